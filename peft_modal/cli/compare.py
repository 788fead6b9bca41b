"""The verb `compare`: several methods on the same data, and one table."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft_modal.cli.options import Options
from peft_modal.cli.output import write, write_json
from peft_modal.comparison.cost import ROUNDS
from peft_modal.comparison.fork_server import ForkServer
from peft_modal.comparison.items import parse_grid, parse_methods, parse_seeds
from peft_modal.comparison.liveness import Badge
from peft_modal.comparison.manifest import Manifest, read_manifest, write_manifest
from peft_modal.comparison.plan import COST, Plan, Progress, conflicts, make_plan
from peft_modal.comparison.process import run_child
from peft_modal.comparison.storage import Board
from peft_modal.comparison.table import comma_separated, markdown, rows
from peft_modal.comparison.worker import Executor, failures, measured, require_all, work
from peft_modal.errors import ConfigError
from peft_modal.files import write_bytes, write_text


def compare(options: Options) -> int:
    """Train and measure what is missing, then write the table; without `--methods` only write it again.

    Raises:
        ConfigError: An option is missing, or of no use here.
    """
    out = options.out
    assert out is not None
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: '{out}' is a file; name a folder")
    if options.methods is None:
        names = ("config", "seeds", "storage", "study", "retry_failed")
        useless = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
        useless += [f"--{override.partition('=')[0]}" for override in options.overrides]
        if useless:
            raise ConfigError(f"--methods is missing: {', '.join(useless)} would do nothing without it")
        manifest = read_manifest(out)
        if options.remeasure:
            manifest = _remeasured(manifest, out)
    else:
        manifest = _run(options, out)
    publish(out, manifest, complete=True)
    _print(out, manifest, as_json=options.json)
    require_all(manifest.plan, manifest.progress)
    return 0


def publish(out: Path, manifest: Manifest, *, complete: bool) -> None:
    """Write the manifest and the table; when the comparison is complete, plot and page too."""
    write_manifest(out, manifest)
    write_text(out / "table.csv", comma_separated(manifest.plan, manifest.progress))
    write_text(out / "table.md", markdown(manifest.plan, manifest.progress))
    if complete:
        from peft_modal.comparison.figures import draw
        from peft_modal.comparison.page import page

        svg, png = draw(manifest.plan, rows(manifest.plan, manifest.progress))
        write_text(out / "plot.svg", svg)
        write_bytes(out / "plot.png", png)
        write_text(out / "table.html", page(manifest, svg))


def _remeasured(manifest: Manifest, out: Path) -> Manifest:
    """The same comparison with its costs measured here and now.

    Raises:
        ConfigError: Its workers' own record is there, which has to hold the costs, too.
    """
    if (out / "comparison.db").is_file():
        raise ConfigError(f"--methods is missing: costs of '{out}' belong into its comparison.db; repeat its command")
    if not manifest.plan.cost_rounds:
        raise ConfigError(f"--remeasure: '{out}' was made with --cost-rounds 0, so its table has no costs")
    with tempfile.TemporaryDirectory() as name:
        ended = measured(Executor(manifest.plan, Path(name), tick_s=10.0))
    return replace(manifest, progress={**manifest.progress, COST: ended})


def _run(options: Options, out: Path) -> Manifest:
    assert options.methods is not None
    if not options.config:
        raise ConfigError("--config is missing: name the configuration that the methods are compared on")
    if options.cost_rounds < 0:
        raise ConfigError(f"--cost-rounds: expected 0 or more, got {options.cost_rounds}")
    plan = make_plan(
        options.config,
        parse_methods(options.methods),
        overrides=options.overrides,
        grid=parse_grid(options.lr_grid),
        seeds=parse_seeds(options.seeds or "3"),
        cost_rounds=options.cost_rounds,
    )
    out.mkdir(parents=True, exist_ok=True)
    study = options.study or out.resolve().name
    url = options.storage or f"sqlite:///{out.resolve() / 'comparison.db'}"
    with Badge(out) as badge:
        board = Board(url, study, worker=badge.name, is_dead=badge.is_dead)
        with board.reachable():
            return _take_part(options, plan, board, out)


def _take_part(options: Options, plan: Plan, board: Board, out: Path) -> Manifest:
    board.bind(plan, finished=_published(out, plan))
    if options.retry_failed:
        board.retry([run.key for run, _ in failures(plan, board.progress())])
    if options.remeasure:
        for path in (out / COST).glob("*.json"):
            path.unlink()
        board.retry([COST])

    def manifest_of(progress: Mapping[str, Progress]) -> Manifest:
        storage = board.url if options.storage else "comparison.db"
        return Manifest(plan, progress, _command(options), board.study, storage)

    def publish_table(progress: Mapping[str, Progress]) -> None:
        publish(out, manifest_of(progress), complete=False)

    with _runner(plan) as run:
        executor = Executor(plan, out, tick_s=board.heartbeat, run=run)
        return manifest_of(work(plan, board, executor, publish=publish_table))


def _published(out: Path, plan: Plan) -> Mapping[str, Progress]:
    """Runs of a comparison whose table lies there without the workers' record, as when it was made elsewhere.

    Raises:
        ConfigError: They are of something else.
    """
    if not (out / "manifest.json").is_file():
        return {}
    manifest = read_manifest(out)
    found = conflicts(manifest.plan.to_dict(), plan.to_dict())
    if found:
        raise ConfigError(f"--out: '{out}' holds another comparison: {', '.join(found[:4])}; choose another --out")
    return manifest.progress


@contextmanager
def _runner(plan: Plan) -> Iterator[Callable[..., None]]:
    import torch

    if torch.accelerator.is_available():
        yield run_child  # a GPU that was looked at before a fork cannot be used after it
        return
    with ForkServer(plan.modules) as server:
        yield server.run


def _command(options: Options) -> str:
    """The command that makes this comparison; the storage's address, which may hold a password, is left out."""
    parts = ["compare"]
    for name in options.config:
        parts += ["--config", name]
    parts += ["--methods", str(options.methods), "--seeds", options.seeds or "3"]
    parts += ["--lr-grid", options.lr_grid] if options.lr_grid != Options.lr_grid else []
    parts += ["--cost-rounds", str(options.cost_rounds)] if options.cost_rounds != ROUNDS else []
    parts += [f"--{override}" for override in options.overrides]
    return " ".join(["python -m peft_modal", *map(shlex.quote, [*parts, "--out", str(options.out)])])


def _print(out: Path, manifest: Manifest, *, as_json: bool) -> None:
    if as_json:
        table: list[dict[str, Any]] = [asdict(row) for row in rows(manifest.plan, manifest.progress)]
        write_json({"out": str(out), "metric": manifest.plan.metric, "rows": table})
        return
    write(markdown(manifest.plan, manifest.progress))
    write(f"{out / 'table.html'}, table.md, table.csv, plot.svg, plot.png, manifest.json")
