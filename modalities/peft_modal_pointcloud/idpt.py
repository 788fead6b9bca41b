"""IDPT: instance-aware dynamic prompt tuning (Zha et al., ICCV 2023, arXiv:2304.07221)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Backbone, Context
from peft_modal.attach import Adapter, PromptSource
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.base import Method
from peft_modal_pointcloud.idpt_generator import build_prompt_generator
from peft_modal_pointcloud.network import Block

PromptModule = Literal["dgcnn", "dgcnn_light2", "dgcnn_light", "mlp", "transformer"]
_INPUT = "idpt.tokens"


class IDPT(Method):
    """One prompt made for each cloud by a graph network over its tokens (Zha et al., ICCV 2023, arXiv:2304.07221).

    Before block l the patch tokens y = (output of block l-1, without positions) go through graph convolutions whose
    neighbours are nearest in feature space; the maximum over the tokens is one prompt. It enters block l behind the
    class token with a position of its own, stays to the end, and is handed to the head as `prompt`.

    The figure of the paper shows the class token frozen; the released code trains it and its position; so does this.
    `prompt_pos` looks learnable in the paper but is never trained by the code; `train_prompt_pos` changes that.

    Args:
        prompt_layer: Block l that the prompt enters, zero-based; -1 is the last.
        prompt_module: The generator: `dgcnn` (three graph layers, as published), `dgcnn_light2` (two), `dgcnn_light`
            (one), `mlp` (none) or `transformer` (one block).
        k: Neighbours of each token, itself included.
        train_prompt_pos: Train the prompt's position.

    Raises:
        ConfigError: `k` is below 1.
    """

    identity_at_init = False

    def __init__(
        self,
        *,
        prompt_layer: int = -1,
        prompt_module: PromptModule = "dgcnn",
        k: int = 20,
        train_prompt_pos: bool = False,
    ) -> None:
        if k < 1:
            raise ConfigError(f"method.k: {k} is below 1")
        self.prompt_layer = prompt_layer
        self.prompt_module: PromptModule = prompt_module
        self.k = k
        self.train_prompt_pos = train_prompt_pos

    def build(self, adapter: Adapter) -> None:
        """Tap the tokens before block l, insert the prompt there, export its final state.

        Raises:
            AttachError: The backbone has no such block, or fewer patches than `k`.
        """
        anatomy = adapter.backbone.anatomy
        depth = anatomy.depth["blocks"]
        if not -depth <= self.prompt_layer < depth:
            raise AttachError(
                f"prompt_layer: {self.prompt_layer} is outside 0..{depth - 1} (the backbone has {depth} blocks); "
                "-1 is the last"
            )
        layer = self.prompt_layer % depth
        generator = prepare_generator(adapter.backbone, self.prompt_module, self.k)()
        source = DynamicPrompt(generator, width=adapter.backbone.feature_width, train_position=self.train_prompt_pos)
        source.first_token = tap_tokens(adapter, layer, _INPUT)
        adapter.prompts(
            "blocks", range(layer, depth), source, num_tokens=1, survives=True, name="idpt", export="prompt"
        )


def prepare_generator(backbone: Backbone, module: PromptModule, k: int) -> Callable[[], nn.Module]:
    """What makes prompt generators that fit a backbone.

    Raises:
        AttachError: A cloud has fewer patches than `k`.
    """
    num_group = getattr(backbone, "num_group", None)
    if num_group is not None and k > num_group and module.startswith("dgcnn"):
        raise AttachError(
            f"k: {k} neighbours are more than the {num_group} patches of a cloud; use method.k={num_group} or less"
        )
    sites, width = backbone.anatomy.sites, backbone.feature_width
    heads = next(site.heads for site in sites if site.role == "attn.qkv")
    hidden_dim = next(site.shape[0] for site in sites if site.role == "mlp.in")
    make_block = functools.partial(Block, width, num_heads=heads or 1, mlp_ratio=hidden_dim / width)
    return functools.partial(build_prompt_generator, module, dim=width, k=k, make_block=make_block)


def tap_tokens(adapter: Adapter, block: int, key: str) -> int:
    """Read the tokens that come to `block`, without positions; returns where the patches start among them."""
    anatomy = adapter.backbone.anatomy
    if block == 0:
        port = anatomy.port("embed.out", stack="blocks", block=None)
    else:
        port = anatomy.port("block.out", stack="blocks", block=block - 1)
    adapter.tap(port, key)
    return sum(segment.count or 0 for segment in anatomy.layout(port).segments)


def make_prompt(generator: nn.Module, context: Context, key: str, first_token: int) -> Tensor:
    """The prompt (B, 1, D) of the patch tokens that were read under `key`."""
    tokens = context.taps[key][:, first_token:]
    if getattr(generator, "adds_positions", False):
        tokens = tokens + context.get("positions")
    # float32: a maximum over tokens that half precision makes equal sends its gradient to another one.
    with torch.autocast(tokens.device.type, enabled=False):
        prompt: Tensor = generator(tokens.float())
    return prompt


class DynamicPrompt(PromptSource):
    """The prompt of a cloud and its position.

    Args:
        generator: Maps patch tokens (B, G, D) to the prompt (B, 1, D).
        width: D.
        train_position: Train the position instead of keeping its random draw.
    """

    def __init__(self, generator: nn.Module, *, width: int, train_position: bool) -> None:
        super().__init__()
        self.generator = generator
        self.first_token = 1
        position = torch.empty(1, 1, width)
        if train_position:
            self.prompt_pos: Tensor = nn.Parameter(position)
        else:
            self.register_buffer("prompt_pos", position)
        nn.init.normal_(self.prompt_pos, std=0.02)

    def tokens(self, context: Context, block: int) -> Tensor:
        """(B, 1, D), made from the tokens that entered this pass's block without their positions."""
        del block
        return make_prompt(self.generator, context, _INPUT, self.first_token)

    def positions(self, block: int) -> Tensor:
        """(1, 1, D), added before every block that the prompt enters."""
        del block
        return self.prompt_pos
