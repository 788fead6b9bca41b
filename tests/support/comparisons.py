"""Plans of comparisons for tests, and what their runs would leave."""

from peft_modal.comparison.plan import COST, Plan, Progress

METHODS = ("lora", "full")


def make(methods=METHODS, lrs=(0.1, 0.2, 0.3), seeds=(0, 1), mode="max", metric="accuracy", cost_rounds=0):
    """A plan without a real configuration."""
    parts = {noun: {"name": noun} for noun in ("backbone", "head")}
    config = {**parts, "task": {"name": "task", "lr": 0.1}, "data": {"name": "data", "seed": 0}, "seed": 0}
    nodes = {label: {"name": label.partition("(")[0]} for label in methods}
    return Plan(config, nodes, {"name": "full"}, tuple(lrs), tuple(seeds), metric, mode, cost_rounds)


def done(**figures):
    """A finished training; `val=0.5` stands for `val/accuracy`."""
    sizes = {"params/adapter": 10.0, "params/backbone_trained": 0.0, "params/head": 5.0, "params/trained_share": 0.25,
             "file/adapter_bytes": 2000.0}  # fmt: skip
    return Progress(
        "done", figures={**sizes, **{f"{key}/accuracy": value for key, value in figures.items()}}, seconds=1.0
    )


def complete(plan, test=lambda run: 0.5 + run.seed / 10, val=lambda run: run.lr):
    """All runs finished, figures by functions of the run."""
    progress = {}
    while due := plan.due(progress):
        for run in due:
            progress[run.key] = Progress("done", figures={}) if run.key == COST else done(val=val(run), test=test(run))
    return progress
