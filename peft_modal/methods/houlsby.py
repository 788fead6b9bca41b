"""The Houlsby adapter: two bottlenecks per block (Houlsby et al., ICML 2019, arXiv:1902.00751)."""

from __future__ import annotations

from typing import Any

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method, select_blocks
from peft_modal.methods.bottleneck import Activation, Bottleneck, must_be_channels_last
from peft_modal.ranges import DropRate, PositiveInt


class Houlsby(Method):
    """A sequential bottleneck after each sub-layer, before its residual is added (arXiv:1902.00751).

    s = SubLayer(LN x); x = x + DropPath(s + U(GELU(D s))) for attention and for the MLP.

    Args:
        hidden_dim: Width of the bottlenecks.
        blocks: Blocks to adapt; see `Selector`; None for all.
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
        """Apply a bottleneck with residual at every `attn.out` and `mlp.out`."""
        for role in ("attn.out", "mlp.out"):
            for port in select_blocks(adapter.backbone.anatomy, self.where, role=role):
                must_be_channels_last(port.channel_dim, port.name)
                module = Bottleneck(
                    port.width, hidden_dim=self.hidden_dim, activation=self.activation, dropout=self.dropout,
                    residual=True,
                )  # fmt: skip
                adapter.branch(port, port, module, mode="apply")
