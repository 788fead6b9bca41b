"""LoCA: location-aware cosine adaptation (ICLR 2025, arXiv:2502.06820)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Selector
from peft_modal.anatomy.context import in_backward
from peft_modal.attach import Adapter, LifeCycle, Run
from peft_modal.attach.dense_update import DenseUpdate
from peft_modal.errors import AttachError
from peft_modal.methods.base import Method
from peft_modal.ranges import DropRate, NonNegativeInt, PositiveFloat, PositiveInt, Share

SavedFor: TypeAlias = Any  # torch's context takes any attribute
Transform = Literal["dense", "sparse"]
CYCLE: Final = 30
"""Forward passes of one turn of the alternation: coefficients first, then positions."""
COEFFICIENT_PASSES: Final = 10
_LAST: Final = 0.999


class LoCA(Method):
    """Updates made of a few cosines whose places are learnt, too (ICLR 2025, arXiv:2502.06820).

    dW = alpha * C_p^T S C_q for a weight (p, q): the inverse of the orthonormal two-dimensional cosine transform of a
    spectrum S with n entries a_k at (r_k, c_k). The places are positions in 0..1 times the sides, rounded; their
    gradients are half the differences to the neighbouring entries of the transformed gradient, times a_k, cut to -1..1.
    For a share of the run coefficients and positions are trained in turn, ten forward passes and twenty; then the
    positions stay. Starts at zero. Merges exactly. The paper's counts leave the positions out. Without dropout the
    update is part of the weight; with it, it acts beside the call: y = x W^T + dropout(x) dW^T.

    Args:
        sites: Linears to update; see `Selector`.
        num_frequencies: n of each site.
        alpha: Factor of the update.
        location_share: Share of the run's steps in which positions are trained, too.
        location_steps: The same as a number of forward passes; goes before the share.
        location_lr: Learning rate of the positions.
        transform: How dW is computed: with `dense` matrices of the spectrum's size, or from the `sparse` entries
            alone, which is cheaper for small n and gives the same.
        dropout: Probability of zeroing an input channel of the update.
    """

    identity_at_init = True

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = ["attn.q", "attn.v"],  # noqa: B006 — never changed
        num_frequencies: PositiveInt = 1000, alpha: float = 1.0, location_share: Share = 0.1,
        location_steps: NonNegativeInt | None = None, location_lr: PositiveFloat = 1e-4,
        transform: Transform = "sparse", dropout: DropRate = 0.0,
    ) -> None:  # fmt: skip
        self.sites = Selector.parse(sites)
        self.num_frequencies = num_frequencies
        self.alpha = alpha
        self.location_share = location_share
        self.location_steps = location_steps
        self.location_lr = location_lr
        self.transform: Transform = transform
        self.dropout = dropout

    def build(self, adapter: Adapter) -> None:
        """A spectrum per site.

        Raises:
            AttachError: A site is no linear, or dropout is asked for where there is no call.
        """
        spectra = []
        for site in adapter.backbone.anatomy.select(self.sites, needs="weight"):
            if site.op != "linear" or len(site.shape) != 2:
                raise AttachError(f"'{site.name}' is no linear; leave it out of method.sites")
            spectrum = Spectrum(
                (site.shape[0], site.shape[1]), self.num_frequencies, alpha=self.alpha,
                location_steps=self.location_steps, transform=self.transform, dropout=self.dropout,
            )  # fmt: skip
            if self.dropout:
                adapter.dense_update(site, spectrum)
            else:
                adapter.reparametrise(site, spectrum)
            adapter.optimise(f"{site.name}.location", lr=self.location_lr)
            spectra.append(spectrum)
        if self.location_steps is None:
            adapter.listen(Alternation(spectra, self.location_share), name="loca", training_only=True)


class Alternation(LifeCycle):
    """Tells the spectra for how many steps positions are trained.

    Args:
        spectra: Of all sites.
        share: Of the run's steps.
    """

    def __init__(self, spectra: list[Spectrum], share: float) -> None:
        super().__init__()
        self.__dict__["spectra"] = spectra  # owned by their sites
        self.share = share

    @override
    def on_fit_start(self, run: Run) -> None:
        for spectrum in self.__dict__["spectra"]:
            spectrum.location_steps = round(self.share * run.total_steps)


class Spectrum(DenseUpdate):
    """W + dW for a weight (p, q), or dW beside the call.

    Args:
        shape: (p, q).
        count: Entries of the spectrum.
        alpha: Factor of dW.
        location_steps: Training passes in which positions take turns; None for all, until a run says.
        transform: See `LoCA`.
        dropout: See `LoCA`.
    """

    step: Tensor
    """Training passes so far."""

    def __init__(
        self, shape: tuple[int, int], count: int, *, alpha: float, location_steps: int | None, transform: Transform,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(dropout=dropout)
        self.shape = shape
        self.alpha = alpha
        self.location_steps = location_steps
        self.transform: Transform = transform
        self.coef = nn.Parameter(torch.empty(count))
        self.location = nn.Parameter(torch.empty(2, count))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Coefficients zero, positions anywhere."""
        nn.init.zeros_(self.coef)
        nn.init.uniform_(self.location)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight and its update, in its own dtype."""
        return weight + self.delta().to(weight.dtype)

    @override
    def generators(self) -> tuple[Tensor, ...]:
        """Coefficients and positions; those whose turn it is not are cut off. Counts a training pass."""
        trains_coef, trains_location = self._turn()
        coef = self.coef if trains_coef else self.coef.detach()
        return coef, self.location if trains_location else self.location.detach()

    @override
    def generate(self, *tensors: Tensor) -> Tensor:
        """The update's transpose, (q, p)."""
        coef, location = tensors
        sparse = self.transform == "sparse"
        return cast("Tensor", _InverseCosine.apply(coef, location, self.shape, self.alpha, sparse)).T

    def index(self) -> Tensor:
        """Rows and columns of the entries, (2, n) int64."""
        return _index(self.location.detach(), self.shape)

    def _turn(self) -> tuple[bool, bool]:
        """Whether coefficients and positions learn in this pass."""
        if not self.training:
            return True, True
        step = int(self.step)
        if not in_backward():
            self.step += 1
        elif step:
            # A checkpointed block is computed again with the turn that its first pass had.
            step -= 1
        if self.location_steps is not None and step >= self.location_steps:
            return True, False
        trains_coef = step % CYCLE < COEFFICIENT_PASSES
        return trains_coef, not trains_coef


