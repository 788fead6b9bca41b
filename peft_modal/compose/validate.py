"""A merged configuration checked node by node, all mistakes in one error."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from peft_modal.compose.arguments import ArgumentChecker, restrict_imports
from peft_modal.compose.composed import Composed, Node, node_args, runtime_args
from peft_modal.compose.describe import show
from peft_modal.compose.merge import TOP_LEVEL
from peft_modal.compose.trainer import check_trainer
from peft_modal.errors import ConfigError, PeftModalError, nearest
from peft_modal.registry import NOUNS, Noun, Registry, Resolved

_CHEAP: Final[tuple[Noun, ...]] = ("method", "data")
"""Nouns whose constructors only look at their arguments."""
_SEED_LIMIT: Final = 2**32
"""numpy takes no larger seed."""


@dataclass(frozen=True)
class Layer:
    """One source of configuration and what to call it."""

    label: str
    """Such as "in lora.yaml"; "" where there is nothing to tell."""
    values: Mapping[str, Any]


def validate(
    merged: Mapping[str, Any], *, layers: Sequence[Layer], registry: Registry, required: Collection[Noun]
) -> Composed:
    """Check everything and fill in all defaults.

    Args:
        merged: The layers merged.
        layers: Where the values come from, for the sentences.
        registry: Where names are looked up.
        required: Nouns that must be there; a head is needed unless the task's class says `needs_head = False`.

    Raises:
        ConfigError: Lists every mistake of every node.
    """
    restrict_imports(registry)
    problems: list[str] = []
    checker = ArgumentChecker(registry, problems, origin=lambda path: _origin(path, layers))
    for key in merged:
        if key not in TOP_LEVEL:
            checker.add(str(key), f"unknown key; {nearest(str(key), TOP_LEVEL)}")
    nodes = _Nodes(checker, registry).check_all(merged, required)
    trainer = check_trainer(merged.get("trainer"), checker)
    seed = merged.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _SEED_LIMIT:
        checker.add("seed", f"expected an int from 0 to {_SEED_LIMIT - 1}, got {show(seed)}.")
    if problems:
        raise ConfigError(*problems)
    return Composed(nodes, trainer, seed)


@dataclass
class _Nodes:
    """Checks of the five nouns; short names are looked up in the backbone's modality."""

    checker: ArgumentChecker
    registry: Registry
    modality: str | None = None

    def check_all(self, merged: Mapping[str, Any], required: Collection[Noun]) -> dict[Noun, Node]:
        nodes: dict[Noun, Node] = {}
        present = [noun for noun in NOUNS if merged.get(noun) is not None]
        for noun in present:
            node = self.check(noun, merged[noun], path=noun)
            if node is not None:
                nodes[noun] = node
        for noun in NOUNS:
            if noun in required and noun not in present:
                self._missing(noun)
        task = nodes.get("task")
        if task is not None:
            needs_head = getattr(task.cls, "needs_head", True)
            if needs_head and "head" not in present:
                self._missing("head")
            if not needs_head and "head" in present:
                self.checker.add("head", f"task '{task.name}' uses no head; remove it, or write head: null.")
        return nodes

    def check(self, noun: Noun, value: object, *, path: str) -> Node | None:
        """One node, None when it cannot even be identified."""
        example = self._names(noun)[:1] or ["..."]
        if not isinstance(value, Mapping):
            self.checker.add(path, f"expected a mapping such as {{name: {example[0]}}}, got {show(value)}.")
            return None
        name = value.get("name")
        if not isinstance(name, str):
            known = ", ".join(self._names(noun)) or "none"
            what = "'name' is missing" if name is None else f"'name' is no text but {show(name)}"
            self.checker.add(path, f"{what}; write {path}: {{name: ...}}; known: {known}.")
            return None
        before = len(self.checker.problems)
        try:
            resolved = self.registry.resolve(noun, name, modality=self.modality)
            if noun == "backbone":
                self.modality = resolved.modality
            cls = self.registry.load(resolved)
        except PeftModalError as error:
            # Without its backbone the modality is unknown: a name that exists somewhere may well be right.
            if noun == "backbone" or self.modality is not None or not self._exists(noun, name):
                self.checker.add(f"{path}.name", str(error))
            return None
        try:
            arguments = {key: item for key, item in value.items() if key != "name"}
            children = self._children(cls, arguments, path)
            kwargs = self.checker.check(
                cls,
                {key: item for key, item in arguments.items() if key not in children},
                path=path,
                owner=f"{noun} '{name}'",
                skip=runtime_args(cls) | children.keys(),
            )
            node = Node(noun, self._shown(resolved), resolved.modality, cls, kwargs, children)
            if noun in _CHEAP and len(self.checker.problems) == before:
                node.build()  # its own checks are reported with the rest
        except PeftModalError as error:
            self._add_error(path, error)
            return None
        return node

    def _children(self, cls: type, arguments: Mapping[str, Any], path: str) -> dict[str, Node | tuple[Node, ...]]:
        children: dict[str, Node | tuple[Node, ...]] = {}
        for key, noun in node_args(cls).items():
            value = arguments.get(key)
            if isinstance(value, list):
                checked = [self.check(noun, item, path=f"{path}.{key}.{i}") for i, item in enumerate(value)]
                children[key] = tuple(node for node in checked if node is not None)
            elif value is not None:
                node = self.check(noun, value, path=f"{path}.{key}")
                children[key] = node if node is not None else ()
        return children

    def _shown(self, resolved: Resolved) -> str:
        return self.registry.name_of(resolved, modality=None if resolved.noun == "backbone" else self.modality)

    def _add_error(self, path: str, error: PeftModalError) -> None:
        # A constructor that knows which of its arguments is wrong starts its sentence with the key path.
        for line in str(error).splitlines():
            where, colon, text = line.partition(": ")
            known = colon and where.startswith(f"{path}.") and " " not in where
            self.checker.add(where if known else path, text if known else line)

    def _missing(self, noun: Noun) -> None:
        known = ", ".join(self._names(noun)) or "none"
        self.checker.add(noun, f"missing; write {noun}: {{name: ...}} or --{noun}=NAME; known: {known}.")

    def _names(self, noun: Noun) -> list[str]:
        listed = self.registry.entries(noun)
        return list(
            dict.fromkeys(
                entry.name for entry in listed if self.modality is None or entry.modality in {self.modality, ""}
            )
        )

    def _exists(self, noun: Noun, name: str) -> bool:
        short = name.rpartition(".")[2]
        return any(short == entry.name for entry in self.registry.entries(noun))


def _origin(path: str, layers: Sequence[Layer]) -> str:
    """Which layer has set the value at `path` last; "" for none, as for something missing."""
    for layer in reversed(layers):
        value: object = layer.values
        for part in path.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, str) and part == "name":
                continue  # `method: lora` is short for `method: {name: lora}`
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                break
        else:
            return f" ({layer.label})" if layer.label else ""
    return ""
