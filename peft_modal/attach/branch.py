"""Branches: read a tensor at one port, add a module's output at another, or let the module replace what is there."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Backbone, Contexts, Port, WeightSite
from peft_modal.attach.attachment import Attachment, FoldedWeights, FoldStage, scaled
from peft_modal.attach.hub import Phase, hang, unhang
from peft_modal.errors import AttachError, MergeError

BranchMode = Literal["add", "apply", "join"]


class BranchAttachment(Attachment):
    """A module beside or inside the data path.

    `add`: the tensor seen at `tap` goes through the module and is added at `inject`. `apply`: the module replaces the
    tensor at `inject` by its output. `join`: the module gets the tensor seen at `tap` and the one at `inject`, and its
    output replaces the latter. A module with `uses_context = True` gets the context as its last argument.

    Args:
        order: See `Attachment`.
        tap: Where to read.
        inject: Where to write.
        module: The branch.
        mode: `add`, `apply` or `join`.
        folds_into: For `apply` at an operation's output: the operation's weight site; the module then offers
            `fold(weight, bias) -> (weight, bias)`.
    """

    def __init__(
        self, order: int, tap: Port, inject: Port, module: nn.Module, mode: BranchMode,
        folds_into: WeightSite | None = None,
    ) -> None:  # fmt: skip
        super().__init__(order)
        self.tap, self.inject, self.module, self.mode = tap, inject, module, mode
        self.folds_into = folds_into
        self.stage = FoldStage.OUTPUT if folds_into is not None else None
        self.touches = (tap.module, inject.module)
        self.weight = 1.0
        self.slot: Tensor | None = None
        self.contexts: Contexts | None = None
        self._read = _Read(self)
        self._write = _Write(self)

    @override
    def hang(self, backbone: Backbone) -> None:
        self.contexts = backbone.contexts if getattr(self.module, "uses_context", False) else None
        if self.mode != "apply":
            hang(backbone, self.tap, Phase.BRANCH, self.order, self._read)
        hang(backbone, self.inject, Phase.BRANCH, self.order, self._write)

    @override
    def unhang(self, backbone: Backbone) -> None:
        if self.mode != "apply":
            unhang(backbone, self.tap, self._read)
        unhang(backbone, self.inject, self._write)
        self.slot = None

    def run(self, *tensors: Tensor) -> Tensor:
        """The module's output."""
        return self.module(*tensors) if self.contexts is None else self.module(*tensors, self.contexts.current())

    @override
    def clear(self) -> None:
        self.slot = None

    @override
    def set_weight(self, weight: float) -> None:
        self.weight = weight

    @override
    def fold(self, weights: FoldedWeights) -> None:
        site = self.folds_into
        if site is None or site.bias is None:
            raise MergeError(
                f"{self.describe()} has no equivalent in plain weights; keep the adapter file beside the backbone"
            )
        weight = weights.get(site.holder, site.tensor)
        assert weight is not None
        bias = weights.get(site.holder, site.bias)
        module = copy.deepcopy(self.module).double().to(weight.device)
        with torch.no_grad():
            new_weight, new_bias = module.fold(weight, bias)  # type: ignore[operator]
            if self.weight != 1.0:
                new_weight, new_bias = scaled(weight, new_weight, self.weight), scaled(bias, new_bias, self.weight)
        weights.set(site.holder, site.tensor, new_weight)
        weights.set(site.holder, site.bias, new_bias)

    @override
    def describe(self) -> str:
        return f"a branch from '{self.tap.name}' to '{self.inject.name}'"

    @override
    def where(self) -> tuple[Port, ...]:
        return (self.inject,) if self.mode == "apply" else (self.tap, self.inject)

    @override
    def parameters(self) -> Iterable[nn.Parameter]:
        return self.module.parameters()


class _Read:
    def __init__(self, branch: BranchAttachment) -> None:
        self.branch = branch

    def __call__(self, tensor: Tensor) -> Tensor:
        self.branch.slot = tensor
        return tensor


class _Write:
    def __init__(self, branch: BranchAttachment) -> None:
        self.branch = branch

    def __call__(self, tensor: Tensor) -> Tensor:
        branch = self.branch
        if branch.mode == "apply":
            return scaled(tensor, branch.run(tensor), branch.weight)
        seen, branch.slot = branch.slot, None
        if seen is None:
            raise AttachError(
                f"'{branch.inject.name}' runs before '{branch.tap.name}', so {branch.describe()} has no input"
            )
        if branch.mode == "join":
            return scaled(tensor, branch.run(seen, tensor), branch.weight)
        added = branch.run(seen)
        return tensor + (added if branch.weight == 1.0 else branch.weight * added)
