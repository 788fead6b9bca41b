"""A configuration built on the meta device: shapes without values, so neither weights nor data nor a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.compose import Composed, Node
from peft_modal.compose.composed import build_head as build_any_head
from peft_modal.errors import ConfigError
from peft_modal.methods.base import Method

if TYPE_CHECKING:
    from peft_modal.tasks.base import Task

Anything: TypeAlias = Any  # torch's functions take and return anything


@dataclass(frozen=True)
class MetaModel:
    """A model without values."""

    backbone: Backbone
    adapter: Adapter
    head: nn.Module | None
    task: Task | None
    """None where the configuration has no task, or its task needs a head that the configuration lacks."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What holds tensors."""
        return tuple(m for m in (self.backbone.network, self.adapter, self.head) if m is not None)


class _WithoutGenerators(TorchFunctionMode):
    """Drops generators where no number is drawn: those of a CPU are refused beside tensors of the meta device.

    One place for all methods, backbones and heads, whatever they draw their initial values from.
    """

    def __torch_function__(
        self,
        func: Callable[..., Anything],
        types: object,
        args: tuple[Anything, ...] = (),
        kwargs: Mapping[str, Anything] | None = None,
    ) -> Anything:
        del types
        named = dict(kwargs or {})
        if named.get("generator") is not None and named.get("device") is None:
            tensors = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
            if all(tensor.is_meta for tensor in tensors):  # none at all: a factory, which the device mode sends to meta
                named["generator"] = None
        return func(*args, **named)


@contextmanager
def on_meta() -> Iterator[None]:
    """Create every tensor inside on the meta device."""
    with torch.device("meta"), _WithoutGenerators():
        yield


def build_backbone(node: Node) -> Backbone:
    """A backbone on the meta device; its weights are not looked for.

    Raises:
        ConfigError: It cannot be built without values.
    """
    with on_meta(), _explained(f"backbone '{node.name}'"):
        backbone: Backbone = node.build()
        return backbone


def build_model(composed: Composed, labels: tuple[str, ...], *, method: Method | None = None) -> MetaModel:
    """Backbone, adapter, head and task on the meta device.

    Args:
        composed: The configuration; head and task may be missing.
        labels: Names of the classes.
        method: To attach instead of the configuration's.

    Raises:
        ConfigError: A part cannot be built without values.
        AttachError: The method does not work on this backbone.
    """
    backbone = build_backbone(composed.nodes["backbone"])
    with on_meta():
        node = composed.nodes["method"]
        with _explained(f"method '{node.name if method is None else method.describe()}'"):
            adapter = (node.build() if method is None else method).attach(backbone)
        head: nn.Module | None = None
        if "head" in composed.nodes:
            head = build_head(composed.nodes["head"], backbone, labels)
        task: Task | None = None
        if "task" in composed.nodes and head is not None:
            with _explained(f"task '{composed.nodes['task'].name}'"):
                task = composed.nodes["task"].build(backbone=backbone, adapter=adapter, head=head, class_names=labels)
    return MetaModel(backbone, adapter, head, task)


def build_head(node: Node, backbone: Backbone, labels: tuple[str, ...]) -> nn.Module:
    """A head on the meta device.

    Raises:
        ConfigError: It does not fit the features, or cannot be built without values.
    """
    with on_meta(), _explained(f"head '{node.name}'"):
        head: nn.Module = build_any_head(node, backbone.feature_spec(), labels)
        return head


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        # Reading a value of a tensor that has none.
        if "meta" not in str(error).lower():
            raise
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"{what} cannot be inspected: it reads values of weights while it is built, which are not loaded here "
            f"({first})"
        ) from error
