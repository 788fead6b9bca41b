"""What one verb of an adapter leaves on a backbone: how it is hung, taken away, and folded into plain weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import IntEnum

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Backbone, Port, WeightSite
from peft_modal.errors import MergeError


class FoldStage(IntEnum):
    """Order in which the mechanisms act during a forward pass, and so in which they fold."""

    LEAF = 0
    TRANSFORM = 1
    OPERATION = 2
    UPDATE = 3
    OUTPUT = 4


class FoldedWeights:
    """Float64 working copies of the tensors that a merge changes."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.tensors: dict[tuple[str, str], Tensor | None] = {}

    def get(self, holder: str, tensor: str) -> Tensor | None:
        """The working copy; None for a bias that does not exist.

        Raises:
            MergeError: The tensor is stored in an integer format.
        """
        key = (holder, tensor)
        if key not in self.tensors:
            try:
                own = self.backbone.tensor(f"{holder}.{tensor}" if holder else tensor)
            except KeyError:
                self.tensors[key] = None
            else:
                if not own.is_floating_point() and own.dim() > 0:
                    raise MergeError(
                        f"'{holder}.{tensor}' is stored as {own.dtype}; merge into the unquantised weights"
                    )
                self.tensors[key] = own.detach().to(torch.float64) if own.is_floating_point() else own.clone()
        return self.tensors[key]

    def set(self, holder: str, tensor: str, value: Tensor) -> None:
        """Replace the working copy."""
        self.tensors[holder, tensor] = value


class Attachment(ABC):
    """One thing that an adapter has hung on a backbone.

    Args:
        order: Position among all attachments of the backbone; decides the order at places shared with others.
    """

    stage: FoldStage | None = None
    """When it folds, or None where it cannot."""
    touches: tuple[str, ...] = ()
    """Paths of the modules it acts on."""

    def __init__(self, order: int) -> None:
        self.order = order

    @abstractmethod
    def hang(self, backbone: Backbone) -> None:
        """Become effective."""

    @abstractmethod
    def unhang(self, backbone: Backbone) -> None:
        """Leave no trace."""

    def fold(self, weights: FoldedWeights) -> None:
        """Write the effect into plain weights.

        Raises:
            MergeError: It has no equivalent in plain weights.
        """
        del weights
        raise MergeError(
            f"{self.describe()} has no equivalent in plain weights; keep the adapter file beside the backbone"
        )

    def set_weight(self, weight: float) -> str | None:
        """Scale the effect; the reason where that is not defined."""
        return None if weight == 1.0 else f"{self.describe()} cannot be weighted"

    def clear(self) -> None:  # noqa: B027 — optional: most keep nothing
        """Let go of tensors kept between hooks."""

    @abstractmethod
    def describe(self) -> str:
        """What it is and where, for sentences."""

    def where(self) -> tuple[WeightSite | Port, ...]:
        """The sites and ports that it acts on, in order of execution; empty where the anatomy names none."""
        return ()

    def parameters(self) -> Iterable[nn.Parameter]:
        """The trained tensors that it acts with."""
        return ()


def scaled(base: Tensor | None, changed: Tensor, weight: float) -> Tensor:
    """The point `weight` of the way from `base` (None counts as zero) to `changed`; exactly `changed` for 1."""
    if weight == 1.0:
        return changed
    return changed * weight if base is None else torch.lerp(base, changed, weight)
