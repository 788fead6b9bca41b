"""One call object per adapted module: it holds what all adapters do to the call and computes it together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Backbone, WeightSite
from peft_modal.attach.attachment import scaled
from peft_modal.attach.dense_update import DenseUpdate
from peft_modal.attach.low_rank_function import LowRankLinear
from peft_modal.attach.updates import LowRankUpdate
from peft_modal.errors import AttachError

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_PLAIN_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass(frozen=True, eq=False)
class Entry:
    """One update on the rows of one weight."""

    order: int
    site: WeightSite
    update: LowRankUpdate | DenseUpdate
    weight: float

    @property
    def rows(self) -> tuple[int, int]:
        """Output rows that the update acts on."""
        return self.site.rows or (0, self.site.shape[0])


class _Operation(Protocol):
    has_dropout: bool

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def fold_weight(self, weight: Tensor) -> Tensor: ...

    def fold_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class OperationEntry:
    """One operation in place of the module's own; see `peft_modal.attach.operations.Operation`."""

    order: int
    site: str
    operation: _Operation
    weight: float

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the plain operation that computes the same."""
        new_weight = scaled(weight, self.operation.fold_weight(weight), self.weight)
        new_bias = self.operation.fold_bias(weight, bias)
        return new_weight, None if new_bias is None else scaled(bias, new_bias, self.weight)


class SiteCall:
    """Stands in for `module.forward`; stacking appends to it, so adapters come and go in any order.

    Operations in place of the module's own come first, low-rank updates are added to the output. Of several operations
    the last is called; those below act through the weight and bias that they amount to.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.entries: list[Entry] = []
        self.operations: list[OperationEntry] = []
        module.__dict__["forward"] = self.forward

    def add(self, entry: Entry) -> None:
        """Hang an update."""
        self.entries = sorted([*self.entries, entry], key=lambda e: e.order)

    def add_operation(self, entry: OperationEntry) -> None:
        """Hang an operation.

        Raises:
            AttachError: One with dropout would lie below another.
        """
        operations = sorted([*self.operations, entry], key=lambda e: e.order)
        if any(e.operation.has_dropout for e in operations[:-1]):
            raise AttachError(
                f"'{entry.site}' is computed by an adapter with dropout already, which cannot act below another one; "
                "set its dropout to 0, or detach it first"
            )
        self.operations = operations

    def remove(self, entry: Entry | OperationEntry) -> bool:
        """Take an update or an operation away; True when none is left and the module is itself again."""
        self.entries = [e for e in self.entries if e is not entry]
        self.operations = [e for e in self.operations if e is not entry]
        return self.close_if_idle()

    def close_if_idle(self) -> bool:
        """Leave the module when nothing is hung; whether it did."""
        if self.entries or self.operations:
            return False
        del self.module.__dict__["forward"]
        return True

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The module's operation, or what stands in for it, and every update."""
        fused = [
            e
            for e in self.entries
            if isinstance(e.update, LowRankUpdate) and not e.update.drops and type(self.module) in _PLAIN_LINEAR
        ]
        if self.operations:
            y = self._operated(x)
            rest = self.entries
        elif fused and not args and not kwargs:
            y = self._fused(x, fused)
            rest = [e for e in self.entries if e not in fused]
        else:
            y = type(self.module).forward(self.module, x, *args, **kwargs)
            rest = self.entries
        dropped: dict[float, Tensor] = {}
        for entry in rest:
            y = _add_rows(y, self._single(x, entry, dropped), entry, dim=entry.site.out_dim)
        return y

    def _operated(self, x: Tensor) -> Tensor:
        module = self.module
        assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        weight, bias = module.weight, module.bias
        *below, top = self.operations
        for entry in below:
            weight, bias = entry.fold(weight, bias)
        y = top.operation.call(x, weight, bias)
        if top.weight == 1.0:
            return y
        plain = (
            functional.linear(x, weight, bias)
            if isinstance(module, nn.Linear)
            else module._conv_forward(x, weight, bias)  # noqa: SLF001 — the modules offer no other way to pass a weight
        )
        return scaled(plain, y, top.weight)

    def _fused(self, x: Tensor, entries: list[Entry]) -> Tensor:
        module = self.module
        assert isinstance(module, nn.Linear)
        weight, bias = module.weight, module.bias
        updates = [cast("LowRankUpdate", e.update) for e in entries]
        pairs = [update.factors() for update in updates]
        tensors = [x, weight, bias, *(down for down, _ in pairs), *(up for _, up in pairs)]
        dtype = _compute_dtype(x, weight)
        tensors = [None if t is None else t.to(dtype) for t in tensors]
        slices = tuple((*e.rows, update.scale * e.weight) for e, update in zip(entries, updates, strict=True))
        return LowRankLinear.apply(*tensors[:3], slices, *tensors[3:])

    def _single(self, x: Tensor, entry: Entry, dropped: dict[float, Tensor]) -> Tensor:
        update = entry.update
        if isinstance(update, DenseUpdate):
            added = update.branch(x.to(_compute_dtype(x, x)), dropped)
            return added if entry.weight == 1.0 else added * entry.weight
        down, up = update.factors()
        x = update.drop(x)
        scale = update.scale * entry.weight
        dtype = _compute_dtype(x, x)
        x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
        if entry.site.op == "linear":
            hidden = update.drop_hidden(functional.linear(x, down))
            return update.drop_samples(functional.linear(hidden, up) * scale)
        module = self.module
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        # The module's own stride, padding, dilation and padding mode.
        hidden = module._conv_forward(x, down, None)  # noqa: SLF001 — the modules offer no other way to pass a weight
        return update.drop_samples(_CONV[up.dim() - 2](update.drop_hidden(hidden), up) * scale)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _add_rows(y: Tensor, delta: Tensor, entry: Entry, *, dim: int) -> Tensor:
    if entry.site.rows is None:
        return y + delta
    first, last = entry.rows
    parts = [y.narrow(dim, 0, first), y.narrow(dim, first, last - first) + delta]
    return torch.cat([*parts, y.narrow(dim, last, y.shape[dim] - last)], dim=dim)


def hang_update(backbone: Backbone, entry: Entry) -> None:
    """Hang an update on the module that computes its site."""
    _site_call(backbone, entry.site.owner).add(entry)


def unhang_update(backbone: Backbone, entry: Entry) -> None:
    """Take an update away."""
    _remove(backbone, entry.site.owner, entry)


def hang_operation(backbone: Backbone, owner: str, entry: OperationEntry) -> None:
    """Hang an operation in place of the module at `owner`.

    Raises:
        AttachError: It cannot be stacked on what is there.
    """
    call = _site_call(backbone, owner)
    try:
        call.add_operation(entry)
    except AttachError:
        if call.close_if_idle():
            del backbone.shared["call", owner]
        raise


def unhang_operation(backbone: Backbone, owner: str, entry: OperationEntry) -> None:
    """Take an operation away."""
    _remove(backbone, owner, entry)


def _site_call(backbone: Backbone, owner: str) -> SiteCall:
    key = ("call", owner)
    if key not in backbone.shared:
        backbone.shared[key] = SiteCall(backbone.network.get_submodule(owner))
    return backbone.shared[key]


def _remove(backbone: Backbone, owner: str, entry: Entry | OperationEntry) -> None:
    if backbone.shared["call", owner].remove(entry):
        del backbone.shared["call", owner]
