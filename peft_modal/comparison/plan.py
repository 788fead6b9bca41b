"""The plan: every run of a comparison, and which of them can be made now."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from peft_modal.comparison.choose import Choice, Mode, choose
from peft_modal.comparison.items import Item
from peft_modal.compose import compose
from peft_modal.errors import ConfigError

COST = "cost"
"""Key of the run that measures step time and peak memory."""
State = Literal["waiting", "running", "done", "failed"]


@dataclass(frozen=True)
class Run:
    """One thing that a worker takes: a training, or the measurement of what training costs."""

    key: str
    """Its name, and its folder below the comparison's."""
    method: str = ""
    lr: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    state: State = "waiting"
    figures: Mapping[str, Any] | None = None
    """What a training wrote into `metrics.json`; of the cost run, the costs by method."""
    error: str | None = None
    """The sentence that a failed run ended with."""
    seconds: float | None = None
    host: str | None = None
    versions: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Plan:
    """What is compared, complete: the same plan on another machine gives the same runs."""

    config: dict[str, Any]
    """The resolved configuration without its method; every run has its own learning rate and seed."""
    methods: dict[str, dict[str, Any]]
    """Resolved nodes by label."""
    reference: dict[str, Any] | None
    """Resolved node of full fine-tuning, that costs are compared to; None where it does not go with the rest."""
    lrs: tuple[float, ...]
    """Ascending; empty where the task has no learning rate."""
    seeds: tuple[int, ...]
    metric: str
    """Chosen by on validation data and reported on test data, without the split: `accuracy`."""
    mode: Mode
    cost_rounds: int
    """Rounds of paired steps per method; 0 leaves the measurement out."""
    compared: tuple[str, ...] = ()
    """Whole names of further figures that the table has a column for."""
    balanced: tuple[str, str] | None = None
    """Of the first figure less is better, of the second more; a column tells how near each method is to the best."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` was taken of."""
        lists = {name: tuple(values.get(name, ())) for name in ("lrs", "seeds", "compared")}
        balanced = values.get("balanced")
        return cls(**{**values, **lists, "balanced": tuple(balanced) if balanced else None})

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON's own types."""
        return json.loads(json.dumps(asdict(self)))

    def run_config(self, run: Run) -> dict[str, Any]:
        """The complete configuration of a training."""
        assert run.seed is not None
        return self._config(self.methods[run.method], lr=run.lr, seed=run.seed)

    def cost_config(self, label: str | None) -> dict[str, Any]:
        """The configuration whose steps are timed: a method's, or for None full fine-tuning's."""
        node = self.reference if label is None else self.methods[label]
        assert node is not None
        return self._config(node, lr=self.lrs[0] if self.lrs else None, seed=self.seeds[0])

    @property
    def modules(self) -> list[str]:
        """What every run imports."""
        first = compose(self.run_config(self.grid(next(iter(self.methods)))[0]))
        return ["peft_modal.running.fit", *sorted({node.cls.__module__ for node in first.nodes.values()})]

    def training(self, label: str, lr: float | None, seed: int) -> Run:
        """A training by what distinguishes it."""
        rate = "" if lr is None else f"/lr{lr:g}"
        return Run(f"runs/{self._slug(label)}{rate}/seed{seed}", label, lr, seed)

    def grid(self, label: str) -> list[Run]:
        """The runs that a method's learning rate is chosen by."""
        return [self.training(label, lr, self.seeds[0]) for lr in self.lrs or (None,)]

    def choice(self, label: str, progress: Mapping[str, Progress]) -> Choice | None:
        """The learning rate chosen for a method; None until its grid is finished, or when every run of it failed."""
        runs = self.grid(label)
        known = [progress.get(run.key, Progress()) for run in runs]
        if any(one.state not in {"done", "failed"} for one in known):
            return None
        values = {
            run.lr: (one.figures or {}).get(f"val/{self.metric}") if one.state == "done" else None
            for run, one in zip(runs, known, strict=True)
        }
        if len(runs) == 1:  # nothing to choose, so that no validation data is needed
            return Choice(runs[0].lr, values) if known[0].state == "done" else None
        return choose(values, self.mode)

    def chosen(self, label: str, progress: Mapping[str, Progress]) -> list[Run]:
        """The runs of all seeds with the chosen learning rate; the first is one of the grid's."""
        choice = self.choice(label, progress)
        return [self.training(label, choice.lr, seed) for seed in self.seeds] if choice else []

    def due(self, progress: Mapping[str, Progress]) -> list[Run]:
        """Unfinished runs that can be made now, in the order in which they are taken."""
        trainings = list(self._trainings(progress))
        due = [run for run in trainings if progress.get(run.key, Progress()).state in {"waiting", "running"}]
        if due or not self.cost_rounds:
            return due
        # Costs are measured last, when no worker trains beside.
        state = progress.get(COST, Progress()).state
        return [Run(COST)] if state in {"waiting", "running"} else []

    @property
    def size(self) -> int:
        """Number of runs when none fails."""
        per_method = max(1, len(self.lrs)) + len(self.seeds) - 1
        return len(self.methods) * per_method + bool(self.cost_rounds)

    def known(self, progress: Mapping[str, Progress]) -> list[Run]:
        """Every run that is finished, under way or due."""
        runs = list(self._trainings(progress))
        return [*runs, Run(COST)] if self.cost_rounds else runs

    def _trainings(self, progress: Mapping[str, Progress]) -> Iterator[Run]:
        for label in self.methods:
            yield from self.grid(label)
        for label in self.methods:
            yield from self.chosen(label, progress)[1:]

    def _slug(self, label: str) -> str:
        slug = _folder_name(label)
        alike = [other for other in self.methods if _folder_name(other) == slug]
        return slug if len(alike) == 1 else f"{slug}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"

    def _config(self, method: Mapping[str, Any], *, lr: float | None, seed: int) -> dict[str, Any]:
        config = copy.deepcopy(self.config)
        config["method"] = copy.deepcopy(dict(method))
        if lr is not None:
            config["task"]["lr"] = lr
        config["seed"] = seed
        if "seed" in config["data"]:
            config["data"]["seed"] = seed
        return config


