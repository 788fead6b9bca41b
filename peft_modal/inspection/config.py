"""What a configuration would train: a report made from shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import Tensor

from peft_modal.anatomy import Backbone
from peft_modal.compose import Composed
from peft_modal.compose.composed import runtime_args
from peft_modal.counting import Counts, count_parameters
from peft_modal.errors import PeftModalError
from peft_modal.files import Header, versions
from peft_modal.inspection.building import MetaModel, build_head, build_model
from peft_modal.inspection.classes import Classes, classes_of
from peft_modal.inspection.estimate import LEFT_OUT, Estimate, Unknown, estimate, precision_of
from peft_modal.inspection.places import TrainedPlace, trained_places
from peft_modal.methods.base import Method
from peft_modal.registry import Registry
from peft_modal.tasks.tensors import tensors_of

ASSUMED_BATCH: Final = 8
"""Where neither the data nor the command line names a batch size; the output says so."""

_TRIED: Final = (2, 3, 5)
"""Numbers of classes that a head is built for: two tell the formula, the third checks it."""

_INDEX_BYTES: Final = 75
"""What a tensor's entry in a safetensors header takes beside its name."""


@dataclass(frozen=True)
class HeadFormula:
    """Parameters of a head as a function of the number of classes."""

    fixed: int
    per_class: int
    growing: tuple[str, ...]
    """Names of the tensors that have a row for each class."""


@dataclass(frozen=True)
class ConfigReport:
    """All that can be said of a configuration without weights, data and network."""

    composed: Composed
    classes: Classes | None
    """None where nothing depends on it."""
    head_formula: HeadFormula | None
    """None without a head, or where its size is no linear function of the classes."""
    counts: Counts
    places: tuple[TrainedPlace, ...]
    notes: tuple[str, ...]
    """What is decided only with data, and what else is not known here."""
    file_bytes: int
    """Of the adapter file, about: without metrics."""
    batch_size: int
    batch_source: str
    """`data`, `option` or `assumed`."""
    inputs: tuple[str, ...]
    """Shapes of the inputs that the estimate is made for."""
    precision: str
    method: Estimate | Unknown
    full: Estimate | Unknown

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        counts = self.counts
        return {
            "kind": "config",
            "config": self.composed.to_dict(),
            "classes": None if self.classes is None else asdict(self.classes),
            "parameters": {
                **asdict(counts),
                "trained": counts.trained,
                "total": counts.total,
                "trained_share": counts.trained_share,
                "head_formula": None if self.head_formula is None else asdict(self.head_formula),
            },
            "places": [{**asdict(place), "parameters": place.parameters} for place in self.places],
            "file_bytes": self.file_bytes,
            "estimate": {
                "batch_size": self.batch_size,
                "batch_source": self.batch_source,
                "inputs": list(self.inputs),
                "precision": self.precision,
                "full": _figures(self.full),
                "method": _figures(self.method),
                "ratio": ratios(self.method, self.full),
                "left_out": list(LEFT_OUT),
            },
            "notes": list(self.notes),
        }


def ratios(method: Estimate | Unknown, full: Estimate | Unknown) -> dict[str, float] | None:
    """Each figure of the method over full fine-tuning's; None where one is unknown."""
    if isinstance(method, Unknown) or isinstance(full, Unknown):
        return None
    own, reference = method.to_dict(), full.to_dict()
    return {name: own[name] / reference[name] for name in own if reference[name]}


