"""From a configuration or an adapter file to a ready model, in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.compose import Composed, compose
from peft_modal.compose.composed import build_head
from peft_modal.errors import BackboneMismatchError, FileFormatError
from peft_modal.files import Header, fingerprint, load_adapter
from peft_modal.tasks.tensors import load_tensors

if TYPE_CHECKING:
    from peft_modal.tasks.base import Task


@dataclass
class Model:
    """A backbone with its adapter and head, ready to predict.

    Use it as a function: `model(batch)` gives what the head gives, e.g. logits.
    """

    backbone: Backbone
    adapter: Adapter
    head: nn.Module
    class_names: tuple[str, ...]
    composed: Composed
    header: Header | None = None

    def __call__(self, batch: Mapping[str, Any]) -> Any:  # noqa: ANN401 — what a head returns is its own
        """Predictions of a batch, without gradients."""
        with torch.no_grad():
            return self.head(self.backbone(batch))

    def eval(self) -> Model:
        """Switch every dropout off."""
        for part in (self.backbone, *self.backbone.adapters.values(), self.head):
            part.eval()
        return self

    def task(self) -> Task:
        """The Lightning module that trains and measures this model."""
        node = self.composed.nodes["task"]
        task: Task = node.build(
            backbone=self.backbone, adapter=self.adapter, head=self.head, class_names=self.class_names
        )
        if self.header is not None:
            task.suit(self.header.preprocessing)
        return task


@dataclass(frozen=True)
class Exported:
    """What a format of `export` has written."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    """What is worth knowing, one line each."""


def build(composed: Composed, class_names: Sequence[str], *, weights: bool = True) -> Model:
    """Build backbone, adapter and head of a configuration.

    Initial values of adapter and head follow from `seed` alone.

    Args:
        composed: The configuration.
        class_names: Names of the classes in label order.
        weights: Load the backbone's weights.
    """
    backbone: Backbone = composed.nodes["backbone"].build()
    if weights:
        backbone.load_weights()
    generator = torch.Generator().manual_seed(composed.seed)
    adapter: Adapter = composed.nodes["method"].build().attach(backbone, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(composed.seed)
        head: nn.Module = build_head(composed.nodes["head"], backbone.feature_spec(), class_names)
    return Model(backbone, adapter, head, tuple(class_names), composed)


def load(path: str | Path, *, weight: float | None = None) -> Model:
    """A ready model from its adapter file, in evaluation mode.

    Args:
        path: An adapter file.
        weight: Factor of the adapter's effect, see `Adapter.weight`; None for what the file says, usually 1.

    Raises:
        FileFormatError: The file is missing, corrupt, from a newer version, or does not fit its own configuration.
        BackboneMismatchError: The backbone's weights are not those that the adapter was trained on.
        AttachError: The adapter's effect cannot be weighted.
    """
    tensors, header = load_adapter(Path(path))
    composed = compose(header.config)
    model = build(composed, header.class_names)
    found = fingerprint(model.backbone.network.state_dict())
    if found != header.fingerprint:
        raise BackboneMismatchError(
            f"'{path}' was trained on other weights of {_weights(composed)}: "
            f"fingerprint {header.fingerprint[:12]} there, {found[:12]} here; "
            "get the same backbone weights, or train again"
        )
    _fill(model.adapter, model.head, tensors, header, weight)
    model.header = header
    return model.eval()


def load_stack(files: Sequence[tuple[str | Path, float | None]]) -> Model:
    """A ready model from several adapter files on one backbone; their effects add up where they meet.

    Configuration and head are those of the first.

    Args:
        files: Adapter files, each with a factor of its effect or None; see `load`.

    Raises:
        BackboneMismatchError: They were trained on different backbones, or see `load`.
        FileFormatError: Another than the first has a head; or see `load`.
        AttachError: A method cannot act beside another, or an effect cannot be weighted.
    """
    (first, weight), *others = files
    model = load(first, weight=weight)
    assert model.header is not None
    for number, (path, other_weight) in enumerate(others, start=2):
        tensors, header = load_adapter(Path(path))
        composed = compose(header.config)
        if header.fingerprint != model.header.fingerprint:
            raise BackboneMismatchError(
                f"'{path}' cannot be stacked on '{first}': it was trained on other backbone weights, "
                f"{_weights(composed)}, than that file, {_weights(model.composed)}"
            )
        if any(name.startswith("head.") for name in tensors):
            raise FileFormatError(
                f"'{path}' cannot be stacked on '{first}': it has a head of its own, and predictions come from one head"
            )
        generator = torch.Generator().manual_seed(composed.seed)
        adapter = composed.nodes["method"].build().attach(model.backbone, name=f"stacked{number}", generator=generator)
        _fill(adapter, nn.Identity(), tensors, header, other_weight)
    return model.eval()


def _fill(
    adapter: Adapter, head: nn.Module, tensors: Mapping[str, Tensor], header: Header, weight: float | None
) -> None:  # fmt: skip
    adapter.rebuild(header.facts)
    load_tensors(adapter, head, tensors)
    adapter.adopt(header.facts)
    if weight is not None:
        adapter.weight = weight


def _weights(composed: Composed) -> str:
    node = composed.nodes["backbone"]
    return f"'{node.name}' (weights: {node.kwargs.get('weights')})"
