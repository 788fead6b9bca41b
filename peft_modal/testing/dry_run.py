"""One forward pass under observation: which modules are called, in what order, and what passes at each port."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_modal.anatomy import Backbone, Features, Port

Place = tuple[str, str]
"""Path of a module, and `in` or `out`."""


@dataclass
class DryRun:
    """What one forward pass did."""

    calls: Counter[str] = field(default_factory=Counter)
    """Calls by module path."""
    first: dict[Place, int] = field(default_factory=dict)
    """Position of each place's first event among all events."""
    seen: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the tensors at ports, by port name."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """First output of each watched module that is a tensor."""
    faults: list[str] = field(default_factory=list)
    """Ports that could not be read, as sentences."""


def dry_run(backbone: Backbone, ports: list[Port], called: list[str]) -> tuple[Features, DryRun]:
    """Run the backbone on its example batch and watch `ports` and the modules at the paths `called`."""
    run = DryRun()
    by_module: dict[str, list[Port]] = {path: [] for path in called}
    for port in ports:
        by_module.setdefault(port.module, []).append(port)
    with ExitStack() as stack, torch.no_grad():
        for path, here in by_module.items():
            module = backbone.network.get_submodule(path)
            watch = _Watch(run, path, here)
            stack.callback(module.register_forward_pre_hook(watch.before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(watch.after).remove)
        features = backbone(backbone.example_batch())
    return features, run


class _Watch:
    def __init__(self, run: DryRun, path: str, ports: list[Port]) -> None:
        self.run, self.path, self.ports = run, path, ports

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.run.calls[self.path] += 1
        self._note("in")
        for port in self.ports:
            if port.side == "in":
                found = kwargs.get(port.item) if isinstance(port.item, str) else _at(args, port.item)
                self._keep(port, found, f"input {port.item!r}")

    def after(self, _module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        self._note("out")
        if isinstance(output, Tensor):
            self.run.outputs.setdefault(self.path, output.detach().clone())
        for port in self.ports:
            if port.side == "out":
                found = _at(output, port.item) if isinstance(output, tuple) else output
                self._keep(port, found, f"output {port.item!r}" if isinstance(output, tuple) else "output")

    def _note(self, side: str) -> None:
        self.run.first.setdefault((self.path, side), len(self.run.first))

    def _keep(self, port: Port, found: object, what: str) -> None:
        if not isinstance(found, Tensor):
            self.run.faults.append(
                f"port '{port.name}': {what} of '{port.module}' is {type(found).__name__}, not a tensor"
            )
        # A later operation may work in place on what passes here.
        elif port.name not in self.run.seen:
            self.run.seen[port.name] = found.detach().clone()


def _at(values: tuple[Any, ...], item: int | str) -> object:
    return values[item] if isinstance(item, int) and item < len(values) else None


@contextmanager
def no_attention_fast_path() -> Iterator[None]:
    """Keep MultiheadAttention on its slow path inside.

    Without gradients in eval mode it takes a fused path whose results differ by some 1e-7, so an output with an adapter
    (gradients) and one without (none) would not be comparable to the bit.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class ModuleCalls:
    """Counts the calls of all modules of a network inside a `with` block, recomputation included."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.count = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ModuleCalls:
        self._handles = [module.register_forward_pre_hook(self._note) for module in self.network.modules()]
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, _module: nn.Module, _args: object) -> None:
        self.count += 1


def random_projection(features: Features) -> Tensor:
    """A scalar loss that weighs every entry of the output and of the differentiable extras at random.

    A sum of squares behind a LayerNorm is almost constant, so wrong gradients would pass.
    """
    generator = torch.Generator().manual_seed(1234)
    values = [features.tokens, *(features.extras[key] for key in sorted(features.extras))]
    terms = []
    for value in values:
        if value.is_floating_point():
            weights = torch.randn(value.shape, generator=generator).to(value.device)
            terms.append((value.float() * weights).sum())
    return torch.stack(terms).sum()
