"""Attachments that act on a weight: low-rank updates, computed tensors, and trained leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Backbone, WeightSite
from peft_modal.attach.attachment import Attachment, FoldedWeights, FoldStage, scaled
from peft_modal.attach.chain import drop_leaf, drop_transform, push_leaf, push_transform
from peft_modal.attach.dense_update import DenseUpdate
from peft_modal.attach.site_call import Entry, hang_update, unhang_update
from peft_modal.attach.updates import LowRankUpdate


class UpdateAttachment(Attachment):
    """A low-rank or generated update computed beside the operation."""

    stage = FoldStage.UPDATE

    def __init__(self, order: int, site: WeightSite, update: LowRankUpdate | DenseUpdate) -> None:
        super().__init__(order)
        self.site = site
        self.update = update
        self.touches = (site.owner, site.holder)
        self.entry: Entry | None = None
        self.weight = 1.0

    @override
    def hang(self, backbone: Backbone) -> None:
        self.entry = Entry(self.order, self.site, self.update, self.weight)
        hang_update(backbone, self.entry)

    @override
    def unhang(self, backbone: Backbone) -> None:
        if self.entry is not None:
            unhang_update(backbone, self.entry)
            self.entry = None

    @override
    def set_weight(self, weight: float) -> None:
        self.weight = weight

    @override
    def fold(self, weights: FoldedWeights) -> None:
        whole = weights.get(self.site.holder, self.site.tensor)
        assert whole is not None
        first, last = self.site.rows or (0, whole.shape[0])
        delta = copy.deepcopy(self.update).double().delta().detach().to(whole.device)
        folded = whole.clone()
        folded[first:last] += self.weight * delta.view_as(folded[first:last])
        weights.set(self.site.holder, self.site.tensor, folded)

    @override
    def describe(self) -> str:
        kind = "a generated" if isinstance(self.update, DenseUpdate) else "a low-rank"
        return f"{kind} update of '{self.site.name}'"

    @override
    def where(self) -> tuple[WeightSite, ...]:
        return (self.site,)

    @override
    def parameters(self) -> Iterable[nn.Parameter]:
        return self.update.parameters()


class LowRankTransform(nn.Module):
    """W + dW, for weights that are read inside a function and so have no call to extend."""

    def __init__(self, update: LowRankUpdate | DenseUpdate) -> None:
        super().__init__()
        self.update = update

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, in its own dtype."""
        return weight + self.update.delta().to(weight.dtype)


class TransformAttachment(Attachment):
    """A tensor computed from the stored one at each call of its owner.

    Args:
        order: See `Attachment`.
        site: The weight site.
        transform: Module that maps the site's slice to its effective value; for a bias that does not exist it gets
            None.
        tensor: Attribute name where it is not the site's own, e.g. its bias.
    """

    stage = FoldStage.TRANSFORM

    def __init__(self, order: int, site: WeightSite, transform: nn.Module, tensor: str | None = None) -> None:
        super().__init__(order)
        self.site = site
        self.transform = transform
        self.tensor = tensor or site.tensor
        self.touches = (site.owner, site.holder)
        self.weight = 1.0

    def __call__(self, whole: Tensor | None, /) -> Tensor:
        """The effective whole tensor."""
        return self._apply(whole, self.transform)

    def _apply(self, whole: Tensor | None, transform: nn.Module) -> Tensor:
        rows = self.site.rows
        if whole is None or rows is None:
            return scaled(whole, transform(whole), self.weight)
        part = whole[rows[0] : rows[1]]
        return torch.cat([whole[: rows[0]], scaled(part, transform(part), self.weight), whole[rows[1] :]])

    @override
    def hang(self, backbone: Backbone) -> None:
        push_transform(backbone, self.site.holder, self.tensor, self.site.owner, self, self.order)

    @override
    def unhang(self, backbone: Backbone) -> None:
        drop_transform(backbone, self.site.holder, self.tensor, self.site.owner, self)

    @override
    def set_weight(self, weight: float) -> None:
        self.weight = weight

    @override
    def fold(self, weights: FoldedWeights) -> None:
        with torch.no_grad():
            whole = weights.get(self.site.holder, self.tensor)
            transform = copy.deepcopy(self.transform).double()
            if whole is not None:
                transform = transform.to(whole.device)
            weights.set(self.site.holder, self.tensor, self._apply(whole, transform))

    @override
    def describe(self) -> str:
        return f"a computed '{self.site.name}'"

    @override
    def where(self) -> tuple[WeightSite, ...]:
        return (self.site,)

    @override
    def parameters(self) -> Iterable[nn.Parameter]:
        return self.transform.parameters()


class LeafAttachment(Attachment):
    """A tensor of the adapter that stands in for a whole stored tensor: a trained copy, or a drifting statistic.

    Args:
        order: See `Attachment`.
        places: (holder, tensor) of every module that registers the tensor; several where it is tied.
        source: Module that owns the stand-in.
        attribute: Name of the stand-in in `source`.
        path: The one of the tensor's names under which it was asked for.
    """

    stage = FoldStage.LEAF

    def __init__(
        self, order: int, places: tuple[tuple[str, str], ...], source: nn.Module, attribute: str, *, path: str
    ) -> None:
        super().__init__(order)
        self.places = places
        self.source = source
        self.attribute = attribute
        self.path = path
        self.touches = tuple(holder for holder, _ in places)

    @property
    def value(self) -> Tensor:
        """The stand-in."""
        return getattr(self.source, self.attribute)

    @override
    def hang(self, backbone: Backbone) -> None:
        for holder, tensor in self.places:
            push_leaf(backbone, holder, tensor, self.value, self.order)

    @override
    def unhang(self, backbone: Backbone) -> None:
        for holder, tensor in self.places:
            drop_leaf(backbone, holder, tensor, self.order)

    @override
    def fold(self, weights: FoldedWeights) -> None:
        for holder, tensor in self.places:
            value = self.value.detach()
            weights.set(holder, tensor, value.to(torch.float64) if value.is_floating_point() else value.clone())

    @override
    def describe(self) -> str:
        return f"a trained '{self.path}'"

    @override
    def parameters(self) -> Iterable[nn.Parameter]:
        return (self.value,) if isinstance(self.value, nn.Parameter) else ()


class ReplaceSlice(nn.Module):
    """A trained leaf in place of one row slice of a fused tensor."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The leaf; the slice below it is not read."""
        return self.value.to(weight.dtype)
