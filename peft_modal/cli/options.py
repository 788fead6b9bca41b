"""Verbs, their options, and how an argument list becomes `Options`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

from peft_modal.cli.plugin_options import flag_names, flags_text, formats_text
from peft_modal.compose.merge import TOP_LEVEL, split_overrides
from peft_modal.errors import ConfigError, nearest
from peft_modal.registry import NOUNS, Noun, Registry, default_registry

PROGRAM: Final = "peft-modal"
KINDS: Final = ("modalities", "methods", "heads", "backbones", "tasks", "data", "configs")
"""What `list` shows, in this order."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was typed; options that a verb does not have keep their defaults."""

    verb: str
    config: tuple[str, ...] = ()
    """Names or paths of configurations, in order."""
    overrides: tuple[str, ...] = ()
    """`a.b=value` for `peft_modal.compose.compose`, in order."""
    adapter: Path | None = None
    """The adapter file, or the first of several."""
    adapters: tuple[tuple[Path, float | None], ...] = ()
    """Adapter files with their weights, of the verbs that stack them."""
    input: Path | None = None
    out: Path | None = None
    overwrite: bool = False
    print_config: bool = False
    json: bool = False
    matrix: bool = False
    classes: int | None = None
    """Number of classes, for `inspect`."""
    batch_size: int | None = None
    """Of the estimate of `inspect`."""
    dtype: str = "float32"
    """Type of merged weights."""
    methods: str | None = None
    """Methods to compare, as typed."""
    seeds: str | None = None
    """A count or a list, as typed."""
    lr_grid: str = "0.1,0.3,1,3,10"
    """Multipliers of the configuration's learning rate, as typed."""
    cost_rounds: int = 9
    """Paired rounds of timed steps per method."""
    storage: str | None = None
    """URL of the database that workers share."""
    study: str | None = None
    """Name of the comparison in that database."""
    retry_failed: bool = False
    format: str = "peft"
    """What `export` writes."""
    remeasure: bool = False
    """Whether step time and memory are measured once more."""
    kind: str | None = None
    """The only kind that `list` shows."""
    name: str | None = None
    """Of the plugin that `new-plugin` writes."""
    alpha: float | None = None
    """Weight of adapters that have none of their own."""
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What was typed for flags of `predict` that plugins declare."""


@dataclass(frozen=True)
class _Verb:
    summary: str
    handler: str
    """`module:function` that takes `Options` and returns the exit code; imported when the verb is used."""
    options: tuple[str, ...]
    """Keys of `_ARGUMENTS`."""
    overrides: bool = True
    """Whether keys of the configuration (`--method.rank=4`) may be given."""
    required: tuple[str, ...] = ()
    notes: str = ""
    """Stands below the options in the verb's help."""
    stacks: bool = False
    """Whether several adapters may be given, with weights."""
    plugin_notes: Callable[[Registry], str] | None = None
    """What plugins add to it; stands below the notes."""


_INSPECT_HELP: Final = """\
  inspect --config NAME [--method=lora ...]   what would be trained, and the cost of a step
  inspect --adapter FILE                      all that an adapter file says of itself
  inspect --backbone=NAME                     blocks, sites and ports of a backbone
Nothing is downloaded or read but the file named: neither weights nor data need to be there.

"""
_MERGE_HELP: Final = """\
Writes the backbone with the adapter folded in, in the backbone's own checkpoint layout: a file, or the
folder of a complete pipeline (diffusion). --backbone.weights=OUT starts another run from it. Beside it,
OUT's name with `.head.safetensors` is an adapter file with the head alone, so that test and predict
--adapter go on working.
Computed in float64, rounded once to --dtype; the deviations of weights and of features are printed.

"""

