"""What masks do during a run: their norm, the warning of short runs, gradient dropout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from peft_modal.attach import Adapter, LifeCycle, Run
from peft_modal.attach.lifecycle import Batch, Output, total
from peft_modal.errors import TrainingError
from peft_modal.methods.r_amt.mask import Mask

if TYPE_CHECKING:
    from peft_modal.methods.r_amt.method import RAMT

_LOG = logging.getLogger(__name__)
EPSILON: Final = 1e-8
_LEAST_TRAVEL: Final = 1.5
"""Of the sum of learning rates, in distances from the initial value to the threshold."""


class Masks(LifeCycle):
    """The masks' norm, and how many weights are gone.

    Args:
        method: The configuration.
        adapter: The parent.
        masks: By the name of their site; may be filled by calibration.
    """

    def __init__(self, method: RAMT, adapter: Adapter, masks: Mapping[str, Mask]) -> None:
        super().__init__()
        self.method = method
        self.__dict__["masks"] = masks  # owned by their sites
        self.__dict__["adapter"] = adapter  # no submodule: it is the parent
        self._masked_share = 0.0

    @property
    def masks(self) -> Mapping[str, Mask]:
        """By the name of their site."""
        return self.__dict__["masks"]

    @override
    def on_fit_start(self, run: Run) -> None:
        """Say when no entry can reach the threshold: Adam moves it by about the learning rate a step."""
        distance = self.method.init - self.method.threshold
        if run.learning_rates is None or not self.masks:
            return
        travel = run.learning_rates(next(iter(self.masks.values())).mask_logit)
        if travel < _LEAST_TRAVEL * distance:
            _LOG.warning(
                "r_amt: the learning rates of all steps add up to %.2g, and a mask has to move by %.2g before it "
                "drops a weight; train for more epochs, or raise task.lr",
                travel, distance,
            )  # fmt: skip

    @override
    def penalty(self, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        if not self.method.norm_weight:
            return {}
        norms = torch.stack([torch.linalg.vector_norm(mask.mask_logit.float()) for mask in self.masks.values()])
        return {"mask_norm": self.method.norm_weight * norms.sum()}

    @override
    def on_epoch_start(self, epoch: int) -> None:
        self._masked_share = self.masked_share()

    def masked_share(self) -> float:
        """Share of the masked tensors' entries that are gone."""
        entries = sum(mask.mask_logit.numel() for mask in self.masks.values())
        return sum(self.site_entries().values()) / max(1, entries)

    @override
    def figures(self) -> Mapping[str, float]:
        return {"masked_share": self._masked_share}

    @override
    def finalise(self) -> None:
        self._masked_share = self.masked_share()

    @override
    def site_entries(self) -> Mapping[str, int]:
        """Weights that are gone."""
        return {name: int((~mask.kept()).sum()) for name, mask in self.masks.items()}

    @override
    def facts(self) -> Mapping[str, Any]:
        return {"masked_share": self.masked_share()}


class RegularisedMasks(Masks):
    """Gradient dropout: entries that move away from what the model knew are left out at random."""

    def __init__(self, method: RAMT, adapter: Adapter, masks: Mapping[str, Mask]) -> None:
        super().__init__(method, adapter, masks)
        self._run: Run | None = None
        self._general: Tensor | None = None

    @override
    def on_fit_start(self, run: Run) -> None:
        """See `Masks`.

        Raises:
            TrainingError: The task gives no class logits.
        """
        super().on_fit_start(run)
        if run.forward is not None and not run.gives_logits:
            raise TrainingError(
                "r_amt compares class logits with and without masks, and this task gives none; set "
                "method.gate_strength to 0"
            )
        self._run = run

    @override
    def penalty(self, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        terms = dict(super().penalty(batch, output))
        if self._run is None or self._run.forward is None:
            return terms
        self._general = self.general(output, self.teacher(batch))
        return {**terms, "general": self._general}

    def teacher(self, batch: Batch) -> Tensor:
        """Logits without masks."""
        assert self._run is not None
        assert self._run.forward is not None
        adapter: Adapter = self.__dict__["adapter"]
        adapter.enable(False)
        try:
            with torch.no_grad():
                return self._run.forward(batch)
        finally:
            adapter.enable(True)

    def general(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Cross-entropy of both models' softmax, times the squared temperature; classes on axis 1."""
        temperature = self.method.temperature
        target = functional.softmax(teacher.float() / temperature, dim=1)
        return functional.cross_entropy(logits.float() / temperature, target) * temperature**2

    @override
    def compute_gradients(
        self, losses: Mapping[str, Tensor], closure: Callable[[], Mapping[str, Tensor]],
        backward: Callable[[Tensor], None],
    ) -> None:  # fmt: skip
        """Gradients of all losses but the general one, gated in the masks by that one's."""
        del closure
        general = losses.get("general")
        if general is None or self._general is None:
            backward(total(losses))
            return
        logits = [mask.mask_logit for mask in self.masks.values()]
        scale = float((general.detach() / self._general.detach()).nan_to_num(1.0))
        towards = torch.autograd.grad(general, logits, retain_graph=True)
        before = [logit.grad for logit in logits]
        for logit in logits:
            logit.grad = None
        backward(total({name: loss for name, loss in losses.items() if name != "general"}))
        for logit, earlier, other in zip(logits, before, towards, strict=True):
            own = logit.grad
            assert own is not None
            noise = _shared(torch.rand_like(own))
            gated = gate(own, _mean(other), noise, self.method.gate_strength, epsilon=EPSILON * scale)
            logit.grad = gated if earlier is None else earlier + gated


def gate(own: Tensor, other: Tensor, noise: Tensor, strength: float, *, epsilon: float = EPSILON) -> Tensor:
    """Gradient dropout.

    Args:
        own: Gradient of the task.
        other: Gradient of the general loss, of the same shape.
        noise: Uniform in [0, 1), of the same shape.
        strength: lambda.
        epsilon: Keeps the quotient finite, in the unit of the gradients.
    """
    agreement = (own.sign() * (own + other) / (own.abs() + other.abs() + epsilon) + 1) / 2
    return torch.where(agreement > noise, own, (1 - strength) * own)


def _mean(tensor: Tensor) -> Tensor:
    """Over all processes, as gradients are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


def _shared(tensor: Tensor) -> Tensor:
    """The first process's, so that all drop the same."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, src=0)
    return tensor
