"""The shipped nano pipeline: a complete Stable Diffusion that plain diffusers opens, and that draws what it is told."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_modal.data.drawn import COLOURS, SHAPES, draw_scenes, draw_style, draw_subject, object_name
from peft_modal.data.drawn.judge import colour_of, judge_accuracy, train_shape_judge
from peft_modal.data.seeding import seeded
from peft_modal_clip.backbone import OpenCLIPBackbone
from peft_modal_diffusion.autoencoder import psnr
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.generation import Sampling, generate

FOLDER = Path(str(resources.files("peft_modal_diffusion") / "nano"))
SAMPLING = Sampling(steps=20)
PAIRS = [(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES))]
PROMPTS = [object_name(*pair) for pair in PAIRS]


@pytest.fixture(scope="module")
def nano() -> StableDiffusion:
    backbone = StableDiffusion(weights="nano")
    backbone.load_weights()
    return backbone


@pytest.fixture(scope="module")
def objects(nano: StableDiffusion) -> Tensor:
    """One picture of every pair of colour and shape."""
    return generate(nano, PROMPTS, range(len(PROMPTS)), SAMPLING)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 10e6


def test_plain_diffusers_draws_the_same(nano: StableDiffusion) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "a yellow cross", num_inference_steps=8, guidance_scale=4.0, generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images  # fmt: skip
    ours = generate(nano, ["a yellow cross"], [3], Sampling(steps=8, guidance=4.0))
    assert drawn.shape == ours.shape == (1, 3, 32, 32)
    assert (drawn.float() - ours).abs().max() < 1e-3


def test_its_text_encoder_is_the_text_tower_of_the_nano_clip(nano: StableDiffusion) -> None:
    clip = OpenCLIPBackbone(weights="nano")
    clip.load_weights()
    encoder, tokenizer = nano.surroundings["text_encoder"], nano.surroundings["tokenizer"]
    texts = ["a red circle", "an orange ring above a small blue square"]
    with torch.no_grad():
        ids = tokenizer(texts, padding="max_length", max_length=20, return_tensors="pt").input_ids
        pooled = encoder(ids).pooler_output @ clip.network.text_projection
        wanted = clip.network.encode_text(clip.tokenize(texts))
    assert torch.allclose(pooled, wanted, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("draw", "least"),
    [(draw_scenes, 28.0), (draw_style, 24.0), (draw_subject, 22.0)],
    ids=["scenes", "style", "subject"],
)
def test_its_autoencoder_can_show_what_it_has_not_seen(
    draw: Callable[..., object], least: float, nano: StableDiffusion
) -> None:
    pixels = draw(48, seeded("held-out pictures", draw.__name__)).images * 2 - 1  # type: ignore[attr-defined]
    autoencoder = nano.surroundings["vae"]
    with torch.no_grad():
        rebuilt = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    assert float(psnr(rebuilt, pixels).mean()) >= least


def test_single_objects_have_the_colour_they_are_asked_for(objects: Tensor) -> None:
    wanted = torch.tensor([colour for colour, _ in PAIRS])
    assert float((colour_of(objects) == wanted).float().mean()) >= 0.9


# Trains the judge.
@pytest.mark.nightly
def test_single_objects_have_the_shape_they_are_asked_for(objects: Tensor) -> None:
    judge = train_shape_judge(steps=400)
    assert judge_accuracy(judge) >= 0.95
    wanted = torch.tensor([shape for _, shape in PAIRS])
    with torch.no_grad():
        assert float((judge(objects).argmax(1) == wanted).float().mean()) >= 0.6
