"""Weights of few bits that are trained in full precision (Jie et al., ICCV 2023, arXiv:2307.16867)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, Final, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.attach.packing import PacksItself
from peft_modal.errors import FileFormatError

Bits = Literal[1, 2, 4, 8]
SavedFor: TypeAlias = Any  # torch's context takes any attribute
ITERATIONS: Final = 500
"""Of the fixed point that the levels are: 8 bits have not converged by then, so the number is part of the format."""
EPSILON: Final = 1e-5


@cache
def levels_of(bits: int, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """The levels of a standard normal with the least absolute error, and the thresholds between them, float64.

    Each level is the median of what falls to it: v = Phi^-1 of the middle of the probabilities of its two thresholds,
    which lie half way between neighbouring levels. The thresholds are those that the last levels were made of.
    """
    levels = torch.zeros(2**bits, dtype=torch.float64)
    thresholds = levels[:-1]
    edge = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for _ in range(iterations):
        thresholds = (levels[1:] + levels[:-1]) / 2
        probability = torch.cat([edge[:1], torch.special.ndtr(thresholds), edge[1:]])
        levels = torch.special.ndtri((probability[1:] + probability[:-1]) / 2)
    return levels, thresholds


class QuantisedMatrix(PacksItself):
    """A trained matrix W that acts through 2^bits levels: W_eff = q((W - mean) / (std + 1e-5)) * std + mean.

    The gradient passes straight through the choice of the level, and through mean and standard deviation in full.
    Statistics are taken in float32. In an adapter file it is one code per entry, bit-packed, and two numbers; loaded
    from there it is not quantised again, since the levels have another deviation, until a forward pass in training.

    Args:
        rows: Outputs.
        columns: Inputs.
        bits: Bits per entry.

    Raises:
        ValueError: It has fewer than two entries, which have no deviation.
    """

    file_names: ClassVar[tuple[str, ...]] = ("codes", "mean", "std")

    def __init__(self, rows: int, columns: int, bits: Bits) -> None:
        super().__init__()
        if rows * columns < 2:
            raise ValueError("a matrix of one entry has no standard deviation")
        self.bits: Bits = bits
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self._loaded: dict[str, Tensor] | None = None

    def forward(self) -> Tensor:
        """The effective matrix (rows, columns)."""
        if self.training:
            self._loaded = None
        if self._loaded is not None:
            return self.weight
        wide = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        mean, std = wide.mean(), wide.std()
        normal = (wide - mean) / (std + EPSILON)
        return cast("Tensor", _StraightThrough.apply(normal, self.bits)) * std + mean

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Number of each entry's level (rows, columns) int64, mean and standard deviation."""
        wide = self.weight.detach().float()
        mean, std = wide.mean(), wide.std()
        return _codes((wide - mean) / (std + EPSILON), self.bits), mean, std

    @override
    def packed(self) -> dict[str, Tensor]:
        if self._loaded is not None:
            return {name: tensor.clone() for name, tensor in self._loaded.items()}
        codes, mean, std = self.codes()
        return {"codes": pack(codes, self.bits), "mean": mean.view(1), "std": std.view(1)}

    @override
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        codes = unpack(tensors["codes"], self.bits, self.weight.numel()).view(self.weight.shape)
        mean, std = (tensors[name].to(torch.float32) for name in ("mean", "std"))
        levels = levels_of(self.bits)[0].to(torch.float32)
        with torch.no_grad():
            self.weight.copy_(levels[codes] * std + mean)
        self._loaded = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    @override
    def refuse(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        size = packed_size(self.weight.numel(), self.bits)
        codes = tensors["codes"]
        if codes.dtype != torch.uint8 or tuple(codes.shape) != (size,):
            raise FileFormatError(
                f"tensor '{name}.codes' is {codes.dtype} of shape {tuple(codes.shape)}; {self.bits} bits for each of "
                f"{self.weight.numel()} entries are {size} bytes"
            )
        for key in ("mean", "std"):
            if tensors[key].numel() != 1 or not tensors[key].is_floating_point():
                raise FileFormatError(f"tensor '{name}.{key}' is not one real number")


class _StraightThrough(torch.autograd.Function):
    """The level of each entry; the gradient of the identity."""

    @staticmethod
    def forward(ctx: SavedFor, normal: Tensor, bits: int) -> Tensor:
        """The level, or the middle of two exactly on their threshold."""
        del ctx
        levels, thresholds = (t.to(normal.device, normal.dtype) for t in levels_of(bits))
        chosen = levels[_codes(normal, bits)]
        on = normal[..., None] == thresholds if bits <= 2 else None
        if on is None or not bool(on.any()):
            return chosen
        return torch.where(on.any(-1), ((levels[1:] + levels[:-1]) / 2)[on.to(torch.uint8).argmax(-1)], chosen)

    @staticmethod
    def backward(ctx: SavedFor, grad: Tensor) -> tuple[Tensor, None]:
        """As it came."""
        del ctx
        return grad, None


def _codes(normal: Tensor, bits: int) -> Tensor:
    thresholds = levels_of(bits)[1].to(normal.device, normal.dtype)
    return torch.bucketize(normal.contiguous(), thresholds)


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes; the last one is filled up with zeros."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape as bytes, row-major, the first in the least significant bits; uint8."""
    if codes.is_meta:  # a count without values
        return codes.new_empty(packed_size(codes.numel(), bits), dtype=torch.uint8)
    digits = codes.flatten().to("cpu", torch.int64).numpy()
    bit = (digits[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(bit.astype(np.uint8).reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (count,) int64 that `pack` was given."""
    bit = np.unpackbits(packed.to("cpu", torch.uint8).numpy(), bitorder="little")[: count * bits]
    return torch.from_numpy((bit.reshape(-1, bits).astype(np.int64) << np.arange(bits)).sum(1))


def to_authors_bytes(matrices: Iterable[QuantisedMatrix]) -> bytes:
    """The authors' headerless `.bin`: for each matrix in module order its codes, float32 mean and deviation.

    Raises:
        ValueError: A matrix does not fill its bytes, so that the authors' reader would lose its tail.
    """
    out = bytearray()
    for matrix in matrices:
        if matrix.weight.numel() * matrix.bits % 8:
            raise ValueError(f"{matrix.weight.numel()} entries of {matrix.bits} bits do not fill whole bytes")
        parts = matrix.packed()
        out += parts["codes"].numpy().tobytes()
        for name in ("mean", "std"):
            out += parts[name].to(torch.float32).numpy().astype("<f4").tobytes()
    return bytes(out)


def from_authors_bytes(content: bytes, matrices: Iterable[QuantisedMatrix]) -> int:
    """Fill matrices from the authors' `.bin`; gives the number of bytes that were used.

    Raises:
        FileFormatError: The content is too short.
    """
    place = 0
    for matrix in matrices:
        size = packed_size(matrix.weight.numel(), matrix.bits)
        if len(content) < place + size + 8:
            raise FileFormatError(f"the file ends after {len(content)} bytes, {place + size + 8} were expected")
        codes = np.frombuffer(content, np.uint8, size, place)
        numbers = np.frombuffer(content, "<f4", 2, place + size)
        tensors = (torch.from_numpy(part.copy()) for part in (codes, numbers[:1], numbers[1:]))
        matrix.unpack(dict(zip(QuantisedMatrix.file_names, tensors, strict=True)))
        place += size + 8
    return place
