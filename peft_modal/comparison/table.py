"""The table: one row per method, as CSV, Markdown and plain figures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from peft_modal.comparison.choose import Choice
from peft_modal.comparison.plan import COST, Plan, Progress


@dataclass(frozen=True)
class Row:
    """One method."""

    method: str
    seeds: int
    """Runs with the chosen learning rate that are finished."""
    split: str
    """What `mean` and `deviation` are measured on: `test`, or `val` where there is no test data."""
    mean: float | None
    deviation: float | None
    """Sample deviation over seeds; None for a single one."""
    lr: float | None
    at_edge: bool
    """Whether the chosen learning rate is the smallest or largest tried."""
    val: float | None
    """Mean validation figure over the same runs."""
    trained: float | None
    """Trained parameters: the adapter's, the backbone's and the head's."""
    trained_share: float | None
    adapter_bytes: float | None
    step_ms: float | None
    step_ratio: float | None
    peak_mb: float | None
    peak_ratio: float | None
    problems: tuple[str, ...]
    """What failed."""
    further: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    """Mean and deviation of the plan's other figures."""
    balance: float | None = None
    """See `balances`."""


def rows(plan: Plan, progress: Mapping[str, Progress]) -> list[Row]:
    """One row per method, in the plan's order."""
    costs = (progress.get(COST, Progress()).figures or {}) if plan.cost_rounds else {}
    found = [_row(plan, label, progress, costs.get(label, {})) for label in plan.methods]
    if plan.balanced is None:
        return found
    pairs = [tuple(row.further[name][0] if name in row.further else None for name in plan.balanced) for row in found]
    return [replace(row, balance=value) for row, value in zip(found, balances(pairs), strict=True)]


def balances(pairs: Sequence[tuple[float | None, ...]]) -> list[float | None]:
    """How well each row does in two figures at once, 0 to 2 (the VLHI of Hu et al., ICLR 2025, arXiv:2409.06633).

    The first figure's distance from the worst, over the range of all rows, plus the second's. It depends on the whole
    group: another row changes all of them. None where a figure is missing, and where fewer than two rows have both or
    all are alike in one.

    Args:
        pairs: Of the first less is better, of the second more.
    """
    known = [(less, more) for less, more in pairs if less is not None and more is not None]
    if len(known) < 2:
        return [None for _ in pairs]
    (least, most), (lowest, highest) = ((min(values), max(values)) for values in zip(*known, strict=True))
    if least == most or lowest == highest:
        return [None for _ in pairs]
    return [
        None if less is None or more is None else (most - less) / (most - least) + (more - lowest) / (highest - lowest)
        for less, more in pairs
    ]


