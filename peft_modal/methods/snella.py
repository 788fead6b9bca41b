"""SNELLA: kernelised sparse tuning with bi-level competition (2025, arXiv:2510.24037)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter, LifeCycle, Run
from peft_modal.errors import ConfigError
from peft_modal.methods.base import Method
from peft_modal.methods.snell import LINEARS, KernelUpdate, check_pieces, drops, own_class_token, select_linears
from peft_modal.ranges import DropRate, NonNegativeInt, PositiveInt, Share

Form = Literal["sparse", "mixk"]
BETAS = (0.85, 0.85)
"""Of the moving averages of the importance and of its uncertainty."""


class SNELLA(Method):
    """SNELL with a richer kernel, and linears that compete for a shrinking number of entries (2025, arXiv:2510.24037).

    D = E + alpha softmax(E / gamma, over the outputs) + beta, with SNELL's kernel E and three trained numbers per
    linear. Within a linear entries compete by magnitude as in SNELL; the linears compete at the start of every epoch: V
    entries, which fall from the initial to the target share along a cubic, are shared out in proportion to sensitivity
    times uncertainty of A and B. At the start D is about 1 / outputs everywhere, so the update is not zero. Merges
    exactly.

    Args:
        sites: Linears to update; see `Selector`.
        rank: r; both pieces have the width r / 2, rounded down.
        initial_sparsity: Share of zeros in the first epoch.
        target_sparsity: Share of zeros of all linears together in the end.
        initial_epochs: Epochs after the first that keep the initial share.
        final_epochs: Last epochs that keep the target.
        interval: Epochs between two allocations.
        betas: Of the moving averages of importance and uncertainty.
        form: `sparse`, or `mixk`: D itself is the update, and nothing competes.
        dropout: See `SNELL`.
        drop_path: See `SNELL`.
        train_cls: Train the class token, where there is one.
    """

    identity_at_init = False

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = list(LINEARS),  # noqa: B006 — never changed
        rank: PositiveInt = 32, initial_sparsity: Share = 0.01, target_sparsity: Share = 0.8,
        initial_epochs: NonNegativeInt = 0, final_epochs: NonNegativeInt = 0, interval: PositiveInt = 1,
        betas: tuple[Share, Share] = BETAS, form: Form = "sparse", dropout: DropRate = 0.1, drop_path: DropRate = 0.1,
        train_cls: bool = True,
    ) -> None:  # fmt: skip
        check_pieces(rank=rank, pieces=2)
        if max(initial_sparsity, target_sparsity) >= 1.0:
            raise ConfigError("method.target_sparsity: 1 leaves nothing to train; use less")
        self.sites = Selector.parse(sites)
        self.rank = rank
        self.initial_sparsity = initial_sparsity
        self.target_sparsity = target_sparsity
        self.initial_epochs = initial_epochs
        self.final_epochs = final_epochs
        self.interval = interval
        self.betas = betas
        self.form: Form = form
        self.dropout = dropout
        self.drop_path = drop_path
        self.train_cls = train_cls

    @classmethod
    def example(cls) -> SNELLA:
        """Without dropout, which weights that are read inside a function do not take."""
        return cls(dropout=0.0, drop_path=0.0)

    def build(self, adapter: Adapter) -> None:
        """One kernel per linear, and the competition."""
        updates: dict[str, MixedKernelUpdate] = {}
        for site in select_linears(adapter, self.sites):
            updates[site.name] = MixedKernelUpdate(
                site.shape[1], site.shape[0], rank=self.rank, sparsity=self.initial_sparsity,
                is_sparse=self.form == "sparse", **drops(site, self.dropout, self.drop_path),
            )  # fmt: skip
            adapter.dense_update(site, updates[site.name])
        if self.form == "sparse":
            allocator = Allocator(
                updates, initial_sparsity=self.initial_sparsity, target_sparsity=self.target_sparsity,
                initial_epochs=self.initial_epochs, final_epochs=self.final_epochs, interval=self.interval,
                betas=self.betas,
            )  # fmt: skip
            adapter.listen(allocator, name="allocator", training_only=True)
        if self.train_cls:
            own_class_token(adapter, self.sites)


class Mix(nn.Module):
    """The three numbers of one linear's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.gamma = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.zeros(1))


