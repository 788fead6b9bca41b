"""SPT's two stages: sensitivities and their allocation, and what is attached by it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from peft_modal.anatomy import Backbone, Selector
from peft_modal.attach import Adapter, LifeCycle, LowRankUpdate, Run
from peft_modal.attach.lifecycle import Batch, Losses
from peft_modal.attach.updates import drop_samples
from peft_modal.errors import AttachError, FileFormatError, TrainingError
from peft_modal.methods.base import Method
from peft_modal.methods.calibration import take_gradients
from peft_modal.methods.spt.allocation import Allocation, Target, allocate
from peft_modal.methods.spt.places import MATRICES, Place, places_of
from peft_modal.ranges import DropRate, PositiveFloat, PositiveInt

_LOG = logging.getLogger(__name__)
Form = Literal["lora", "adapter"]
FAR: Final = 0.2
"""Share of the budget that an allocation may miss it by without a word; the sweep's steps alone miss small budgets."""
Init = Literal["zero", "trunc_normal"]


class SPT(Method):
    """Modules where a task is sensitive, single entries elsewhere (He et al., ICCV 2023, arXiv:2303.08566).

    Stage 1, before training: the sensitivity of an entry is the sum over batches of its squared gradient; the most
    sensitive entries of all blocks are looked at, and for a budget of tuned entries a matrix with many of them gets a
    module, a vector with many is tuned whole, and the rest are tuned one by one (see `allocate`). Stage 2 is ordinary
    training. `lora` adds U D x beside a matrix; `adapter` adds U gelu(D y) to its output y (to the attention's output
    projection beside it). q, k and v of a fused matrix are ranked on their own. The LoRA form merges exactly.

    As in the released code, entries of norms that are not tuned whole count but are not trained; `norm_entries` trains
    them. There the network's initialisation runs over the finished modules, so that both factors start normal with
    deviation 0.02: `init: trunc_normal`.

    Args:
        sites: Matrices to rank; see `Selector`. Their biases and the norms of their stacks are ranked with them.
        form: `lora` or `adapter`.
        rank: Width of a module.
        budget: Tuned entries, in units; the papers search it per task on validation data, from 0.2 to 1.
        unit: Entries of one unit.
        alpha: How easily a matrix gets a module: with 1/alpha of the module's entries.
        beta: How easily a vector is tuned whole: with 1/beta of its entries.
        batches: Batches that sensitivities are taken of, at most.
        structured_only: Tune no single entries.
        norm_entries: Train single entries of norms.
        init: `zero` leaves the network as it is at the start; or `trunc_normal`.
        dropout: Probability of zeroing a module's input channel; none before the output projection.
        drop_path: Probability of leaving a sample's module out.
        train_cls: Train the class token, which the budget counts.
    """

    identity_at_init = True  # with `init: zero`

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = list(MATRICES),  # noqa: B006 — never changed
        form: Form = "lora", rank: PositiveInt = 8, budget: PositiveFloat = 0.4, unit: PositiveFloat = 1e6,
        alpha: PositiveFloat = 10.0, beta: PositiveFloat = 5.0, batches: PositiveInt = 16,
        structured_only: bool = False, norm_entries: bool = False, init: Init = "zero", dropout: DropRate = 0.1,
        drop_path: DropRate = 0.1, train_cls: bool = True,
    ) -> None:  # fmt: skip
        self.sites = Selector.parse(sites)
        self.form: Form = form
        self.rank = rank
        self.budget = budget
        self.unit = unit
        self.alpha = alpha
        self.beta = beta
        self.batches = batches
        self.structured_only = structured_only
        self.norm_entries = norm_entries
        self.init: Init = init
        self.dropout = dropout
        self.drop_path = drop_path
        self.train_cls = train_cls
        self.identity_at_init = init == "zero"  # type: ignore[misc]  # of one start alone

    @classmethod
    def example(cls) -> SPT:
        """Without dropout, which weights that are read inside a function do not take."""
        return cls(dropout=0.0, drop_path=0.0)

    def build(self, adapter: Adapter) -> None:
        """Nothing but the class token until the sensitivities are known.

        Raises:
            AttachError: No linear is selected.
        """
        anatomy = adapter.backbone.anatomy
        places = places_of(anatomy, self.sites)
        if not any(place.is_matrix for place in places.values()):
            raise AttachError("no linear is selected; choose others in method.sites")
        overhead = 0
        stacks = {place.site.stack for place in places.values()}
        for site in anatomy.sites:
            if self.train_cls and site.role == "cls" and site.stack in stacks:
                adapter.own(site)
                overhead += site.shape[-1]
        seed = int(torch.randint(2**31, (), device="cpu"))
        adapter.listen(SPTRun(self, adapter, places, overhead, seed), name="spt")

    def target(self, place: Place) -> Target:
        """A place with what its module would cost."""
        if not place.is_matrix:
            return Target(place.name, "vector", place.size)
        outputs, inputs = place.shape
        cost = self.rank * (inputs + outputs)
        if self.form == "adapter":
            cost = 2 * self.rank * outputs + self.rank + outputs
        return Target(place.name, "matrix", place.size, cost)

    def attach_by(self, adapter: Adapter, places: Mapping[str, Place], allocation: Allocation) -> None:
        """Modules, whole vectors and single entries."""
        fused: dict[str, list[tuple[Place, SequentialModule]]] = {}
        for name in allocation.structured:
            place = places[name]
            dropout = 0.0 if place.site.role.endswith("attn.out") else self.dropout
            if self.form == "lora":
                update = LowRankUpdate(
                    place.site.shape, rank=self.rank, dropout=dropout, drop_path=self.drop_path,
                    init="kaiming" if self.init == "zero" else "trunc_normal",
                )  # fmt: skip
                adapter.low_rank(place.site, update)
            else:
                self._sequential(adapter, place, dropout, fused)
        for found in fused.values():
            self._on_slices(adapter, found)
        self._single_entries(adapter, places, allocation)

    def _sequential(
        self, adapter: Adapter, place: Place, dropout: float, fused: dict[str, list[tuple[Place, SequentialModule]]]
    ) -> None:
        site, anatomy = place.site, adapter.backbone.anatomy
        if "call" not in site.reach:
            raise AttachError(f"'{site.name}' is read inside a function, so nothing can be added to its output")
        is_parallel = site.role.endswith("attn.out")
        outputs, inputs = place.shape
        width = inputs if is_parallel else outputs
        module = SequentialModule(
            width, outputs, self.rank, dropout=dropout, drop_path=self.drop_path, init=self.init,
            residual=not is_parallel,
        )  # fmt: skip
        if site.rows is not None:
            fused.setdefault(site.path, []).append((place, module))
            return
        out = anatomy.output_port(site)
        if is_parallel:
            adapter.branch(anatomy.input_port(site, width=width), out, module, name=site.name)
        else:
            adapter.branch(out, out, module, name=site.name, mode="apply")

    def _on_slices(self, adapter: Adapter, found: list[tuple[Place, SequentialModule]]) -> None:
        anatomy = adapter.backbone.anatomy
        whole = next(site for site in anatomy.sites if found[0][0].site.name in site.parts)
        out = anatomy.output_port(whole)
        for place, module in found:
            adapter.add(place.site.name, module)
        rows = [(place.site.rows or (0, 0), module) for place, module in found]
        adapter.branch(out, out, OnSlices(rows), name="", mode="apply")

    def _single_entries(self, adapter: Adapter, places: Mapping[str, Place], allocation: Allocation) -> None:
        """Entries by stored tensor: slices of one fused bias share a tensor."""
        chosen: dict[str, list[Tensor]] = {}
        sites = {}
        for name in allocation.vectors:
            place = places[name]
            whole = place.shape == place.site.shape
            if whole:
                adapter.own(place.site)
            else:
                sites[place.site.name] = place.site
                chosen.setdefault(place.site.name, []).append(torch.arange(place.first, place.last))
        for name, index in allocation.entries.items():
            place = places[name]
            if place.site.op == "norm" and not self.norm_entries:
                continue
            sites[place.site.name] = place.site
            chosen.setdefault(place.site.name, []).append(index + (0 if place.is_matrix else place.first))
        # A module of the same site would stand in the way of its bias's name.
        with adapter.scope("entries"):
            for name, parts in chosen.items():
                adapter.sparse(sites[name], torch.cat(parts), decay=False)


