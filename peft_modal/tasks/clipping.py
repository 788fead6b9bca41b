"""Gradients of frozen tensors, for a clipping norm that counts them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.attach.sparse_attachment import SparseAttachment


class FrozenGradients:
    """Gives every frozen parameter of a backbone a gradient, and takes it away again.

    Released code that leaves frozen tensors out of the optimiser, but never switches their gradients off, clips by the
    norm over all tensors, so its clip acts harder. Copies stand in for the frozen tensors while this is attached; they
    are never stepped, counted or saved. It costs the memory of the copies and a backward pass as long as full
    fine-tuning's.

    Args:
        backbone: The backbone, with what trains attached to it already.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.stand_ins = Adapter(backbone, "clip_scope")
        for path, _ in backbone.network.named_parameters():
            if not any(adapter.owns(path) for adapter in backbone.adapters.values()):
                self.stand_ins.own_tensor(path)

    def clip(self, trained: Iterable[nn.Parameter], max_norm: float) -> None:
        """Scale the gradients of `trained` so that the norm over them and the frozen ones is at most `max_norm`."""
        named = self.stand_ins.named_trained()
        for adapter in self.stand_ins.backbone.adapters.values():
            for attachment in adapter.attachments:
                if isinstance(attachment, SparseAttachment):
                    # A stand-in is whole: of entries that are trained it must not count a second time.
                    attachment.leave_out(named[f"backbone.{attachment.sites[0].path}"].grad)
        frozen = list(named.values())
        nn.utils.clip_grad_norm_([*trained, *frozen], max_norm)
        for parameter in frozen:
            parameter.grad = None

    def detach(self) -> None:
        """Let the backbone's own tensors be read again."""
        self.stand_ins.detach()