class MixedKernelUpdate(KernelUpdate):
    """The sparse update of one linear.

    Args:
        inputs: Columns of the weight.
        outputs: Rows of the weight.
        rank: r.
        sparsity: Share of zeros to begin with.
        is_sparse: Whether entries compete.
        dropout: See `DenseUpdate`.
        drop_path: See `DenseUpdate`.
    """

    def __init__(
        self, inputs: int, outputs: int, *, rank: int, sparsity: float, is_sparse: bool = True, dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs, rank=rank, sparsity=sparsity, dropout=dropout, drop_path=drop_path)
        self.is_sparse = is_sparse
        self.mix = Mix()

    @property
    def is_dense(self) -> bool:
        """Whether the kernel itself is the update; with sparsity 0 entries compete, too, and the smallest loses."""
        return not self.is_sparse

    def generators(self) -> tuple[Tensor, ...]:
        """A, B and the three numbers."""
        return self.factor_in, self.factor_out, self.mix.alpha, self.mix.gamma, self.mix.beta

    def dense(self, *tensors: Tensor) -> Tensor:
        """D (in, out)."""
        factor_in, factor_out, alpha, gamma, beta = tensors
        kernel = super().dense(factor_in, factor_out)
        return kernel + alpha * (kernel / gamma).softmax(-1) + beta


