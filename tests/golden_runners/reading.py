"""Hooks that read what enters and leaves a module, with whatever adapters insert there."""

from __future__ import annotations

from torch import Tensor, nn


def input_of(module: nn.Module) -> list[Tensor]:
    """Filled at each call with the first argument; hung after an adapter, it sees what the adapter inserts."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    return seen


def output_of(module: nn.Module) -> list[Tensor]:
    """Filled at each call with the output, read before an adapter strips its prompts."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _module, _args, output: seen.append(output), prepend=True)
    return seen
