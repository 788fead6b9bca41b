"""Numbers of parameters, counted in one place for runs, reports and `inspect`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters; a tied or shared one counts once."""

    adapter: int
    """What the method adds and saves."""
    backbone_trained: int
    """The backbone's own that are trained, as copies."""
    head: int
    training_only: int
    """Trained, but folded away before saving."""
    backbone: int
    """The whole network, trained or not."""

    @property
    def trained(self) -> int:
        """All that the optimiser moves."""
        return self.adapter + self.backbone_trained + self.head + self.training_only

    @property
    def total(self) -> int:
        """Network, adapter and head; copies of the network's own tensors do not count again."""
        return self.backbone + self.adapter + self.head + self.training_only

    @property
    def trained_share(self) -> float:
        """Trained over total."""
        return self.trained / self.total

    def figures(self) -> dict[str, float]:
        """As they stand in `metrics.json`."""
        return {
            "params/adapter": float(self.adapter),
            "params/backbone_trained": float(self.backbone_trained),
            "params/head": float(self.head),
            "params/training_only": float(self.training_only),
            "params/total": float(self.total),
            "params/trained_share": self.trained_share,
        }


def count_parameters(backbone: Backbone, adapter: Adapter, head: nn.Module | None) -> Counts:
    """Count the parameters of a backbone with one adapter and a head."""
    own = adapter.counts()
    return Counts(
        adapter=own["adapter"],
        backbone_trained=own["backbone"],
        head=0 if head is None else _size(head),
        training_only=own["training_only"],
        backbone=_size(backbone.network),
    )


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
