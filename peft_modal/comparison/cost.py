"""What a training step costs, over what full fine-tuning's costs."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peft_modal.comparison.process import run_child
from peft_modal.errors import TrainingError
from peft_modal.files import write_text

if TYPE_CHECKING:
    from peft_modal.compose import Composed

ROUNDS: Final = 9


@dataclass(frozen=True)
class StepCost:
    """Time and memory of training steps; ratios are None without full fine-tuning to compare to."""

    step_ms: float | None = None
    """Median."""
    ratio: float | None = None
    """Median over rounds of this step's time over full fine-tuning's in the same round."""
    ratio_low: float | None = None
    """Smallest ratio of a round."""
    ratio_high: float | None = None
    """Largest ratio of a round."""
    peak_mb: float | None = None
    """MiB at most, above what the loaded libraries take; on a GPU, of its allocator."""
    peak_ratio: float | None = None
    """Over full fine-tuning's."""
    error: str | None = None
    """Why figures are missing."""


def measure(
    configs: Mapping[str, Composed],
    reference: Composed | None,
    *,
    rounds: int = ROUNDS,
    folder: Path | None = None,
    tick_s: float = 10.0,
    tick: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, StepCost]:
    """Cost of every configuration, one after the other.

    For each, a fresh process trains it and full fine-tuning in turns of a few steps, and another fresh process trains
    it alone for the peak memory. The machine should do nothing else, with the number of threads that counts.

    Args:
        configs: Configurations by name.
        reference: What to compare to; None for absolute figures.
        rounds: Turns of each that count; one more is warm-up.
        folder: Where intermediate files lie; what lies there already is not measured again. None for none.
        tick_s: Seconds between calls of `tick`.
        tick: Called while processes run; it may raise to end the measurement.
        report: Told the name of the configuration that comes next.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return measure(
                configs, reference, rounds=rounds, folder=Path(name), tick_s=tick_s, tick=tick, report=report
            )
    bench = _Bench(folder, tick_s, tick)
    base: Path | None = None
    base_peak, failure = 0.0, None
    if reference is not None:
        report("full fine-tuning, to compare to")
        try:
            base = bench.config(reference)
            base_peak = bench.run("peak", base)["peak_mb"]
        except TrainingError as error:
            base, failure = None, f"full fine-tuning: {error}"
    costs: dict[str, StepCost] = {}
    for name, composed in configs.items():
        report(name)
        path = bench.config(composed)
        try:
            times = bench.run("pair", base or path, path, str(rounds))
            peak = bench.run("peak", path)["peak_mb"]
        except TrainingError as error:
            costs[name] = StepCost(error=str(error))
            continue
        costs[name] = StepCost(
            step_ms=times["step_ms"],
            ratio=times["ratio"] if base else None,
            ratio_low=times["ratio_low"] if base else None,
            ratio_high=times["ratio_high"] if base else None,
            peak_mb=peak,
            peak_ratio=peak / base_peak if base and base_peak > 0 else None,
            error=failure,
        )
    return costs


@dataclass(frozen=True)
class _Bench:
    folder: Path
    tick_s: float
    tick: Callable[[], None]

    def config(self, composed: Composed) -> Path:
        text = composed.to_yaml()
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
        write_text(path, text)
        return path

    def run(self, kind: str, *arguments: Path | str) -> dict[str, float]:
        """Figures of one child process, or those that an earlier one has left."""
        of = [Path(argument) for argument in arguments if isinstance(argument, Path)][-1]
        out = of.with_suffix(f".{'-'.join([kind, *(each for each in arguments if isinstance(each, str))])}.json")
        if not out.is_file():
            command = [kind, *map(str, arguments), str(out)]
            run_child(command, log=self.folder / "log.txt", tick_s=self.tick_s, tick=self.tick)
        figures: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
        return figures
