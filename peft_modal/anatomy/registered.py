"""What a module has registered, whatever stands in for it at the moment."""

from __future__ import annotations

from torch import Tensor, nn

Registration = tuple[str, str]
"""Path of a module, and the name under which it registers a tensor."""


def registered(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer registered under `name`, or None; `getattr` would return what stands in for it."""
    parameter = module._parameters.get(name)  # noqa: SLF001 — torch has no public read that skips `__dict__`
    return parameter if parameter is not None else module._buffers.get(name)  # noqa: SLF001


def has_parameter_slot(module: nn.Module, name: str) -> bool:
    """Whether the module registers a parameter of that name; a slot that holds None (`bias=False`) counts."""
    return name in module._parameters  # noqa: SLF001 — `hasattr` is true for any attribute


def registrations(network: nn.Module, tensor: Tensor) -> tuple[Registration, ...]:
    """Every place where a network registers this very tensor; several where it is tied."""
    return tuple(
        (path, name)
        for path, module in network.named_modules()
        for name, own in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        )
        if own is tensor
    )
