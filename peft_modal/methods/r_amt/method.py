"""What is masked, and by what rule."""

from __future__ import annotations

from typing import Any

from peft_modal.anatomy import Selector
from peft_modal.anatomy.sites import WeightSite
from peft_modal.attach import Adapter
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.base import Method
from peft_modal.methods.r_amt.choice import MaskChoice
from peft_modal.methods.r_amt.mask import Mask
from peft_modal.methods.r_amt.training import Masks, RegularisedMasks
from peft_modal.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share


class RAMT(Method):
    """Binary masks over frozen weights (Zheng et al., R-AMT, ICCV 2023, arXiv:2307.15049).

    W' = 1[m > threshold] * W, with m trained through the threshold as if it were not there: dL/dm = dL/dW' * W. All
    weights are kept at first. Where the gradient a of the task, and g of the distance to the model without masks,
    pull an entry apart, a is dropped at random: with P = (sign(a) (a + g) / (|a| + |g|) + 1) / 2 and U uniform, the
    gradient is (1 - lambda + lambda 1[P > U]) a. g takes no other part. That model's logits mean something from the
    start where its head does: a zero-shot classifier's. Without the second gradient (`gate_strength: 0`) this is the
    paper's AMT. Merges exactly; a file holds one bit per entry.

    Which kinds of layers are masked is a finding of the paper, not a step of it: those whose gradient on the task is
    large. `tensors` takes that step, before training, for the task at hand.

    As in the released code and unlike the method's name the patch embedding is masked, too; and the first term's norm
    is not squared.

    Args:
        sites: The linears and convolutions among these sites; whole fused tensors go before their slices.
        tensors: How many of these are masked: those with the largest mean |dL/dm| on training batches; None for all.
        batches: Batches that the gradients are taken of, at most.
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
        tensors: PositiveInt | None = None, batches: PositiveInt = 16, threshold: float = 5e-3,
        init: float = 1e-2, gate_strength: Share = 0.3, norm_weight: NonNegativeFloat = 1e-4,
        temperature: PositiveFloat = 1.0,
    ) -> None:  # fmt: skip
        if init <= threshold:
            raise ConfigError(
                f"method.init: {init:g} is not above method.threshold, {threshold:g}, so that no weight would be kept"
            )
        self.sites = Selector.parse(sites)
        self.tensors = tensors
        self.batches = batches
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
        """A mask per tensor, or none until calibration has chosen.

        Raises:
            AttachError: There are fewer tensors than shall be chosen.
        """
        found = adapter.backbone.anatomy.select(self.sites, needs="weight", fused=True)
        sites = {site.name: site for site in found if site.op == "linear" or site.op.startswith("conv")}
        masks: dict[str, Mask] = {}
        if self.tensors is None:
            for site in sites.values():
                self.mask(adapter, site, masks)
        elif self.tensors > len(sites):
            raise AttachError(f"method.tensors: {self.tensors} are asked for, method.sites selects {len(sites)}")
        else:
            adapter.listen(MaskChoice(self, adapter, sites, masks), name="r_amt_choice")
        kind = RegularisedMasks if self.gate_strength else Masks
        adapter.listen(kind(self, adapter, masks), name="r_amt", training_only=True)

    def mask(self, adapter: Adapter, site: WeightSite, masks: dict[str, Mask]) -> None:
        """Mask one tensor."""
        masks[site.name] = Mask(site.shape, threshold=self.threshold, init=self.init)
        adapter.reparametrise(site, masks[site.name])
        adapter.optimise(f"{site.name}.mask_logit", decay=False)
