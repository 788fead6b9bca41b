"""The checked, complete configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_modal.registry import NOUNS, Noun


@dataclass(frozen=True)
class Node:
    """One noun of a configuration: which class, with which arguments."""

    noun: Noun
    name: str
    """As it goes into a file: short where that is unambiguous in the backbone's modality."""
    modality: str
    """Modality of the registered entry, "" for the core's."""
    cls: type
    kwargs: dict[str, Any]
    """Every configurable argument with its value, in YAML's own types."""
    children: dict[str, Node | tuple[Node, ...]] = field(default_factory=dict)
    """Arguments that are nodes themselves (`node_args` of the class)."""

    def build(self, **runtime: object) -> Any:  # noqa: ANN401 - any registered class
        """Create the object.

        Args:
            runtime: The arguments that the program supplies (`runtime_args` of the class).
        """
        from peft_modal.compose.arguments import typed_arguments

        nested = {
            key: [node.build() for node in child] if isinstance(child, tuple) else child.build()
            for key, child in self.children.items()
        }
        skip = runtime_args(self.cls) | nested.keys() | runtime.keys()
        return self.cls(**typed_arguments(self.cls, self.kwargs, skip=skip), **nested, **runtime)

    def to_dict(self) -> dict[str, Any]:
        """The node as it stands in a file."""
        nested = {
            key: [node.to_dict() for node in child] if isinstance(child, tuple) else child.to_dict()
            for key, child in self.children.items()
        }
        return {"name": self.name, **copy.deepcopy(self.kwargs), **nested}


@dataclass(frozen=True)
class Composed:
    """What a run is made of; composing `to_dict()` again gives the same."""

    nodes: Mapping[Noun, Node]
    trainer: dict[str, Any]
    """Every argument of Lightning's Trainer, in YAML's own types."""
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The complete configuration in the order backbone, method, head, task, data, trainer, seed."""
        nodes: dict[str, Any] = {noun: self.nodes[noun].to_dict() for noun in NOUNS if noun in self.nodes}
        return {**nodes, "trainer": copy.deepcopy(self.trainer), "seed": self.seed}

    def to_yaml(self) -> str:
        """`to_dict` as text."""
        from peft_modal.compose.yaml_text import format_yaml  # here, so that `doctor` starts where PyYAML is missing

        return format_yaml(self.to_dict())


def build_head(node: Node, spec: object, class_names: Sequence[str]) -> Any:  # noqa: ANN401 - any registered class
    """A head with an output for each class; one whose `runtime_args` list `class_names` is told these as well.

    Args:
        node: Of the head.
        spec: What the features will hold.
        class_names: In label order.
    """
    offered = {"class_names": tuple(class_names)} if "class_names" in runtime_args(node.cls) else {}
    return node.build(spec=spec, num_outputs=len(class_names), **offered)


def runtime_args(cls: type) -> frozenset[str]:
    """Arguments of `cls` that the program supplies and a configuration must not name."""
    declared: frozenset[str] = getattr(cls, "runtime_args", frozenset())
    return frozenset(declared)


def node_args(cls: type) -> Mapping[str, Noun]:
    """Arguments of `cls` that hold nodes themselves (one or a list), with their nouns."""
    declared: Mapping[str, Noun] = getattr(cls, "node_args", {})
    return declared
