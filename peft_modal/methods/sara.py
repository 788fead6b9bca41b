"""SaRA: progressive sparse low-rank adaptation (Hu et al., ICLR 2025, arXiv:2409.06633)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from peft_modal.anatomy import Backbone, Selector, WeightSite
from peft_modal.attach import Adapter, LifeCycle, Run, SparseEntries
from peft_modal.attach.sparse import part_of
from peft_modal.data.seeding import seeded
from peft_modal.errors import AttachError, BackboneMismatchError, ConfigError, FileFormatError
from peft_modal.methods.base import Method
from peft_modal.methods.magnitude import magnitude, magnitude_at
from peft_modal.ranges import NonNegativeFloat, PositiveFloat, Share

FORMAT: Final = "sara-v1"
"""Of the index and delta tensors in an adapter file."""
DEFAULT_SHARE: Final = 0.05
"""About what the paper's 50 M of Stable Diffusion 1.5's 860 M entries are."""
_FITTED_UP_TO: Final = 1e-2
_SHORT_SIDE: Final = 64
_TOO_FEW: Final = 100


def default_lr(threshold: float) -> float:
    """The learning rate that the authors use where none is given: 1e-3 * exp(-350 * threshold).

    A fit of the best rates on Stable Diffusion 1.5, for thresholds up to 0.01; give it to the task as `lr`.

    Raises:
        ConfigError: The threshold lies outside the fit.
    """
    if not 0.0 <= threshold <= _FITTED_UP_TO:
        raise ConfigError(
            f"task.lr: SaRA's default is fitted for thresholds from 0 to {_FITTED_UP_TO}, not for {threshold:g}; "
            "choose a rate"
        )
    return 1e-3 * math.exp(-350.0 * threshold)


class SaRA(Method):
    """Train the entries of smallest magnitude (Hu et al., SaRA, ICLR 2025, arXiv:2409.06633).

    Of every selected tensor, biases and norms included, the entries with |w| < threshold are trained, with gradients
    and optimiser state of their number. Once per optimiser step the nuclear norm of one random matrix of trained
    entries (its other entries zero) is added to the objective, after clipping. After a share of the run only those
    trained entries go on that are still below the threshold; the others keep the value they have. The task's weight
    decay pulls the entries themselves to zero, not their change. Merges exactly; `Adapter.weight` scales the change,
    and the changes of several adapters add up.

    The released optimisers differ: of the two, this follows the masked one. The compact one starts from |w| instead of
    w, never applies the rank loss to what it trains, and at re-selection drops its moments and one update (for the
    moments alone: `reset_state_on_reselect`). `default_lr` has the learning rate that goes with a threshold.

    Args:
        sites: Weight sites to take entries from; the default is all that the anatomy lists. Whole fused tensors are
            taken where both they and their slices are named.
        threshold: Strict upper limit of the magnitude, looked at in float32. The paper's are 2e-4, 8e-4 and 2e-3.
        share: Share of the entries of all selected tensors together; the threshold is the quantile there. Either this
            or `threshold`; 0.05 where neither is given.
        rank_weight: Weight of the nuclear norm: 5e-4 as released, 5e-3 in the paper's appendix; 0 for none.
        reselect_share: Share of the run's optimiser steps after which entries are selected again; null for never.
        reset_state_on_reselect: Start the optimiser's moments anew then.

    Raises:
        ConfigError: Both `threshold` and `share` are given, or a number is outside its range.
    """

    identity_at_init = True

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = {},  # noqa: B006 — never changed
        threshold: PositiveFloat | None = None, share: Share | None = None, rank_weight: NonNegativeFloat = 5e-4,
        reselect_share: Share | None = 0.5, reset_state_on_reselect: bool = False,
    ) -> None:  # fmt: skip
        if threshold is not None and share is not None:
            raise ConfigError(
                "method.share: the threshold is given already; give one of the two, and null for the other"
            )
        if share is not None and not 0.0 < share <= 1.0:
            raise ConfigError(f"method.share: {share} is not above 0 and at most 1")
        self.sites = Selector.parse(sites)
        self.threshold = threshold
        self.share = DEFAULT_SHARE if threshold is None and share is None else share
        self.rank_weight = rank_weight
        self.reselect_share = reselect_share
        self.reset_state_on_reselect = reset_state_on_reselect

    def build(self, adapter: Adapter) -> None:
        """Select entries of every tensor, and take part in the run.

        Raises:
            AttachError: No entry is below the threshold.
        """
        sites = self._sites(adapter)
        weights = [loaded_of(adapter.backbone, site) for site in sites.values()]
        threshold = self._threshold(weights)
        tuned: dict[str, SparseEntries] = {}
        for (name, site), weight in zip(sites.items(), weights, strict=True):
            below = (magnitude(weight) < threshold).flatten()
            tuned[name] = adapter.sparse(site, below.nonzero().flatten(), decay=True)
        if all(entries.is_empty for entries in tuned.values()):
            raise AttachError(
                f"no entry of the {len(sites)} selected tensors is below {threshold:g}, the smallest has "
                f"{magnitude_at(weights, 0):g}; raise method.{'threshold' if self.share is None else 'share'}"
            )
        seed = int(torch.randint(2**31, ()))
        adapter.listen(SaRARun(self, adapter, sites, tuned, threshold, seed), name="sara", training_only=True)

    def _sites(self, adapter: Adapter) -> dict[str, WeightSite]:
        """The selected sites by the name of their tensor, a tied one once.

        What every method trains whole is left to that.

        Raises:
            AttachError: Nothing is left.
        """
        anatomy, backbone = adapter.backbone.anatomy, adapter.backbone
        seen = {(id(backbone.tensor(site.path)), site.rows) for site in anatomy.always_trained}
        sites = {}
        for site in anatomy.select(self.sites, needs=("weight", "leaf"), fused=True, optional=True):
            key = (id(backbone.tensor(site.path)), site.rows)
            if key not in seen:
                seen.add(key)
                sites[site.path if site.rows is None else site.name] = site
        if not sites:
            raise AttachError("every selected tensor is trained whole by any method on this backbone; select others")
        return sites

    def _threshold(self, weights: list[Tensor]) -> float:
        if self.share is None:
            assert self.threshold is not None
            return self.threshold
        total = sum(weight.numel() for weight in weights)
        wanted = round(self.share * total)
        return magnitude_at(weights, wanted) if wanted < total else torch.finfo(torch.float32).max


class SaRARun(LifeCycle):
    """Rank loss and re-selection.

    Args:
        method: The configuration.
        adapter: Whose entries are trained.
        sites: The selected sites by the name of their tensor.
        tuned: Their entries.
        threshold: Strict upper limit of the magnitude.
        seed: Of the choice of matrices.
    """

    reselected_after: Tensor
    """Optimiser steps before the re-selection, or -1."""

    def __init__(
        self, method: SaRA, adapter: Adapter, sites: Mapping[str, WeightSite], tuned: Mapping[str, SparseEntries],
        threshold: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.method = method
        self.sites = dict(sites)
        self.tuned = dict(tuned)
        self.matrices = [name for name, site in sites.items() if len(site.shape) == 2 and min(site.shape) > _SHORT_SIDE]
        """Candidates of the rank loss."""
        self.threshold = threshold
        self.seed = seed
        self.reselect_step: int | None = None
        self.register_buffer("reselected_after", torch.tensor(-1))
        self.__dict__["_adapter"] = adapter  # no submodule: it is the parent
        self._run: Run | None = None
        self._rank_loss: float | None = None

    @override
    def on_fit_start(self, run: Run) -> None:
        """Learn how long the run is.

        Raises:
            ConfigError: Several processes train, which cannot follow a change of sizes.
        """
        share = self.method.reselect_share
        self.reselect_step = None if share is None else round(share * run.total_steps)
        if self.reselect_step is not None and self.reselect_step < run.total_steps and run.world_size > 1:
            raise ConfigError(
                "method.reselect_share: re-selection changes how many entries are trained, which several processes "
                "cannot follow; set it to null, or train in one process"
            )
        self._run = run

    @override
    def step_begin(self, step: int) -> None:
        if self.reselect_step is not None and step >= self.reselect_step and int(self.reselected_after) < 0:
            self.reselect()
            self.reselected_after.fill_(step)

    @override
    def before_step(self, step: int) -> None:
        """Add the gradient of the rank loss of one matrix; it is not clipped, so it is no penalty of the loss."""
        self._rank_loss = None
        name = self.pick(step)
        if name is None or self.tuned[name].values.numel() <= _TOO_FEW:
            return
        value, gradient = self.rank_loss(name)
        self._rank_loss = float(value)
        values = self.tuned[name].values
        if values.grad is None:
            values.grad = gradient
        else:
            values.grad.add_(gradient)

    @override
    def figures(self) -> Mapping[str, float]:
        return {} if self._rank_loss is None else {"rank_loss": self._rank_loss}

    @override
    def finalise(self) -> None:
        """Hold every entry that was ever trained as a trained one again."""
        for entries in self.tuned.values():
            entries.widen()
        self._run = None

    @override
    def facts(self) -> Mapping[str, Any]:
        return {
            "format": FORMAT,
            "threshold": self.threshold,
            "reselect_step": int(self.reselected_after) if int(self.reselected_after) >= 0 else None,
            "base_sha256": self.base_sha256(),
            "alpha": self._own.weight,
        }

    @override
    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Check that the file was made on this base, and scale the change as it says.

        Raises:
            FileFormatError: It is of another format.
            BackboneMismatchError: The base values of the entries are others.
        """
        if facts.get("format") != FORMAT:
            raise FileFormatError(
                f"the file's SaRA entries are of format {facts.get('format')!r}, this peft_modal reads {FORMAT!r}; "
                "train again, or use the version that wrote it"
            )
        found = self.base_sha256()
        if facts.get("base_sha256") != found:
            raise BackboneMismatchError(
                "the SaRA entries were trained on other weights: base_sha256 "
                f"{str(facts.get('base_sha256'))[:12]} in the file, {found[:12]} here; get the same backbone weights, "
                "or train again"
            )
        alpha = facts.get("alpha")
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise FileFormatError(f"the file's alpha is {alpha!r}, not a number; copy or train it again")
        self._own.weight = float(alpha)

    def pick(self, step: int) -> str | None:
        """The matrix whose rank loss counts in a step; drawn with replacement, by the step's own number."""
        if not self.matrices or self.method.rank_weight == 0:
            return None
        drawn = torch.randint(len(self.matrices), (1,), generator=seeded("sara", self.seed, step))
        return self.matrices[int(drawn)]

    @torch.no_grad()
    def rank_loss(self, name: str) -> tuple[Tensor, Tensor]:
        """Weighted nuclear norm of one matrix of trained entries, zero elsewhere, and its gradient at those entries."""
        entries = self.tuned[name]
        index = entries.index.to(torch.int64)
        matrix = entries.values.new_zeros(self.sites[name].shape, dtype=torch.float64)
        matrix.view(-1).index_copy_(0, index, entries.values.to(torch.float64))
        value, gradient = nuclear_norm(matrix)
        weight = self.method.rank_weight
        return weight * value, weight * gradient.flatten().index_select(0, index).to(entries.values.dtype)

    @torch.no_grad()
    def reselect(self) -> None:
        """Train on only the entries that are still below the threshold."""
        for entries in self.tuned.values():
            alive = magnitude(entries.values) < self.threshold
            if bool(alive.all()):
                continue
            former, kept = entries.narrow(alive)
            if self._run is not None:
                survivors = None if self.method.reset_state_on_reselect else kept
                self._run.parameters.replace(former, entries.values, survivors)

    def base_sha256(self) -> str:
        """Hash over the values that the entries had when the backbone was loaded, in float32."""
        digest = hashlib.sha256()
        for name, entries in self.tuned.items():
            index, _ = entries.tuned()
            loaded = loaded_of(self._own.backbone, self.sites[name]).flatten().index_select(0, index)
            digest.update(f"{name}|{index.numel()}|".encode())
            digest.update(loaded.to("cpu", torch.float32).numpy().tobytes())
        return digest.hexdigest()

    @property
    def _own(self) -> Adapter:
        return self.__dict__["_adapter"]


def loaded_of(backbone: Backbone, site: WeightSite) -> Tensor:
    """The tensor or slice of a site as loaded."""
    return part_of(backbone.tensor(site.path).detach(), site.rows)


def nuclear_norm(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the singular values, and its gradient U V^T (the subgradient of least norm where there are zeros).

    Through the Gram matrix of the short side in float64, which is as exact as a singular value decomposition in float32
    and needs only the small eigenproblem.

    Args:
        matrix: (m, n), float64.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    negligible = squares[-1] * squares.numel() * torch.finfo(matrix.dtype).eps
    inverse = torch.where(squares > negligible, squares.clamp_min(0.0).rsqrt(), 0.0)
    polar = tall @ ((vectors * inverse) @ vectors.T)
    return squares.clamp_min(0.0).sqrt().sum(), polar if tall is matrix else polar.T
