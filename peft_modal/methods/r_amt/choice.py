"""Which tensors are masked: those whose masks the task pulls at most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from peft_modal.anatomy import Backbone
from peft_modal.anatomy.sites import WeightSite
from peft_modal.attach import Adapter, LifeCycle, Run
from peft_modal.attach.lifecycle import Batch, Losses
from peft_modal.errors import FileFormatError, TrainingError
from peft_modal.methods.calibration import take_gradients
from peft_modal.methods.r_amt.mask import Mask

if TYPE_CHECKING:
    from peft_modal.methods.r_amt.method import RAMT


class MaskChoice(LifeCycle):
    """Masks the tensors with the largest gradients, before training; a file names them.

    Args:
        method: The configuration.
        adapter: The parent.
        sites: What may be masked, by name.
        masks: Filled with the masks of the chosen.
    """

    def __init__(
        self, method: RAMT, adapter: Adapter, sites: Mapping[str, WeightSite], masks: dict[str, Mask]
    ) -> None:  # fmt: skip
        super().__init__()
        self.method = method
        self.sites = dict(sites)
        self.calibration_batches = method.batches
        # Neither is a submodule: masks are owned by their sites, and the adapter is the parent.
        self.__dict__["masks"] = masks
        self.__dict__["adapter"] = adapter

    @override
    def prepare(self, batches: Iterable[Batch], loss: Losses) -> None:
        """Measure and mask.

        Raises:
            TrainingError: There is no batch.
        """
        backbone = self.__dict__["adapter"].backbone
        pull = mask_gradients(backbone, self.sites, islice(batches, self.method.batches), loss)
        ranked = sorted(pull, key=lambda name: -pull[name])[: self.method.tensors]
        self._mask([name for name in self.sites if name in ranked])

    @override
    def on_fit_start(self, run: Run) -> None:
        """Refuse to train what was never calibrated.

        Raises:
            TrainingError: It was not.
        """
        if not self.__dict__["masks"]:
            raise TrainingError("r_amt was not calibrated; call adapter.events.prepare(batches, loss) before training")

    @override
    def facts(self) -> Mapping[str, Any]:
        return {"masked": list(self.__dict__["masks"])} if self.__dict__["masks"] else {}

    @override
    def rebuild(self, facts: Mapping[str, Any]) -> None:
        """Mask what a file names.

        Raises:
            FileFormatError: It names tensors that this network does not have.
        """
        if not facts or self.__dict__["masks"]:
            return
        if unknown := [name for name in facts["masked"] if name not in self.sites]:
            raise FileFormatError(f"the file masks '{unknown[0]}', which is none of this network's tensors here")
        self._mask(facts["masked"])

    def _mask(self, names: Iterable[str]) -> None:
        adapter: Adapter = self.__dict__["adapter"]
        for name in names:
            self.method.mask(adapter, self.sites[name], self.__dict__["masks"])
        adapter.train(adapter.training)


def mask_gradients(
    backbone: Backbone, sites: Mapping[str, WeightSite], batches: Iterable[Batch], loss: Losses
) -> dict[str, float]:
    """Mean over batches and entries of |dL/dm| = |dL/dW * W| for a mask over each site, all weights kept.

    Raises:
        TrainingError: There is no batch.
    """
    paths = {site.path: name for name, site in sites.items()}
    sums = dict.fromkeys(sites, 0.0)

    def take(path: str, gradient: Tensor) -> None:
        sums[paths[path]] += float((gradient * backbone.tensor(path).detach()).float().abs().mean())

    count = take_gradients(backbone, paths, batches, loss, take, purpose="method r_amt chooses tensors by gradients")
    return {name: value / count for name, value in sums.items()}
