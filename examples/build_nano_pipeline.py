"""Put the nano Stable Diffusion together from the runs that trained its parts; the result is a diffusers folder.

python examples/build_nano_pipeline.py start --vae RUN/adapter.safetensors --clip RUN/adapter.safetensors --out START
python -m peft_modal fit --config diffusion_pretrain_nano.yaml --backbone.weights=START --out RUN
python examples/build_nano_pipeline.py finish --unet RUN/adapter.safetensors --out nano
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from peft_modal.api import load
from peft_modal.attach.merge import merge_
from peft_modal.data.drawn import draw_open_ended, draw_scenes
from peft_modal.data.seeding import seeded
from peft_modal_clip.conversion import text_encoder_of
from peft_modal_clip.tokenizer import hf_tokenizer
from peft_modal_diffusion.autoencoder import whiten
from peft_modal_diffusion.generation import pipeline_of

UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (48, 96), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "mid_block_type": "UNetMidBlock2DCrossAttn",
    "cross_attention_dim": 96, "attention_head_dim": 4, "norm_num_groups": 16,
}  # fmt: skip
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def merged(path: Path) -> Any:  # noqa: ANN401 — a registered backbone
    """The backbone of an adapter file with what it has learnt folded in."""
    model = load(path)
    merge_(model.backbone)
    return model.backbone


def latent_statistics(autoencoder: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each latent channel over scenes and open-ended pictures."""
    generator = seeded("latent statistics")
    pictures = torch.cat([draw_scenes(1536, generator).images, draw_open_ended(512, generator)]) * 2 - 1
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(part).latent_dist.sample(generator) for part in pictures.split(128)])
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def start(vae: Path, clip: Path, out: Path) -> None:
    """Trained autoencoder and text encoder around a random U-Net."""
    autoencoder = merged(vae).network
    whiten(autoencoder, *latent_statistics(autoencoder))
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=autoencoder, text_encoder=text_encoder_of(merged(clip)), tokenizer=hf_tokenizer(),
        unet=UNet2DConditionModel(**UNET), scheduler=DDIMScheduler(**SCHEDULE), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(out)  # fmt: skip


def finish(unet: Path, out: Path) -> None:
    """The start's folder with the trained U-Net, in half precision.

    The text encoder's numbers are stored in single precision, though: transformers opens a model in the type that it is
    stored in, diffusers in single precision, and a pipeline has to open without a word about types.
    """
    backbone = merged(unet)
    pipeline = pipeline_of(backbone).to(torch.float16)
    pipeline.save_pretrained(out)
    pipeline.text_encoder.float().save_pretrained(out / "text_encoder")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("start")
    first.add_argument("--vae", type=Path, required=True)
    first.add_argument("--clip", type=Path, required=True)
    last = verbs.add_parser("finish")
    last.add_argument("--unet", type=Path, required=True)
    for verb in (first, last):
        verb.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.verb == "start":
        start(arguments.vae, arguments.clip, arguments.out)
    else:
        finish(arguments.unet, arguments.out)


if __name__ == "__main__":
    main()