class SequentialModule(nn.Module):
    """U gelu(D dropout(y)), added to y where `residual`; drop-path over the samples.

    Args:
        width: Channels in.
        outputs: Channels out.
        rank: Channels between.
        dropout: Probability of zeroing an input channel.
        drop_path: Probability of leaving a sample out.
        init: See `SPT`.
        residual: Add the input.
    """

    def __init__(
        self, width: int, outputs: int, rank: int, *, dropout: float, drop_path: float, init: Init, residual: bool
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.drop_path = drop_path
        self.residual = residual
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, outputs)
        if init == "zero":
            nn.init.zeros_(self.up.weight)
        else:
            for linear in (self.down, self.up):
                nn.init.trunc_normal_(linear.weight, std=0.02)
        for linear in (self.down, self.up):
            nn.init.zeros_(linear.bias)

    def forward(self, y: Tensor) -> Tensor:
        """Of `outputs` channels."""
        dropped = functional.dropout(y, self.dropout, training=self.training)
        added: Tensor = self.up(functional.gelu(self.down(dropped)))
        if self.training and self.drop_path:
            added = drop_samples(added, self.drop_path)
        return y + added if self.residual else added


class OnSlices(nn.Module):
    """Modules on slices of a fused linear's output.

    Args:
        parts: First and last channel, and module.
    """

    def __init__(self, parts: list[tuple[tuple[int, int], SequentialModule]]) -> None:
        super().__init__()
        self.rows = [rows for rows, _ in parts]
        self.parts = nn.ModuleList([module for _, module in parts])

    def forward(self, y: Tensor) -> Tensor:
        """Of the input's shape."""
        pieces, place = [], 0
        for (first, last), module in zip(self.rows, self.parts, strict=True):
            pieces += [y[..., place:first], module(y[..., first:last])]
            place = last
        return torch.cat([*pieces, y[..., place:]], dim=-1)