def make_plan(
    configs: Sequence[str],
    items: Sequence[Item],
    *,
    overrides: Sequence[str],
    grid: Sequence[float],
    seeds: Sequence[int],
    cost_rounds: int,
) -> Plan:
    """Compose and check everything before anything runs.

    Args:
        configs: Names or paths of configurations, as `fit` takes them.
        items: The methods.
        overrides: As `fit` takes them, without the method's.
        grid: Multipliers of the configuration's learning rate.
        seeds: The first decides on the learning rates.
        cost_rounds: Rounds of paired steps per method.

    Raises:
        ConfigError: Lists the mistakes of the configuration with every method.
    """
    _refuse(overrides)
    composed, problems = {}, []
    for item in items:
        try:
            # The method lies over the files: one that they configure keeps its other arguments.
            composed[item.label] = compose(*configs, {"method": item.node}, overrides=overrides)
        except ConfigError as error:
            problems += [f"{item.label}: {problem}" for problem in error.problems if problem.startswith("method")]
            problems += [problem for problem in error.problems if not problem.startswith("method")]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    first = next(iter(composed.values()))
    try:
        full = compose(*configs, {"method": {"name": "core.full"}}, overrides=overrides).to_dict()["method"]
    except ConfigError:
        full = None
    task = first.nodes["task"]
    lr = task.kwargs.get("lr")
    if not isinstance(lr, (int, float)) and list(grid) != [1.0]:
        raise ConfigError(f"--lr-grid: task '{task.name}' has no argument 'lr' to choose; write --lr-grid 1.")
    metric, mode = task.cls.selection  # type: ignore[attr-defined]
    config = first.to_dict()
    del config["method"]
    return Plan(
        config=config,
        methods={label: one.to_dict()["method"] for label, one in composed.items()},
        reference=full,
        lrs=tuple(float(f"{lr * factor:.3g}") for factor in grid) if isinstance(lr, (int, float)) else (),
        seeds=tuple(seeds),
        metric=metric.removeprefix("val/"),
        mode=mode,
        cost_rounds=cost_rounds,
        compared=task.cls.compared,  # type: ignore[attr-defined]
        balanced=task.cls.balanced,  # type: ignore[attr-defined]
    )


def conflicts(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why runs of two plans cannot share a folder and a table, in words; methods, seeds and rates may come and go."""
    free = {"methods", "seeds", "lrs", "cost_rounds"}
    old, new = ({key: value for key, value in plan.items() if key not in free} for plan in (before, now))
    shared = before["methods"].keys() & now["methods"].keys()
    old["methods"], new["methods"] = ({label: plan["methods"][label] for label in shared} for plan in (before, now))
    same = [
        f"the folders of '{one}' and '{other}' have one name"
        for one in sorted(before["methods"].keys() - shared)
        for other in sorted(now["methods"])
        if _folder_name(one) == _folder_name(other)
    ]
    return differences(old, new) + same


def _folder_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", label).strip("-.")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where two plans differ, in words: `seeds (was [0], now [0, 1])`."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{key}.{text}" for text in differences(old, new)]
        else:
            found.append(f"{key} (was {_short(old)}, now {_short(new)})")
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse(overrides: Sequence[str]) -> None:
    reasons = {"method": "methods are named in --methods", "seed": "seeds are named in --seeds"}
    problems = []
    for override in overrides:
        key = override.partition("=")[0]
        top = "seed" if key in {"seed", "data.seed"} else key.partition(".")[0]
        if top in reasons:
            problems.append(f"--{key}: {reasons[top]}; leave this out.")
    if problems:
        raise ConfigError(*problems)
