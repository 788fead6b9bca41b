"""The selection language: roles, blocks, stacks, and a regular expression as the last resort."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft_modal.errors import SelectionError

_KEYS = ("roles", "blocks", "stacks", "path")


@dataclass(frozen=True)
class Selector:
    """Chooses weight sites or ports.

    In YAML a role (`attn.q`), a list of roles (`[attn, mlp]`), or a mapping with these keys.
    """

    roles: tuple[str, ...] | None = None
    """Roles; `attn` matches `attn.q`, `attn.out`, ... up to a dot."""
    blocks: str | tuple[int, ...] | None = None
    """Indices, or `last: 4`, `first: 2`, a slice such as `::2`, or shares of the depth such as `0.5:`; per stack."""
    stacks: tuple[str, ...] | None = None
    """Stacks; `unet` matches `unet.down`, `unet.up`."""
    path: str | None = None
    """Regular expression searched in the names."""

    @classmethod
    def parse(cls, value: object) -> Selector:
        """Read what a configuration holds.

        Raises:
            SelectionError: The value is not one of the three forms, or has an unknown key.
        """
        if isinstance(value, Selector):
            return value
        if isinstance(value, str):
            return cls(roles=(value,))
        if isinstance(value, Sequence):
            return cls(roles=_names("roles", value))
        if not isinstance(value, Mapping):
            raise SelectionError(f"a selection is a role, a list of roles or a mapping with {_KEYS}, not {value!r}")
        unknown = sorted(set(value) - set(_KEYS))
        if unknown:
            raise SelectionError(f"a selection has no key '{unknown[0]}'; its keys are {', '.join(_KEYS)}")
        path = value.get("path")
        if path is not None and not isinstance(path, str):
            raise SelectionError(f"path: expected a regular expression, got {path!r}")
        return cls(
            roles=_names("roles", value.get("roles")),
            blocks=_parse_blocks(value.get("blocks")),
            stacks=_names("stacks", value.get("stacks")),
            path=path,
        )

    def matches_role(self, role: str, *, exact: bool = False) -> bool:
        """Whether `role` is named, or lies below a named role."""
        if self.roles is None:
            return not exact
        return any(role == want or (not exact and role.startswith(want + ".")) for want in self.roles)

    def matches_stack(self, stack: str) -> bool:
        """Whether `stack` is named, or lies below a named stack."""
        return self.stacks is None or any(stack == want or stack.startswith(want + ".") for want in self.stacks)

    def matches_name(self, name: str) -> bool:
        """Whether the regular expression, if any, is found in `name`.

        Raises:
            SelectionError: `path` is not a regular expression.
        """
        if self.path is None:
            return True
        try:
            return re.search(self.path, name) is not None
        except re.error as error:
            raise SelectionError(f"path: {self.path!r} is not a regular expression ({error})") from error

    def block_indices(self, depth: int, stack: str) -> frozenset[int] | None:
        """Indices chosen in a stack of `depth` blocks, or None for no restriction.

        Raises:
            SelectionError: An index lies outside the stack, or the text is not of the language.
        """
        if self.blocks is None:
            return None
        if isinstance(self.blocks, str):
            return frozenset(_blocks_from_text(self.blocks, depth))
        chosen = set()
        for index in self.blocks:
            if not -depth <= index < depth:
                raise SelectionError(
                    f"blocks: {index} is outside 0..{depth - 1} (stack '{stack}' has {depth} blocks); -1 is the last"
                )
            chosen.add(index % depth)
        return frozenset(chosen)

    def describe(self) -> str:
        """The selection as one readable phrase for error sentences."""
        parts = [f"{key}={getattr(self, key)!r}" for key in _KEYS if getattr(self, key) is not None]
        return ", ".join(parts) or "everything"


def _names(key: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise SelectionError(f"{key}: expected a name or a list of names, got {value!r}")


def _parse_blocks(value: object) -> str | tuple[int, ...] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise SelectionError(f"blocks: expected indices or a text such as 'last: 4', got {value!r}")
    if isinstance(value, int):
        return (value,)
    if isinstance(value, Mapping) and len(value) == 1:
        key, count = next(iter(value.items()))
        return f"{key}: {count}"
    if isinstance(value, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return tuple(value)
    raise SelectionError(f"blocks: expected indices or a text such as 'last: 4', '::2' or '0.5:', got {value!r}")


def _blocks_from_text(text: str, depth: int) -> range:
    match = re.fullmatch(r"\s*(first|last)\s*:\s*(\d+)\s*", text)
    if match:
        count = min(int(match[2]), depth)
        return range(count) if match[1] == "first" else range(depth - count, depth)
    fields = text.split(":")
    if len(fields) in {2, 3}:
        try:
            start, stop = _bound(fields[0], depth), _bound(fields[1], depth)
            step = int(fields[2]) if len(fields) == 3 and fields[2].strip() else None
            return range(*slice(start, stop, step).indices(depth))
        except (ValueError, OverflowError):
            pass
    raise SelectionError(
        f"blocks: {text!r} is none of 'first: 2', 'last: 4', '2:6', '::2', '0.5:' or a list of indices"
    )


def _bound(text: str, depth: int) -> int | None:
    text = text.strip()
    if not text:
        return None
    if "." in text:
        return round(float(text) * depth)
    return int(text)
