"""Whether what stands in for a weight is read by the forward pass, and whether checkpointing changes gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from peft_modal.anatomy import Backbone, WeightSite
from peft_modal.anatomy.sites import Reach
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method
from peft_modal.testing.dry_run import ModuleCalls, random_projection

CHECKPOINT_TOLERANCE = 1e-6
"""Of the largest gradient entry; the recomputed forward makes the same products in the same order."""


def check_reach(backbone: Backbone) -> list[str]:
    """Let a tensor stand in for every site, as its `reach` promises, and see whether a gradient arrives there."""
    problems: list[str] = []
    for probe in (_PerCallProbe(), _LeafProbe()):
        adapter = probe.attach(backbone, name="anatomy_checker")
        try:
            gradients = _gradients(backbone, probe.stand_ins)
            problems += [
                f"site '{name}' has reach '{probe.reach}', but a tensor {probe.what} is not read by the forward pass"
                for name, gradient in gradients.items()
                if gradient is None
            ]
            problems += _check_checkpointing(backbone, probe, gradients)
        finally:
            adapter.detach()
    return problems


class _Probe(Method):
    """Puts a stand-in at every site that states `reach`."""

    identity_at_init = True
    reach: ClassVar[Reach]
    what: ClassVar[str]

    def __init__(self) -> None:
        self.stand_ins: dict[str, nn.Parameter] = {}

    def build(self, adapter: Adapter) -> None:
        for site in adapter.backbone.anatomy.sites:
            if self.reach in site.reach and _trainable(adapter.backbone, site):
                self.place(adapter, site)

    def place(self, adapter: Adapter, site: WeightSite) -> None:
        raise NotImplementedError


class _PerCallProbe(_Probe):
    reach: ClassVar[Reach] = "weight"
    what: ClassVar[str] = "computed at each call of its owner"

    def place(self, adapter: Adapter, site: WeightSite) -> None:
        added = _Added(site.shape)
        # Numbered, because one site's name may be the beginning of another's.
        adapter.reparametrise(site, added, name=f"probe{len(self.stand_ins)}")
        self.stand_ins[site.name] = added.value


class _LeafProbe(_Probe):
    reach: ClassVar[Reach] = "leaf"
    what: ClassVar[str] = "that stands in all the time"

    def __init__(self) -> None:
        super().__init__()
        self.placed: set[int] = set()

    def place(self, adapter: Adapter, site: WeightSite) -> None:
        stored = adapter.backbone.tensor(site.path)
        # Row slices are reached through the whole tensor; tied tensors share one stand-in.
        if site.rows is None and id(stored) not in self.placed:
            self.placed.add(id(stored))
            self.stand_ins[site.name] = adapter.own_tensor(site.path)


class _Added(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        # Another value than the stored one, so that reading that instead changes gradients.
        self.value = nn.Parameter(0.02 * torch.randn(shape))

    def forward(self, weight: Tensor) -> Tensor:
        """W and a little more."""
        return weight + self.value


def _trainable(backbone: Backbone, site: WeightSite) -> bool:
    try:
        stored = backbone.tensor(site.path)
        backbone.network.get_submodule(site.owner)
    except (KeyError, AttributeError):
        return False  # reported with the paths
    fits = site.rows is not None or tuple(stored.shape) == site.shape
    return stored.is_floating_point() and fits


def _gradients(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    loss = random_projection(backbone(backbone.example_batch()))
    if not tensors or not loss.requires_grad:
        return dict.fromkeys(tensors)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return dict(zip(tensors, found, strict=True))


def _check_checkpointing(backbone: Backbone, probe: _Probe, expected: Mapping[str, Tensor | None]) -> Iterator[str]:
    tensors = probe.stand_ins
    try:
        backbone.blocks_for_checkpointing(enabled=True)
    except NotImplementedError:
        return
    try:
        with ModuleCalls(backbone.network) as checkpointed:
            gradients = _gradients(backbone, tensors)
    except CheckpointError as fault:
        first = str(fault).splitlines()[0]
        yield f"with gradient checkpointing a tensor {probe.what} is not read when a block is computed again: {first}"
        return
    finally:
        backbone.blocks_for_checkpointing(enabled=False)
    with ModuleCalls(backbone.network) as plain:
        _gradients(backbone, tensors)
    if checkpointed.count <= plain.count:
        yield "blocks_for_checkpointing(enabled=True) has no effect: no module runs again during backward"
    largest = max((float(g.abs().max()) for g in expected.values() if g is not None), default=0.0)
    for name, gradient in gradients.items():
        before = expected[name]
        if gradient is not None and before is not None:
            error = float((gradient - before).abs().max())
            if not error <= CHECKPOINT_TOLERANCE * max(largest, 1e-12):
                yield (
                    f"with gradient checkpointing the gradient of '{name}' changes by {error:.1e}; a tensor "
                    f"{probe.what} may not be read when its block is computed again"
                )
                return
