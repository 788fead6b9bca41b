"""The Pfeiffer adapter: one bottleneck per block, after the MLP (Pfeiffer et al., EACL 2021, arXiv:2005.00247)."""

from __future__ import annotations

from typing import Any

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method, select_blocks
from peft_modal.methods.bottleneck import Activation, Bottleneck, must_be_channels_last
from peft_modal.ranges import DropRate, PositiveInt


class Pfeiffer(Method):
    """One sequential bottleneck per block, on the MLP's output before the residual is added (arXiv:2005.00247).

    m = MLP(LN x); m = m + U(GELU(D m)); x = x + DropPath(m). D is Kaiming, U zero: with both at zero, as in code that
    is still in circulation, only U's bias would ever learn.

    Args:
        hidden_dim: Width of the bottleneck.
        blocks: Blocks to adapt; see `Selector` (`last: 4`, indices, ...); None for all.
        activation: Nonlinearity.
        dropout: Probability of zeroing a hidden channel.
    """

    identity_at_init = True

    def __init__(
        self, *, hidden_dim: PositiveInt = 64, blocks: str | list[int] | dict[str, Any] | None = None,
        activation: Activation = "gelu", dropout: DropRate = 0.0,
    ) -> None:  # fmt: skip
        self.hidden_dim = hidden_dim
        self.where = Selector.parse({"blocks": blocks})
        self.activation: Activation = activation
        self.dropout = dropout

    def build(self, adapter: Adapter) -> None:
        """Apply a bottleneck with residual at every `mlp.out`."""
        for port in select_blocks(adapter.backbone.anatomy, self.where, role="mlp.out"):
            must_be_channels_last(port.channel_dim, port.name)
            module = Bottleneck(
                port.width, hidden_dim=self.hidden_dim, activation=self.activation, dropout=self.dropout, residual=True
            )
            adapter.branch(port, port, module, mode="apply")
