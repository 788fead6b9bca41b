"""The Pfeiffer adapter: one bottleneck per block, after the MLP (Pfeiffer et al., EACL 2021, arXiv:2005.00247)."""

from __future__ import annotations

from typing import Any

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method
from peft_modal.methods.bottleneck import Activation, Bottleneck, BottleneckInit
from peft_modal.methods.placement import Form, Half, Placement
from peft_modal.ranges import DropRate, PositiveInt


class Pfeiffer(Method):
    """One sequential bottleneck per block, on the MLP's output before the residual is added (arXiv:2005.00247).

    m = MLP(LN x); m = m + U(GELU(D m)); x = x + DropPath(m). D is Kaiming, U zero: with both at zero, as in code that
    is still in circulation, only U's bias would ever learn. Other forms and places are those of Cappellazzo et al.
    (MLSP 2024, arXiv:2312.03694), whose released code has form `parallel` and place `mlp`, whose text has `attn`.

    Args:
        hidden_dim: Width of the bottleneck.
        blocks: Blocks to adapt; see `Selector` (`last: 4`, indices, ...); None for all.
        activation: Nonlinearity.
        dropout: Probability of zeroing a hidden channel.
        form: Behind the sub-layer (`sequential`), beside it (`parallel`, reads LN x), or before it (`input`); see
            `Placement`.
        residual: Whether what the bottleneck reads is added to what it gives; None for the form's usual.
        place: The sub-layer.
        train_norms: Train the norm in front of the sub-layer, too.
        init: U starts at zero (`zero_up`), or both factors are drawn with standard deviation 0.02 (`normal`), as in the
            published runs on audio.
    """

    def __init__(
        self, *, hidden_dim: PositiveInt = 64, blocks: str | list[int] | dict[str, Any] | None = None,
        activation: Activation = "gelu", dropout: DropRate = 0.0, form: Form = "sequential",
        residual: bool | None = None, place: Half = "mlp", train_norms: bool = False, init: BottleneckInit = "zero_up",
    ) -> None:  # fmt: skip
        self.hidden_dim = hidden_dim
        self.activation: Activation = activation
        self.dropout = dropout
        self.place: Half = place
        self.init: BottleneckInit = init
        self.placement = Placement(Selector.parse({"blocks": blocks}), form, residual, train_norms)

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]
        """U is zero, and the form has room for that."""
        return self.init == "zero_up" and self.placement.is_identity

    def build(self, adapter: Adapter) -> None:
        """A bottleneck for one half of each block."""
        self.placement.attach(adapter, (self.place,), self._bottleneck)

    def _bottleneck(self, width: int) -> Bottleneck:
        return Bottleneck(
            width, hidden_dim=self.hidden_dim, activation=self.activation, dropout=self.dropout, init=self.init
        )
