"""A worker: takes runs from the board until there is nothing left to do."""

from __future__ import annotations

import json
import math
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from peft_modal.comparison.cost import measure
from peft_modal.comparison.plan import COST, Plan, Progress, Run
from peft_modal.comparison.process import run_child
from peft_modal.comparison.storage import Board, Claim, LostRunError
from peft_modal.compose import compose
from peft_modal.compose.sources import ConfigFile, read_config
from peft_modal.errors import ConfigError, PeftModalError, TrainingError
from peft_modal.files import versions, write_text
from peft_modal.running.folder import RunFolder

_POLL_S: Final = 2.0
Execute = Callable[[Run, Callable[[], None]], dict[str, Any]]
"""Makes a run and returns its figures; calls its second argument now and then. Raises PeftModalError when it fails."""


class Executor:
    """Makes runs in processes of their own.

    Args:
        plan: What the runs are of.
        out: The comparison's folder; runs lie below it.
        tick_s: Seconds between signs of life.
        run: Makes a training's process, as `run_child` does.
    """

    def __init__(self, plan: Plan, out: Path, *, tick_s: float, run: Callable[..., None] = run_child) -> None:
        self._plan, self._out, self._tick_s, self._run = plan, out, tick_s, run

    def __call__(self, run: Run, tick: Callable[[], None]) -> dict[str, Any]:
        """Figures of a run, made now or finished earlier."""
        return self._cost(tick) if run.key == COST else self._train(run, tick)

    def _train(self, run: Run, tick: Callable[[], None]) -> dict[str, Any]:
        folder = RunFolder(self._out / run.key)
        config = self._plan.run_config(run)
        if folder.is_finished:
            self._require_same(folder, config)
        else:
            write_text(folder.config, compose(config).to_yaml())
            command = ["fit", "--config", str(folder.config), "--out", str(folder.root), "--json"]
            self._run(command, log=folder.root / "log.txt", tick_s=self._tick_s, tick=tick)
        figures: dict[str, Any] = json.loads(folder.metrics.read_text(encoding="utf-8"))
        value = figures.get(f"val/{self._plan.metric}")
        if len(self._plan.lrs) > 1 and value is None:
            raise ConfigError(
                f"the run leaves no val/{self._plan.metric}, by which learning rates are chosen: give the data a "
                "validation split and validate at the last epoch (trainer.check_val_every_n_epoch), or set --lr-grid 1"
            )
        return figures

    def _cost(self, tick: Callable[[], None]) -> dict[str, Any]:
        plan = self._plan
        costs = measure(
            {label: compose(plan.cost_config(label)) for label in plan.methods},
            compose(plan.cost_config(None)) if plan.reference is not None else None,
            rounds=plan.cost_rounds,
            folder=self._out / COST,
            tick_s=self._tick_s,
            tick=tick,
            report=lambda name: say(f"measuring step time and memory: {name}"),
        )
        return {label: asdict(cost) for label, cost in costs.items()}

    @staticmethod
    def _require_same(folder: RunFolder, config: Mapping[str, Any]) -> None:
        found = read_config(ConfigFile(str(folder.config), "", folder.config)) if folder.config.is_file() else {}
        if found != config:
            raise ConfigError(f"'{folder.root}' holds a finished run of other settings; remove it")


def work(
    plan: Plan,
    board: Board,
    execute: Execute,
    *,
    publish: Callable[[Mapping[str, Progress]], None],
    poll_s: float = _POLL_S,
) -> dict[str, Progress]:
    """Take and make runs until all are finished; wait for those that other workers are at.

    Args:
        plan: What is compared.
        board: Where runs are taken.
        execute: Makes one.
        publish: Called with how far all runs are, after each run of this worker and at the end.
        poll_s: Seconds between looks at the board while others work.

    Returns:
        How every run ended.
    """
    waited = False
    while True:
        progress = board.progress()
        due = plan.due(progress)
        if not due:
            publish(progress)
            return progress
        claim = board.take([run.key for run in due])
        if claim is None:
            if not waited:
                say(f"waiting for {_count(due)} that other workers are at")
            waited = True
            time.sleep(poll_s)
            continue
        waited = False
        run = next(run for run in due if run.key == claim.key)
        say(_headline(plan, run, progress))
        try:
            ended = _make(plan, board, claim, run, execute)
        except LostRunError:
            say(f"{run.key}: another worker has taken this run over")
            continue
        say(_outcome(plan, run, ended, board.progress()))
        publish(board.progress())


