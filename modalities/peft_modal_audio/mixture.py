"""Mixtures of adapters (Cappellazzo et al., Interspeech 2024, arXiv:2402.00828)."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError
from peft_modal.methods.base import Method, beside_mlp, select_blocks
from peft_modal.methods.bottleneck import Bottleneck, BottleneckInit
from peft_modal.methods.placement import Placement
from peft_modal.ranges import PositiveInt, Range
from peft_modal_audio.conformer import Places, halves_of

Routing = Literal["soft", "dense"]
Variant = Literal["corrected", "reference"]
Experts: TypeAlias = Annotated[int, Range(1, 256)]
"""Each is a module of its own."""
_EPS: Final = 1e-6
"""Added to norms that are divided by."""


class MixtureOfAdapters(Method):
    """Several bottlenecks beside a sub-layer, each token's or slot's share of them learned (Cappellazzo et al., 2024).

    Dense: out = sum_e w_e A_e(u), w = softmax(R u + r) for each token. Soft, after Puigcerver et al. (ICLR 2024,
    arXiv:2308.00951): with logits u Phi, a slot reads tokens by their softmax over the tokens, expert e runs on its own
    slots, and a token reads all slots by their softmax over slots.

    Args:
        routing: `soft` or `dense`.
        experts: Bottlenecks.
        slots: Slots of each expert, soft.
        hidden_dim: Width of each bottleneck.
        places: Beside attention (what the paper calls Pfeiffer), the MLP, or both (Houlsby).
        normalise: Divide u and Phi by their norms, and multiply by a learned factor; soft. The experiments do not.
        variant: `reference` does what the released code does: beside attention alone, what the mixture gives there is
            added to the MLP's sum a second time; and Phi's norm is that along its experts, not along its channels.
        train_norms: Train the norms in front of the adapted sub-layers, too, as the paper does.
        init: Of the bottlenecks, see `Bottleneck`; `normal` is what the published runs had, the router alike.
        blocks: Blocks to adapt; see `Selector`; None for all.

    Raises:
        ConfigError: A dense mixture is told to normalise, or to have slots.
    """

    def __init__(
        self, *, routing: Routing = "soft", experts: Experts = 7, slots: PositiveInt = 1,
        hidden_dim: PositiveInt = 6, places: Places = "attn", normalise: bool = False, variant: Variant = "corrected",
        train_norms: bool = True, init: BottleneckInit = "zero_up",
        blocks: str | list[int] | dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if routing == "dense" and (normalise or slots != 1):
            raise ConfigError("method.routing: 'dense' has neither slots nor normalise; leave them out")
        self.routing: Routing = routing
        self.experts = experts
        self.slots = slots
        self.hidden_dim = hidden_dim
        self.places: Places = places
        self.normalise = normalise
        self.variant: Variant = variant
        self.init: BottleneckInit = init
        self.where = Selector.parse({"blocks": blocks})
        self.placement = Placement(self.where, "parallel", None, train_norms)

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]
        """Every bottleneck gives zero."""
        return self.init == "zero_up"

    def build(self, adapter: Adapter) -> None:
        """One mixture for each chosen half of each block."""
        self.placement.attach(adapter, halves_of(self.places), self._mixture)
        if self.variant == "reference" and self.places == "attn":
            anatomy = adapter.backbone.anatomy
            for tap in select_blocks(anatomy, self.where, role="attn.norm.out"):
                block = f"{tap.name.removesuffix('.attn.norm.out')}.attn.branch"
                module = adapter.adapter.get_submodule(block)
                adapter.branch(tap, beside_mlp(anatomy, tap), module, name="")

    def _mixture(self, width: int) -> nn.Module:
        experts = [Bottleneck(width, hidden_dim=self.hidden_dim, init=self.init) for _ in range(self.experts)]
        if self.routing == "dense":
            return DenseMixture(width, experts)
        axis: Literal[0, 1] | None = None
        if self.normalise:
            axis = 1 if self.variant == "reference" else 0
        return SoftMixture(width, experts, slots=self.slots, normalised_axis=axis)


class DenseMixture(nn.Module):
    """Sum_e w_e A_e(u) for tokens u (B, N, D).

    Args:
        width: D.
        experts: The A_e, at least one.
    """

    def __init__(self, width: int, experts: list[Bottleneck]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Linear(width, len(experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The router normal with standard deviation 0.02; the experts draw themselves."""
        nn.init.normal_(self.router.weight, std=0.02)
        nn.init.zeros_(self.router.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Of the input's shape."""
        shares = self.router(u).softmax(-1)  # (B, N, E)
        given = torch.stack([expert(u) for expert in self.experts], dim=-1)  # (B, N, D, E)
        return (given * shares[..., None, :]).sum(-1)


class SoftMixture(nn.Module):
    """Experts on slots for tokens u (B, N, D).

    Args:
        width: D.
        experts: One or more.
        slots: p, of each expert.
        normalised_axis: Normalise u and Phi, the latter along this axis; None for neither.
    """

    def __init__(
        self, width: int, experts: list[Bottleneck], *, slots: int, normalised_axis: Literal[0, 1] | None = None
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.slots = nn.Parameter(torch.empty(width, len(experts), slots))
        self.normalised_axis = normalised_axis
        self.scale = nn.Parameter(torch.empty(1)) if normalised_axis is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Phi Xavier normal, as PyTorch counts the fans of a tensor of three axes; the factor 1."""
        nn.init.xavier_normal_(self.slots)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def forward(self, u: Tensor) -> Tensor:
        """Of the input's shape."""
        phi: Tensor = self.slots
        if self.scale is not None:
            assert self.normalised_axis is not None
            u = _normalised(u, -1)
            phi = self.scale * _normalised(phi, self.normalised_axis)
        logits = torch.einsum("bnd,dep->bnep", u, phi)
        dispatch = logits.softmax(1)
        combine = logits.flatten(2).softmax(-1).reshape(logits.shape)
        read = torch.einsum("bnd,bnep->bepd", u, dispatch)
        given = torch.stack([expert(read[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("bepd,bnep->bnd", given, combine)


def _normalised(x: Tensor, axis: int) -> Tensor:
    return x / (x.norm(dim=axis, keepdim=True) + _EPS)
