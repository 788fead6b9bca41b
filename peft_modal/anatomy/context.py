"""What belongs to one forward pass and is shared by all layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from peft_modal.anatomy.layout import TokenLayout
from peft_modal.anatomy.sites import Port
from peft_modal.errors import ContextError

T = TypeVar("T")


def in_backward() -> bool:
    """Whether autograd is running, which is when a checkpointed block is computed again."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 — the only way torch offers to ask


@dataclass(frozen=True)
class Inserted:
    """How many prompts stand in a block at the layout's prompt index, and how many behind the last token."""

    prefix: int = 0
    end: int = 0


class Context:
    """One forward pass: its batch, and values computed once for all layers.

    It lives until the next forward of the same backbone starts, not until this one ends: a checkpointed block reads it
    again during backward.

    Args:
        batch: What the backbone was called with.
        inserted: Prompts by (stack, block).
    """

    def __init__(
        self, batch: Mapping[str, Any], inserted: Mapping[tuple[str, int | None], Inserted] | None = None
    ) -> None:
        self.batch = batch
        self._inserted = inserted if inserted is not None else {}
        self.carry: dict[tuple[str, int], Tensor] = {}
        """State of surviving prompts by (set, block), kept per block so that recomputation finds it."""
        self.taps: dict[str, Tensor] = {}
        """Tensors read at tapped ports."""
        self.exports: dict[str, Tensor] = {}
        """What methods hand to the head."""
        self._values: dict[str, Any] = {}

    def put(self, key: str, value: object) -> None:
        """Publish a value; done by the backbone before its first block."""
        self._values[key] = value

    def get(self, key: str) -> Any:  # noqa: ANN401 — the reader knows what the backbone has put
        """Read a published value.

        Raises:
            ContextError: Nobody put it.
        """
        if key not in self._values:
            raise ContextError(
                f"this forward pass has no '{key}'; it has {', '.join(sorted(self._values)) or 'nothing'}"
            )
        return self._values[key]

    def has(self, key: str) -> bool:
        """Whether somebody put it."""
        return key in self._values

    def data_tokens(self, port: Port, layout: TokenLayout, num_tokens: int) -> slice:
        """Where the data tokens stand in a sequence that a branch reads at `port`, prompts of all adapters among them.

        Args:
            port: A sequence port inside a block: `block.in` and `block.out`, or what lies between.
            layout: The layout of its stack, which knows nothing of prompts.
            num_tokens: Length of the sequence as it was read.
        """
        prompts = self._inserted.get((port.stack, port.block), Inserted())
        bare = layout.slice(layout.body_name, num_tokens - prompts.prefix - prompts.end)
        shift = prompts.prefix if layout.prompt_index is not None and layout.prompt_index <= bare.start else 0
        return slice(bare.start + shift, bare.stop + shift)

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """Compute a value at its first use in this pass, without gradients, and share it with every layer."""
        if key not in self._values:
            with torch.no_grad():
                self._values[key] = compute()
        return self._values[key]


class Contexts:
    """The contexts of one backbone: the current one, and those whose backward may still come."""

    def __init__(self) -> None:
        self._current: Context | None = None
        self._open: list[tuple[weakref.ref[_Sentinel], Context]] = []
        self.inserted: dict[tuple[str, int | None], Inserted] = {}
        """The prompts of everything that is attached and enabled, by (stack, block)."""

    def begin(self, batch: Mapping[str, Any]) -> Context:
        """Start a forward pass."""
        self._open = [(ref, context) for ref, context in self._open if self._awaits_backward(ref)]
        self._current = Context(batch, self.inserted)
        return self._current

    def watch(self, output: Tensor) -> None:
        """Remember that the pass which made `output` is open until its backward has run or its graph is gone."""
        if output.requires_grad and self._current is not None:
            sentinel = _Sentinel()
            output.register_hook(sentinel)  # type: ignore[no-untyped-call]
            self._open.append((weakref.ref(sentinel), self._current))

    def current(self) -> Context:
        """The context of the pass that is running, or of the one that is being computed again in backward.

        Raises:
            ContextError: No forward has started, or a backward runs while several are open and nothing tells which
                of them is computed again.
        """
        if in_backward():
            alive = [context for ref, context in self._open if ref() is not None]
            if len(alive) > 1:
                raise ContextError(
                    f"a checkpointed block is computed again while {len(alive)} forward passes are open, so its "
                    "context is ambiguous; call backward after each forward, or switch gradient checkpointing off"
                )
            if alive:
                return alive[0]
        if self._current is None:
            raise ContextError("no forward pass has started; call the backbone, not its network")
        return self._current

    @staticmethod
    def _awaits_backward(ref: weakref.ref[_Sentinel]) -> bool:
        sentinel = ref()
        return sentinel is not None and not sentinel.seen

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle starts without open passes: their tensors belong to the original's graph.
        return {"_current": None, "_open": [], "inserted": self.inserted}


class _Sentinel:
    """Lives in the autograd graph of one output and notes when its backward begins."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, _grad: Tensor) -> None:
        self.seen = True
