"""Low-rank pairs of whole tensors: what every LoRA adapter of ours comes down to, whatever format it is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_modal.anatomy import WeightSite
from peft_modal.attach import Adapter
from peft_modal.attach.attachment import Attachment
from peft_modal.attach.operations import OperationAttachment, OperationWeight
from peft_modal.attach.updates import LowRankUpdate
from peft_modal.attach.weights import LeafAttachment, LowRankTransform, TransformAttachment, UpdateAttachment
from peft_modal.errors import FileFormatError
from peft_modal.hf.operation import TunerOperation


@dataclass(frozen=True)
class Pair:
    """dW = scale * up down for one whole tensor of the network.

    Shapes: down (r, in, *kernel), up (out, r, *1), magnitude (out) of DoRA or None.
    """

    holder: str
    tensor: str
    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def padded(self, rank: int) -> Pair:
        """The same update with zeros up to `rank` rows and a scale of 1."""
        down = self.down.new_zeros(rank, *self.down.shape[1:])
        up = self.up.new_zeros(self.up.shape[0], rank, *self.up.shape[2:])
        down[: self.rank], up[:, : self.rank] = self.down, self.scale * self.up
        return replace(self, down=down, up=up, scale=1.0)


@dataclass(frozen=True)
class _Part:
    site: WeightSite
    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None


def pairs_of(adapter: Adapter) -> list[Pair]:
    """The pairs of an adapter that is nothing but LoRA, one for each whole tensor, in order of attachment.

    Pairs of row slices become one pair: their `down` on top of each other, their `up` as blocks on a diagonal.

    Raises:
        FileFormatError: Something in the adapter is no low-rank update.
    """
    parts: dict[tuple[str, str], list[_Part]] = {}
    for attachment in adapter.attachments:
        if isinstance(attachment, LeafAttachment):
            continue  # tensors of the network's own, which are written beside the pairs
        part = _part(attachment)
        parts.setdefault((part.site.holder, part.site.tensor), []).append(part)
    if not parts:
        raise FileFormatError("the adapter has no low-rank update, so there is nothing to write as LoRA")
    return [_joined(adapter, found) for found in parts.values()]


def _part(attachment: Attachment) -> _Part:
    update: object = None
    if isinstance(attachment, UpdateAttachment):
        update = attachment.update
    elif isinstance(attachment, OperationAttachment):
        update = attachment.operation
    elif isinstance(attachment, TransformAttachment):
        transform = attachment.transform
        update = transform.update if isinstance(transform, LowRankTransform) else transform
        update = update.operation if isinstance(update, OperationWeight) else update
    if isinstance(attachment, UpdateAttachment | OperationAttachment | TransformAttachment):
        if isinstance(update, LowRankUpdate):
            down, up = update.factors()
            return _Part(attachment.site, down.detach(), up.detach(), update.scale * attachment.weight)
        if isinstance(update, TunerOperation) and not isinstance(attachment, UpdateAttachment):
            return _part_of_tuner(attachment.site, update, attachment)
    raise FileFormatError(f"{attachment.describe()} is no low-rank update, so it has no place in a LoRA file")


def _part_of_tuner(
    site: WeightSite, operation: TunerOperation, attachment: OperationAttachment | TransformAttachment
) -> _Part:
    from peft_modal.hf.operation import factors

    layer = operation.tuner
    dora = getattr(layer, "use_dora", {}).get("default", False)
    other_variant = "default" in getattr(layer, "lora_variant", {}) and not dora
    if not getattr(layer, "lora_A", None) or other_variant or operation.changes_bias:
        raise FileFormatError(
            f"peft's {type(layer).__name__} at '{site.name}' is no plain LoRA or DoRA pair; keep the adapter file"
        )
    down, up = (tensor.detach() for tensor in factors(layer))
    scale = float(layer.scaling["default"])
    if dora:
        if operation.start is not None or attachment.weight != 1.0:
            raise FileFormatError(f"DoRA at '{site.name}' starts from the weights or is weighted, which no pair holds")
        magnitude = layer.lora_magnitude_vector["default"].weight.detach()
        return _Part(site, down, up, scale, magnitude)
    if operation.start is not None:
        # W - s B0 A0 + s B A is the base plus one pair of twice the rank.
        down = torch.cat([down, operation.start.down])
        up = torch.cat([up, -operation.start.up], dim=1)
    return _Part(site, down, up, scale * attachment.weight)


def _joined(adapter: Adapter, parts: Sequence[_Part]) -> Pair:
    site = parts[0].site
    if len(parts) == 1 and site.rows is None:
        return Pair(site.holder, site.tensor, parts[0].down, parts[0].up, parts[0].scale, parts[0].magnitude)
    if any(part.magnitude is not None for part in parts):
        raise FileFormatError(f"DoRA and another update share '{site.path}', which no single pair holds")
    rows = adapter.backbone.tensor(site.path).shape[0]
    # One scale for all is left to the format; folding it would round.
    common = parts[0].scale if len({part.scale for part in parts}) == 1 else None
    ups = []
    for part in parts:
        first, last = part.site.rows or (0, rows)
        up = part.up.new_zeros(rows, *part.up.shape[1:])
        up[first:last] = part.up if common is not None else part.scale * part.up
        ups.append(up)
    scale = 1.0 if common is None else common
    return Pair(site.holder, site.tensor, torch.cat([part.down for part in parts]), torch.cat(ups, dim=1), scale)
