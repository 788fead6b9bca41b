"""Contracts on gradients and on what training leaves behind: ownership, detach, bf16, checkpointing, compilation."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch
from unittest import SkipTest

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method
from peft_modal.testing.sandbox import (
    BackboneFactory,
    distance,
    gradient_distance,
    gradients,
    outputs,
    quiet,
    shift,
    train,
)

BF16_TOLERANCE = 0.05
"""Relative, of the norm of all gradients: eight bits of mantissa through a few layers."""
CHECKPOINT_TOLERANCE = 1e-6
"""Of the largest gradient entry; the recomputed forward makes the same products in the same order."""
COMPILE_TOLERANCE = 1e-5
"""Of the largest entry: compiled code may fuse and reorder sums."""


def check_gradients_only_in_adapter(
    backbone_factory: BackboneFactory, method: Method, *, exempt: Collection[str] = ()
) -> None:
    """Every trained tensor gets a non-zero gradient within two steps, and no tensor of the backbone gets any.

    Args:
        backbone_factory: Makes a fresh backbone.
        method: The method.
        exempt: Names, with `*`, of trained tensors that need no gradient: what the forward pass never reads.

    Raises:
        AssertionError: A trained tensor stays without, or a backbone tensor has a gradient.
    """
    with quiet():
        backbone = backbone_factory()
        adapter = method.attach(backbone)
        reached = train(backbone, adapter, steps=2)
        missed = [
            name
            for name, parameter in adapter.named_trained().items()
            if name not in reached and parameter.numel() and not any(fnmatch(name, pattern) for pattern in exempt)
        ]
        touched = [name for name, p in backbone.network.named_parameters() if p.requires_grad or p.grad is not None]
    assert not missed, (
        f"{len(missed)} trained tensors of {method.describe()} get no gradient in two steps: {', '.join(missed[:3])}"
    )
    assert not touched, f"{method.describe()} leaves a gradient on the backbone's own '{', '.join(touched[:3])}'"


def check_detach_restores_every_bit(backbone_factory: BackboneFactory, method: Method) -> None:
    """Training never touches the backbone, and detaching leaves no hook, stand-in or attribute.

    Raises:
        AssertionError: Keys, order or values of the state dict change, or something is left on a module.
    """
    with quiet():
        backbone = backbone_factory()
        bare, before = outputs(backbone), _Snapshot(backbone)
        adapter = method.attach(backbone)
        before.compare(backbone, f"while {method.describe()} is attached", structure=False)
        backbone.train()
        adapter.train()
        train(backbone, adapter)
        before.compare(backbone, f"after training {method.describe()}", structure=False)
        adapter.detach()
        backbone.eval()
        before.compare(backbone, f"after detaching {method.describe()}", structure=True)
        assert distance(outputs(backbone), bare) == 0.0, f"the output differs after detaching {method.describe()}"


class _Snapshot:
    """State dict, classes, attributes and hooks of all modules of a network."""

    def __init__(self, backbone: Backbone) -> None:
        self.state = {name: value.clone() for name, value in backbone.network.state_dict().items()}
        self.parameters = [name for name, _ in backbone.network.named_parameters()]
        self.structure = _structure(backbone)

    def compare(self, backbone: Backbone, when: str, *, structure: bool) -> None:
        state = backbone.network.state_dict()
        assert list(state) == list(self.state), f"names or order of the network's state dict differ {when}"
        changed = [name for name, value in self.state.items() if not torch.equal(value, state[name])]
        assert not changed, f"values of '{', '.join(changed[:3])}' differ {when}"
        names = [name for name, _ in backbone.network.named_parameters()]
        assert names == self.parameters, f"names or order of the network's parameters differ {when}"
        if structure:
            now = _structure(backbone)
            left = [path for path, seen in now.items() if seen != self.structure.get(path)]
            assert not left, f"hooks, attributes or the class of '{', '.join(left[:3])}' differ {when}"


def _structure(backbone: Backbone) -> dict[str, object]:
    structure: dict[str, object] = {
        path: (type(module), sorted(vars(module)), _hook_counts(module))
        for path, module in backbone.network.named_modules()
    }
    # A running number is no trace of any adapter.
    structure["(shared)"] = sorted(str(key) for key in backbone.shared if key != "order")
    structure["(adapters)"] = [sorted(backbone.adapters), sorted(backbone.exports)]
    return structure


def _hook_counts(module: nn.Module) -> dict[str, int]:
    return {name: len(value) for name, value in vars(module).items() if name.endswith(("hooks", "kwargs", "called"))}


def check_bf16(backbone_factory: BackboneFactory, method: Method, *, tolerance: float = BF16_TOLERANCE) -> None:
    """Under bf16 autocast gradients stay close to those of float32, and trained tensors stay float32.

    Raises:
        AssertionError: They part ways, or a trained tensor or gradient is of another type.
    """
    with quiet():
        backbone = backbone_factory()
        adapter = method.attach(backbone)
        shift(adapter)
        wanted = gradients(backbone, adapter)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(backbone, adapter)
    named = adapter.named_trained()
    narrow = [name for name, p in named.items() if torch.float32 not in {p.dtype, found.get(name, p).dtype}]
    assert not narrow, f"'{narrow[0]}' of {method.describe()} is not float32 under bf16 autocast"
    assert found.keys() == wanted.keys(), f"{method.describe()} trains other tensors under bf16 autocast"
    if wanted:
        flat, flat_wanted = (torch.cat([g[name].flatten() for name in wanted]) for g in (found, wanted))
        error = float((flat - flat_wanted).norm() / flat_wanted.norm().clamp_min(1e-12))
        assert error <= tolerance, (
            f"gradients of {method.describe()} under bf16 autocast differ from float32 by {error:.1%}"
        )


def check_gradient_checkpointing(backbone_factory: BackboneFactory, method: Method) -> None:
    """Gradients with and without checkpointing agree, dropout on, and nothing is kept between hooks after backward.

    Raises:
        AssertionError: They differ, or an attachment still holds a tensor of the graph.
        SkipTest: The network has no gradient checkpointing.
    """
    with quiet():
        backbone = backbone_factory()
        adapter = method.attach(backbone)
        shift(adapter)
        backbone.train()
        adapter.train()
        found: dict[bool, dict[str, Tensor]] = {}
        for enabled in (False, True):
            try:
                backbone.blocks_for_checkpointing(enabled=enabled)
            except NotImplementedError as reason:
                raise SkipTest(str(reason)) from reason
            torch.manual_seed(3)
            found[enabled] = gradients(backbone, adapter)
            _check_nothing_kept(adapter, method)
        backbone.blocks_for_checkpointing(enabled=False)
    assert found[True].keys() == found[False].keys(), f"{method.describe()} trains other tensors with checkpointing"
    error, name = gradient_distance(found[True], found[False])
    assert error <= CHECKPOINT_TOLERANCE, (
        f"with gradient checkpointing the gradient of '{name}' of {method.describe()} differs by {error:.1e} of the "
        "largest entry; draw random numbers inside a forward from the global generator only"
    )


def _check_nothing_kept(adapter: Adapter, method: Method) -> None:
    for attachment in adapter.attachments:
        kept = [name for name, value in vars(attachment).items() if isinstance(value, Tensor) and not value.is_leaf]
        assert not kept, f"{attachment.describe()} of {method.describe()} keeps '{kept[0]}' after backward"


def check_compile(backbone_factory: BackboneFactory, method: Method) -> None:
    """Compiled blocks (the whole network where there are none) give the outputs and gradients of eager ones.

    Compiled with the backend `aot_eager`, which traces forward and backward and needs no compiler; each block has to be
    one graph.

    Raises:
        AssertionError: They differ, or nothing was compiled.
    """
    import torch._dynamo as dynamo  # a second that only this contract pays

    with quiet():
        dynamo.reset()
        backbone = backbone_factory()
        adapter = method.attach(backbone)
        shift(adapter)
        wanted, wanted_gradients = outputs(backbone), gradients(backbone, adapter)
        stream = {"block.in", "block.out"}
        paths = {port.module for port in backbone.anatomy.ports if port.role in stream} or {""}
        for path in sorted(paths):
            backbone.network.get_submodule(path).compile(backend="aot_eager", fullgraph=True, dynamic=False)
        dynamo.utils.counters.clear()
        found_gradients, found = gradients(backbone, adapter), outputs(backbone)
        compiled = dynamo.utils.counters["stats"]["unique_graphs"]
        dynamo.reset()
    assert compiled, f"nothing was compiled with {method.describe()}: are the blocks called as modules?"
    error = distance(found, wanted)
    assert error <= COMPILE_TOLERANCE, f"the output of {method.describe()} changes by {error:.1e} when compiled"
    assert found_gradients.keys() == wanted_gradients.keys(), f"{method.describe()} trains other tensors when compiled"
    error, name = gradient_distance(found_gradients, wanted_gradients)
    assert error <= COMPILE_TOLERANCE, f"the gradient of '{name}' of {method.describe()} changes when compiled"