def measured(execute: Execute) -> Progress:
    """How the cost run ends when it is made outside any board."""
    return _executed(execute, Run(COST), lambda: None)


def _executed(execute: Execute, run: Run, tick: Callable[[], None]) -> Progress:
    started = time.perf_counter()
    facts: dict[str, Any] = {"host": socket.gethostname(), "versions": versions()}
    try:
        figures = execute(run, tick)
    except PeftModalError as error:
        return Progress("failed", error=str(error), seconds=time.perf_counter() - started, **facts)
    return Progress("done", figures=figures, seconds=time.perf_counter() - started, **facts)


def _make(plan: Plan, board: Board, claim: Claim, run: Run, execute: Execute) -> Progress:
    try:
        progress = _executed(execute, run, lambda: board.sign_of_life(claim))
    except BaseException:
        board.give_back(claim)
        raise
    value = (progress.figures or {}).get(f"val/{plan.metric}")
    usable = isinstance(value, (int, float)) and math.isfinite(value)
    board.finish(claim, progress, value=value if usable else None)
    return progress


def failures(plan: Plan, progress: Mapping[str, Progress]) -> list[tuple[Run, str]]:
    """The runs that failed, and why; the cost run when it failed for one of the methods."""
    found = []
    for run in plan.known(progress):
        one = progress.get(run.key, Progress())
        costs = (one.figures or {}) if run.key == COST else {}
        reasons = [f"{label}: {cost['error']}" for label, cost in costs.items() if cost.get("error")]
        if one.state == "failed":
            found.append((run, str(one.error)))
        elif reasons:
            found.append((run, " ".join(reasons)))
    return found


def require_all(plan: Plan, progress: Mapping[str, Progress]) -> None:
    """Raise unless every run worked.

    Raises:
        TrainingError: Names the runs that failed, with their reasons.
    """
    failed = failures(plan, progress)
    if failed:
        lines = [f"{run.key}: {reason}" for run, reason in failed]
        raise TrainingError(
            "\n".join([*lines, f"{len(failed)} of {plan.size} runs failed; --retry-failed takes them again"])
        )


def say(text: str) -> None:
    """One line of progress on standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
    sys.stderr.flush()


def _count(runs: list[Run]) -> str:
    return "a run" if len(runs) == 1 else f"{len(runs)} runs"


def _headline(plan: Plan, run: Run, progress: Mapping[str, Progress]) -> str:
    return f"[{_finished(plan, progress) + 1}/{plan.size}] {_title(run)}{_left(plan, progress)}"


def _finished(plan: Plan, progress: Mapping[str, Progress]) -> int:
    """Runs that count for the table; earlier choices of learning rates may have left others."""
    return sum(progress.get(run.key, Progress()).state in {"done", "failed"} for run in plan.known(progress))


def _title(run: Run) -> str:
    if run.key == COST:
        return "step time and memory of every method"
    rate = "" if run.lr is None else f", lr {run.lr:g}"
    return f"{run.method}{rate}, seed {run.seed}"


def _left(plan: Plan, progress: Mapping[str, Progress]) -> str:
    times = [one.seconds for key, one in progress.items() if one.seconds is not None and key != COST]
    running = sum(one.state == "running" for one in progress.values())
    if not times:
        return ""
    seconds = statistics.mean(times) * (plan.size - _finished(plan, progress)) / (running + 1)
    return f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"


def _outcome(plan: Plan, run: Run, ended: Progress, progress: Mapping[str, Progress]) -> str:
    if ended.state == "failed":
        return f"{run.key} failed: {ended.error}"
    if run.key == COST:
        return f"costs measured, {ended.seconds:.0f} s"
    name = f"val/{plan.metric}"
    value = (ended.figures or {}).get(name)
    text = f"{_title(run)}: {f'{name} {value:.4g}, ' if value is not None else ''}{ended.seconds:.0f} s"
    choice = plan.choice(run.method, progress)
    if choice is not None and len(plan.lrs) > 1 and run in plan.grid(run.method):
        text += f"; learning rate of {run.method}: {choice.lr:g}"
    return text