def _row(plan: Plan, label: str, progress: Mapping[str, Progress], cost: Mapping[str, Any]) -> Row:
    choice = plan.choice(label, progress)
    chosen = plan.chosen(label, progress)
    found = [progress.get(run.key, Progress()) for run in chosen]
    figures = [one.figures for one in found if one.state == "done" and one.figures is not None]
    split = "test" if any(f"test/{plan.metric}" in one for one in figures) else "val"
    values = _values(figures, f"{split}/{plan.metric}")
    every = {run.key: run for run in [*plan.grid(label), *chosen]}
    problems = [
        f"{_where(run.lr, run.seed)}: {progress[key].error}"
        for key, run in every.items()
        if progress.get(key, Progress()).state == "failed"
    ]
    if cost.get("error"):
        problems.append(f"cost: {cost['error']}")
    whole = progress.get(COST, Progress())
    if plan.cost_rounds and whole.state == "failed":
        problems.append(f"cost: {whole.error}")
    return Row(
        method=label,
        seeds=len(values),
        split=split,
        mean=statistics.fmean(values) if values else None,
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        lr=choice.lr if choice else None,
        at_edge=bool(choice and choice.at_edge),
        val=_mean(figures, f"val/{plan.metric}"),
        trained=_mean(figures, "params/adapter", "params/backbone_trained", "params/head"),
        trained_share=_mean(figures, "params/trained_share"),
        adapter_bytes=_mean(figures, "file/adapter_bytes"),
        step_ms=cost.get("step_ms"),
        step_ratio=cost.get("ratio"),
        peak_mb=cost.get("peak_mb"),
        peak_ratio=cost.get("peak_ratio"),
        problems=tuple(problems),
        further={
            name: (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
            for name in plan.compared
            if (values := _values(figures, name))
        },
    )


def _where(lr: float | None, seed: int | None) -> str:
    return f"seed {seed}" if lr is None else f"lr {lr:g}, seed {seed}"


def _values(figures: Sequence[Mapping[str, Any]], *names: str) -> list[float]:
    return [sum(float(one[name]) for name in names) for one in figures if all(name in one for name in names)]


def _mean(figures: Sequence[Mapping[str, Any]], *names: str) -> float | None:
    values = _values(figures, *names)
    return statistics.fmean(values) if values else None


# Text.


@dataclass(frozen=True)
class Style:
    """How the metric is written."""

    metric: str
    percent: bool

    @classmethod
    def of(cls, plan: Plan, table: Sequence[Row]) -> Style:
        """Percent for figures between 0 and 1 that shall be large."""
        shown = [row.mean for row in table if row.mean is not None]
        return cls(plan.metric, plan.mode == "max" and all(0 <= value <= 1 for value in shown))

    def title(self, split: str) -> str:
        """Of the column."""
        return f"{split} {self.metric.replace('_', ' ')}{', %' if self.percent else ''}"

    def value(self, value: float | None) -> str:
        """A figure, "" for none."""
        if value is None:
            return ""
        return f"{100 * value:.1f}" if self.percent else f"{value:.4g}"


COLUMNS = ("learning rate", "trained", "share", "adapter")
"""After the method and the metric."""
COST_COLUMNS = ("step time", "peak memory")
"""After these, where costs are measured."""


def further_columns(plan: Plan, table: Sequence[Row]) -> list[str]:
    """The plan's other figures that a row has."""
    return [name for name in plan.compared if any(name in row.further for row in table)]


def headings(style: Style, plan: Plan, table: Sequence[Row]) -> list[str]:
    """Headings of the table in words."""
    splits = {row.split for row in table if row.mean is not None} or {"test"}
    split = "test" if splits == {"test"} else "validation" if splits == {"val"} else "test or validation"
    further = [name.replace("/", ": ").replace("_", " ") for name in further_columns(plan, table)]
    balance = ["balance"] if any(row.balance is not None for row in table) else []
    return ["method", style.title(split), *further, *balance, *COLUMNS, *(COST_COLUMNS if plan.cost_rounds else ())]


def cells(row: Row, style: Style, plan: Plan, table: Sequence[Row]) -> list[str]:
    """A row of a table in words, for Markdown and HTML."""
    if row.mean is None:
        metric = "failed" if row.problems else "not finished"
    else:
        deviation = "" if row.deviation is None else f" ± {style.value(row.deviation)}"
        missing = "" if row.seeds == len(plan.seeds) else f" ({row.seeds} of {len(plan.seeds)})"
        metric = f"{style.value(row.mean)}{deviation}{missing}"
    costs = [_relative(row.step_ratio, row.step_ms, "ms"), _relative(row.peak_ratio, row.peak_mb, "MB")]
    return [
        row.method,
        metric,
        *(_spread(*row.further.get(name, (None, None))) for name in further_columns(plan, table)),
        *([_spread(row.balance, None)] if any(other.balance is not None for other in table) else []),
        "" if row.lr is None else f"{row.lr:g}{'*' if row.at_edge else ''}",
        "" if row.trained is None else f"{row.trained:,.0f}",
        "" if row.trained_share is None else f"{100 * row.trained_share:.2f} %",
        "" if row.adapter_bytes is None else size(row.adapter_bytes),
        *(costs if plan.cost_rounds else []),
    ]


def _spread(value: float | None, deviation: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" + ("" if deviation is None else f" ± {deviation:.2g}")


def size(number: float) -> str:
    """Bytes in kB or MB."""
    return f"{number / 1e6:.2f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"


def _relative(ratio: float | None, value: float | None, unit: str) -> str:
    absolute = "" if value is None else f"{value:,.0f} {unit}"
    return absolute if ratio is None else f"{ratio:.2f} ({absolute})"


def caption(plan: Plan, table: Sequence[Row], choices: Mapping[str, Choice | None]) -> list[str]:
    """What the figures are, sentence by sentence."""
    seeds = ", ".join(map(str, plan.seeds))
    several = len(plan.seeds) > 1
    text = [
        f"Mean{' ± sample deviation' if several else ''} over seed{'s' if several else ''} {seeds}, last epoch; a seed "
        "sets initial values, order and augmentation, and what the data draws from it.",
    ]
    if any(row.mean is not None and row.split == "val" for row in table):
        text.append("There is no test data: figures are those on validation data.")
    if len(plan.lrs) > 1:
        grid = ", ".join(f"{lr:g}" for lr in plan.lrs)
        best = "highest" if plan.mode == "max" else "lowest"
        text.append(
            f"Each method's learning rate is the one of {grid} with the {best} val/{plan.metric} of seed "
            f"{plan.seeds[0]} (of equals the smallest); test figures have no part in it."
        )
        if any(choice is not None and choice.at_edge for choice in choices.values()):
            text.append("*: the smallest or largest learning rate tried.")
    if plan.balanced is not None and any(row.balance is not None for row in table):
        less, more = (name.rpartition("/")[2].replace("_", " ") for name in plan.balanced)
        text.append(
            f"Balance: how far {less} is below the largest of these rows, over their range, plus how far {more} is "
            "above the smallest; another row changes it."
        )
    text.append("Trained parameters and the adapter file include the head.")
    if any(row.step_ms is not None for row in table):
        over = "over full fine-tuning's (absolute in brackets)" if plan.reference is not None else "of one step"
        text.append(
            f"Step time and peak memory are {over}: median of {plan.cost_rounds} paired rounds in one process; memory "
            "above what the loaded libraries take, each in a fresh process."
        )
    return text


def markdown(plan: Plan, progress: Mapping[str, Progress]) -> str:
    """The table, its caption, and what failed."""
    table = rows(plan, progress)
    style = Style.of(plan, table)
    titles = headings(style, plan, table)
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    lines += [
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells(row, style, plan, table))} |" for row in table
    ]
    choices = {label: plan.choice(label, progress) for label in plan.methods}
    lines += ["", " ".join(caption(plan, table, choices))]
    failed = [f"- {row.method}, {problem}" for row in table for problem in row.problems]
    if failed:
        lines += ["", "Failed:", "", *failed]
    return "\n".join(lines) + "\n"


def comma_separated(plan: Plan, progress: Mapping[str, Progress]) -> str:
    """The table with full precision, under the names of `Row`'s fields."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    table = rows(plan, progress)
    columns = {name: [f"{name} mean", f"{name} deviation"] for name in further_columns(plan, table)}
    left_out = {"further"} if plan.balanced else {"further", "balance"}
    names = [one.name for one in fields(Row) if one.name not in left_out]
    writer.writerow(["metric", *names, *(title for pair in columns.values() for title in pair)])
    for row in table:
        values = {**asdict(row), "problems": "; ".join(row.problems)}
        further = [value for name in columns for value in row.further.get(name, (None, None))]
        writer.writerow(
            [plan.metric, *("" if value is None else value for value in [*map(values.get, names), *further])]
        )
    return text.getvalue()
