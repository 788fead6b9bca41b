"""Where adapters stand in a block: behind, beside or before its attention and its MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from peft_modal.anatomy import Anatomy, Port, Selector
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError
from peft_modal.methods.base import beside_mlp, select_blocks
from peft_modal.methods.bottleneck import must_be_channels_last

Half = Literal["attn", "mlp"]
Form = Literal["sequential", "parallel", "input"]


@dataclass(frozen=True)
class Placement:
    """How an adapter A joins a half of a block, which computes s(u) of u = LN(x) and adds it to x.

    | form | residual | x becomes |
    |---|---|---|
    | `sequential` | yes (its default) | x + s(u) + A(s(u)) |
    | `sequential` | no | x + A(s(u)): what the half has computed is replaced |
    | `parallel` | no (its default) | x + s(u) + A(u) |
    | `parallel` | yes | x + s(u) + A(u) + u |
    | `input` | no | x + s(A(u)) + A(u) |

    Args:
        blocks: Which blocks; see `Selector`.
        form: See above.
        residual: See above; None for the form's default.
        train_norms: Train the norms in front of the adapted halves, too.

    Raises:
        ConfigError: The form has no such residual.
    """

    blocks: Selector
    form: Form = "sequential"
    residual: bool | None = None
    train_norms: bool = False

    def __post_init__(self) -> None:
        if self.form == "input" and self.residual:
            raise ConfigError("method.residual: form 'input' has none; set it to false, or the form to sequential")

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes while A gives zero."""
        return self.form != "input" and self._residual == (self.form == "sequential")

    @property
    def _residual(self) -> bool:
        return self.form == "sequential" if self.residual is None else self.residual

    def attach(self, adapter: Adapter, halves: tuple[Half, ...], make: Callable[[int], nn.Module]) -> None:
        """Attach one adapter to each half of each block.

        Args:
            adapter: What they become part of.
            halves: Of a block, in order.
            make: Makes A for a number of channels.

        Raises:
            AttachError: A port has its channels elsewhere.
            SelectionError: No block has such ports.
        """
        anatomy = adapter.backbone.anatomy
        for half in halves:
            role = f"{half}.out" if self.form == "sequential" else f"{half}.norm.out"
            for port in select_blocks(anatomy, self.blocks, role=role):
                must_be_channels_last(port.channel_dim, port.name)
                self._attach(adapter, half, port, make(port.width))
            if self.train_norms:
                _own_norms(adapter, select_blocks(anatomy, self.blocks, role=f"{half}.norm.out"))

    def _attach(self, adapter: Adapter, half: Half, port: Port, module: nn.Module) -> None:
        if self.form == "sequential":
            adapter.branch(port, port, module, mode="add" if self._residual else "apply")
            return
        inject = _beside(adapter.backbone.anatomy, half, port)
        if self.form == "parallel":
            adapter.branch(port, inject, module)
        else:
            adapter.branch(port, port, module, mode="apply")
        if self.form == "input" or self._residual:
            adapter.branch(port, inject, nn.Identity(), name="")


def _beside(anatomy: Anatomy, half: Half, port: Port) -> Port:
    """Where a half's output is added to the stream; of attention its output, where that addition is no port."""
    if half == "mlp":
        return beside_mlp(anatomy, port)
    roles = {other.role for other in anatomy.ports if (other.stack, other.block) == (port.stack, port.block)}
    role = "attn.branch" if "attn.branch" in roles else "attn.out"
    return anatomy.port(role, stack=port.stack, block=port.block)


def _own_norms(adapter: Adapter, ports: list[Port]) -> None:
    modules = {port.module for port in ports}
    for site in adapter.backbone.anatomy.sites:
        if site.holder in modules and site.role.startswith("norm") and not adapter.owns(site.path):
            adapter.own(site)
