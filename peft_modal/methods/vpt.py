"""VPT: visual prompt tuning (Jia et al., ECCV 2022, arXiv:2203.12119)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Context, Selector
from peft_modal.attach import Adapter, PromptSource
from peft_modal.errors import AttachError
from peft_modal.methods.base import Method
from peft_modal.ranges import DropRate, PositiveInt

PromptInit = Literal["xavier", "normal"]
EXPORT: Final = "prompts"
"""What the head calls prompts that it reads."""


class VPT(Method):
    """Learned tokens in the sequence of every block, or of the first only (Jia et al., ECCV 2022, arXiv:2203.12119).

    Deep: block i gets its own prompts, what it makes of them is thrown away. Shallow: prompts enter the first block and
    stay to the end. The head does not read them unless that is asked for. Where the network adds positions before every
    block (Point-MAE) each prompt has a learned position of its own, as in the released point-cloud code of IDPT (ICCV
    2023).

    Args:
        num_tokens: Prompts per block.
        deep: Fresh prompts in every block; False for the shallow form.
        place: `prefix` inserts after the class token, `end` after the last token (the point-cloud wiring); attention
            does not care.
        init: `xavier` draws uniformly with bound sqrt(6 / (3 * patch_size^2 + width)) as released; `normal` draws with
            standard deviation 0.02 as in the point-cloud code. None chooses `normal` where positions repeat.
        patch_size: Patch size in the bound of `xavier`.
        dropout: Probability of zeroing a prompt entry.
        stacks: Token stacks to act on; None for every one that takes prompts.
        export: Hand what the last block makes of its prompts, behind the final norm, to the head as `prompts`:
            `head.pool: [mean.all]` averages over them and all other tokens, as PETL-AST does (Cappellazzo et al., MLSP
            2024, arXiv:2312.03694).
    """

    identity_at_init = False

    def __init__(
        self, *, num_tokens: PositiveInt = 10, deep: bool = True, place: Literal["prefix", "end"] = "prefix",
        init: PromptInit | None = None, patch_size: PositiveInt = 16, dropout: DropRate = 0.0,
        stacks: str | list[str] | None = None, export: bool = False,
    ) -> None:  # fmt: skip
        self.num_tokens = num_tokens
        self.deep = deep
        self.place: Literal["prefix", "end"] = place
        self.init = init
        self.patch_size = patch_size
        self.dropout = dropout
        self.where = Selector.parse({"stacks": stacks})
        self.export = export

    def build(self, adapter: Adapter) -> None:
        """Prompts in every selected stack.

        Raises:
            AttachError: No selected stack takes prompts; says why.
        """
        anatomy = adapter.backbone.anatomy
        refused = []
        found = False
        for stack, layout in anatomy.layouts.items():
            if not self.where.matches_stack(stack):
                continue
            if layout.prompt_index is None:
                refused.append(f"'{stack}' takes no prompts: {layout.reason}")
                continue
            found = True
            depth = anatomy.depth[stack]
            source = LearnedPrompts(
                num_blocks=depth if self.deep else 1, num_tokens=self.num_tokens,
                width=anatomy.port("block.in", stack=stack, block=0).width,
                with_positions=layout.repeats_positions, bound=self._bound, init=self._init(layout.repeats_positions),
                dropout=self.dropout,
            )  # fmt: skip
            for number, (blocks, survives, export) in enumerate(self._sets(depth)):
                adapter.prompts(
                    stack, blocks, source, num_tokens=self.num_tokens, survives=survives, place=self.place,
                    name=stack if number == 0 else "", export=export,
                )  # fmt: skip
        if not found:
            raise AttachError("; ".join(refused) or "this network has no token sequence; use lora, ssf or an adapter")

    def _sets(self, depth: int) -> list[tuple[range, bool, str | None]]:
        """Blocks of each set of prompts, whether they survive, and what the head calls them."""
        if not self.deep:
            return [(range(depth), True, EXPORT if self.export else None)]
        # What leaves the last block can be read where it survives, which the fresh prompts of others do not.
        last = range(depth - 1, depth) if self.export else range(0)
        sets = [(range(depth - len(last)), False, None), (last, True, EXPORT)]
        return [of for of in sets if of[0]]

    def _init(self, repeats_positions: bool) -> PromptInit:
        return self.init or ("normal" if repeats_positions else "xavier")

    def _bound(self, width: int) -> float:
        return xavier_bound(width, self.patch_size)


def xavier_bound(width: int, patch_size: int) -> float:
    """Bound of a uniform draw of tokens, as if they were made of patches of pictures."""
    return math.sqrt(6.0 / (3 * patch_size**2 + width))


class LearnedPrompts(PromptSource):
    """Static prompts: `prompts.{i}` (T, D) and, with positions, `positions.{i}` (T, D) for block i.

    Args:
        num_blocks: Blocks with prompts of their own.
        num_tokens: T.
        width: D.
        with_positions: Give every prompt a learned position.
        bound: Bound of the uniform draw for a width.
        init: See `VPT`.
        dropout: Probability of zeroing a prompt entry.
    """

    def __init__(
        self, *, num_blocks: int, num_tokens: int, width: int, with_positions: bool, bound: Callable[[int], float],
        init: PromptInit, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bound, self.init = bound(width), init
        shape = (num_tokens, width)
        self.prompt = nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(num_blocks))
        self.prompt_pos = nn.ParameterList(
            nn.Parameter(torch.empty(shape)) for _ in range(num_blocks if with_positions else 0)
        )
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw prompts and positions."""
        for tensor in [*self.prompt, *self.prompt_pos]:
            if self.init == "xavier":
                nn.init.uniform_(tensor, -self.bound, self.bound)
            else:
                nn.init.normal_(tensor, std=0.02)

    def tokens(self, context: Context, block: int) -> Tensor:
        """Prompts of `block`, (T, D)."""
        del context
        return self.dropout(self.prompt[block])

    def positions(self, block: int) -> Tensor | None:
        """Their positions, re-added before every block for the shallow form, (T, D)."""
        if not len(self.prompt_pos):
            return None
        return self.prompt_pos[min(block, len(self.prompt_pos) - 1)]