_VERBS: Final[Mapping[str, _Verb]] = MappingProxyType(
    {
        "fit": _Verb(
            "fine-tune: train, validate, test, and write one run folder",
            "peft_modal.cli.run:fit",
            ("--config", "--out", "--overwrite", "--print_config", "--json"),
        ),
        "validate": _Verb(
            "measure an adapter on validation data",
            "peft_modal.cli.run:validate",
            ("--adapter", "--out", "--overwrite", "--json"),
            required=("--adapter",),
        ),
        "test": _Verb(
            "measure an adapter on test data",
            "peft_modal.cli.run:test",
            ("--adapter", "--out", "--overwrite", "--json"),
            required=("--adapter",),
        ),
        "predict": _Verb(
            "run an adapter on files of your own, or let it draw what you describe",
            "peft_modal.cli.run:predict",
            ("--adapter", "--alpha", "--input", "--out", "--json"),
            required=("--adapter", "--out"),
            stacks=True,
            plugin_notes=flags_text,
        ),
        "merge": _Verb(
            "fold an adapter into plain weights",
            "peft_modal.cli.merge:merge",
            ("--adapter", "--alpha", "--out", "--dtype", "--json"),
            overrides=False,
            required=("--adapter", "--out"),
            notes=_MERGE_HELP,
            stacks=True,
        ),
        "inspect": _Verb(
            "what would be trained, at what cost; what an adapter file says; how a backbone is built",
            "peft_modal.cli.inspect:inspect",
            ("--config", "--adapter", "--classes", "--batch-size", "--json"),
            notes=_INSPECT_HELP,
        ),
        "doctor": _Verb(
            "look at this installation; name what is missing and the command that mends it",
            "peft_modal.cli.doctor:doctor",
            ("--json",),
            overrides=False,
        ),
        "compare": _Verb(
            "train several methods on the same data and write one table",
            "peft_modal.cli.compare:compare",
            (
                "--config",
                "--methods",
                "--seeds",
                "--lr-grid",
                "--cost-rounds",
                "--out",
                "--storage",
                "--study",
                "--retry-failed",
                "--remeasure",
                "--json",
            ),
            required=("--out",),
        ),
        "export": _Verb(
            "write an adapter for another program",
            "peft_modal.cli.export:export",
            ("--adapter", "--format", "--out", "--json"),
            overrides=False,
            required=("--adapter", "--out"),
            plugin_notes=formats_text,
        ),
        "import": _Verb(
            "make an adapter file of a LoRA folder of Hugging Face peft, or of a LoRA file of diffusers or kohya",
            "peft_modal.cli.export:import_lora",
            ("--config", "--input", "--out", "--json"),
            required=("--config", "--input", "--out"),
        ),
        "list": _Verb(
            "what is installed: " + ", ".join(KINDS),
            "peft_modal.cli.listing:list_verb",
            ("kind", "--matrix", "--json"),
            overrides=False,
        ),
        "new-plugin": _Verb(
            "write a small plugin of your own: backbone, method, head, data, configuration, tests",
            "peft_modal.cli.new_plugin:new_plugin",
            ("name", "--out"),
            overrides=False,
        ),
    }
)
VERBS: Final = tuple(_VERBS)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is no number")
    return value


def _weighted(text: str) -> tuple[Path, float | None]:
    """`FILE` or `FILE:WEIGHT`; a file whose whole name this is comes first."""
    file, colon, weight = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return Path(file), _finite(weight)
        except argparse.ArgumentTypeError:
            pass  # a path that is not there, which is said when it is opened
    return Path(text), None


_STACKED: Final = {
    "action": "append", "type": _weighted, "metavar": "FILE[:WEIGHT]",
    "help": "adapter file (.safetensors); repeat it to stack several, each with a factor of its effect if you like",
}  # fmt: skip
"""`--adapter` of the verbs that stack."""

