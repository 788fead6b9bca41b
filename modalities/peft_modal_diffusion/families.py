"""The families of Stable Diffusion: which parts a pipeline has, and how large the published ones are.

Sizes are those of the published configuration files. What a folder says of itself always comes first; these serve
where only a name is known, as in `inspect` without a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

FamilyName = Literal["sd", "sdxl", "sd3"]


@dataclass(frozen=True)
class Family:
    """What the pipelines of one family have in common."""

    name: FamilyName
    pipeline: str
    """Class in `diffusers`."""
    denoiser: str
    """Component that is fine-tuned: `unet` or `transformer`."""
    denoiser_class: str
    text_encoders: tuple[str, ...]
    """CLIP text encoders, in the order in which their states are joined."""
    t5: str | None = None
    """Component whose states are appended along the sequence; may be missing."""

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Tokenizer of each text encoder."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        family.pipeline: family
        for family in (
            Family("sd", "StableDiffusionPipeline", "unet", "UNet2DConditionModel", ("text_encoder",)),
            Family(
                "sdxl", "StableDiffusionXLPipeline", "unet", "UNet2DConditionModel", ("text_encoder", "text_encoder_2")
            ),
            Family(
                "sd3", "StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel",
                ("text_encoder", "text_encoder_2"), t5="text_encoder_3",
            ),
        )
    }
)  # fmt: skip
"""By the `_class_name` of a pipeline's `model_index.json`."""


@dataclass(frozen=True)
class Size:
    """Configurations of the parts."""

    pipeline: str
    denoiser: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]


_CROSS: Final = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_CROSS_UP: Final = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
_SD: Final = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "down_block_types": _CROSS, "up_block_types": _CROSS_UP,
}  # fmt: skip
_SD2: Final = {
    **_SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
}  # fmt: skip
_CLIP_L: Final = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_H: Final = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
_CLIP_BIG_G: Final = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip

_TOY_TEXT: Final = {
    "vocab_size": 50, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 6, "projection_dim": 10, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49,
}  # fmt: skip
_TOY_UNET: Final = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12, "attention_head_dim": 4, "norm_num_groups": 4,
}  # fmt: skip
_TOY_XL: Final = {
    **_TOY_UNET, "cross_attention_dim": 24, "attention_head_dim": (2, 4), "transformer_layers_per_block": 2,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}  # fmt: skip
_TOY_TRANSFORMER: Final = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 28, "caption_projection_dim": 16, "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}  # fmt: skip

SIZES: Final[Mapping[str, Size]] = MappingProxyType(
    {
        "sd15": Size(
            "StableDiffusionPipeline", {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8}, (_CLIP_L,)
        ),
        "sd2": Size("StableDiffusionPipeline", _SD2, (_CLIP_H,)),
        "sd2_768": Size("StableDiffusionPipeline", {**_SD2, "sample_size": 96}, (_CLIP_H,)),
        "sdxl": Size(
            "StableDiffusionXLPipeline",
            {
                "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
                "layers_per_block": 2, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            (_CLIP_L, _CLIP_BIG_G),
        ),
        "sd3": Size(
            "StableDiffusion3Pipeline",
            {
                "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
                "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
                "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
            },
            (_CLIP_L, _CLIP_BIG_G),
        ),
        "toy": Size("StableDiffusionPipeline", _TOY_UNET, (_TOY_TEXT,)),
        "toy_xl": Size("StableDiffusionXLPipeline", _TOY_XL, (_TOY_TEXT, _TOY_TEXT)),
        "toy_sd3": Size("StableDiffusion3Pipeline", _TOY_TRANSFORMER, (_TOY_TEXT, _TOY_TEXT)),
        # Its first block has the second attention and the norms of version 3.5.
        "toy_sd35": Size(
            "StableDiffusion3Pipeline", {**_TOY_TRANSFORMER, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
            (_TOY_TEXT, _TOY_TEXT),
        ),
    }
)  # fmt: skip
"""By the short name that `architecture` takes: published sizes, and the same classes at toy size."""

HUB_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "runwayml/stable-diffusion-v1-5": "sd15",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
        "CompVis/stable-diffusion-v1-4": "sd15",
        "stabilityai/stable-diffusion-2": "sd2_768",
        "stabilityai/stable-diffusion-2-base": "sd2",
        "stabilityai/stable-diffusion-2-1": "sd2_768",
        "stabilityai/stable-diffusion-2-1-base": "sd2",
        "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
        "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    }
)
"""Repositories whose sizes are known without asking the hub."""