def inspect_config(
    composed: Composed, registry: Registry, *, classes: int | None = None, batch_size: int | None = None
) -> ConfigReport:
    """Report on a configuration; builds it on the meta device.

    Args:
        composed: Backbone and method at least.
        registry: Where full fine-tuning, the reference, is looked up.
        classes: Number of classes, where the data cannot tell or something else is asked.
        batch_size: Likewise.

    Raises:
        PeftModalError: The configuration cannot be built.
    """
    found = classes_of(composed, classes)
    model = build_model(composed, found.labels)
    formula = _head_formula(composed, model.backbone)
    counts = count_parameters(model.backbone, model.adapter, model.head)
    places = tuple(trained_places(model.adapter, model.head))
    matters = model.head is not None and (formula is None or formula.per_class > 0)
    file_bytes = _file_bytes(composed, model, found)
    size, size_source = _batch_size(composed, batch_size)
    batch = model.backbone.example_batch(size)
    precision, is_named = precision_of(composed.trainer)
    notes = _notes(composed, model)
    if not is_named:
        notes.append(f"trainer.precision {composed.trainer['precision']!r} is not estimated; figures are for 32-true.")
    own = estimate(model, batch, precision=precision)
    full = own
    if composed.nodes["method"].name != "full":
        full = _full(composed, registry, found, batch, precision)
    return ConfigReport(
        composed=composed, classes=found if matters else None, head_formula=formula, counts=counts, places=places,
        notes=tuple(notes), file_bytes=file_bytes, batch_size=size, batch_source=size_source, inputs=_shapes(batch),
        precision=precision, method=own, full=full,
    )  # fmt: skip


def _full(
    composed: Composed, registry: Registry, classes: Classes, batch: Mapping[str, Any], precision: str
) -> Estimate | Unknown:
    cls = registry.load(registry.resolve("method", "core.full", modality=None))
    method: Method = cls()
    try:
        model = build_model(composed, classes.labels, method=method)
    except PeftModalError as error:
        # A head may read what only the configured method exports.
        return Unknown(f"full fine-tuning does not go with this configuration: {error}")
    return estimate(model, batch, precision=precision)


def _head_formula(composed: Composed, backbone: Backbone) -> HeadFormula | None:
    node = composed.nodes.get("head")
    # A head that is told the names of the classes may be made by more than their number.
    if node is None or "class_names" in runtime_args(node.cls):
        return None
    heads = [build_head(node, backbone, tuple(f"class {i}" for i in range(count))) for count in _TRIED]
    shapes = [{f"head.{name}": p.shape for name, p in head.named_parameters()} for head in heads]
    two, three, five = (sum(shape.numel() for shape in own.values()) for own in shapes)
    per_class = three - two
    if five - two != 3 * per_class:
        return None
    growing = tuple(name for name, shape in shapes[0].items() if shapes[1].get(name) != shape)
    return HeadFormula(two - 2 * per_class, per_class, growing)


def _batch_size(composed: Composed, given: int | None) -> tuple[int, str]:
    if given is not None:
        return given, "option"
    node = composed.nodes.get("data")
    size = None if node is None else node.kwargs.get("batch_size")
    return (size, "data") if isinstance(size, int) else (ASSUMED_BATCH, "assumed")


def _file_bytes(composed: Composed, model: MetaModel, classes: Classes) -> int:
    state = model.adapter.state()
    if model.head is not None:
        state = tensors_of(model.adapter, model.head)
    header = Header(config=composed.to_dict(), fingerprint="0" * 64, class_names=classes.labels, versions=versions())
    document = json.dumps({"kind": "adapter", **asdict(header)})
    # The document is a JSON string inside the file's own JSON header, so its quotes are escaped.
    described = len(json.dumps(document)) + sum(len(name) + _INDEX_BYTES for name in state)
    return described + sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _notes(composed: Composed, model: MetaModel) -> list[str]:
    notes = []
    name = composed.nodes["method"].name
    if model.adapter.events.wants("prepare"):
        notes.append(
            f"Method '{name}' calibrates on data before training and may then change sites, indices and sizes; "
            "counts are those before it."
        )
    if model.adapter.events.wants("compute_gradients"):
        notes.append(
            f"Method '{name}' computes its gradients in its own way; the estimate is of one forward and one backward."
        )
    if model.head is None:
        notes.append("Without a head: give --config, or --head, --task and --data, to count it.")
    accumulated = composed.trainer.get("accumulate_grad_batches") or 1
    if accumulated != 1:
        notes.append(f"The step is one batch; the optimiser moves after {accumulated} of them.")
    return notes


def _shapes(batch: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key} {'x'.join(map(str, v.shape))}" for key, v in batch.items() if isinstance(v, Tensor))


def _figures(value: Estimate | Unknown) -> dict[str, Any]:
    return {"unknown": value.reason} if isinstance(value, Unknown) else value.to_dict()