_ARGUMENTS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType({
    "kind": {"nargs": "?", "metavar": "KIND", "help": "show only one of: " + ", ".join(KINDS)},
    "name": {"metavar": "NAME", "help": "of the package and its modality, such as sleep_eeg"},
    "--config": {"action": "append", "default": [], "metavar": "NAME",
                 "help": "configuration: a local YAML file, or the name of a shipped one; repeat it to lay "
                         "several over each other"},
    "--adapter": {"type": Path, "metavar": "FILE", "help": "adapter file (.safetensors)"},
    "--input": {"type": Path, "metavar": "PATH", "help": "file or folder to predict on, or to import"},
    "--out": {"type": Path, "metavar": "PATH",
              "help": "where results go; default runs/<config or adapter's folder-verb>/<time>, new-plugin: NAME"},
    "--alpha": {"type": _finite, "metavar": "WEIGHT",
                "help": "factor of the effect of adapters that name none of their own"},
    "--format": {"default": Options.format, "metavar": "NAME",
                 "help": f"one of the formats below (default {Options.format})"},
    "--classes": {"type": int, "metavar": "N", "help": "number of classes, where the data cannot tell unread"},
    "--batch-size": {"type": int, "metavar": "N", "help": "of the estimate (default: that of the data)"},
    "--dtype": {"choices": ["float32", "float16", "bfloat16"], "default": "float32",
                "help": "type of the merged weights (default float32)"},
    "--overwrite": {"action": "store_true", "help": "replace a finished run in --out"},
    "--print_config": {"action": "store_true", "help": "print the complete configuration as YAML and stop"},
    "--json": {"action": "store_true", "help": "print the result as JSON"},
    "--methods": {"metavar": "LIST",
                  "help": "methods to compare, with arguments if you like: 'idpt,lora(rank=16),full'; without it the "
                          "table in --out is written again"},
    "--seeds": {"metavar": "SEEDS", "help": "a count (default 3: seeds 0, 1, 2) or a list such as 0,1,5"},
    "--lr-grid": {"metavar": "LIST", "default": Options.lr_grid,
                  "help": "multipliers of task.lr; each method's learning rate is chosen from them on validation data, "
                          f"by runs of the first seed (default {Options.lr_grid})"},
    "--cost-rounds": {"type": int, "metavar": "N", "default": Options.cost_rounds,
                      "help": "rounds in which each method's steps are timed against full fine-tuning's, at the end "
                              f"(default {Options.cost_rounds}, 0: not at all)"},
    "--storage": {"metavar": "URL",
                  "help": "database that processes and machines share one comparison through, such as "
                          "postgresql://USER:PASSWORD@HOST/NAME (default: an SQLite file in --out)"},
    "--study": {"metavar": "NAME",
                "help": "name of the comparison in the database (default: that of the --out folder)"},
    "--retry-failed": {"action": "store_true", "help": "make the runs that failed once more"},
    "--remeasure": {"action": "store_true",
                    "help": "measure step time and memory once more, for instance when the machine was busy"},
    "--matrix": {"action": "store_true", "help": "which method works on which backbone, and why not"},
})  # fmt: skip

_OVERRIDES_HELP: Final = f"""\
Every part of the configuration can be given here: --method=lora --method.rank=4 --trainer.max_epochs=10.
  top-level keys: {", ".join(TOP_LEVEL)}
  --method.help NAME prints the arguments of a method, --method.help lists the methods;
  the same for {", ".join(noun for noun in NOUNS if noun != "method")}.
"""