class Allocator(LifeCycle):
    """The competition between linears.

    After every step I = |X grad X| of each factor, with moving averages of I and of its deviation from that average; at
    the start of an epoch the budget is shared out. Counts are in float64, where 85 M entries are exact.

    Args:
        updates: By name, in order.
        initial_sparsity: See `SNELLA`.
        target_sparsity: See `SNELLA`.
        initial_epochs: See `SNELLA`.
        final_epochs: See `SNELLA`.
        interval: See `SNELLA`.
        betas: See `SNELLA`.
    """

    def __init__(
        self, updates: Mapping[str, KernelUpdate], *, initial_sparsity: float, target_sparsity: float,
        initial_epochs: int = 0, final_epochs: int = 0, interval: int = 1, betas: tuple[float, float] = BETAS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.__dict__["updates"] = dict(updates)  # owned by their sites
        self.initial_sparsity = initial_sparsity
        self.target_sparsity = target_sparsity
        self.initial_epochs = initial_epochs
        self.final_epochs = final_epochs
        self.interval = interval
        self.betas = betas
        self.total_epochs: int | None = None
        self.budget = float("nan")
        """Entries that may differ from zero in the current epoch."""
        self.scores: Tensor | None = None
        """Share of each linear at the last allocation."""
        self.averages = nn.ModuleDict()
        for number, update in enumerate(updates.values()):
            self.averages[str(number)] = Averages(update)

    @property
    def _updates(self) -> dict[str, KernelUpdate]:
        return self.__dict__["updates"]

    @override
    def site_entries(self) -> Mapping[str, int]:
        """Entries that may differ from zero, by linear."""
        return {name: round((1.0 - float(update.sparsity)) * _size(update)) for name, update in self._updates.items()}

    @override
    def on_fit_start(self, run: Run) -> None:
        """Learn how many epochs there are.

        Raises:
            ConfigError: The run counts steps alone, or is no longer than the epochs that keep a share.
        """
        if run.total_epochs is None:
            raise ConfigError("trainer.max_epochs: snella shares entries out by the epoch; set a number of epochs")
        kept = self.initial_epochs + self.final_epochs
        if kept and run.total_epochs <= kept:
            raise ConfigError(
                f"method.final_epochs: {kept} epochs keep a share, and the run has {run.total_epochs}; give it more"
            )
        self.total_epochs = run.total_epochs

    @override
    def after_step(self, step: int) -> None:
        gradients = [p.grad for u in self._updates.values() for p in (u.factor_in, u.factor_out) if p.grad is not None]
        # A step whose gradients overflowed was not taken.
        if any(bool(gradient.isinf().any()) for gradient in gradients):
            return
        for averages, update in zip(self.averages.values(), self._updates.values(), strict=True):
            averages.update(update, self.betas)  # type: ignore[operator]

    @override
    def on_epoch_start(self, epoch: int) -> None:
        assert self.total_epochs is not None
        sizes = [_size(update) for update in self._updates.values()]
        first, last = ((1.0 - s) * sum(sizes) for s in (self.initial_sparsity, self.target_sparsity))
        if epoch <= self.initial_epochs:
            self.budget = first
            return
        if epoch > self.total_epochs - self.final_epochs:
            self.budget, is_due = last, True
        else:
            done = (epoch - self.initial_epochs) / (self.total_epochs - self.final_epochs - self.initial_epochs)
            self.budget, is_due = int(last + (first - last) * (1.0 - done) ** 3), epoch % self.interval == 0
        scores = torch.stack([averages.score() for averages in self.averages.values()])  # type: ignore[operator]
        total = float(scores.sum())
        # Before anything has moved there is nothing to tell the linears apart.
        if not is_due or not total > 0.0:
            return
        self.scores = scores / total
        for update, count, size in zip(
            self._updates.values(), share_out(self.budget, self.scores.tolist(), sizes), sizes, strict=True
        ):
            update.sparsity.fill_(min(1.0, max(0.0, 1.0 - count / size)))


class Averages(nn.Module):
    """Moving averages of one linear's importance and its uncertainty.

    Args:
        update: Whose factors.
    """

    def __init__(self, update: KernelUpdate) -> None:
        super().__init__()
        for side, factor in (("in", update.factor_in), ("out", update.factor_out)):
            for kind in ("importance", "uncertainty"):
                self.register_buffer(f"{kind}_{side}", torch.zeros_like(factor))

    @torch.no_grad()
    def update(self, update: KernelUpdate, betas: tuple[float, float]) -> None:
        """Add one step's factors, as stepped, and gradients."""
        for side, factor in (("in", update.factor_in), ("out", update.factor_out)):
            if factor.grad is None:
                continue
            importance, uncertainty = self.get_buffer(f"importance_{side}"), self.get_buffer(f"uncertainty_{side}")
            now = (factor * factor.grad).abs().nan_to_num(0.0)
            importance.mul_(betas[0]).add_(now, alpha=1.0 - betas[0])
            # Against the new average.
            uncertainty.mul_(betas[1]).add_((now - importance).abs(), alpha=1.0 - betas[1])

    def score(self) -> Tensor:
        """Mean of importance times uncertainty, of both factors together; float64 scalar."""
        parts = [
            (self.get_buffer(f"importance_{side}") * self.get_buffer(f"uncertainty_{side}")).double().mean()
            for side in ("in", "out")
        ]
        return parts[0] + parts[1]


def share_out(budget: float, scores: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Whole numbers of entries in proportion to the scores, none above its size; what is left goes to those with room.

    Args:
        budget: Entries in all.
        scores: Shares, which sum to 1.
        sizes: Entries that each has.
    """
    counts = [min(float(size), math.floor(budget * score)) for score, size in zip(scores, sizes, strict=True)]
    left = budget - sum(counts)
    is_filled = True
    # A round that fills none has shared out all that was left.
    while left > 0 and is_filled:
        room = [i for i, size in enumerate(sizes) if counts[i] < size]
        total = sum(scores[i] for i in room)
        if not room or total <= 0.0:
            break
        added = {i: min(left * scores[i] / total, sizes[i] - counts[i]) for i in room}
        for i, count in added.items():
            counts[i] += count
        left = budget - sum(counts)
        is_filled = any(counts[i] >= sizes[i] for i in room)
    return [math.floor(count) for count in counts]


def _size(update: KernelUpdate) -> int:
    return update.factor_in.shape[1] * update.factor_out.shape[1]
