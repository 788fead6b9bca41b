"""The verbs that need torch: fit, validate, test, predict."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from peft_modal.api import Model, load, load_stack
from peft_modal.cli.options import Options
from peft_modal.cli.output import write, write_json
from peft_modal.cli.plugin_options import read_flags
from peft_modal.compose import compose
from peft_modal.errors import ConfigError, DataError
from peft_modal.files import read_index, write_text
from peft_modal.registry import default_registry
from peft_modal.running.faults import in_sentences
from peft_modal.running.fit import describe
from peft_modal.running.fit import fit as run_fit
from peft_modal.running.folder import open_folder, open_measure_folder
from peft_modal.running.measure import STAGES, Verb, measure
from peft_modal.tasks.predicting import PredictRequest

_LISTED: Final = 8
"""Names of classes that a sentence lists."""


def fit(options: Options) -> int:
    """Train, test, and print what came out and where it lies."""
    name = options.config[-1] if options.config else "run"
    folder = open_folder(options.out, config_name=name, overwrite=options.overwrite)
    configs: tuple[Any, ...] = options.config
    if not configs and folder.config.is_file():
        configs = (folder.config,)
    composed = compose(*configs, overrides=options.overrides)
    figures = run_fit(composed, folder)
    compared = composed.nodes["task"].cls.compared  # type: ignore[attr-defined]
    if options.json:
        write_json({"out": str(folder.root), **figures})
    else:
        for key, value in describe(folder, figures, compared):
            write(f"{key:14} {value}")
    return 0


def validate(options: Options) -> int:
    """Print the figures on validation data."""
    return _measure(options, "validate")


def test(options: Options) -> int:
    """Print the figures on test data."""
    return _measure(options, "test")


def predict(options: Options) -> int:
    """Write predictions of files, or what the task makes of the modality's own options.

    Raises:
        ConfigError: An option does not belong to the adapter, or the task predicts nothing that could be written.
    """
    assert options.adapter is not None
    assert options.out is not None
    adapters = [(path, options.alpha if weight is None else weight) for path, weight in options.adapters]
    # What can be refused is, before weights are loaded.
    _, header = read_index(options.adapter)
    composed = compose(header.config, overrides=options.overrides)
    flags = read_flags(options.flags, default_registry(), composed.nodes["backbone"].cls.modality)  # type: ignore[attr-defined]
    named = tuple((str(path), 1.0 if weight is None else weight) for path, weight in adapters)
    request = PredictRequest(options.out, options.input, flags, composed.seed, named)
    if hasattr(composed.nodes["task"].cls, "check_request"):
        composed.nodes["task"].cls.check_request(request)
    model = _overridden(load_stack(adapters), options)
    task: Any = model.task().eval()
    if hasattr(task, "predict_with"):
        with in_sentences():
            rows: list[dict[str, Any]] = task.predict_with(request)
        told = f"{len(rows)} files written: {options.out}"
    elif flags and not hasattr(task, "take_flags"):
        raise ConfigError(f"--{next(iter(flags))}: task '{model.composed.nodes['task'].name}' has no use for it")
    else:
        if flags:
            task.take_flags(flags)
        rows = _predict_files(model, task, options)
        told = f"{len(rows)} files predicted: {options.out / 'predictions.csv'}, {options.out / 'predictions.json'}"
    if options.json:
        write_json(rows)
    else:
        write(told)
    return 0


def _predict_files(model: Model, task: Any, options: Options) -> list[dict[str, Any]]:  # noqa: ANN401
    assert options.out is not None
    if options.input is None:
        raise ConfigError("peft-modal predict: --input PATH is missing: this adapter predicts on files")
    data = model.composed.nodes["data"].build()
    if not hasattr(data, "predict_items"):
        raise ConfigError(f"data '{model.composed.nodes['data'].name}' cannot read files to predict on")
    if not hasattr(task, "predictions"):
        raise ConfigError(f"task '{model.composed.nodes['task'].name}' makes no predictions that could be written")
    paths, batches = data.predict_items(options.input)
    rows: list[dict[str, Any]] = []
    with in_sentences():
        for batch in batches:
            output = task.predict_batch(batch)
            made = task.predictions(output)
            if hasattr(task, "write_predictions"):
                files = [Path(path) for path in paths[len(rows) : len(rows) + len(made)]]
                names = [_name_below(file, options.input) for file in files]
                written = task.write_predictions(output, files, names, options.out)
                made = [{**more, **row} for more, row in zip(written, made, strict=True)]
            rows += made
    rows = [{**_place(path), **row} for path, row in zip(paths, rows, strict=True)]
    write_text(options.out / "predictions.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    write_text(options.out / "predictions.csv", _csv(rows))
    return rows


def _place(item: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns that say what a row is of: the path of a file, or what the data says of a part of it."""
    return item if isinstance(item, Mapping) else {"path": str(item)}


