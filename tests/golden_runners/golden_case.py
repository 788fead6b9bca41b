"""One golden case: its settings and tensors, and a ledger of what was used and what was compared.

`case.json` holds the slug, the settings, the tolerances and the generated tensors; `case.safetensors` everything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

INPUTS = frozenset({"in", "param", "base", "frozen", "buffer"})
"""First parts of the names of tensors that are fed; every other tensor is a result."""

_REQUIRED = object()
_INERT = frozenset({"seed"})


class GoldenCase:
    """A folder with `case.json` and `case.safetensors`.

    Args:
        folder: Where it lies.

    Raises:
        AssertionError: A generated tensor does not match its checksum.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.json: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        self.tensors = load_file(folder / "case.safetensors")
        for name, recipe in self.json.get("procedural", {}).items():
            full = name if name.split(".")[0] in INPUTS else f"param.{name}"
            assert full not in self.tensors, f"{self.name}: '{full}' is both stored and generated"
            self.tensors[full] = generate(name, recipe)
        self._settings: dict[str, Any] = self.json.get("config", {})
        self._read: set[str] = set()
        self._used: set[str] = set()
        self._compared: set[str] = set()
        self._excluded: dict[str, str] = {}
        self._differences: list[str] = []

    @property
    def slug(self) -> str:
        """What kind of case it is."""
        return self.json["slug"]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def names(self, prefix: str) -> list[str]:
        """Names below a prefix, without it, sorted."""
        return sorted(name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix))

    # Settings.

    def setting(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a setting."""
        self._read.add(name)
        if name in self._settings:
            return self._settings[name]
        assert default is not _REQUIRED, f"{self.name}: the case has no setting '{name}'"
        return default

    def choice(self, name: str, meanings: Mapping[Any, Any], default: Any = _REQUIRED) -> Any:
        """What a setting's value means here; an unknown value fails."""
        value = self.setting(name, default)
        assert value in meanings, f"{self.name}: setting {name}={value!r} is unknown; known: {list(meanings)}"
        return meanings[value]

    def require(self, name: str, value: Any) -> None:
        """Where the setting is given, it must be the one that the product has."""
        given = self.setting(name, value)
        same = math.isclose(given, value, rel_tol=1e-6) if isinstance(value, float) else given == value
        assert same, f"{self.name}: the case is made with {name}={given!r}, this runs with {value!r}"

    # Tensors that are fed.

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        assert name in self.tensors, f"{self.name}: the case has no tensor '{name}'"
        return tuple(self.tensors[name].shape)

    def take(self, name: str) -> Tensor:
        """A copy of an input."""
        assert name in self.tensors, f"{self.name}: the case has no tensor '{name}'"
        self._used.add(name)
        return self.tensors[name].clone()

    def fill(self, module: nn.Module, rename: Callable[[str], str], *, keep: frozenset[str] = frozenset()) -> None:
        """Load a module strictly from the inputs that `rename` names; `keep` stays as drawn."""
        module.load_state_dict(self._state(module.state_dict(), rename, keep))

    def state(self, own: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
        """The inputs as a state with the names of `own`."""
        return self._state(own, rename, frozenset())

    def _state(
        self, own: Mapping[str, Tensor], rename: Callable[[str], str], keep: frozenset[str]
    ) -> dict[str, Tensor]:
        # The cases do not store BatchNorm's step counters; a scalar may be stored with or without an axis.
        state = {
            name: value if name in keep or name.endswith("num_batches_tracked") else self.take(rename(name))
            for name, value in own.items()
        }
        return {
            name: value.reshape(own[name].shape) if value.numel() == own[name].numel() == 1 else value
            for name, value in state.items()
        }

    # Results.

    def compare(self, name: str, ours: Tensor | None) -> None:
        """Compare with a result of the case, where it has one of that name."""
        if name not in self.tensors:
            return
        self._compared.add(name)
        difference = "nothing was computed" if ours is None else self._difference(name, ours.detach())
        if difference:
            self._differences.append(f"{name}: {difference}")

    def compare_loosely(self, name: str, ours: Tensor, slack: Tensor) -> None:
        """Compare element by element with `slack` beside the tolerance; what is not a number must be none in both."""
        if name not in self.tensors:
            return
        self._compared.add(name)
        theirs = self.tensors[name]
        if ours.shape != theirs.shape:
            self._differences.append(f"{name}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
            return
        ours, theirs = ours.double(), theirs.double()
        is_number = ~theirs.isnan()
        rtol, atol = self._tolerance(name)
        distance = (ours - theirs).abs()
        if not torch.equal(~ours.isnan(), is_number) or bool(
            (distance > slack + atol + rtol * theirs.abs())[is_number].any()
        ):
            self._differences.append(f"{name}: differs by {float(distance[is_number].max()):.3g}, element by element")

    def report(self, difference: str) -> None:
        """Fail in the end, with whatever else differs."""
        self._differences.append(difference)

    def note(self, name: str, default: float) -> float:
        """A number of the tolerance's note."""
        note = self.json["tolerance"].get("note")
        found = json.loads(note) if isinstance(note, str) and note.lstrip().startswith("{") else note
        return float(found.get(name, default)) if isinstance(found, dict) else default

    def compare_gradient(self, name: str, ours: Tensor | None, *, prefix: str = "grad", sums: str = "gradsum") -> None:
        """Compare a gradient, whole or as the sums over either axis that large ones are stored as."""
        self.compare(f"{prefix}.{name}", ours)
        rows = None if ours is None else ours.reshape(ours.shape[0], -1) if ours.dim() else ours.reshape(1, 1)
        for axis in (0, 1):
            self.compare(f"{sums}{axis}.{name}", None if rows is None else rows.sum(axis))

    def exclude(self, name: str, reason: str) -> None:
        """Leave a result uncompared for a stated reason."""
        assert reason
        self._excluded[name] = reason

    def finish(self) -> None:
        """Fail on any difference, and on whatever was neither used nor compared.

        Raises:
            AssertionError: Says what differs and what was left out.
        """
        problems = list(self._differences)
        results = {name for name in self.tensors if is_result(name)}
        for what, left in (
            ("results were not compared", results - self._compared - self._excluded.keys()),
            ("inputs were not used", self.tensors.keys() - results - self._used),
            ("settings were not read", self._settings.keys() - self._read - _INERT),
        ):
            if left:
                problems.append(f"{len(left)} {what}: {', '.join(sorted(left))}")
        if not self._compared:
            problems.append("nothing was compared")
        assert not problems, f"{self.name}:\n  " + "\n  ".join(problems)

    def _difference(self, name: str, ours: Tensor) -> str | None:
        theirs = self.tensors[name]
        if ours.numel() == theirs.numel() == 1:
            ours = ours.reshape(theirs.shape)
        if ours.shape != theirs.shape:
            return f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        if not theirs.is_floating_point():
            if ours.is_floating_point():
                return f"{ours.dtype}, expected integers"
            unequal = int((ours.long() != theirs.long()).sum())
            return f"{unequal} of {theirs.numel()} integers differ" if unequal else None
        if not bool(ours.isfinite().all() and theirs.isfinite().all()):
            return "not finite"
        if not theirs.numel():
            return None
        rtol, atol = self._tolerance(name)
        distance = float((ours.double() - theirs.double()).abs().max())
        allowed = atol + rtol * float(theirs.double().abs().max())
        return None if distance <= allowed else f"differs by {distance:.3g}, allowed are {allowed:.3g}"

    def _tolerance(self, name: str) -> tuple[float, float]:
        tolerance = self.json["tolerance"]
        own = _notes(tolerance.get("note")).get(name)
        if own is None:
            first, second, *_ = [*name.split("."), ""]
            # A variant's name may stand in front: `mlp.grad_eval.fuse.weight`.
            is_gradient = first.startswith("grad") or (first != "out" and second.startswith("grad"))
            own = tolerance["grad" if is_gradient else "out"]
        return float(own["rtol"]), float(own["atol"])


def is_result(name: str) -> bool:
    """Whether a tensor is computed; of a variant such as `mlp.out.prompt` the second part of the name tells."""
    first, *rest = name.split(".")
    if first in INPUTS:
        return False
    return first.startswith(("out", "grad")) or not rest or rest[0] not in INPUTS


def generate(name: str, recipe: Mapping[str, Any]) -> Tensor:
    """A tensor from the integer hash that the cases describe.

    Raises:
        AssertionError: It does not match its checksum.
    """
    shape = tuple(recipe["shape"])
    mask = np.uint64(0xFFFFFFFF)
    h = (np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(recipe["seed"] * 0x9E3779B9 % 2**32)) & mask
    h ^= h >> np.uint64(16)
    h = (h * np.uint64(0x21F0AAAD)) & mask
    h ^= h >> np.uint64(15)
    h = (h * np.uint64(0x735A2D97)) & mask
    h ^= h >> np.uint64(15)
    unit = h.astype(np.float64) / 2.0**31 - 1.0
    values = (recipe["offset"] + recipe["scale"] * unit).astype(np.float32)
    first, total = values[:3].tolist(), float(values.astype(np.float64).sum())
    wanted = recipe.get("check_first3", first)[: len(first)]
    assert np.allclose(first, wanted, rtol=1e-6, atol=1e-9), f"{name}: first {first}, expected {wanted}"
    wanted = recipe["check_sum"]
    assert math.isclose(total, wanted, rel_tol=1e-6, abs_tol=1e-6), f"{name}: sum {total}, expected {wanted}"
    return torch.from_numpy(values.reshape(shape))


def _notes(note: Any) -> Mapping[str, Any]:
    # Most notes are prose that repeats the tolerances; one that loosens a tensor maps its name to both.
    if isinstance(note, str) and note.lstrip().startswith("{"):
        note = json.loads(note)
    if not isinstance(note, dict):
        return {}
    return {name: own for name, own in note.items() if isinstance(own, dict) and {"rtol", "atol"} <= own.keys()}
