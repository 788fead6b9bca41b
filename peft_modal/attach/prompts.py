"""Prompts: inserted at a block's input with their positions, stripped at its output, re-inserted where they survive.

Equal to keeping the tokens in the sequence to the bit, and the only form that works where the network adds positions of
a fixed length before every block. Pooling and dense heads never see a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from peft_modal.anatomy import Backbone, Context, Port, TokenLayout, in_backward
from peft_modal.anatomy.context import Inserted
from peft_modal.attach.attachment import Attachment
from peft_modal.attach.hub import Phase, hang, unhang

PromptPlace = Literal["prefix", "end"]


class PromptSource(nn.Module):
    """Base of what makes prompts: `tokens(context, block)` and, where tokens have positions, `positions(block)`."""

    def tokens(self, context: Context, block: int) -> Tensor:
        """Prompts entering `block`, (T, D) or (B, T, D)."""
        raise NotImplementedError

    def positions(self, block: int) -> Tensor | None:
        """Positions added to the prompts at the input of `block`, (T, D), or None for tokens without positions."""
        del block
        return None


class PromptSet:
    """The prompts of one adapter in one stack.

    Args:
        name: Unique name; key of the surviving state.
        source: What makes them.
        blocks: Blocks that they enter, ascending.
        num_tokens: How many there are.
        survives: Whether what a block makes of them enters the next; otherwise each block gets fresh ones.
        place: `prefix` inserts at the layout's prompt index, `end` after the last token.
        export: Name under which the head reads them behind the final norm, or None: their final state where they
            survive, else (B, 2 * blocks * T, D), what entered each block without positions and then what left it.
    """

    def __init__(
        self, name: str, source: PromptSource, *, blocks: tuple[int, ...], num_tokens: int, survives: bool,
        place: PromptPlace, export: str | None,
    ) -> None:  # fmt: skip
        self.name = name
        self.source = source
        self.blocks = blocks
        self.num_tokens = num_tokens
        self.survives = survives
        self.place = place
        self.export = export

    @property
    def num_exported(self) -> int:
        """How many tokens the head reads."""
        if self.export is None:
            return 0
        return self.num_tokens if self.survives else 2 * len(self.blocks) * self.num_tokens

    def entering(self, context: Context, block: int, batch_size: int) -> Tensor:
        """Prompts with positions that enter `block`, (B, T, D)."""
        if self.survives and block != self.blocks[0]:
            tokens = context.carry[self.name, block]
        else:
            with still_statistics(self.source):
                tokens = self.source.tokens(context, block)
        if self.export is not None and not self.survives:
            context.carry[f"{self.name}.in", block] = tokens.expand(batch_size, -1, -1)
        positions = self.source.positions(block)
        if positions is not None:
            tokens = tokens + positions
        return tokens.expand(batch_size, -1, -1)

    def leaving(self, context: Context, block: int, processed: Tensor) -> None:
        """Remember what `block` made of the prompts, (B, T, D), where somebody reads it."""
        if self.survives:
            context.carry[self.name, block + 1] = processed
        elif self.export is not None:
            context.carry[f"{self.name}.out", block] = processed

    def final(self, context: Context) -> Tensor:
        """What passes the final norm for the head, (B, num_exported, D)."""
        if self.survives:
            return context.carry[self.name, self.blocks[-1] + 1]
        return torch.cat(
            [context.carry[f"{self.name}.{side}", b] for side in ("in", "out") for b in self.blocks], dim=1
        )


@contextmanager
def still_statistics(source: nn.Module) -> Iterator[None]:
    """Keep BatchNorm statistics of `source` still while a checkpointed block is computed again."""
    norms = [m for m in source.modules() if isinstance(m, _BatchNorm)] if in_backward() else []
    kept = [(norm, norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
            for norm in norms]  # fmt: skip
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


def refuse_blocks(blocks: tuple[int, ...], *, depth: int, survives: bool, exported: bool) -> str | None:
    """Why prompts cannot enter these ascending blocks of a stack, or None."""
    if not blocks:
        return "no block is chosen"
    if not 0 <= blocks[0] <= blocks[-1] < depth:
        return f"blocks {list(blocks)} are outside 0..{depth - 1}"
    if survives and blocks != tuple(range(blocks[0], blocks[-1] + 1)):
        return f"surviving prompts enter consecutive blocks, not {list(blocks)}"
    if exported and survives and blocks[-1] != depth - 1:
        return f"the head reads prompts behind the last block {depth - 1}, these leave after block {blocks[-1]}"
    return None


class PromptAttachment(Attachment):
    """Hangs a prompt set on the blocks it enters, and on the final norm where the head reads it."""

    def __init__(
        self, order: int, prompts: PromptSet, ports: tuple[tuple[int, Port, Port], ...], layout: TokenLayout,
        final: tuple[Port, Port] | None,
    ) -> None:  # fmt: skip
        super().__init__(order)
        self.prompts = prompts
        self.ports = ports
        self.layout = layout
        self.final = final
        self.touches = tuple(port.module for _, port, _ in ports)
        self.actions: list[tuple[Port, _Insert | _Strip]] = []

    @override
    def hang(self, backbone: Backbone) -> None:
        # Inserting in order of attachment and stripping in the opposite order keeps every set contiguous. The hub sorts
        # by order, so the strip carries its negative.
        places: list[tuple[int | None, Port, Port]] = [*self.ports]
        if self.final is not None:
            places.append((None, *self.final))
        for block, before, after in places:
            insert = _Insert(backbone, self, block)
            strip = _Strip(backbone, self, block)
            hang(backbone, before, Phase.INSERT, self.order, insert)
            hang(backbone, after, Phase.STRIP, -self.order, strip)
            self.actions += [(before, insert), (after, strip)]
            self._count(backbone, before, insert.num_tokens)
        if self.prompts.export is not None:
            backbone.exports[self.prompts.export] = self.prompts.num_exported

    @override
    def unhang(self, backbone: Backbone) -> None:
        for port, action in self.actions:
            unhang(backbone, port, action)
            if isinstance(action, _Insert):
                self._count(backbone, port, -action.num_tokens)
        self.actions.clear()
        if self.prompts.export is not None:
            backbone.exports.pop(self.prompts.export, None)

    def _count(self, backbone: Backbone, port: Port, change: int) -> None:
        place = (port.stack, port.block)
        now = backbone.contexts.inserted.pop(place, Inserted())
        counted = replace(now, **{self.prompts.place: getattr(now, self.prompts.place) + change})
        if counted != Inserted():
            backbone.contexts.inserted[place] = counted

    @override
    def describe(self) -> str:
        return f"a set of prompts in {len(self.ports)} block{'s' if len(self.ports) > 1 else ''}"

    @override
    def where(self) -> tuple[Port, ...]:
        return tuple(before for _, before, _ in self.ports)

    @override
    def parameters(self) -> Iterable[nn.Parameter]:
        return self.prompts.source.parameters()


class _Action:
    """What happens to the prompts at the input or output of a block, or of the final norm where `block` is None."""

    def __init__(self, backbone: Backbone, attachment: PromptAttachment, block: int | None) -> None:
        self.backbone, self.attachment, self.block = backbone, attachment, block

    @property
    def num_tokens(self) -> int:
        prompts = self.attachment.prompts
        return prompts.num_exported if self.block is None else prompts.num_tokens


class _Insert(_Action):
    def __call__(self, tensor: Tensor) -> Tensor:
        prompts, layout = self.attachment.prompts, self.attachment.layout
        context = self.backbone.contexts.current()
        sequence = tensor.movedim(layout.token_dim, 1)
        if self.block is None:
            entering = prompts.final(context)
        else:
            entering = prompts.entering(context, self.block, sequence.shape[0])
        assert entering.shape[1] == self.num_tokens, "a source must make as many prompts as it declares"
        index = layout.prompt_index if prompts.place == "prefix" else sequence.shape[1]
        parts = [sequence[:, :index], entering.to(sequence.dtype), sequence[:, index:]]
        return torch.cat(parts, dim=1).movedim(1, layout.token_dim)


class _Strip(_Action):
    def __call__(self, tensor: Tensor) -> Tensor:
        prompts, layout = self.attachment.prompts, self.attachment.layout
        sequence = tensor.movedim(layout.token_dim, 1)
        count = self.num_tokens
        index = layout.prompt_index if prompts.place == "prefix" else sequence.shape[1] - count
        assert index is not None
        processed = sequence[:, index : index + count]
        context = self.backbone.contexts.current()
        if self.block is not None:
            prompts.leaving(context, self.block, processed)
        elif prompts.export is not None:
            context.exports[prompts.export] = processed
        rest = torch.cat([sequence[:, :index], sequence[:, index + count :]], dim=1)
        return rest.movedim(1, layout.token_dim)
