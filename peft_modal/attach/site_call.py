"""One call object per adapted module: it holds the low-rank updates of all adapters and computes them together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Backbone, WeightSite
from peft_modal.attach.low_rank_function import LowRankLinear
from peft_modal.attach.updates import LowRankUpdate

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_PLAIN_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass(frozen=True, eq=False)
class Entry:
    """One update on the rows of one weight."""

    order: int
    site: WeightSite
    update: LowRankUpdate
    weight: float

    @property
    def rows(self) -> tuple[int, int]:
        """Output rows that the update acts on."""
        return self.site.rows or (0, self.site.shape[0])


class SiteCall:
    """Stands in for `module.forward`; stacking appends to it, so adapters come and go in any order."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.entries: list[Entry] = []
        module.__dict__["forward"] = self.forward

    def add(self, entry: Entry) -> None:
        """Hang an update."""
        self.entries = sorted([*self.entries, entry], key=lambda e: e.order)

    def remove(self, entry: Entry) -> bool:
        """Take an update away; True when none is left and the module is itself again."""
        self.entries = [e for e in self.entries if e is not entry]
        if self.entries:
            return False
        del self.module.__dict__["forward"]
        return True

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The module's operation and every update."""
        fused = [e for e in self.entries if not e.update.drops and type(self.module) in _PLAIN_LINEAR]
        if fused and not args and not kwargs:
            y = self._fused(x, fused)
            rest = [e for e in self.entries if e not in fused]
        else:
            y = type(self.module).forward(self.module, x, *args, **kwargs)
            rest = self.entries
        for entry in rest:
            y = _add_rows(y, self._single(x, entry), entry, dim=entry.site.out_dim)
        return y

    def _fused(self, x: Tensor, entries: list[Entry]) -> Tensor:
        module = self.module
        assert isinstance(module, nn.Linear)
        weight, bias = module.weight, module.bias
        pairs = [e.update.factors() for e in entries]
        tensors = [x, weight, bias, *(down for down, _ in pairs), *(up for _, up in pairs)]
        dtype = _compute_dtype(x, weight)
        tensors = [None if t is None else t.to(dtype) for t in tensors]
        slices = tuple((*e.rows, e.update.scale * e.weight) for e in entries)
        return LowRankLinear.apply(*tensors[:3], slices, *tensors[3:])

    def _single(self, x: Tensor, entry: Entry) -> Tensor:
        down, up = entry.update.factors()
        x = entry.update.drop(x)
        scale = entry.update.scale * entry.weight
        dtype = _compute_dtype(x, x)
        x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
        if entry.site.op == "linear":
            return functional.linear(functional.linear(x, down), up) * scale
        module = self.module
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        # The module's own stride, padding, dilation and padding mode.
        hidden = module._conv_forward(x, down, None)  # noqa: SLF001 — the modules offer no other way to pass a weight
        return _CONV[up.dim() - 2](hidden, up) * scale


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
    key = ("call", entry.site.owner)
    if key not in backbone.shared:
        backbone.shared[key] = SiteCall(backbone.network.get_submodule(entry.site.owner))
    backbone.shared[key].add(entry)


def unhang_update(backbone: Backbone, entry: Entry) -> None:
    """Take an update away."""
    key = ("call", entry.site.owner)
    if backbone.shared[key].remove(entry):
        del backbone.shared[key]
