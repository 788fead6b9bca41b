"""One hook object per port, which orders everything that adapters do there."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_modal.anatomy import Backbone, Port
from peft_modal.errors import AttachError

Output: TypeAlias = Tensor | tuple[Any, ...]


class Phase(IntEnum):
    """Order of the actions at one port: a tap never sees a prompt, a branch always does."""

    TAP_IN = 0
    INSERT = 1
    BRANCH = 2
    STRIP = 3
    TAP_OUT = 4


class Action(Protocol):
    """Reads or replaces the tensor at a port."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """What goes on in place of `tensor`."""
        ...


class PortHub:
    """Runs the actions of one port, by phase and then by order of attachment.

    A module-level class, not a closure: a deep copy of the backbone then copies its adapters' actions along, and a
    pickle holds them.
    """

    def __init__(self, module: nn.Module, port: Port) -> None:
        self.side = port.side
        self.actions: list[tuple[tuple[int, int], int | str, Action]] = []
        self.handle: RemovableHandle = (
            module.register_forward_pre_hook(self.before, with_kwargs=True)
            if port.side == "in"
            else module.register_forward_hook(self.after)
        )

    def add(self, phase: Phase, order: int, item: int | str, action: Action) -> None:
        """Hang an action."""
        self.actions.append(((phase, order), item, action))
        self.actions.sort(key=lambda entry: entry[0])

    def remove(self, action: Action) -> bool:
        """Take an action away; True when none is left and the hub is closed."""
        self.actions = [entry for entry in self.actions if entry[2] is not action]
        if self.actions:
            return False
        self.handle.remove()
        return True

    def before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the module.

        Raises:
            AttachError: The module is called without the input that an action waits for.
        """
        for _, item, action in self.actions:
            if isinstance(item, int) and item < len(args):
                args = (*args[:item], action(args[item]), *args[item + 1 :])
            elif isinstance(item, str) and item in kwargs:
                kwargs = {**kwargs, item: action(kwargs[item])}
            else:
                raise AttachError(f"the module is called without its input {item!r}, where an adapter acts")
        return args, kwargs

    def after(self, _module: nn.Module, _args: object, output: Output) -> Output:
        """Forward hook of the module."""
        for _, item, action in self.actions:
            if isinstance(output, tuple):
                index = item if isinstance(item, int) else 0
                output = (*output[:index], action(output[index]), *output[index + 1 :])
            else:
                output = action(output)
        return output


def hang(backbone: Backbone, port: Port, phase: Phase, order: int, action: Action) -> None:
    """Hang an action at a port of the backbone."""
    key = ("hub", port.module, port.side)
    if key not in backbone.shared:
        backbone.shared[key] = PortHub(backbone.network.get_submodule(port.module), port)
    backbone.shared[key].add(phase, order, port.item, action)


def unhang(backbone: Backbone, port: Port, action: Action) -> None:
    """Take an action away from a port, and the hook with it when it was the last."""
    key = ("hub", port.module, port.side)
    if key in backbone.shared and backbone.shared[key].remove(action):
        del backbone.shared[key]