class _InverseCosine(torch.autograd.Function):
    """The update alpha C_p^T S C_q; see `LoCA` for the gradient of the positions."""

    @staticmethod
    def forward(
        ctx: SavedFor, coef: Tensor, location: Tensor, shape: tuple[int, int], alpha: float, sparse: bool
    ) -> Tensor:
        """The update, of shape (p, q)."""
        rows, columns = _index(location, shape)
        ctx.save_for_backward(coef, location, rows, columns)
        ctx.shape, ctx.alpha = shape, alpha
        over, along = (cosines(side, coef.dtype, coef.device) for side in shape)
        if sparse:
            return (over[rows].T * (alpha * coef)) @ along[columns]
        spectrum = coef.new_zeros(shape).index_put_((rows, columns), coef, accumulate=True)
        return alpha * (over.T @ spectrum @ along)

    @staticmethod
    def backward(ctx: SavedFor, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of coefficients and positions."""
        coef, location, rows, columns = ctx.saved_tensors
        over, along = (cosines(side, coef.dtype, coef.device) for side in ctx.shape)
        spectrum = ctx.alpha * (over @ grad.to(coef.dtype) @ along.T)
        grad_coef = spectrum[rows, columns] if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_coef, None, None, None, None
        steps = []
        for axis, (side, here) in enumerate(zip(ctx.shape, (rows, columns), strict=True)):
            after, before = (here + 1).clamp(max=side - 1), (here - 1).clamp(min=0)
            up, down = (spectrum[moved, columns] if axis == 0 else spectrum[rows, moved] for moved in (after, before))
            # Cut before the chain to the grid, as released.
            steps.append((coef / 2 * (up - down)).clamp(-1, 1) * (side - 1))
        is_inside = (location >= 0) & (location <= _LAST)
        return grad_coef, torch.stack(steps) * is_inside, None, None, None


def _index(location: Tensor, shape: tuple[int, int]) -> Tensor:
    # Always in one type: in another, a product near a half would be rounded to the other side.
    location = location.to(torch.float32)
    sides = torch.tensor([[side - 1] for side in shape], dtype=location.dtype, device=location.device)
    return (location.clamp(0.0, _LAST) * sides).round().to(torch.int64)


@lru_cache(maxsize=16)
def cosines(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal matrix of the cosine transform (DCT-II), (side, side); row i is the i-th frequency."""
    number = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(torch.pi * (2 * number + 1) * number[:, None] / (2 * side)) * (2 / side) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.to(device, dtype)