class _Parser(argparse.ArgumentParser):
    """Mistakes become our errors, one sentence, instead of usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message.removeprefix('argument ')}; see {self.prog} --help.")


def program_help() -> str:
    """The text of `peft-modal --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {spec.summary}" for verb, spec in _VERBS.items())
    return f"""\
usage: {PROGRAM} VERB [options]

Parameter-efficient fine-tuning that works the same way for every modality.

verbs:
{verbs}

{PROGRAM} VERB --help tells more, {PROGRAM} --version the version.

{_OVERRIDES_HELP}
examples:
  {PROGRAM} list methods
  {PROGRAM} fit --config NAME.yaml --method=lora --method.rank=4 --out runs/first
  {PROGRAM} test --adapter runs/first/adapter.safetensors
"""


def handler_of(verb: str) -> str:
    """`module:function` of a verb that `parse` has accepted."""
    return _VERBS[verb].handler


def parse(verb: str, arguments: Sequence[str], *, plugins: Callable[[], Registry] = default_registry) -> Options:
    """Read the arguments after the verb; `--help` prints and leaves by SystemExit.

    Args:
        verb: The verb.
        arguments: What follows it.
        plugins: Gives the registry, for the verbs that plugins add options to.

    Raises:
        ConfigError: The verb or an option is unknown, a value is missing, or a required option is.
    """
    spec = _VERBS.get(verb)
    if spec is None:
        raise ConfigError(f"unknown verb '{verb}'; {nearest(verb, VERBS)}")
    parser = _Parser(
        prog=f"{PROGRAM} {verb}",
        description=spec.summary[0].upper() + spec.summary[1:] + ".",
        epilog=spec.notes
        + (spec.plugin_notes(plugins()) if spec.plugin_notes else "")
        + (_OVERRIDES_HELP if spec.overrides else "")
        or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in spec.options:
        settings: dict[str, Any] = {**(_STACKED if spec.stacks and name == "--adapter" else _ARGUMENTS[name])}
        if name in spec.required:
            settings["required"] = True
        parser.add_argument(name, **settings)
    flags = flag_names(plugins()) if verb == "predict" else {}
    for name in flags:  # shown by `plugin_notes`, by modality
        parser.add_argument(f"--{name}", dest=f"--{name}", action="append", help=argparse.SUPPRESS)
    others, overrides = split_overrides(arguments) if spec.overrides else (list(arguments), [])
    values, unknown = parser.parse_known_args(_checked(others, spec, flags))
    if unknown:
        raise ConfigError(f"{parser.prog}: unexpected argument '{unknown[0]}'; see {parser.prog} --help.")
    found = vars(values)
    if found.get("kind") not in {None, *KINDS}:
        raise ConfigError(f"{parser.prog}: unknown kind '{found['kind']}'; {nearest(found['kind'], KINDS)}")
    if "format" in found and found["format"] not in plugins().formats():
        wanted = str(found["format"])
        raise ConfigError(f"{parser.prog}: --format: unknown format '{wanted}'; {nearest(wanted, plugins().formats())}")
    given = {name: found.pop(f"--{name}") for name in flags}
    if spec.stacks:
        found["adapters"] = tuple(found["adapter"])
        found["adapter"] = found["adapters"][0][0]
    config = tuple(found.pop("config", ()))
    return Options(
        verb=verb, config=config, overrides=tuple(overrides),
        flags={name: tuple(texts) for name, texts in given.items() if texts}, **found,
    )  # fmt: skip


def requested_help(arguments: Sequence[str]) -> tuple[Noun, str | None] | None:
    """The noun and the name asked for by `--<noun>.help [NAME]` anywhere among the arguments, None without it."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        for noun in NOUNS:
            if option == f"--{noun}.help":
                following = next(iter(arguments[index + 1 :]), "")
                name = value if equals else following
                return noun, None if name.startswith("-") else name or None
    return None


def _checked(arguments: list[str], spec: _Verb, flags: Iterable[str]) -> list[str]:
    """`arguments`, when every option among them is known.

    Raises:
        ConfigError: Names every unknown option and the nearest known one.
    """
    known = {*spec.options, "--help", *(f"--{key}" for key in TOP_LEVEL if spec.overrides), *(f"--{f}" for f in flags)}
    problems = []
    for argument in arguments:
        option = argument.partition("=")[0]
        head, dot, rest = option.partition(".")
        if option.startswith("--") and option not in known:
            # `--methd.rank` is nearest to `--method.rank`.
            problems.append(f"unknown option '{option}'; {_nearest_option(head, known, tail=dot + rest)}")
    if problems:
        raise ConfigError(*problems)
    return arguments


def _nearest_option(head: str, known: set[str], *, tail: str) -> str:
    if not tail:
        return nearest(head, known, count=1)
    return nearest(head + tail, {key + tail for key in known if key.removeprefix("--") in TOP_LEVEL}, count=1)
