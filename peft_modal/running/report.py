"""The report of a run: what every run has to say, and the task's own part."""

from __future__ import annotations

import csv
import functools
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from peft_modal.compose import Composed
from peft_modal.inspection.places import TrainedPlace
from peft_modal.registry import default_registry
from peft_modal.report import Code, Fact, Facts, Kind, Report, Row, Section, Text, line_chart, show, write_report
from peft_modal.running.environment import environment
from peft_modal.running.folder import RunFolder
from peft_modal.running.parameters import parameters_section
from peft_modal.tasks.base import Task

_SPLITS: Final = {"test": "Test", "val": "Validation"}


@dataclass(frozen=True)
class ReportedRun:
    """What a report is made from."""

    kind: str
    """`fit`, `test` or `validate`."""
    composed: Composed
    folder: RunFolder
    figures: Mapping[str, float]
    task: Task
    trained: Sequence[TrainedPlace]
    """What was trained while training lasted; finalising may fold some of it away."""
    command: Sequence[str]
    """Arguments of `python -m peft_modal` that do the same again."""


def leave_report(run: ReportedRun) -> None:
    """Write the report of a run into its folder; what goes wrong is told on standard error and ends nothing."""
    try:
        modality = run.composed.nodes["backbone"].modality
        write_report(
            run_report(run), run.folder.root, renderer=functools.partial(default_registry().renderer, modality)
        )
    except Exception as error:  # noqa: BLE001 — a run of hours is not lost for a picture of it
        for path in run.folder.reports:
            path.unlink(missing_ok=True)
        if os.environ.get("PEFT_MODAL_DEBUG") == "1":
            traceback.print_exc()
        sys.stderr.write(f"warning: there is no report: {type(error).__name__}: {error}; everything else is complete\n")


def run_report(run: ReportedRun) -> Report:
    """The report of a run; parts that it does not have are absent."""
    names = {noun: node.name for noun, node in run.composed.nodes.items()}
    weights = run.composed.nodes["backbone"].kwargs.get("weights")
    parts = [f"Task {names['task']}", f"head {names['head']}"]
    parts += [f"backbone weights {weights}"] if weights is not None else []
    sections = (
        _curves(run.folder.root / "metrics.csv", run.task),
        *run.task.report_sections(),
        parameters_section(
            run.trained, total=int(run.figures["params/total"]), chosen=run.task.adapter.events.site_entries()
        ),
        _cost(run.figures),
        Section("environment", "Environment", (Facts(_environment(run.composed)),)),
        _reproduce(run),
    )
    return Report(
        kind=run.kind,
        title=f"{names['backbone']} tuned with {names['method']} on {names['data']}",
        lead=f"{', '.join(parts)}, seed {run.composed.seed}.",
        facts=_headline(run),
        sections=tuple(section for section in sections if section is not None),
        metrics=run.figures,
    )


def _headline(run: ReportedRun) -> tuple[Fact, ...]:
    figures, task = run.figures, run.task
    facts = []
    metric = _selected(task)
    split = next((split for split in _SPLITS if f"{split}/{metric}" in figures), None)
    if split is not None:
        others = [
            f"{_words(name)} {show(figures[f'{split}/{name}'], _kind(task, name))}"
            for name in sorted(task.share_metrics - {metric})
            if f"{split}/{name}" in figures
        ]
        label = f"{_SPLITS[split]} {_words(metric)}"
        facts.append(Fact(label, figures[f"{split}/{metric}"], _kind(task, metric), ", ".join(others)))
    if "best/epoch" in figures:
        ended = f", stopped after epoch {figures['stopped/epoch'] + 1:.0f}" if "stopped/epoch" in figures else ""
        note = f"epoch {figures['best/epoch'] + 1:.0f}{', kept' if task.keep == 'best' else ''}{ended}"
        facts.append(Fact("Best validation", figures[f"best/val_{metric}"], _kind(task, metric), note))
    trained = sum(figures[f"params/{part}"] for part in ("adapter", "backbone_trained", "head"))
    note = f"{trained:,.0f} of {figures['params/total']:,.0f} parameters"
    facts.append(Fact("Trained", figures["params/trained_share"], "share", note))
    facts.append(Fact("Adapter file", figures["file/adapter_bytes"], "bytes", "with the head"))
    if "time/step_ms" in figures:
        note = f"{show(figures['time/step_ms'], 'milliseconds')} a step"
        facts.append(Fact("Total time", figures["time/total_s"], "seconds", note))
    return tuple(facts)


def _selected(task: Task) -> str:
    """The figure that a reader judges by: what states are selected by, without its stage."""
    return task.selection[0].partition("/")[2]


def _curves(path: Path, task: Task) -> Section | None:
    """Losses and metrics over epochs, from the table that the trainer wrote."""
    curves = read_curves(path)
    # Losses first, as the eye expects; then the figure that counts.
    order = sorted(curves, key=lambda name: (name in task.share_metrics, name != _selected(task), name))
    charts = tuple(
        line_chart(_capital(_words(name)), curves[name], x_label="Epoch", kind=_kind(task, name)) for name in order
    )
    return Section("curves", "Curves", (Row(charts),)) if charts else None


def read_curves(path: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves of training and validation by metric and split, as (epoch counted from 1, value).

    Args:
        path: `metrics.csv` of a run; an absent one gives nothing.
    """
    splits = {"train": "training", "val": "validation"}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    if not path.is_file():
        return curves
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for column, text in row.items():
                split, _, metric = column.partition("/")
                if text and metric and split in splits:
                    point = (float(row["epoch"]) + 1, float(text))
                    curves.setdefault(metric, {}).setdefault(splits[split], []).append(point)
    return {metric: dict(sorted(by_split.items())) for metric, by_split in curves.items()}


def _cost(figures: Mapping[str, float]) -> Section:
    facts: list[tuple[str, str, Kind, str]] = [
        ("Time of a training step", "time/step_ms", "milliseconds", "median"),
        ("Peak memory", "memory/peak_mb", "megabytes", ""),
        ("Adapter file", "file/adapter_bytes", "bytes", ""),
        ("Total time", "time/total_s", "seconds", ""),
    ]
    items = tuple(Fact(label, figures[key], kind, note) for label, key, kind, note in facts if key in figures)
    return Section("cost", "Cost", (Facts(items),))


def _environment(composed: Composed) -> tuple[Fact, ...]:
    precision = composed.trainer.get("precision")
    own = [Fact("Seed", str(composed.seed))]
    own += [Fact("Precision", str(precision))] if precision is not None else []
    return (*environment(), *own)


def _reproduce(run: ReportedRun) -> Section:
    command = shlex.join(["python", "-m", "peft_modal", *run.command])
    blocks = (
        Code(command),
        Text("Relative paths in it, and in the configuration, start at the folder that this run was started in."),
        Code(run.composed.to_yaml(), "Complete configuration", folded=True),
    )
    return Section("reproduce", "Reproduce", blocks)


def _kind(task: Task, metric: str) -> Kind:
    return "share" if metric in task.share_metrics else "number"


def _words(metric: str) -> str:
    return metric.replace("_", " ").replace("/", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
