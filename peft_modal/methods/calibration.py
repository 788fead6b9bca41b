"""Gradients of frozen tensors on a few batches, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.attach.lifecycle import Batch, Losses, total
from peft_modal.errors import TrainingError


def take_gradients(
    backbone: Backbone, paths: Iterable[str], batches: Iterable[Batch], loss: Losses,
    take: Callable[[str, Tensor], None], *, purpose: str,
) -> int:  # fmt: skip
    """Hand over the gradient of each batch's loss for each tensor, as soon as it is there.

    Copies stand in for the tensors while gradients are taken; the backbone's own never require any.

    Args:
        backbone: Whose tensors.
        paths: Which.
        batches: What the gradients are of.
        loss: Of a batch.
        take: Called with the path and the gradient; not for a tensor that a loss does not depend on.
        purpose: What the error says of it: "method NAME does this".

    Returns:
        The number of batches, 1 or more.

    Raises:
        TrainingError: There is no batch.
    """
    stand_ins = Adapter(backbone, "calibration")
    count = 0
    try:
        copies = {path: stand_ins.own_tensor(path) for path in dict.fromkeys(paths)}
        for count, batch in enumerate(batches, start=1):  # noqa: B007 — how many there were
            gradients = torch.autograd.grad(total(loss(batch)), list(copies.values()), allow_unused=True)
            for path, gradient in zip(copies, gradients, strict=True):
                if gradient is not None:
                    take(path, gradient)
    finally:
        stand_ins.detach()
    if not count:
        raise TrainingError(f"{purpose} on training batches, and there is none")
    return count
