"""Layouts at toy size: the real classes, small enough for tests and for the table of methods and backbones."""

from __future__ import annotations

from typing import Any, Final

from peft_modal_diffusion.families import FAMILIES
from peft_modal_diffusion.layout import Layout

_TEXT: Final[dict[str, Any]] = {
    "vocab_size": 50, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 6, "projection_dim": 10, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49,
}  # fmt: skip


def toy_unet_layout() -> Layout:
    """Like Stable Diffusion 1: one level with attention, one without."""
    unet = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 12, "attention_head_dim": 4,
        "norm_num_groups": 4,
    }  # fmt: skip
    return Layout(FAMILIES["StableDiffusionPipeline"], "", {"unet": unet, "text_encoder": _TEXT})


def toy_xl_layout() -> Layout:
    """Like Stable Diffusion XL: two encoders, linear projections, two transformer blocks, sizes as conditions."""
    unet = {
        **toy_unet_layout().configs["unet"], "cross_attention_dim": 24, "attention_head_dim": (2, 4),
        "transformer_layers_per_block": 2, "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 10 + 6 * 4,
    }  # fmt: skip
    family = FAMILIES["StableDiffusionXLPipeline"]
    return Layout(family, "", {"unet": unet, "text_encoder": _TEXT, "text_encoder_2": _TEXT})


def toy_transformer_layout(*, dual: bool = False) -> Layout:
    """Like Stable Diffusion 3; with `dual` its first block has the second attention and the norms of version 3.5."""
    transformer = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 28, "caption_projection_dim": 16,
        "pooled_projection_dim": 20, "pos_embed_max_size": 8,
    }  # fmt: skip
    if dual:
        transformer |= {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    family = FAMILIES["StableDiffusion3Pipeline"]
    return Layout(family, "", {"transformer": transformer, "text_encoder": _TEXT, "text_encoder_2": _TEXT})
