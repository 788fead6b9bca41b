"""Operations that stand in for a whole linear, convolution or embedding: in its call, or in the weight it reads."""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Backbone, WeightSite
from peft_modal.attach.attachment import Attachment, FoldedWeights, FoldStage, scaled
from peft_modal.attach.site_call import OperationEntry, hang_operation, unhang_operation


class Operation(nn.Module):
    """An affine map of the input that depends on the weight and bias it is given.

    `call` computes it on activations. `fold_weight` and `fold_bias` give the weight and bias of the plain operation
    that computes the same, and are differentiable.
    """

    has_dropout: bool = False
    """Whether `call` draws random numbers while training, which no weight can express."""
    changes_bias: bool = False
    """Whether `fold_bias` can give another bias than it gets."""

    @abstractmethod
    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output for an input; shapes as of the operation."""

    @abstractmethod
    def fold_weight(self, weight: Tensor) -> Tensor:
        """The weight of the same shape that amounts to this operation."""

    @abstractmethod
    def fold_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The bias (out) that amounts to this operation; None where there is none."""


class OperationWeight(nn.Module):
    """The weight of an operation, for weights that are read inside a function and so have no call to replace."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, in its own dtype."""
        return self.operation.fold_weight(weight).to(weight.dtype)


class OperationAttachment(Attachment):
    """An operation that is called in place of a module's own.

    Args:
        order: See `Attachment`.
        site: The weight site of the module.
        operation: What is called.
    """

    stage = FoldStage.OPERATION

    def __init__(self, order: int, site: WeightSite, operation: Operation) -> None:
        super().__init__(order)
        self.site = site
        self.operation = operation
        self.touches = (site.owner, site.holder)
        self.entry: OperationEntry | None = None
        self.weight = 1.0

    @override
    def hang(self, backbone: Backbone) -> None:
        entry = OperationEntry(self.order, self.site.name, self.operation, self.weight)
        hang_operation(backbone, self.site.owner, entry)
        self.entry = entry

    @override
    def unhang(self, backbone: Backbone) -> None:
        if self.entry is not None:
            unhang_operation(backbone, self.site.owner, self.entry)
            self.entry = None

    @override
    def set_weight(self, weight: float) -> None:
        self.weight = weight

    @override
    def fold(self, weights: FoldedWeights) -> None:
        site = self.site
        weight = weights.get(site.holder, site.tensor)
        assert weight is not None
        bias = None if site.bias is None else weights.get(site.holder, site.bias)
        operation = copy.deepcopy(self.operation).double().to(weight.device).eval()
        with torch.no_grad():
            new_weight, new_bias = operation.fold_weight(weight), operation.fold_bias(weight, bias)
        weights.set(site.holder, site.tensor, scaled(weight, new_weight, self.weight))
        if site.bias is not None and new_bias is not None:
            weights.set(site.holder, site.bias, scaled(bias, new_bias, self.weight))

    @override
    def describe(self) -> str:
        return f"an operation in place of '{self.site.name}'"
