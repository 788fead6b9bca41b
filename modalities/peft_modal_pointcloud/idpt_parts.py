"""IDPT for part segmentation: a prompt of its own for every depth that the head reads (Zha et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Context
from peft_modal.attach import Adapter, PromptSource
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.base import Method
from peft_modal.ranges import NonNegativeInt
from peft_modal_pointcloud.idpt import PromptModule, make_prompt, prepare_generator, tap_tokens


class IDPTParts(Method):
    """IDPT of part segmentation: one prompt for each tapped block (Zha et al., ICCV 2023, arXiv:2304.07221).

    Before block t a generator of its own makes the prompt q_t of the patch tokens (without positions). It enters block
    t with a position that all prompts share, and leaves behind it. What the head reads, `prompt`, are the prompts as
    they entered and as they left, all behind the final norm; `pointcloud_parts` takes them as features of the whole
    shape in place of maximum and mean. In the released code (`prompt_pt3`) the position is trained here, unlike in
    classification. Its generators also own BatchNorms that are never called; they are left out.

    Args:
        blocks: Blocks t, zero-based; None for those whose tokens the backbone keeps (`backbone.levels`).
        prompt_module: The generators; `mlp` as published, else see `idpt`.
        k: Neighbours of each token, itself included, in generators with graph layers.
        train_prompt_pos: Train the position of the prompts.

    Raises:
        ConfigError: `k` is below 1.
    """

    identity_at_init = False

    def __init__(
        self,
        *,
        blocks: list[NonNegativeInt] | None = None,
        prompt_module: PromptModule = "mlp",
        k: int = 20,
        train_prompt_pos: bool = True,
    ) -> None:
        if k < 1:
            raise ConfigError(f"method.k: {k} is below 1")
        self.blocks = blocks
        self.prompt_module: PromptModule = prompt_module
        self.k = k
        self.train_prompt_pos = train_prompt_pos

    @classmethod
    def example(cls) -> IDPTParts:
        """Of two blocks, on a backbone that keeps the tokens of none."""
        return cls(blocks=[0, 2])

    def build(self, adapter: Adapter) -> None:
        """Tap the tokens before each block, insert its prompt there, export what enters and what leaves.

        Raises:
            AttachError: The backbone keeps no levels, has no such block, or fewer patches than `k`.
        """
        anatomy = adapter.backbone.anatomy
        depth = anatomy.depth["blocks"]
        blocks = list(getattr(adapter.backbone, "levels", ())) if self.blocks is None else self.blocks
        if not blocks:
            raise AttachError(
                "the backbone keeps the tokens of no block that prompts could be made for; set backbone.levels=3, or "
                "name method.blocks"
            )
        if blocks != sorted(set(blocks)) or blocks[-1] >= depth:
            raise AttachError(f"blocks: {blocks} are not ascending numbers in 0..{depth - 1}")
        make = prepare_generator(adapter.backbone, self.prompt_module, self.k)
        keys = {block: f"idpt.tokens.{block}" for block in blocks}
        first_token = {tap_tokens(adapter, block, key) for block, key in keys.items()}
        source = LevelPrompts(
            {block: make() for block in blocks}, keys, first_token=first_token.pop(),
            width=adapter.backbone.feature_width, train_position=self.train_prompt_pos,
        )  # fmt: skip
        adapter.prompts("blocks", blocks, source, num_tokens=1, survives=False, name="idpt", export="prompt")


class LevelPrompts(PromptSource):
    """The prompts of a cloud, one for each block, and the position that they share.

    Args:
        generators: By block; each maps patch tokens (B, G, D) to a prompt (B, 1, D).
        keys: By block, the name under which its tokens are tapped.
        first_token: Where the patches start.
        width: D.
        train_position: Train the position instead of keeping its random draw.
    """

    def __init__(
        self, generators: Mapping[int, nn.Module], keys: Mapping[int, str], *, first_token: int, width: int,
        train_position: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.generator = nn.ModuleDict({str(block): module for block, module in generators.items()})
        self.keys = dict(keys)
        self.first_token = first_token
        position = torch.empty(1, 1, width)
        if train_position:
            self.prompt_pos: Tensor = nn.Parameter(position)
        else:
            self.register_buffer("prompt_pos", position)
        nn.init.normal_(self.prompt_pos, std=0.02)

    def tokens(self, context: Context, block: int) -> Tensor:
        """(B, 1, D), made of the tokens that came to `block`."""
        return make_prompt(self.generator[str(block)], context, self.keys[block], self.first_token)

    def positions(self, block: int) -> Tensor:
        """(1, 1, D), the same before every block."""
        del block
        return self.prompt_pos
