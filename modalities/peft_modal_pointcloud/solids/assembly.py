"""The builder that families use: it draws numbers for all instances at once and appends one primitive after another."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_modal_pointcloud.solids.primitives import BOX, ELLIPSOID, FRUSTUM, MAX_PRIMITIVES, TORUS, Solids

Number = float | Tensor
"""A number for every instance, or one tensor (n,) with a number for each."""
Triple = tuple[Number, Number, Number]

_CAPS = {"none": 0.0, "bottom": 1.0, "top": 2.0, "both": 3.0}
_AXES = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}
FULL_TURN = 2 * torch.pi
CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))
ARCH = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
"""Stands a torus up as an arch: its arc is centred on +y, spans x, and is stretched along x."""


class Assembly:
    """Primitives of `count` solids of one family. Sizes are full sizes; y is up and the front faces +z.

    Args:
        count: Instances n that are built together.
        generator: CPU generator, the only source of randomness.
    """

    def __init__(self, count: int, *, generator: torch.Generator) -> None:
        self.count = count
        self._generator = generator
        self._slots: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []

    def uniform(self, low: float, high: float) -> Tensor:
        """(n,) float32, uniform."""
        return low + (high - low) * torch.rand(self.count, generator=self._generator)

    def integer(self, low: int, high: int) -> Tensor:
        """(n,) int64, uniform, both ends included."""
        return torch.randint(low, high + 1, (self.count,), generator=self._generator)

    def chance(self, probability: float) -> Tensor:
        """(n,) bool, true with this probability."""
        return torch.rand(self.count, generator=self._generator) < probability

    def any_turn(self) -> Tensor:
        """(n, 3, 3) rotations, uniform over all orientations (QR of a normal matrix with the signs fixed)."""
        q, r = torch.linalg.qr(torch.randn(self.count, 3, 3, generator=self._generator))
        q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
        return q * torch.linalg.det(q).sign()[:, None, None]

    def box(
        self,
        size: Triple,
        at: Triple,
        *,
        turn: Tensor | None = None,
        is_open: Number = 0.0,
        on: Tensor | bool = True,
    ) -> None:
        """A box of width, height, depth; without its top face where `is_open` is 1."""
        half = [self._numbers(s) / 2 for s in size]
        self._append(BOX, [*half, self._numbers(is_open)], at, turn, on)

    def frustum(
        self,
        bottom: Number,
        top: Number,
        height: Number,
        at: Triple,
        *,
        turn: Tensor | None = None,
        caps: str = "both",
        on: Tensor | bool = True,
    ) -> None:
        """A cylinder, cone, disc or tube about y with two radii; `caps` is none, bottom, top or both."""
        numbers = [self._numbers(bottom), self._numbers(top), self._numbers(height) / 2, self._numbers(_CAPS[caps])]
        self._append(FRUSTUM, numbers, at, turn, on)

    def rod(
        self, start: Triple, end: Triple, radius: Number, *, end_radius: Number | None = None, on: Tensor | bool = True
    ) -> None:
        """A frustum from one point to another."""
        a = torch.stack([self._numbers(v) for v in start], dim=-1)
        b = torch.stack([self._numbers(v) for v in end], dim=-1)
        middle = ((a + b) / 2).unbind(-1)
        length = (b - a).norm(dim=-1)
        end_radius = radius if end_radius is None else end_radius
        turn = turn_up_to((b - a) / length.clamp(min=1e-9)[:, None])
        self.frustum(radius, end_radius, length, (middle[0], middle[1], middle[2]), turn=turn, on=on)

    def board(self, start: Triple, end: Triple, width: Number, depth: Number, *, on: Tensor | bool = True) -> None:
        """A box whose long axis runs from one point to another; upright, its width is along x."""
        a = torch.stack([self._numbers(v) for v in start], dim=-1)
        b = torch.stack([self._numbers(v) for v in end], dim=-1)
        middle = ((a + b) / 2).unbind(-1)
        length = (b - a).norm(dim=-1)
        turn = turn_up_to((b - a) / length.clamp(min=1e-9)[:, None])
        self.box((width, length, depth), (middle[0], middle[1], middle[2]), turn=turn, on=on)

    def ellipsoid(
        self,
        radii: Triple,
        at: Triple,
        *,
        turn: Tensor | None = None,
        lowest: Number = -1.0,
        on: Tensor | bool = True,
    ) -> None:
        """An ellipsoid; `lowest` is the sine of the latitude where it starts (0: a dome)."""
        self._append(ELLIPSOID, [*(self._numbers(r) for r in radii), self._numbers(lowest)], at, turn, on)

    def torus(
        self,
        radius: Number,
        tube: Number,
        at: Triple,
        *,
        arc: Number = FULL_TURN,
        stretch: Number = 1.0,
        turn: Tensor | None = None,
        on: Tensor | bool = True,
    ) -> None:
        """A ring about y, or an arc of one centred on +x; `stretch` lengthens it along z."""
        self._append(TORUS, [self._numbers(v) for v in (radius, tube, arc, stretch)], at, turn, on)

    def primitive(self, kind: Tensor, shape: list[Tensor], at: Triple, *, turn: Tensor, on: Tensor) -> None:
        """A primitive whose kind (n,) differs between instances; `shape` holds the record's four numbers."""
        self._append(kind, shape, at, turn, on)

    def build(self, label: int) -> Solids:
        """The finished record, padded to MAX_PRIMITIVES with primitives that are off."""
        n, used = self.count, len(self._slots)
        assert 0 < used <= MAX_PRIMITIVES, f"{used} primitives"
        kind, shape, centre, rotation, on = (torch.stack(list(part), dim=1) for part in zip(*self._slots, strict=True))
        spare = MAX_PRIMITIVES - used
        return Solids(
            kind=torch.cat([kind, torch.zeros(n, spare, dtype=torch.int64)], dim=1),
            shape=torch.cat([shape, torch.zeros(n, spare, 4)], dim=1),
            centre=torch.cat([centre, torch.zeros(n, spare, 3)], dim=1),
            rotation=torch.cat([rotation, torch.eye(3).expand(n, spare, 3, 3)], dim=1),
            on=torch.cat([on, torch.zeros(n, spare, dtype=torch.bool)], dim=1),
            labels=torch.full((n,), label, dtype=torch.int64),
        )

    def _numbers(self, value: Number) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).expand(self.count)

    def _append(
        self, kind: int | Tensor, shape: list[Tensor], at: Triple, turn: Tensor | None, on: Tensor | bool
    ) -> None:
        self._slots.append(
            (
                torch.as_tensor(kind, dtype=torch.int64).expand(self.count),
                torch.stack(shape, dim=-1),
                torch.stack([self._numbers(v) for v in at], dim=-1),
                (torch.eye(3) if turn is None else turn).expand(self.count, 3, 3),
                torch.as_tensor(on).expand(self.count),
            )
        )


