"""The Houlsby adapter: two bottlenecks per block (Houlsby et al., ICML 2019, arXiv:1902.00751)."""

from __future__ import annotations

from typing import Any

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method
from peft_modal.methods.bottleneck import Activation, Bottleneck, BottleneckInit
from peft_modal.methods.placement import Form, Placement
from peft_modal.ranges import DropRate, PositiveInt


class Houlsby(Method):
    """A bottleneck for each sub-layer, behind it before its residual is added (arXiv:1902.00751).

    s = SubLayer(LN x); x = x + DropPath(s + U(GELU(D s))) for attention and for the MLP. Other forms are those of
    Cappellazzo et al. (MLSP 2024, arXiv:2312.03694), who find `parallel` better for audio.

    Args:
        hidden_dim: Width of the bottlenecks.
        blocks: Blocks to adapt; see `Selector`; None for all.
        activation: Nonlinearity.
        dropout: Probability of zeroing a hidden channel.
        form: Behind a sub-layer (`sequential`), beside it (`parallel`, reads LN x), or before it (`input`); see
            `Placement`.
        residual: Whether what the bottleneck reads is added to what it gives; None for the form's usual.
        train_norms: Train the norm in front of each adapted sub-layer, too.
        init: U starts at zero (`zero_up`), or both factors are drawn with standard deviation 0.02 (`normal`), as in the
            published runs on audio.
    """

    def __init__(
        self, *, hidden_dim: PositiveInt = 64, blocks: str | list[int] | dict[str, Any] | None = None,
        activation: Activation = "gelu", dropout: DropRate = 0.0, form: Form = "sequential",
        residual: bool | None = None, train_norms: bool = False, init: BottleneckInit = "zero_up",
    ) -> None:  # fmt: skip
        self.hidden_dim = hidden_dim
        self.activation: Activation = activation
        self.dropout = dropout
        self.init: BottleneckInit = init
        self.placement = Placement(Selector.parse({"blocks": blocks}), form, residual, train_norms)

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]
        """U is zero, and the form has room for that."""
        return self.init == "zero_up" and self.placement.is_identity

    def build(self, adapter: Adapter) -> None:
        """A bottleneck for attention and one for the MLP of each block."""
        self.placement.attach(adapter, ("attn", "mlp"), self._bottleneck)

    def _bottleneck(self, width: int) -> Bottleneck:
        return Bottleneck(
            width, hidden_dim=self.hidden_dim, activation=self.activation, dropout=self.dropout, init=self.init
        )
