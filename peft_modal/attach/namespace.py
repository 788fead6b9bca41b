"""Registering modules under dotted names, so that tensor names in files are the sites' own."""

from __future__ import annotations

from torch import nn


class Namespace(nn.Module):
    """A level of a dotted name; holds modules and parameters, computes nothing."""

    def descend(self, path: str) -> Namespace:
        """The namespace of that dotted name below this one, made on the way.

        Raises:
            ValueError: A module already stands on the way.
        """
        level = self
        for part in path.split(".") if path else ():
            child = _child(level, part)
            if child is None:
                child = Namespace()
                level.add_module(part, child)
            if not isinstance(child, Namespace):
                raise ValueError(  # noqa: TRY004 — the name is taken
                    f"'{path}' lies below the module '{part}', which is not a namespace"
                )
            level = child
        return level

    def place(self, path: str, module: nn.Module) -> None:
        """Register a module under a dotted name.

        Raises:
            ValueError: The name is taken.
        """
        parent, _, name = path.rpartition(".")
        level = self.descend(parent)
        if _child(level, name) is not None:
            raise ValueError(f"two modules of one adapter are called '{path}'")
        level.add_module(name, module)


def _child(level: nn.Module, name: str) -> nn.Module | None:
    return level._modules.get(name)  # noqa: SLF001 — `named_children` skips a module's second name