class SPTRun(LifeCycle):
    """Calibration, and what a file says of it.

    Args:
        method: The configuration.
        adapter: What is built.
        places: What is ranked.
        overhead: Entries that are tuned in any case.
        seed: Of the modules' initial values.
    """

    def __init__(self, method: SPT, adapter: Adapter, places: Mapping[str, Place], overhead: int, seed: int) -> None:
        super().__init__()
        self.method = method
        self.places = dict(places)
        self.overhead = overhead
        self.seed = seed
        self.calibration_batches = method.batches
        self.allocation: Allocation | None = None
        """What is tuned how; None before calibration."""
        self.__dict__["_adapter"] = adapter  # no submodule: it is the parent

    @override
    def prepare(self, batches: Iterable[Batch], loss: Losses) -> None:
        """Measure sensitivities and attach what they ask for; warn where that is far from the budget.

        Raises:
            TrainingError: There is no batch.
        """
        method = self.method
        found = sensitivities(self._own.backbone, self.places, islice(batches, method.batches), loss)
        allocation = self.allocate(found, [method.budget])[0]
        if abs(allocation.total - method.budget) > FAR * method.budget:
            entries, asked = round(allocation.total * method.unit), round(method.budget * method.unit)
            _LOG.warning(
                "spt: method.budget asks for %s tuned entries; the nearest that its rules give here is %s. Change "
                "method.budget, method.unit, or method.rank (what a module costs).",
                f"{asked:,}", f"{entries:,}",
            )  # fmt: skip
        self.attach(allocation)

    def allocate(self, found: Mapping[str, Tensor], budgets: list[float]) -> list[Allocation]:
        """The allocation for each budget."""
        method = self.method
        targets = [method.target(place) for place in self.places.values()]
        return allocate(
            targets, found, budgets, unit=method.unit, alpha=method.alpha, beta=method.beta, overhead=self.overhead,
            structured_only=method.structured_only,
        )  # fmt: skip

    def attach(self, allocation: Allocation) -> None:
        """Build the adapter by an allocation."""
        self.allocation = allocation
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            self.method.attach_by(self._own, self.places, allocation)
        self._own.train(self._own.training)

    @override
    def on_fit_start(self, run: Run) -> None:
        """Refuse to train what was never calibrated.

        Raises:
            TrainingError: It was not.
        """
        if self.allocation is None:
            raise TrainingError("spt was not calibrated; call adapter.events.prepare(batches, loss) before training")

    @override
    def facts(self) -> Mapping[str, Any]:
        if self.allocation is None:
            return {}
        return {
            "structured": list(self.allocation.structured),
            "vectors": list(self.allocation.vectors),
            "entries": list(self.allocation.entries),
            "total": self.allocation.total,
        }

    @override
    def rebuild(self, facts: Mapping[str, Any]) -> None:
        """Attach what a file's allocation names; positions of single entries come with its tensors.

        Raises:
            FileFormatError: It names tensors that this network does not have.
        """
        if not facts or self.allocation is not None:
            return
        named = [*facts.get("structured", ()), *facts.get("vectors", ()), *facts.get("entries", ())]
        if unknown := [name for name in named if name not in self.places]:
            raise FileFormatError(f"the file tunes '{unknown[0]}', which is none of this network's tensors here")
        entries = {name: torch.zeros(0, dtype=torch.int64) for name in facts.get("entries", ())}
        self.attach(
            Allocation(tuple(facts["structured"]), tuple(facts["vectors"]), entries, float(facts.get("total", 0.0)))
        )

    @property
    def _own(self) -> Adapter:
        return self.__dict__["_adapter"]


def sensitivities(
    backbone: Backbone, places: Mapping[str, Place], batches: Iterable[Batch], loss: Losses
) -> dict[str, Tensor]:
    """Sum over batches of the squared gradient of each batch's loss, by place, of its shape.

    Raises:
        TrainingError: There is no batch.
    """
    paths = dict.fromkeys(place.site.path for place in places.values())
    sums = {path: torch.zeros_like(backbone.tensor(path), dtype=torch.float32) for path in paths}

    def take(path: str, gradient: Tensor) -> None:
        sums[path] += gradient.float().square()

    take_gradients(backbone, paths, batches, loss, take, purpose="method spt measures sensitivities")
    out = {}
    for name, place in places.items():
        whole = sums[place.site.path]
        rows = place.site.rows if place.is_matrix else (place.first, place.last)
        out[name] = whole if rows is None else whole[rows[0] : rows[1]]
    return out
