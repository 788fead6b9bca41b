"""Types and values in words, for error sentences and help."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from peft_modal.ranges import Range, hints_of


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """Parameters of the constructor by name; where it hands `**options` on to its base's, those of the base follow."""
    found: dict[str, inspect.Parameter] = {}
    for constructor in _constructors(cls):
        own = list(inspect.signature(constructor).parameters.values())[1:] if found else None
        for parameter in inspect.signature(cls).parameters.values() if own is None else own:
            found.setdefault(parameter.name, parameter)
    return found


def type_hints(cls: type) -> dict[str, Any]:
    """Annotations of `parameters_of`, resolved where they can be."""
    resolved: dict[str, Any] = {}
    for constructor in reversed(_constructors(cls)):
        # Where there are none the text of the annotation still tells the reader enough.
        resolved.update(hints_of(constructor))
    return {name: resolved.get(name, parameter.annotation) for name, parameter in parameters_of(cls).items()}


def _constructors(cls: type) -> list[Callable[..., None]]:
    """The constructor of `cls`, and those of its bases as far as each hands `**options` on to the next."""
    found: list[Callable[..., None]] = []
    for base in cls.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is None or base is object:
            continue
        found.append(constructor)
        kinds = {parameter.kind for parameter in inspect.signature(constructor).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found or [cls.__init__]  # type: ignore[misc]


def describe_type(hint: object) -> str:
    """`int | None` as "int or null", `Literal["a", "b"]` as "one of 'a', 'b'"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [str(item) for item in arguments[1:] if isinstance(item, Range)]
        return " ".join([describe_type(arguments[0]), *limits])
    if origin in {Union, types.UnionType}:
        constants = [value for option in arguments if get_origin(option) is Literal for value in get_args(option)]
        others = [option for option in arguments if get_origin(option) is not Literal]
        options = [Literal[tuple(constants)], *others] if constants else others
        return " or ".join(dict.fromkeys(map(describe_type, options)))
    if origin is Literal:
        return "one of " + ", ".join(map(show, arguments))
    if isinstance(origin, type):
        return _describe_generic(origin, arguments)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(hint.__members__)
    name: str = getattr(hint, "__name__", str(hint).replace("typing.", ""))
    return _NAMES.get(hint, name)


def choices(hint: object) -> set[str]:
    """The texts that a `Literal` or an enumeration inside `hint` allows."""
    if get_origin(hint) is Literal:
        return {value for value in get_args(hint) if isinstance(value, str)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return set(hint.__members__)
    return set().union(*(choices(argument) for argument in get_args(hint)))


def accepts(hint: object, kind: object) -> bool:
    """Whether `kind` is one of the options of `hint`."""
    return hint is kind or (
        get_origin(hint) in {Union, types.UnionType, Annotated} and any(accepts(a, kind) for a in get_args(hint))
    )


def show(value: object) -> str:
    """A value as one would write it in YAML, shortened."""
    text = {None: "null", True: "true", False: "false"}[value] if _is_constant(value) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _is_constant(value: object) -> typing.TypeGuard[bool | None]:
    return value is None or isinstance(value, bool)


def _describe_generic(origin: type, arguments: tuple[Any, ...]) -> str:
    if issubclass(origin, collections.abc.Mapping) and len(arguments) == 2:
        return f"mapping of {describe_type(arguments[0])} to {describe_type(arguments[1])}"
    if issubclass(origin, tuple) and Ellipsis not in arguments:
        return f"list of {len(arguments)}: " + ", ".join(map(describe_type, arguments))
    if issubclass(origin, collections.abc.Iterable) and arguments:
        return f"list of {describe_type(arguments[0])}"
    if origin is type:
        return f"import path of a {describe_type(arguments[0])} class"
    return "import path of a function" if issubclass(origin, collections.abc.Callable) else origin.__name__  # type: ignore[arg-type]


_NAMES: dict[object, str] = {
    None: "null",
    type(None): "null",
    Any: "anything",
    inspect.Parameter.empty: "anything",
    str: "text",
    bool: "true or false",
    dict: "mapping",
}
