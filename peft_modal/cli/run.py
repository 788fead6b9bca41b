"""The verbs that need torch: fit, validate, test, predict."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from peft_modal.api import Model, load
from peft_modal.cli.options import Options
from peft_modal.cli.output import write, write_json
from peft_modal.compose import compose
from peft_modal.errors import ConfigError, DataError
from peft_modal.files import write_text
from peft_modal.running.fit import describe, evaluate
from peft_modal.running.fit import fit as run_fit
from peft_modal.running.folder import open_folder


def fit(options: Options) -> int:
    """Train, test, and print what came out and where it lies."""
    name = options.config[-1] if options.config else "run"
    folder = open_folder(options.out, config_name=name, overwrite=options.overwrite)
    configs: tuple[Any, ...] = options.config
    if not configs and folder.config.is_file():
        configs = (folder.config,)
    composed = compose(*configs, overrides=options.overrides)
    figures = run_fit(composed, folder)
    if options.json:
        write_json({"out": str(folder.root), **figures})
    else:
        for key, value in describe(folder, figures):
            write(f"{key:14} {value}")
    return 0


def validate(options: Options) -> int:
    """Print the figures on validation data."""
    return _measure(options, "val")


def test(options: Options) -> int:
    """Print the figures on test data."""
    return _measure(options, "test")


def predict(options: Options) -> int:
    """Write predictions of a file or a folder of files as CSV and JSON.

    Raises:
        ConfigError: The data reads no files, or the task predicts nothing that could be written.
    """
    assert options.input is not None
    assert options.out is not None
    model = _load(options)
    task: Any = model.task().eval()
    data = model.composed.nodes["data"].build()
    if not hasattr(data, "predict_items"):
        raise ConfigError(f"data '{model.composed.nodes['data'].name}' cannot read files to predict on")
    if not hasattr(task, "predictions"):
        raise ConfigError(f"task '{model.composed.nodes['task'].name}' makes no predictions that could be written")
    paths, batches = data.predict_items(options.input)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        rows += task.predictions(model(batch))
    rows = [{"path": str(path), **row} for path, row in zip(paths, rows, strict=True)]
    write_text(options.out / "predictions.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    write_text(options.out / "predictions.csv", _csv(rows))
    if options.json:
        write_json(rows)
    else:
        write(f"{len(rows)} files predicted: {options.out / 'predictions.csv'}, {options.out / 'predictions.json'}")
    return 0


def _measure(options: Options, stage: str) -> int:
    model = _load(options)
    data = model.composed.nodes["data"].build()
    data.prepare_data()
    data.setup("validate" if stage == "val" else "test")
    if tuple(data.class_names) != model.class_names:
        raise DataError(
            f"the adapter knows the classes {', '.join(model.class_names)}; the data has {', '.join(data.class_names)}"
        )
    figures = evaluate(model, stage, data=data)
    if options.json:
        write_json(figures)
    else:
        for name, value in sorted(figures.items()):
            write(f"{name:26} {value:.4f}")
    return 0


def _load(options: Options) -> Model:
    assert options.adapter is not None
    model = load(options.adapter)
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
    names = list(rows[0]["probabilities"]) if rows else []
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "class", *names])
    for row in rows:
        writer.writerow([row["path"], row["class"], *row["probabilities"].values()])
    return text.getvalue()
