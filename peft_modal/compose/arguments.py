"""Constructor arguments checked against signatures, and types against annotations.

The constructor is the schema: keys are checked against its signature, values by jsonargparse. All mistakes are
collected, each as one sentence; jsonargparse's own text for a union is eight lines.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, get_args

from peft_modal.compose.describe import accepts, choices, describe_type, parameters_of, show, type_hints
from peft_modal.compose.plain import plain
from peft_modal.errors import ConfigError, nearest
from peft_modal.ranges import outside
from peft_modal.registry import Registry

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_ACCEPTS_NULL: Final = (None, type(None), Any, inspect.Parameter.empty)
_FOREIGN: Final = ("lightning.pytorch", "torch.optim")
"""Packages of others that `class_path` may name."""


def restrict_imports(registry: Registry) -> None:
    """Let configurations import from our packages, the plugins', and Lightning's only.

    The setting of jsonargparse is process-wide; a program that parses configurations of its own with jsonargparse adds
    its packages by `jsonargparse.set_parsing_settings(import_path_allowlist=[...])`.
    """
    from jsonargparse import set_parsing_settings

    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*_FOREIGN, *sorted(registry.packages)],
        instantiate_subclass_spec_in_any=False,
    )


def typed_arguments(cls: type, values: Mapping[str, Any], *, skip: Collection[str] = ()) -> dict[str, Any]:
    """Checked plain `values` turned into what the constructor's annotations ask for.

    Args:
        cls: Whose constructor.
        values: Plain arguments, as `ArgumentChecker.check` returns them.
        skip: Arguments that somebody else supplies.
    """
    parser, _ = _parser(cls, skip)
    kept = {key: value for key, value in values.items() if key not in skip}
    # `parse_object` turns mappings inside lists of its argument into Namespaces, in place.
    return dict(vars(parser.instantiate(parser.parse_object(copy.deepcopy(kept)))))


@dataclass(frozen=True)
class ArgumentChecker:
    """Checks arguments of any class and collects what is wrong.

    Args:
        registry: Says which packages may be imported from.
        problems: Receives one sentence per mistake.
        origin: Tells where the value at a key path comes from, " (in file.yaml)" or "".
    """

    registry: Registry
    problems: list[str]
    origin: Callable[[str], str] = lambda path: ""  # noqa: ARG005 - the interface names it

    def add(self, path: str, text: str) -> None:
        """Note one mistake."""
        self.problems.append(f"{path}: {text}{self.origin(path)}")

    def check(
        self, cls: type, values: Mapping[str, Any], *, path: str, owner: str, skip: Collection[str] = ()
    ) -> dict[str, Any]:
        """Check the arguments of one class.

        Args:
            cls: Whose constructor.
            values: Arguments as read from YAML.
            path: Key path of the arguments, `method`.
            owner: What to call the class in a sentence, "method 'lora'".
            skip: Arguments that the program supplies.

        Returns:
            Every argument with its value, in plain types; meaningless when mistakes were noted.
        """
        before = len(self.problems)
        parser, names = _parser(cls, skip)
        hints = type_hints(cls)
        self._check_names(cls, values, names=names, path=path, owner=owner, skip=skip)
        expanded = {
            key: self._expand(value, hints.get(key), f"{path}.{key}") for key, value in values.items() if key in names
        }
        self._check_nulls(cls, values, hints=hints, path=path)
        self._check_ranges(expanded, hints=hints, path=path)
        if len(self.problems) == before:
            parsed = self._parse(parser, expanded)
            if parsed is not None:
                return self._complete(parsed, hints, path=path, owner=owner)
        self._check_values(cls, expanded, hints=hints, names=names, path=path, skip=skip)
        return {}

    def check_object(self, spec: Mapping[str, Any], *, path: str) -> dict[str, Any]:
        """Check a `{class_path, init_args}` mapping; returned complete."""
        for key in spec:
            if key not in {"class_path", "init_args"}:
                self.add(f"{path}.{key}", f"unknown key; an object has class_path and init_args, {_near(key, spec)}")
        class_path, given = spec["class_path"], spec.get("init_args") or {}
        cls = self._import(class_path, path=f"{path}.class_path")
        if not isinstance(given, Mapping):
            self.add(f"{path}.init_args", f"expected a mapping of arguments, got {show(given)}.")
        elif cls is not None:
            given = self.check(cls, given, path=f"{path}.init_args", owner=f"'{class_path}'")
        return {"class_path": class_path, "init_args": given}

    def _import(self, class_path: object, *, path: str) -> type | None:
        text = class_path if isinstance(class_path, str) else ""
        module_name, _, name = text.rpartition(".")
        found: object = None
        if not module_name:
            self.add(path, f"expected a full import path such as lightning.pytorch.callbacks.EarlyStopping, "
                           f"got {show(class_path)}.")  # fmt: skip
        elif not (self.registry.allows(text) or text.startswith(tuple(package + "." for package in _FOREIGN))):
            allowed = ", ".join([*_FOREIGN, *sorted(self.registry.packages)])
            self.add(path, f"'{text}' may not be imported; allowed are {allowed}.")
        else:
            try:
                module = importlib.import_module(module_name)
            except ImportError as error:
                self.add(path, f"'{text}' cannot be imported: {error}.")
                return None
            found = getattr(module, name, None)
            if not isinstance(found, type):
                classes = [key for key, value in vars(module).items() if isinstance(value, type)]
                self.add(path, f"'{module_name}' has no class '{name}'; {nearest(name, classes)}")
        return found if isinstance(found, type) else None

    def _check_names(
        self, cls: type, values: Mapping[str, Any], *, names: Collection[str], path: str, owner: str,
        skip: Collection[str],
    ) -> None:  # fmt: skip
        for key in values:
            if key in skip:
                self.add(f"{path}.{key}", f"the program supplies this argument of {owner}; remove it.")
            elif key not in names:
                self.add(f"{path}.{key}", f"{owner} has no such argument; {nearest(str(key), names)}")
        parameters = parameters_of(cls)
        for key in names:
            parameter = parameters.get(key)
            if parameter is not None and parameter.default is parameter.empty and key not in values:
                expected = describe_type(type_hints(cls)[key])
                self.add(f"{path}.{key}", f"{owner} needs this argument, and it is missing; expected {expected}.")

    def _expand(self, value: object, hint: object, path: str) -> object:
        """`value` with objects and dataclasses inside it checked and completed."""
        if isinstance(value, Mapping) and "class_path" in value:
            return self.check_object(value, path=path)
        if isinstance(value, list):
            return [self._expand(item, hint, f"{path}.{index}") for index, item in enumerate(value)]
        if isinstance(value, Mapping):
            schema = _only_dataclass(hint)
            if schema is not None:
                return self.check(schema, value, path=path, owner=f"'{schema.__name__}'")
        return value

    def _check_nulls(self, cls: type, values: Mapping[str, Any], *, hints: Mapping[str, Any], path: str) -> None:
        """Refuse null for a type without it; jsonargparse takes it for "not given" and lets it pass."""
        parameters = parameters_of(cls)
        for key, value in values.items():
            if value is None and key in parameters and parameters[key].default is not None:
                hint = hints[key]
                if not isinstance(hint, str) and not any(accepts(hint, kind) for kind in _ACCEPTS_NULL):
                    self.add(f"{path}.{key}", _wrong_type(None, hint))

    def _check_ranges(self, values: Mapping[str, Any], *, hints: Mapping[str, Any], path: str) -> None:
        for key, value in values.items():
            if key in hints and outside(value, hints[key]) is not None:
                self.add(f"{path}.{key}", f"expected {describe_type(hints[key])}, got {show(value)}.")

    @staticmethod
    def _parse(parser: ArgumentParser, values: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            return dict(vars(parser.parse_object(copy.deepcopy(dict(values)))))
        except argparse.ArgumentError:
            return None

    def _complete(
        self, parsed: Mapping[str, Any], hints: Mapping[str, Any], *, path: str, owner: str
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in parsed.items():
            try:
                # Once more: parsing turns the text of a class path into an object without arguments.
                result[key] = self._expand(plain(value), hints.get(key), f"{path}.{key}")
            except TypeError as error:
                self.add(f"{path}.{key}", f"the default of {owner} cannot be written to a file: {error}.")
        return result

    def _check_values(
        self, cls: type, values: Mapping[str, Any], *, hints: Mapping[str, Any], names: Collection[str], path: str,
        skip: Collection[str],
    ) -> None:  # fmt: skip
        """Find which of `values` have the wrong type; jsonargparse stops at the first, so one parser for each."""
        for key, value in values.items():
            if any(problem.startswith((f"{path}.{key}.", f"{path}.{key}:")) for problem in self.problems):
                continue
            alone, _ = _parser(cls, {*skip, *names} - {key})
            if self._parse(alone, {key: value}) is None:
                self.add(f"{path}.{key}", _wrong_type(value, hints.get(key, inspect.Parameter.empty)))


def _wrong_type(value: object, hint: object) -> str:
    text = f"expected {describe_type(hint)}, got {show(value)}"
    if isinstance(value, str) and (close := difflib.get_close_matches(value, choices(hint), n=1)):
        return f"{text}; did you mean '{close[0]}'?"
    if not isinstance(value, str | list | Mapping) and value is not None and accepts(hint, str):
        return f"{text}; put it in quotes to keep it as text."
    return f"{text}."


def _near(key: object, spec: Mapping[str, Any]) -> str:
    return nearest(str(key), {"class_path", "init_args"} - set(spec) or {"class_path", "init_args"})


def _only_dataclass(hint: object) -> type | None:
    """The one dataclass that a mapping for `hint` must describe, None where there is none or a choice."""
    found = [option for option in (hint, *_flat(hint)) if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return found[0] if len(found) == 1 else None


def _flat(hint: object) -> list[object]:
    return [inner for option in get_args(hint) for inner in (option, *_flat(option))]


def _parser(cls: type, skip: Collection[str]) -> tuple[ArgumentParser, Sequence[str]]:
    """A parser of the constructor's arguments, and their names.

    Raises:
        ConfigError: jsonargparse cannot read the constructor: a fault of the class, not of the configuration.
    """
    from jsonargparse import ArgumentParser

    where = f"{cls.__module__}.{cls.__qualname__}"
    parser = ArgumentParser(exit_on_error=False)
    parameters = inspect.signature(cls).parameters
    try:
        names = parser.add_class_arguments(cls, skip=set(skip) & parameters.keys(), fail_untyped=False)
    except (ValueError, TypeError, NameError, AttributeError) as error:
        raise ConfigError(f"the constructor of {where} cannot serve as configuration: {error}") from error
    named = {p.name for p in parameters.values() if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY}}
    # jsonargparse leaves out in silence what it cannot read.
    if unread := named - set(names) - set(skip):
        raise ConfigError(f"the constructor of {where} cannot serve as configuration: {', '.join(sorted(unread))}")
    return parser, names