def turn_about(axis: str, angle: Number) -> Tensor:
    """Right-handed rotation about "x", "y" or "z" by `angle` radians, (n, 3, 3) for a tensor (n,), else (1, 3, 3)."""
    angle = torch.as_tensor(angle, dtype=torch.float32).reshape(-1)
    i, j = _AXES[axis]
    turn = torch.eye(3).repeat(len(angle), 1, 1)
    turn[:, i, i] = turn[:, j, j] = angle.cos()
    turn[:, i, j], turn[:, j, i] = -angle.sin(), angle.sin()
    return turn


def turn_up_to(direction: Tensor) -> Tensor:
    """Rotations (n, 3, 3) that take +y to the unit vectors `direction` (n, 3) on the shortest way (Rodrigues)."""
    x, y, z = direction.unbind(-1)
    # v = up x direction = (z, 0, -x); R = I + [v] + [v]^2 / (1 + y). Below the horizon 1 / (1 + y) is written as
    # (1 - y) / (x^2 + z^2), which loses no digits near straight down.
    flat = x * x + z * z
    down = (y < 0) & (flat < 1e-12)
    k = torch.where(y < 0, (1 - y) / flat.clamp(min=1e-12), 1 / (1 + y.clamp(min=0)))
    rows = [
        torch.stack([1 - k * x * x, x, -k * x * z], dim=-1),
        torch.stack([-x, y, -z], dim=-1),
        torch.stack([-k * x * z, z, 1 - k * z * z], dim=-1),
    ]
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    return torch.where(down[:, None, None], flip, torch.stack(rows, dim=1))


# A cylinder's axis along x and along z; a dome made a bowl.
ALONG_X = turn_about("z", -torch.pi / 2)
ALONG_Z = turn_about("x", torch.pi / 2)
UPSIDE_DOWN = turn_about("x", torch.pi)
