"""`inspect`: what a configuration would train, what an adapter file says, how a backbone is built."""

from __future__ import annotations

from peft_modal.cli.inspect_text import adapter_text, anatomy_text, config_text
from peft_modal.cli.options import Options
from peft_modal.cli.output import write_json
from peft_modal.compose import compose
from peft_modal.errors import ConfigError
from peft_modal.registry import Noun, default_registry


def inspect(options: Options) -> int:
    """Print one of the three reports.

    Raises:
        ConfigError: Nothing to inspect is named, or two things are, or a number is below 1.
    """
    for name, value in (("--classes", options.classes), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is below 1.")
    if options.adapter is not None:
        _refuse_beside_adapter(options)
        return _adapter(options)
    if not options.config and not options.overrides:
        raise ConfigError(
            "nothing to inspect: name a configuration with --config NAME, a file with --adapter FILE, "
            "or a backbone with --backbone=NAME."
        )
    nouns = {override.partition("=")[0].partition(".")[0] for override in options.overrides}
    if not options.config and nouns <= {"backbone"}:
        return _backbone(options)
    return _config(options)


def _adapter(options: Options) -> int:
    from peft_modal.inspection.adapter_file import inspect_adapter

    assert options.adapter is not None
    report = inspect_adapter(options.adapter)
    if options.json:
        write_json(report.to_dict())
    else:
        adapter_text(report)
    return 0


def _backbone(options: Options) -> int:
    from peft_modal.inspection.anatomy import inspect_backbone

    required: tuple[Noun, ...] = ("backbone",)
    report = inspect_backbone(compose(overrides=options.overrides, required=required))
    if options.json:
        write_json(report.to_dict())
    else:
        anatomy_text(report)
    return 0


def _config(options: Options) -> int:
    from peft_modal.inspection.config import inspect_config

    composed = compose(*options.config, overrides=options.overrides, required=("backbone", "method"))
    report = inspect_config(composed, default_registry(), classes=options.classes, batch_size=options.batch_size)
    if options.json:
        write_json(report.to_dict())
    else:
        config_text(report, title=", ".join(options.config))
    return 0


def _refuse_beside_adapter(options: Options) -> None:
    given = {
        "--config": bool(options.config),
        "--" + options.overrides[0].partition("=")[0] if options.overrides else "": bool(options.overrides),
        "--classes": options.classes is not None,
        "--batch-size": options.batch_size is not None,
    }
    wrong = next((name for name, there in given.items() if there), None)
    if wrong is not None:
        raise ConfigError(f"{wrong}: an adapter file says all of itself; leave {wrong} out, or leave --adapter out.")