def _name_below(file: Path, folder: Path) -> str:
    """Of a file, by its place below the folder that was named; its suffix stays, since it may tell two files apart."""
    return (file.relative_to(folder) if file.is_relative_to(folder) and file != folder else Path(file.name)).as_posix()


def _measure(options: Options, verb: Verb) -> int:
    assert options.adapter is not None
    model = _overridden(load(options.adapter), options)
    folder = open_measure_folder(options.out, adapter=options.adapter, verb=verb, overwrite=options.overwrite)
    data = model.composed.nodes["data"].build()
    with in_sentences():
        data.prepare_data()
        data.setup(verb)
    if tuple(data.class_names) != model.class_names:
        _take_classes(model, tuple(data.class_names))
    command = [verb, "--adapter", str(options.adapter), *(f"--{override}" for override in options.overrides)]
    figures = measure(verb, model, adapter=options.adapter, data=data, folder=folder, command=command)
    shown = {name: value for name, value in figures.items() if name.startswith(f"{STAGES[verb]}/")}
    if options.json:
        write_json({"out": str(folder.root), **shown})
    else:
        for name, value in sorted(shown.items()):
            write(f"{name:26} {value:.4f}")
        for name, path in (("metrics", folder.metrics), ("report", folder.reports[0])):
            if path.is_file():
                write(f"{name:26} {path}")
    return 0


def _take_classes(model: Model, class_names: tuple[str, ...]) -> None:
    """Measure on other classes than were trained, where the task reads their names and the method has none of its own.

    Raises:
        DataError: It cannot be.
    """
    task, method = model.composed.nodes["task"].cls, model.composed.nodes["method"].cls
    if not task.reads_class_names or method.is_bound_to_classes:  # type: ignore[attr-defined]
        raise DataError(
            f"the adapter knows the classes {_listed(model.class_names)}; the data has {_listed(class_names)}"
        )
    model.class_names = class_names


def _listed(names: Sequence[str]) -> str:
    """Names, of many the first."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _overridden(model: Model, options: Options) -> Model:
    if options.overrides:
        assert model.header is not None
        changed = compose(model.header.config, overrides=options.overrides)
        for noun in ("backbone", "method", "head"):
            if changed.nodes[noun].to_dict() != model.composed.nodes[noun].to_dict():
                raise ConfigError(
                    f"--{noun}: an adapter file fixes its {noun}; only data, task and trainer can be changed"
                )
        model.composed = changed
    return model


def _csv(rows: list[dict[str, Any]]) -> str:
    """A table of the rows: nested values have a column each, empty where a row has none."""
    flat: list[dict[str, Any]] = []
    for row in rows:
        columns: dict[str, Any] = {}
        for key, value in row.items():
            columns.update(value if isinstance(value, dict) else {key: value})
        flat.append(columns)
    names = list(dict.fromkeys(name for columns in flat for name in columns)) or ["path"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([columns.get(name, "") for name in names] for columns in flat)
    return text.getvalue()
