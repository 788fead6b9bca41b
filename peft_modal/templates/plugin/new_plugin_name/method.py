"""A method: its constructor is the configuration, `build` says what goes where."""

from __future__ import annotations

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError
from peft_modal.methods import Method, select_blocks
from torch import Tensor, nn


class Branch(Method):
    """A bottleneck beside the MLP: x + MLP(LN x) + U tanh(D LN x), where U starts at zero.

    Args:
        hidden_dim: Width of the bottleneck.
        blocks: Blocks to adapt, such as `last: 2`; None for all.

    Raises:
        ConfigError: `hidden_dim` is below 1.
    """

    identity_at_init = True

    def __init__(
        self, *, hidden_dim: int = 8, blocks: str | list[int] | None = None
    ) -> None:
        if hidden_dim < 1:
            raise ConfigError(f"method.hidden_dim: {hidden_dim} is below 1")
        self.hidden_dim = hidden_dim
        self.where = Selector.parse({"blocks": blocks})

    def build(self, adapter: Adapter) -> None:
        """One branch in every selected block of any backbone that has these ports."""
        anatomy = adapter.backbone.anatomy
        for tap in select_blocks(anatomy, self.where, role="mlp.norm.out"):
            inject = anatomy.port("block.out", stack=tap.stack, block=tap.block)
            adapter.branch(
                tap, inject, Bottleneck(tap.width, hidden_dim=self.hidden_dim)
            )


class Bottleneck(nn.Module):
    """U tanh(D x)."""

    def __init__(self, width: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden_dim)
        self.up = nn.Linear(hidden_dim, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) to the same shape."""
        return self.up(self.down(x).tanh())
