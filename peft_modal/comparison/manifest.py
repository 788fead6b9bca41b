"""`manifest.json`: everything that the table is made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from peft_modal.comparison.plan import COST, Plan, Progress
from peft_modal.errors import ConfigError, FileFormatError
from peft_modal.files import write_text
from peft_modal.running.folder import RunFolder

FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class Manifest:
    """A comparison as a file."""

    plan: Plan
    progress: Mapping[str, Progress]
    command: str
    """What was typed, without passwords."""
    study: str
    storage: str


def write_manifest(out: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a comparison's folder."""
    plan, progress = manifest.plan, manifest.progress
    runs = [
        {"key": run.key, "method": run.method, "lr": run.lr, "seed": run.seed,
         **asdict(progress.get(run.key, Progress()))}
        for run in plan.known(progress)
    ]  # fmt: skip
    choices = {}
    for label in plan.methods:
        choice = plan.choice(label, progress)
        if choice is not None:
            values = [{"lr": lr, f"val/{plan.metric}": value} for lr, value in choice.values.items()]
            choices[label] = {"lr": choice.lr, "at_edge": choice.at_edge, "chosen_by": values}
    document = {
        "format_version": FORMAT_VERSION,
        "command": manifest.command,
        "study": manifest.study,
        "storage": manifest.storage,
        "plan": plan.to_dict(),
        "choices": choices,
        "runs": runs,
    }
    write_text(out / "manifest.json", json.dumps(document, indent=1, sort_keys=False) + "\n")


def read_manifest(out: Path) -> Manifest:
    """Read it again; where a run's own files lie beside it, figures are theirs.

    Raises:
        ConfigError: There is none.
        FileFormatError: It is damaged, or from a newer version.
    """
    path = out / "manifest.json"
    if not path.is_file():
        raise ConfigError(
            f"--out: '{out}' holds no comparison (no manifest.json); name one, or start it with --config and --methods"
        )
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = document["format_version"]
        if version == FORMAT_VERSION:
            plan = Plan.from_dict(document["plan"])
            names = {field.name for field in dataclasses.fields(Progress)}
            progress = {
                run["key"]: Progress(**{name: value for name, value in run.items() if name in names})
                for run in document["runs"]
            }
            texts = {name: str(document[name]) for name in ("command", "study", "storage")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"'{path}' is damaged ({error}); remake it with the command that made it") from error
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"'{path}' has format version {version}, this peft_modal reads {FORMAT_VERSION}; install a newer one"
        )
    return Manifest(plan, {key: _refreshed(out, key, one) for key, one in progress.items()}, **texts)


def _refreshed(out: Path, key: str, known: Progress) -> Progress:
    folder = RunFolder(out / key)
    if key == COST or not folder.is_finished:
        return known
    try:
        figures: dict[str, Any] = json.loads(folder.metrics.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(
            f"'{folder.metrics}' is damaged ({error}); remove the folder and make the run again"
        ) from error
    return dataclasses.replace(known, state="done", figures=figures, error=None)
