"""AdaptFormer: a bottleneck parallel to the MLP (Chen et al., NeurIPS 2022, arXiv:2205.13535)."""

from __future__ import annotations

from typing import Any, Literal

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method, beside_mlp, select_blocks
from peft_modal.methods.bottleneck import Bottleneck, must_be_channels_last
from peft_modal.ranges import DropRate, PositiveInt


class AdaptFormer(Method):
    """A scaled ReLU bottleneck beside the MLP (Chen et al., NeurIPS 2022, arXiv:2205.13535).

    x2 = x1 + DropPath(MLP(LN x1)) + s * U(dropout(ReLU(D x1))): it reads the un-normalised residual stream and lies
    outside drop-path.

    Args:
        hidden_dim: Width of the bottleneck.
        scale: s, or `learned` for a trained scalar that starts at 1.
        norm: LayerNorm (eps 1e-5) before D (`in`), after the scale (`out`), or none as released. V-PETL Bench uses `in`
            with `hidden_dim=8, scale=1`.
        dropout: Probability of zeroing a hidden channel.
        blocks: Blocks to adapt; see `Selector`; None for all.
    """

    identity_at_init = True

    def __init__(
        self, *, hidden_dim: PositiveInt = 64, scale: float | Literal["learned"] = 0.1,
        norm: Literal["none", "in", "out"] = "none", dropout: DropRate = 0.1,
        blocks: str | list[int] | dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.hidden_dim = hidden_dim
        self.scale: float | Literal["learned"] = scale
        self.norm: Literal["none", "in", "out"] = norm
        self.dropout = dropout
        self.where = Selector.parse({"blocks": blocks})

    def build(self, adapter: Adapter) -> None:
        """A branch from the residual stream before the MLP's norm to where the MLP's output is added."""
        anatomy = adapter.backbone.anatomy
        for tap in select_blocks(anatomy, self.where, role="mlp.norm.in"):
            must_be_channels_last(tap.channel_dim, tap.name)
            module = Bottleneck(
                tap.width, hidden_dim=self.hidden_dim, activation="relu", dropout=self.dropout, scale=self.scale,
                norm=self.norm,
            )  # fmt: skip
            adapter.branch(tap, beside_mlp(anatomy, tap), module)
