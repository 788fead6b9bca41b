"""The three reports of `inspect` as text of at most 100 columns; in a pipe every row stays on one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from peft_modal.cli.output import write
from peft_modal.inspection.ranges import common_name, runs, shown_numbers

if TYPE_CHECKING:
    from peft_modal.inspection.adapter_file import AdapterReport
    from peft_modal.inspection.anatomy import AnatomyReport
    from peft_modal.inspection.config import ConfigReport
    from peft_modal.inspection.places import Group, TrainedPlace

_T = TypeVar("_T")

_WIDTH: Final = 96
_NUMBER: Final = 14
_GROUPS: Final[Mapping[Group, str]] = {
    "adapter": "adapter", "backbone": "backbone tensors", "head": "head", "training_only": "training-only",
}  # fmt: skip
_ROWS: Final[Mapping[str, str]] = {
    "parameters": "parameters and buffers", "gradients": "gradients", "optimizer": "AdamW state",
    "activations": "saved activations", "memory": "memory, sum", "flops": "FLOPs",
}  # fmt: skip


def config_text(report: ConfigReport, *, title: str) -> None:
    """Print what a configuration would train."""
    nodes = report.composed.nodes
    method = nodes["method"].name
    named = ", ".join(f"{noun} {nodes[noun].name}" for noun in ("head", "task", "data") if noun in nodes)
    headline = f"{title + ': ' if title else ''}{method} on {nodes['backbone'].name}{', ' + named if named else ''}"
    for line in _wrapped(headline, indent=0):
        write(line)
    write("Built from shapes alone: no weights, no data, no network.")
    write("\n")
    _print_tree(_trained_tree(report))
    write("\n")
    for line in (*_totals(report), "\n", *_estimate(report, method), *_notes(report)):
        write(line)


def adapter_text(report: AdapterReport) -> None:
    """Print what an adapter file says of itself."""
    header = report.header
    lines: list[tuple[str, str]] = [
        ("file", f"{report.path} ({_size(report.file_bytes)}, format version {header.format_version})"),
    ]
    for noun, value in header.config.items():
        lines.append((noun, _node_text(value) if isinstance(value, dict) else str(value)))
    lines.append(("fingerprint", f"{header.fingerprint} (of the backbone's weights)"))
    lines.append(("classes", f"{len(header.class_names)}: {', '.join(header.class_names)}" if header.class_names else
                  "none"))  # fmt: skip
    lines.append(("preprocessing", _pairs(header.preprocessing) or "none"))
    lines += [(name, _pairs(facts)) for name, facts in header.facts.items()]
    lines.append(("versions", _pairs(header.versions)))
    lines.append(("metrics", "" if header.metrics else "none"))
    for key, text in lines:
        _field(key, text)
    for key, value in sorted(header.metrics.items()):
        write(f"  {key:38} {value:,.6g}")
    write("\n")
    _print_tree(_stored_tree(report))


def anatomy_text(report: AnatomyReport) -> None:
    """Print how a backbone is built."""
    from peft_modal.inspection.anatomy import describe_layout

    node = report.composed.nodes["backbone"]
    anatomy = report.anatomy
    depth = ", ".join(f"{count} in '{stack}'" for stack, count in anatomy.depth.items()) or "none"
    write(f"{node.name} ({node.modality or 'core'}): {report.parameters:,} parameters, "
          f"features {report.backbone.feature_width} wide, blocks: {depth}")  # fmt: skip
    for stack, layout in anatomy.layouts.items():
        _field(f"tokens of '{stack}'", describe_layout(layout), indent=22)
    if anatomy.always_trained:
        _field("always trained", ", ".join(site.name for site in anatomy.always_trained), indent=22)
    write("\nSites are tensors that a method can act on: beside a call, on the weight, or as a trained leaf.")
    write("Ports are the points of the data path that it can read, add to, replace, or insert tokens at.")
    for section in report.sections():
        write(f"\n{section.title}")
        rows = [(s.role, name, "x".join(map(str, s.shape)), s.op, " ".join(sorted(s.reach)) or "listed only")
                for name, s in section.sites]  # fmt: skip
        _aligned(("site", "name", "shape", "kind", "reach"), rows)
        ports = [(p.role, name, str(p.width), f"channel axis {p.channel_dim}" if p.channel_dim != -1 else "",
                  " ".join(sorted(p.allows))) for name, p in section.ports]  # fmt: skip
        if ports:
            write("\n")
        _aligned(("port", "name", "width", "", "allows"), ports)


def _trained_tree(report: ConfigReport) -> Tree:
    counts = report.counts
    sums: dict[Group, int] = {"adapter": counts.adapter, "backbone": counts.backbone_trained, "head": counts.head,
                              "training_only": counts.training_only}  # fmt: skip
    tree = Tree(_row("trained", "parameters", level=0, style="bold"), guide_style="dim")
    for group, title in _GROUPS.items():
        text, number = title, f"{sums[group]:,}"
        formula = report.head_formula
        if group == "head" and report.classes is not None and report.classes.source == "assumed":
            number = "?" if formula is None else f"{formula.fixed:,} + {formula.per_class:,} a class"
        if group == "head":
            text = f"head: {_name(report, 'head') or 'none'}"
        branch = tree.add(_row(text, number, level=1, style="bold"))
        own = [place for place in report.places if place.group == group]
        located = [place for place in own if place.stack]
        for run in runs(runs(located, alike=lambda place: (place.stack, place.blocks)), alike=_looks):
            _add_blocks(branch, run)
        for alike in _alike([place for place in own if not place.stack], name=lambda place: place.role, looks=_shapes):
            number = f"{sum(place.parameters for place in alike):,}"
            if group == "head" and _depends_on_classes(alike[0], report):
                number += f" at {report.classes.count if report.classes else 0}"
            branch.add(_row(_place_text(alike), number, level=2))
    return tree


def _shapes(place: TrainedPlace) -> object:
    return tuple(tensor.shape for tensor in place.tensors)


def _looks(block: list[TrainedPlace]) -> object:
    if len(block[0].blocks) != 1:
        return id(block)
    return block[0].stack, tuple((place.role, _shapes(place)) for place in block)


def _add_blocks(branch: Tree, run: list[list[TrainedPlace]]) -> None:
    first = run[0][0]
    numbers = [number for block in run for number in block[0].blocks]
    where = f"{first.stack} {shown_numbers(numbers)}" if numbers else f"{first.stack}, outside its blocks"
    each = sum(place.parameters for place in run[0])
    times = f"  ({len(run)} x {each:,})" if len(run) > 1 else ", together" if len(first.blocks) > 1 else ""
    branch = branch.add(_row(where + times, f"{each * len(run):,}", level=2))
    for alike in zip(*run, strict=True):
        branch.add(_row(_place_text(alike), f"{sum(place.parameters for place in alike):,}", level=3))


def _depends_on_classes(place: TrainedPlace, report: ConfigReport) -> bool:
    """Whether a row of the head shows a number that holds for the assumed classes only."""
    if report.classes is None or report.classes.source != "assumed":
        return False
    formula = report.head_formula
    return formula is not None and any(tensor.name in formula.growing for tensor in place.tensors)


def _place_text(alike: Sequence[TrainedPlace]) -> str:
    """What stands at one place, or at the same place of blocks that are alike."""
    place = alike[0]
    if place.group == "backbone":
        # The tensor's own name tells more than its role, which others of the block share.
        name = common_name([tensor.name for place in alike for tensor in place.tensors]).removeprefix("backbone.")
        return f"{place.role}  {name} {_shape(place.tensors[0].shape)}"
    role = place.role if place.stack else common_name([place.role for place in alike])
    shapes = [f"{tensor.name.rpartition('.')[2]} {_shape(tensor.shape)}" for tensor in place.tensors]
    if len(shapes) > 3:
        sizes = dict.fromkeys(_shape(tensor.shape) for tensor in place.tensors)
        shapes = [f"{len(shapes)} tensors" + (f" of {next(iter(sizes))}" if len(sizes) == 1 else "")]
    return f"{role}  {', '.join(shapes)}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _totals(report: ConfigReport) -> Iterable[str]:
    counts = report.counts
    assumed = report.classes is not None and report.classes.source == "assumed"
    yield (
        f"trained       {counts.trained:,} of {counts.total:,} parameters ({100 * counts.trained_share:.2f} %)"
        + (f", for {report.classes.count} classes" if assumed and report.classes else "")
    )
    if report.classes is not None:
        told = {
            "data": f"{report.classes.count}, as data '{_name(report, 'data')}' says without being read",
            "option": f"{report.classes.count}, as asked",
            "assumed": f"unknown without data; totals assume {report.classes.count} (--classes N sets the number)",
        }
        yield f"classes       {told[report.classes.source]}"
    yield f"adapter file  about {_size(report.file_bytes)}"


def _name(report: ConfigReport, noun: Any) -> str:  # noqa: ANN401 — a noun
    return report.composed.nodes[noun].name if noun in report.composed.nodes else ""


def _estimate(report: ConfigReport, method: str) -> Iterable[str]:
    from peft_modal.inspection.config import ratios
    from peft_modal.inspection.estimate import LEFT_OUT, Unknown

    told = {"data": "", "option": "", "assumed": " (assumed: --batch-size N sets it)"}[report.batch_source]
    yield f"One training step, batch of {report.batch_size}{told}, {report.precision}, {', '.join(report.inputs)}:"
    both = {"full fine-tuning": report.full, method: report.method}
    if method == "full":
        del both["full fine-tuning"]
    for name, value in both.items():
        if isinstance(value, Unknown):
            yield from _wrapped(f"no estimate for {name}: {value.reason}.", indent=2)
    known = {name: value for name, value in both.items() if not isinstance(value, Unknown)}
    if not known:
        return
    ratio = ratios(report.method, report.full) if len(known) == 2 else None
    yield f"  {'':26}" + "".join(f"{name[:18]:>20}" for name in known) + (f"{'ratio':>10}" if ratio else "")
    for key, label in _ROWS.items():
        unit = _flops if key == "flops" else _size
        cells = "".join(f"{unit(value.to_dict()[key]):>20}" for value in known.values())
        yield f"  {label:26}{cells}" + (f"{ratio[key]:>10.3f}" if ratio and key in ratio else "")
    yield from _wrapped("Estimated as on a CPU. Left out: " + ", ".join(LEFT_OUT) + ".", indent=2)


def _notes(report: ConfigReport) -> Iterable[str]:
    for note in report.notes:
        yield from ("\n", *_wrapped(note, indent=0))


def _stored_tree(report: AdapterReport) -> Tree:
    total = sum(tensor.bytes for tensor in report.tensors)
    tree = Tree(_row(f"{len(report.tensors)} tensors", _size(total), level=0, style="bold"), guide_style="dim")
    for group, title in _GROUPS.items():
        if group == "training_only":
            continue
        stored = report.group(group)
        branch = tree.add(_row(title, _size(sum(t.bytes for t in stored)), level=1, style="bold"))
        for run in _alike(stored, name=lambda tensor: tensor.name, looks=lambda tensor: (tensor.shape, tensor.dtype)):
            name = common_name([tensor.name for tensor in run]).partition(".")[2]
            times = f", {len(run)} times" if len(run) > 1 else ""
            branch.add(
                _row(f"{name}  {run[0].dtype} {_shape(run[0].shape)}{times}", _size(sum(t.bytes for t in run)), level=2)
            )
    return tree


def _alike(items: Sequence[_T], *, name: Callable[[_T], str], looks: Callable[[_T], object]) -> list[list[_T]]:
    """Those that look alike under names differing in one number, together; each group stands where its first does."""
    found: dict[object, list[_T]] = {}
    for item in items:
        parts = name(item).split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        pattern = tuple(parts) if at is None else (*parts[:at], None, *parts[at + 1 :])
        found.setdefault((pattern, looks(item)), []).append(item)
    return list(found.values())


def _node_text(node: Mapping[str, Any]) -> str:
    arguments = _pairs({key: value for key, value in node.items() if key != "name" and value is not None})
    name = node.get("name")
    return arguments if name is None else f"{name}{'  ' if arguments else ''}{arguments}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _row(text: str, number: str, *, level: int, style: str = "") -> Text:
    """A label and a number that ends in one column on every level of the tree."""
    room = _WIDTH - 4 * level - max(_NUMBER, len(number) + 1)
    label = text if len(text) <= room or not sys.stdout.isatty() else text[: room - 3] + "..."
    return Text(f"{label:{room}} {number:>{max(_NUMBER, len(number) + 1) - 1}}", style=style)


def _print_tree(tree: Tree) -> None:
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 10_000)
    with console.capture() as capture:
        console.print(tree)
    # Rich fills each line up to the console's width.
    write("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    shown = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in (columns, *rows)) for i in shown}
    for row in (columns, *rows):
        write("  " + "  ".join(f"{row[i]:{widths[i]}}" for i in shown).rstrip())


def _field(key: str, text: str, *, indent: int = 15) -> None:
    for index, line in enumerate(_wrapped(text, indent=indent)):
        write(f"{key:{indent}}{line[indent:]}" if index == 0 else line)


def _wrapped(text: str, *, indent: int) -> list[str]:
    """Lines of at most 100 columns on a terminal; one line in a pipe."""
    import textwrap

    if not sys.stdout.isatty():
        return [" " * indent + text]
    lines = textwrap.wrap(text, 100 - indent, break_long_words=False, break_on_hyphens=False) or [""]
    return [" " * indent + line for line in lines]


def _size(count: int) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= limit:
            return f"{count / limit:,.2f} {unit}"
    return f"{count} B"


def _flops(count: int) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= limit:
            return f"{count / limit:,.2f} {unit}"
    return f"{count:,}"
