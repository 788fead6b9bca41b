"""A CLIP's text tower as the text encoder of a Stable Diffusion pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from peft_modal.errors import ConfigError
from peft_modal.extras import require

if TYPE_CHECKING:
    from transformers import CLIPTextModel

    from peft_modal_clip.backbone import OpenCLIPBackbone

_IN_BLOCK: Final = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def text_encoder_of(backbone: OpenCLIPBackbone) -> CLIPTextModel:
    """The text tower as transformers' `CLIPTextModel`: the same function of the same tokens.

    Its last hidden state at the end of the text, times the tower's `text_projection`, is what `encode_text` gives.
    Adapters have to be merged before.

    Args:
        backbone: A CLIP whose tokenizer ends texts with the largest id.

    Raises:
        ConfigError: Adapters are attached.
        MissingExtraError: `transformers` is not installed.
    """
    transformers = require("transformers", extra="diffusion")
    if backbone.adapters:
        raise ConfigError("merge or detach the adapters of the CLIP before its text tower is taken out")
    sizes = backbone.sizes
    end = sizes.vocab_size - 1
    config = transformers.CLIPTextConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.text_width, intermediate_size=4 * sizes.text_width,
        num_hidden_layers=sizes.text_layers, num_attention_heads=sizes.text_heads,
        max_position_embeddings=sizes.context_length, projection_dim=sizes.embed_dim,
        hidden_act="quick_gelu" if sizes.quick_gelu else "gelu", bos_token_id=end - 1, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    encoder: CLIPTextModel = transformers.CLIPTextModel(config)
    state = backbone.network.state_dict()
    prefix = "text_model." if hasattr(encoder, "text_model") else ""
    converted = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    for i in range(sizes.text_layers):
        here, there = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            packed = state[f"{here}.attn.in_proj_{kind}"]
            for part, rows in zip("qkv", packed.chunk(3), strict=True):
                converted[f"{there}.self_attn.{part}_proj.{kind}"] = rows
            converted |= {f"{there}.{new}.{kind}": state[f"{here}.{old}.{kind}"] for old, new in _IN_BLOCK.items()}
    with torch.no_grad():
        encoder.load_state_dict({prefix + name: tensor.clone() for name, tensor in converted.items()}, strict=True)
    encoder.eval()  # type: ignore[no-untyped-call]
    return encoder
