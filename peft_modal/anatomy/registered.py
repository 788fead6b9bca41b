"""What a module has registered, whatever stands in for it at the moment."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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


def adopt_biases(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give modules without a bias the one that `state` holds for them: merging a shift (SSF) makes such biases.

    For a backbone's `load_weights`, before it matches names; only an empty `bias` slot is filled.
    """
    for name, tensor in state.items():
        path, _, slot = name.rpartition(".")
        if slot != "bias":
            continue
        try:
            module = network.get_submodule(path)
        except AttributeError:
            continue
        weight = registered(module, "weight")
        if has_parameter_slot(module, "bias") and registered(module, "bias") is None and weight is not None:
            bias = torch.empty(tensor.shape, dtype=weight.dtype, device=weight.device)
            module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))


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
