"""Merging: folding adapters into plain backbone weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Backbone, registered, registrations
from peft_modal.attach.adapter import Adapter
from peft_modal.attach.attachment import Attachment, FoldedWeights
from peft_modal.attach.taps import TapAttachment
from peft_modal.errors import MergeError


def merge_(backbone: Backbone, adapters: Sequence[Adapter] | None = None, *, dtype: torch.dtype | None = None) -> float:
    """Fold adapters into the backbone's weights and detach them; the backbone changes.

    Computed in float64, then rounded once to each tensor's dtype, or to `dtype` where one is given. Mechanisms fold in
    the order in which they act during a forward pass, so every adapter that acts on a module has to be merged together.

    Args:
        backbone: The backbone.
        adapters: What to fold; None for all that is attached.
        dtype: Type that the changed tensors will be stored in; the network keeps its own and holds rounded values.

    Returns:
        The largest rounding deviation over all changed entries.

    Raises:
        MergeError: Something has no equivalent in plain weights, an adapter is switched off, an adapter that stays
            shares a module, or a tied tensor would change in one of its places only.
    """
    folding = list(backbone.adapters.values()) if adapters is None else list(adapters)
    for adapter in folding:
        if not adapter.is_enabled:
            raise MergeError(f"adapter '{adapter.name}' is switched off or detached; enable it, or leave it out")
    attachments = [a for adapter in folding for a in adapter.attachments]
    _refuse_shared(backbone, folding, attachments)
    folded = FoldedWeights(backbone)
    # A tap serves something else that cannot fold, which tells the reader more.
    for attachment in sorted(attachments, key=lambda a: isinstance(a, TapAttachment)):
        if attachment.stage is None:
            attachment.fold(folded)
    for attachment in sorted(attachments, key=lambda a: (a.stage or 0, a.order)):
        attachment.fold(folded)
    _refuse_untied(backbone, folded)
    for adapter in folding:
        adapter.detach()
    deviation = 0.0
    for (holder, tensor), value in folded.tensors.items():
        if value is not None:
            deviation = max(deviation, _write(backbone.network.get_submodule(holder), tensor, value, dtype))
    return deviation


def _refuse_shared(backbone: Backbone, folding: Sequence[Adapter], attachments: Sequence[Attachment]) -> None:
    touched = {module for attachment in attachments for module in attachment.touches}
    for name, other in backbone.adapters.items():
        if other in folding:
            continue
        shared = sorted(touched & {module for a in other.attachments for module in a.touches})
        if shared:
            raise MergeError(
                f"adapter '{name}' also acts on '{shared[0]}'; merge both together, or detach '{name}' first"
            )


def _refuse_untied(backbone: Backbone, folded: FoldedWeights) -> None:
    for (holder, tensor), value in folded.tensors.items():
        own = registered(backbone.network.get_submodule(holder), tensor)
        if own is None or value is None:
            continue
        for place in registrations(backbone.network, own):
            other = folded.tensors.get(place)
            if place != (holder, tensor) and (other is None or not torch.equal(other, value)):
                raise MergeError(
                    f"'{holder}.{tensor}' and '{place[0]}.{place[1]}' are one tensor, which cannot take the change of "
                    "one of them; keep the adapter file beside the backbone"
                )


@torch.no_grad()
def _write(module: nn.Module, tensor: str, value: Tensor, dtype: torch.dtype | None) -> float:
    own = registered(module, tensor)
    if dtype is not None and value.is_floating_point():
        rounded = value.to(dtype)
    else:
        rounded = value.to(next(module.parameters()).dtype if own is None else own.dtype)
    if own is None:
        rounded = rounded.to(next(module.parameters()).dtype)
        module.register_parameter(tensor, nn.Parameter(rounded, requires_grad=False))
    else:
        own.copy_(rounded)
    if not value.is_floating_point() or not value.numel():
        return 0.0
    return float((rounded.to(torch.float64) - value).abs().max())
