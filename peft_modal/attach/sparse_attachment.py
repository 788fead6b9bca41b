"""How trained entries of a tensor reach the forward pass, plain weights and the adapter file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Backbone, WeightSite, registered
from peft_modal.attach.attachment import Attachment, FoldedWeights, FoldStage
from peft_modal.attach.chain import drop_transform, push_transform
from peft_modal.attach.sparse import (
    ReadEntries,
    Rows,
    SparseEntries,
    WriteEntries,
    entries_at,
    part_of,
    refuse_positions,
    shifted,
    write_entries,
)
from peft_modal.errors import FileFormatError

FILE_NAMES = ("index", "delta")
"""Tensors of one set of entries in an adapter file."""
CHECKPOINT_NAMES = ("index", "kept_index", "kept_values", "values")
"""And in the checkpoint of a run that goes on."""


class SparseAttachment(Attachment):
    """Chosen entries of a stored tensor are trained; the tensor itself stays as loaded.

    Args:
        order: See `Attachment`.
        sites: The sites that are this tensor, or this slice of it: several where it is tied.
        entries: What is trained.
    """

    stage = FoldStage.TRANSFORM

    def __init__(self, order: int, sites: tuple[WeightSite, ...], entries: SparseEntries) -> None:
        super().__init__(order)
        self.sites = sites
        self.rows = sites[0].rows
        self.entries = entries
        self.weight = 1.0
        self.touches = tuple(dict.fromkeys(path for site in sites for path in (site.owner, site.holder)))
        self._holder: nn.Module | None = None
        self._written: _Written | None = None

    def __call__(self, whole: Tensor | None, /) -> Tensor:
        """The effective whole tensor."""
        assert whole is not None
        assert self._holder is not None
        loaded = registered(self._holder, self.sites[0].tensor)
        assert loaded is not None
        entries = self.entries
        if entries.is_empty:
            return whole
        is_lowest = whole is loaded
        if is_lowest and not torch.compiler.is_compiling() and _is_worth_keeping(loaded):
            if self._written is None:
                self._written = _Written()
            written = self._written.refreshed(loaded, entries, self.rows, self.weight)
            return ReadEntries.apply(written, entries.values, entries.index, self.rows, self.weight)
        return WriteEntries.apply(
            whole, entries.values, entries.index, None if is_lowest else loaded, entries.kept_index,
            entries.kept_values, self.rows, self.weight,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own; the numbers by which it knows what it has seen start anew in copied tensors.
        return {**self.__dict__, "_written": None}

    @override
    def hang(self, backbone: Backbone) -> None:
        self._holder = backbone.network.get_submodule(self.sites[0].holder)
        for site in self.sites:
            push_transform(backbone, site.holder, site.tensor, _reader(site), self, self.order)

    @override
    def unhang(self, backbone: Backbone) -> None:
        for site in self.sites:
            drop_transform(backbone, site.holder, site.tensor, _reader(site), self)
        self._holder = self._written = None

    @override
    def set_weight(self, weight: float) -> None:
        self.weight, self._written = weight, None

    @override
    def fold(self, weights: FoldedWeights) -> None:
        index, values = self.entries.tuned()
        start = self._loaded_at(weights.backbone, index)
        change = self.weight * (values - start).to(torch.float64)
        for site in self.sites:
            whole = weights.get(site.holder, site.tensor)
            assert whole is not None
            folded = whole.clone(memory_format=torch.contiguous_format)
            part_of(folded, self.rows).view(-1).index_add_(0, index, change)
            weights.set(site.holder, site.tensor, folded)

    @override
    def describe(self) -> str:
        return f"trained entries of '{self.sites[0].name}'"

    @override
    def where(self) -> tuple[WeightSite, ...]:
        return self.sites

    @override
    def parameters(self) -> Iterable[nn.Parameter]:
        return self.entries.parameters()

    def leave_out(self, gradient: Tensor | None) -> None:
        """Set a whole tensor's gradient to zero where its entries are trained, in place."""
        if gradient is not None:
            index = self.entries.index.to(torch.int64)
            part_of(gradient, self.rows).put_(index, gradient.new_zeros(index.shape))

    def packed(self, backbone: Backbone) -> dict[str, Tensor]:
        """What an adapter file holds: every entry that is or was trained, as its position and its change."""
        index, values = self.entries.tuned()
        return {"index": index, "delta": values - self._loaded_at(backbone, index)}

    def unpack(self, backbone: Backbone, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `packed` gave."""
        index = tensors["index"].to(self.entries.index.device)
        loaded = self._loaded_at(backbone, index)
        values = loaded + tensors["delta"].to(loaded)
        self.entries.fill(index, values, index.new_zeros(0), values.new_zeros(0))

    def refuse(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Check tensors of a file or a checkpoint before they are taken over.

        Args:
            name: Of the entries, for sentences.
            tensors: By the names of either.

        Raises:
            FileFormatError: They are no positions and values of this tensor.
        """
        pairs = (("index", "delta"),) if "delta" in tensors else (("index", "values"), ("kept_index", "kept_values"))
        for one, other in pairs:
            index, values = tensors[one], tensors[other]
            if index.shape != values.shape or index.dim() != 1:
                raise FileFormatError(
                    f"tensor '{name}.{one}' has shape {tuple(index.shape)}, '{name}.{other}' {tuple(values.shape)}; "
                    "they must be equally many entries"
                )
            if index.is_floating_point() or not values.is_floating_point():
                raise FileFormatError(f"'{name}.{one}' must be integers and '{name}.{other}' real numbers")
        index = torch.cat([tensors[one] for one, _ in pairs])
        site = self.sites[0]
        reason = refuse_positions(index, torch.Size(site.shape).numel())
        if reason:
            raise FileFormatError(f"'{name}.index' does not fit '{site.name}': {reason}")

    def _loaded_at(self, backbone: Backbone, index: Tensor) -> Tensor:
        loaded = part_of(backbone.tensor(self.sites[0].path).detach(), self.rows)
        return entries_at(loaded, index, dtype=self.entries.values.dtype)


def _reader(site: WeightSite) -> str | None:
    # What no module's own forward reads is written for the length of the backbone's call.
    return site.owner if "weight" in site.reach else None


def _is_worth_keeping(loaded: Tensor) -> bool:
    # On a CPU a fresh copy of every weight costs page faults: measured 0.7 s for 100 M entries, against 0.16 s for
    # writing 5 % of them into a copy that stays. Elsewhere the allocator hands out the same memory again, and what is
    # copied within a checkpointed block is given back after it.
    return loaded.device.type == "cpu" and type(loaded) in {Tensor, nn.Parameter} and loaded.is_contiguous()


class _Written:
    """A copy of a stored tensor into which the entries are written before each use.

    They are written every time: writes through `.data`, as of averaged weights that are swapped in, leave no trace by
    which they could be noticed.
    """

    def __init__(self) -> None:
        self._made_of: tuple[object, ...] = ()
        self._copy: Tensor | None = None
        self._start: Tensor | None = None
        """The trained entries as loaded, (k,)."""
        self._values: tuple[object, ...] = ()

    def refreshed(self, loaded: Tensor, entries: SparseEntries, rows: Rows, factor: float) -> Tensor:
        """The copy, with the entries as they are now."""
        made_of = (*_mark(loaded), *_mark(entries.index), *_mark(entries.kept_index))
        if self._copy is None or self._start is None or not _same(made_of, self._made_of):
            self._made_of = made_of
            self._copy, self._start = self._made(loaded.detach(), entries, rows, factor)
        now, mark = entries.values.detach(), _mark(entries.values)
        # Other values than those of an earlier forward pass: autograd has to notice when that one is back-propagated.
        # The same once more: it must not.
        into = self._copy.data if _same(mark, self._values) else self._copy
        self._values = mark
        write_entries(part_of(into, rows), entries.index, shifted(self._start, self._start, now, factor))
        return self._copy

    @staticmethod
    def _made(loaded: Tensor, entries: SparseEntries, rows: Rows, factor: float) -> tuple[Tensor, Tensor]:
        # A tensor made in inference mode could not be used in training afterwards.
        with torch.inference_mode(mode=False), torch.no_grad():
            written, part = loaded.clone(), part_of(loaded, rows)
            under = entries_at(part, entries.kept_index, dtype=entries.values.dtype)
            write_entries(
                part_of(written, rows), entries.kept_index, shifted(under, under, entries.kept_values, factor)
            )
            return written, entries_at(part, entries.index, dtype=entries.values.dtype)


def _mark(tensor: Tensor) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version  # noqa: SLF001 — torch's only trace of a change in place
    return tensor, version, tensor.data_ptr(), tensor.dtype


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return len(one) == len(other) and all(
        a is b if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )
