"""R-AMT: regularised mask tuning (Zheng et al., ICCV 2023, arXiv:2307.15049)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter, LifeCycle, Run
from peft_modal.attach.lifecycle import Batch, Output, total
from peft_modal.attach.packing import PacksItself
from peft_modal.errors import ConfigError, FileFormatError, TrainingError
from peft_modal.methods.base import Method
from peft_modal.ranges import NonNegativeFloat, PositiveFloat, Share

_LOG = logging.getLogger(__name__)
SavedFor: TypeAlias = Any  # torch's context takes any attribute
EPSILON: Final = 1e-8
_LEAST_TRAVEL: Final = 1.5
"""Of the sum of learning rates, in distances from the initial value to the threshold."""


class RAMT(Method):
    """Binary masks over frozen weights (Zheng et al., R-AMT, ICCV 2023, arXiv:2307.15049).

    W' = 1[m > threshold] * W, with m trained through the threshold as if it were not there: dL/dm = dL/dW' * W. All
    weights are kept at first. Where the gradient a of the task, and g of the distance to the model without masks,
    pull an entry apart, a is dropped at random: with P = (sign(a) (a + g) / (|a| + |g|) + 1) / 2 and U uniform, the
    gradient is (1 - lambda + lambda 1[P > U]) a. g takes no other part. That model's logits mean something from the
    start where its head does: a zero-shot classifier's. Without the second gradient (`gate_strength: 0`) this is the
    paper's AMT. Merges exactly; a file holds one bit per entry.

    As in the released code and unlike the method's name the patch embedding is masked, too; and the first term's norm
    is not squared.

    Args:
        sites: The linears and convolutions among these sites; whole fused tensors go before their slices.
        threshold: A weight is kept where m is above.
        init: Of every m.
        gate_strength: lambda: how much of a dropped gradient is gone; 0 drops nothing and takes one gradient.
        norm_weight: Of the sum over tensors of the Euclidean norm of m.
        temperature: Of the softmax that both models are compared by.

    Raises:
        ConfigError: No weight would be kept at first.
    """

    identity_at_init = True

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = ["embed", "attn"],  # noqa: B006 — never changed
        threshold: float = 5e-3, init: float = 1e-2, gate_strength: Share = 0.3,
        norm_weight: NonNegativeFloat = 1e-4, temperature: PositiveFloat = 1.0,
    ) -> None:  # fmt: skip
        if init <= threshold:
            raise ConfigError(
                f"method.init: {init:g} is not above method.threshold, {threshold:g}, so that no weight would be kept"
            )
        self.sites = Selector.parse(sites)
        self.threshold = threshold
        self.init = init
        self.gate_strength = gate_strength
        self.norm_weight = norm_weight
        self.temperature = temperature

    @classmethod
    def example(cls) -> RAMT:
        """Without the comparison of logits, which a bare backbone does not give."""
        return cls(gate_strength=0.0)

    def build(self, adapter: Adapter) -> None:
        """A mask per tensor."""
        masks = {}
        for site in adapter.backbone.anatomy.select(self.sites, needs="weight", fused=True):
            if site.op == "linear" or site.op.startswith("conv"):
                masks[site.name] = Mask(site.shape, threshold=self.threshold, init=self.init)
                adapter.reparametrise(site, masks[site.name])
                adapter.optimise(f"{site.name}.mask_logit", decay=False)
        kind = RegularisedMasks if self.gate_strength else Masks
        adapter.listen(kind(self, adapter, masks), name="r_amt", training_only=True)


class Mask(PacksItself):
    """1[m > threshold] * W for a weight of any shape.

    Args:
        shape: Of the weight.
        threshold: A weight is kept where m is above.
        init: Of m.
    """

    file_names: ClassVar[tuple[str, ...]] = ("mask_bits",)

    def __init__(self, shape: tuple[int, ...], *, threshold: float, init: float) -> None:
        super().__init__()
        # The comparison is one of float32 in every precision, so that a file's bits are what training used.
        self.threshold = float(np.float32(threshold))
        self.init = init
        self.mask_logit = nn.Parameter(torch.full(shape, init))

    def forward(self, weight: Tensor) -> Tensor:
        """The kept weights, others 0."""
        return cast("Tensor", _StraightThrough.apply(self.mask_logit, weight, self.threshold))

    def kept(self) -> Tensor:
        """Which weights are kept, bool of the weight's shape."""
        return self.mask_logit.detach() > self.threshold

    @override
    def packed(self) -> dict[str, Tensor]:
        """Row by row, eight entries a byte, the first one in the highest bit, zeros behind the last."""
        if self.mask_logit.is_meta:  # a count without values
            return {"mask_bits": self.mask_logit.new_empty(self._bytes(), dtype=torch.uint8)}
        return {"mask_bits": torch.from_numpy(np.packbits(self.kept().cpu().numpy().reshape(-1)))}

    def _bytes(self) -> int:
        return math.ceil(self.mask_logit.numel() / 8)

    @override
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        bits = np.unpackbits(tensors["mask_bits"].cpu().numpy(), count=self.mask_logit.numel())
        kept = torch.from_numpy(bits).to(self.mask_logit).view(self.mask_logit.shape)
        with torch.no_grad():
            self.mask_logit.copy_(self.threshold + (2 * kept - 1) * (self.init - self.threshold))

    @override
    def refuse(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        bits, size = tensors["mask_bits"], self._bytes()
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (size,):
            raise FileFormatError(
                f"tensor '{name}.mask_bits' is {bits.dtype} of shape {tuple(bits.shape)}; a bit for each of "
                f"{self.mask_logit.numel()} weights is {size} bytes"
            )


class _StraightThrough(torch.autograd.Function):
    """Weights above the threshold; to m the gradient of m * W."""

    @staticmethod
    def forward(ctx: SavedFor, logit: Tensor, weight: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(logit, weight)
        ctx.threshold = threshold
        return torch.where(logit > threshold, weight, weight.new_zeros(()))

    @staticmethod
    def backward(ctx: SavedFor, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        logit, weight = ctx.saved_tensors
        of_logit = (gradient * weight).to(logit.dtype) if ctx.needs_input_grad[0] else None
        of_weight = gradient * (logit > ctx.threshold) if ctx.needs_input_grad[1] else None
        return of_logit, of_weight, None


class Masks(LifeCycle):
    """The masks' norm, and how many weights are gone.

    Args:
        method: The configuration.
        adapter: The parent.
        masks: By the name of their site.
    """

    def __init__(self, method: RAMT, adapter: Adapter, masks: Mapping[str, Mask]) -> None:
        super().__init__()
        self.method = method
        self.__dict__["masks"] = dict(masks)  # owned by their sites
        self.__dict__["adapter"] = adapter  # no submodule: it is the parent
        self._masked_share = 0.0

    @property
    def masks(self) -> dict[str, Mask]:
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
