"""One of peft's tuner layers as an operation: on activations, and as the weight that amounts to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy.sites import Operation as Kind
from peft_modal.attach import Operation

_CHUNK = 256


class Start(nn.Module):
    """The first factors of a LoRA layer that starts from the base weight (PiSSA, OLoRA, CorDA).

    Peft subtracts their product from the base weight. Here the base weight stays, and they are kept: the effective
    base is W - scaling * B0 A0.

    Args:
        layer: peft's layer with its initial factors.
        zero: Start with factors of zero, to be filled by calibration.
    """

    down: Tensor
    up: Tensor

    def __init__(self, layer: Any, *, zero: bool = False) -> None:  # noqa: ANN401 — a class of peft's
        super().__init__()
        down, up = factors(layer)
        self.scaling = float(next(iter(layer.scaling.values())))
        self.register_buffer("down", torch.zeros_like(down) if zero else down.detach().clone())
        self.register_buffer("up", torch.zeros_like(up) if zero else up.detach().clone())

    def delta(self) -> Tensor:
        """The first update (out, in)."""
        return self.scaling * (self.up @ self.down)


def factors(layer: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 — a class of peft's
    """The weights A (r, in, ...) and B (out, r, ...) of a LoRA layer."""
    (down,), (up,) = layer.lora_A.values(), layer.lora_B.values()
    return down.weight, up.weight


class TunerOperation(Operation):
    """One of peft's layers over a shell, which shows it the weight that it acts on for the time of a call.

    Args:
        layer: The layer, whose base layer has neither weight nor bias of its own.
        kind: Operation of the site.
        shape: Shape of the site's weight.
        start: First factors, where the layer starts from the base weight.
        has_dropout: See `Operation`.
        changes_bias: See `Operation`.
    """

    def __init__(
        self, layer: Any, kind: Kind, shape: tuple[int, ...], *, start: Start | None, has_dropout: bool,  # noqa: ANN401
        changes_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tuner = layer
        self.kind = kind
        self.shape = shape
        self.start = start
        self.has_dropout = has_dropout
        self.changes_bias = changes_bias

    @override
    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shell = self.tuner.get_base_layer().__dict__
        # A plain attribute, found before anything registered: nothing of the network becomes part of the adapter.
        shell["weight"] = weight if self.start is None else weight - self.start.delta().to(weight.dtype)
        shell["bias"] = bias
        try:
            return self.tuner(x)
        finally:
            shell["weight"] = shell["bias"] = None

    @override
    def fold_weight(self, weight: Tensor) -> Tensor:
        with _full_precision(weight):
            columns = self._columns(weight)
        return columns.view(self.shape) if self.kind == "embedding" else columns.T.reshape(self.shape)

    @override
    def fold_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not self.changes_bias:
            return bias
        with _full_precision(weight):
            zero = self._at(weight.new_zeros(1, *self._input_shape()), weight, bias)[0]
        return zero if bias is not None or bool(zero.any()) else None

    def _columns(self, weight: Tensor) -> Tensor:
        """The images of all unit inputs, without the constant term."""
        if self.kind == "embedding":
            return self.call(torch.arange(self.shape[0], device=weight.device), weight, None)
        size = weight[0].numel()
        images = []
        # In pieces: the unit inputs of a convolution have a spatial extent each.
        for first in range(0, size, size if self.kind == "linear" else _CHUNK):
            units = self._units(weight, first, min(size, first + (size if self.kind == "linear" else _CHUNK)))
            images.append(self._at(units, weight, None))
        columns = torch.cat(images)
        return columns - self._at(torch.zeros_like(units[:1]), weight, None) if self.changes_bias else columns

    def _at(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output (N, out) at the place that looks at the whole input and no padding."""
        y = self.call(x, weight, bias)
        for place, _ in () if self.kind == "linear" else self._window():
            y = y.select(2, place)
        return y

    def _units(self, weight: Tensor, first: int, last: int) -> Tensor:
        if self.kind == "linear":
            return torch.eye(self.shape[1], dtype=weight.dtype, device=weight.device)[first:last]
        x = weight.new_zeros(last - first, *self._input_shape())
        taps = list(product(range(self.shape[1]), *(range(side) for side in self.shape[2:])))
        for row, (channel, *tap) in enumerate(taps[first:last]):
            x[(row, channel, *(start + t for (_, start), t in zip(self._window(), tap, strict=True)))] = 1.0
        return x

    def _input_shape(self) -> tuple[int, ...]:
        if self.kind == "linear":
            return (self.shape[1],)
        sides = (start + side for (_, start), side in zip(self._window(), self.shape[2:], strict=True))
        return (self.shape[1], *sides)

    def _window(self) -> list[tuple[int, int]]:
        """For each spatial axis an output place and the input place where its kernel begins, clear of padding."""
        base = self.tuner.get_base_layer()
        before = base._reversed_padding_repeated_twice[-2::-2]  # noqa: SLF001 — the one form in which `same` is resolved
        return [(-(-p // s), -(-p // s) * s - p) for p, s in zip(before, base.stride, strict=True)]


@contextmanager
def _full_precision(weight: Tensor) -> Iterator[None]:
    with torch.autocast(weight.device.type, enabled=False):
        yield
