"""The convolutional adapter of PETL-AST (Cappellazzo et al., MLSP 2024, arXiv:2312.03694)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.attach.prompts import still_statistics
from peft_modal.methods.base import Method
from peft_modal.methods.placement import Form, Half, Placement
from peft_modal.ranges import DropRate, PositiveInt

Places = Literal["attn", "mlp", "both"]
ConformerInit = Literal["zero_up", "released"]


class Conformer(Method):
    """A bottleneck with the convolution module of a Conformer, beside the MLP (Cappellazzo et al., MLSP 2024).

    A(u) = U SiLU(BatchNorm(conv_k(GLU(D u)))), D to 2r channels, conv_k over each channel of the token sequence by
    itself, class and distillation tokens and prompts included. Patches lie in frequency-major order, so that what is
    mixed are neighbours in time, but for the ends of rows. Long kernels help speech most: 31 there, 8 for other sounds.

    The released code also has a LayerNorm whose result nobody reads, and counts it; here it is left out.

    Args:
        hidden_dim: r.
        kernel: k.
        places: Beside the MLP (the paper's Pfeiffer), beside attention, or beside both (its Houlsby).
        form: See `Placement`; the paper's best is `parallel`.
        residual: See `Placement`.
        train_norms: Train the norms in front of the adapted sub-layers, too, as the paper does.
        dropout: Probability of zeroing what the adapter gives.
        init: U starts at zero (`zero_up`), or everything as PyTorch draws it (`released`).
        blocks: Blocks to adapt; see `Selector`; None for all.
    """

    def __init__(
        self, *, hidden_dim: PositiveInt = 8, kernel: PositiveInt = 8, places: Places = "mlp", form: Form = "parallel",
        residual: bool | None = None, train_norms: bool = True, dropout: DropRate = 0.0,
        init: ConformerInit = "zero_up", blocks: str | list[int] | dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.hidden_dim = hidden_dim
        self.kernel = kernel
        self.places: Places = places
        self.dropout = dropout
        self.init: ConformerInit = init
        self.placement = Placement(Selector.parse({"blocks": blocks}), form, residual, train_norms)

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]
        """U is zero, and the form has room for that."""
        return self.init == "zero_up" and self.placement.is_identity

    def build(self, adapter: Adapter) -> None:
        """One for each chosen half of each block."""
        self.placement.attach(adapter, halves_of(self.places), self._bottleneck)

    def _bottleneck(self, width: int) -> ConformerBottleneck:
        return ConformerBottleneck(
            width, hidden_dim=self.hidden_dim, kernel=self.kernel, dropout=self.dropout, init=self.init
        )


def halves_of(places: Places) -> tuple[Half, ...]:
    """The halves of a block that are meant."""
    return ("attn", "mlp") if places == "both" else (places,)


class ConformerBottleneck(nn.Module):
    """A(u) for tokens (B, N, D).

    Its BatchNorm takes statistics of all tokens of a training batch; they are part of the adapter.

    Args:
        width: D.
        hidden_dim: See `Conformer`.
        kernel: See `Conformer`.
        dropout: See `Conformer`.
        init: See `Conformer`.
    """

    def __init__(
        self, width: int, *, hidden_dim: int, kernel: int, dropout: float = 0.0, init: ConformerInit = "zero_up"
    ) -> None:
        super().__init__()
        self.init: ConformerInit = init
        self.down = nn.Conv1d(width, 2 * hidden_dim, 1)
        # Of an even kernel the longer side lies behind. Not `padding="same"`, which warns of that.
        self.padding = ((kernel - 1) // 2, kernel // 2)
        self.depthwise = nn.Conv1d(hidden_dim, hidden_dim, kernel, groups=hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim)
        self.up = nn.Conv1d(hidden_dim, width, 1)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As PyTorch draws them; U zero where `init` says so."""
        for module in (self.down, self.depthwise, self.norm, self.up):
            module.reset_parameters()
        if self.init == "zero_up":
            assert self.up.bias is not None
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Of the input's shape."""
        hidden = functional.glu(self.down(u.transpose(1, 2)), dim=1)  # (B, r, N)
        with still_statistics(self.norm):
            hidden = self.norm(self.depthwise(functional.pad(hidden, self.padding)))
        return self.dropout(self.up(functional.silu(hidden))).transpose(1, 2)
