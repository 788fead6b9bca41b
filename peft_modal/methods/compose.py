"""Compose: several methods attached as one adapter, saved in one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError
from peft_modal.methods.base import Method
from peft_modal.registry import Noun


class Compose(Method):
    """Attach several methods together; they act in the order given.

    Args:
        methods: Method nodes: `[{name: lora, rank: 4}, {name: ssf}]`.

    Raises:
        ConfigError: The list is empty, or an item is no method.
    """

    node_args: ClassVar[Mapping[str, Noun]] = {"methods": "method"}

    def __init__(self, *, methods: list[Method]) -> None:
        if not methods:
            raise ConfigError("method.methods: compose needs at least one method")
        for index, method in enumerate(methods):
            if not isinstance(method, Method):
                raise ConfigError(f"method.methods[{index}]: expected a mapping with 'name', got {method!r}")
        self.methods = [(method.describe(), method) for method in methods]

    @classmethod
    def example(cls) -> Compose:
        """LoRA and norm tuning together, for tables and tests that make every method without arguments."""
        from peft_modal.methods.lora import LoRA
        from peft_modal.methods.norm_tuning import NormTuning

        return cls(methods=[LoRA(rank=2), NormTuning()])

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]
        """All of its methods start as the identity."""
        return all(method.identity_at_init for _, method in self.methods)

    @property
    def needs_backward_through_backbone(self) -> bool:  # type: ignore[override]
        """One of its methods does."""
        return any(method.needs_backward_through_backbone for _, method in self.methods)

    def build(self, adapter: Adapter) -> None:
        """Build every method under a name of its own."""
        for index, (name, method) in enumerate(self.methods):
            with adapter.scope(f"{index}_{name.replace('.', '_')}"):
                method.build(adapter)

    def describe(self) -> str:
        """The names of its methods."""
        return "compose(" + ", ".join(name for name, _ in self.methods) + ")"
