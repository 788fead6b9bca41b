"""Pictures from a denoiser: diffusers' own pipeline around the modules as they are, adapters included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from peft_modal_diffusion.backbone import StableDiffusion


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled.

    Args:
        steps: Steps of the sampler.
        guidance: Classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598); 1 is none.
        height: In pixels; None: what the denoiser was trained for.
        width: Likewise.
        negative_prompt: What pictures shall not show.
    """

    steps: int = 25
    guidance: float = 4.0
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None

    def settings(self, prompt: str, seed: int) -> dict[str, Any]:
        """What a picture's file says of how it was made."""
        return {"prompt": prompt, "seed": seed, **asdict(self)}


def pipeline_of(backbone: StableDiffusion) -> Any:  # noqa: ANN401 — a class of diffusers
    """A diffusers pipeline of the backbone's own modules; nothing is copied."""
    import diffusers

    family = backbone.layout.family
    parts: dict[str, Any] = {
        name: part for name, part in backbone.surroundings.parts.items() if name != "scheduler"
    } | dict(backbone.network.named_children())
    scheduler = backbone.surroundings["sampler"]
    parts.pop("sampler", None)
    missing: dict[str, Any] = {
        "sd": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        "sdxl": {"add_watermarker": False},
        "sd3": {"text_encoder_3": None, "tokenizer_3": None},
    }[family.name]
    pipeline = getattr(diffusers, family.pipeline)(**{**missing, **parts}, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    backbone: StableDiffusion, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling = Sampling()
) -> Tensor:
    """Pictures (B, 3, H, W) in 0..1, one for each prompt and seed; the same whatever else is in the batch.

    Args:
        backbone: With its weights; adapters act.
        prompts: What to show.
        seeds: Of each picture's initial noise.
        sampling: How.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        pipeline = pipeline_of(backbone)
        with _contexts(backbone):
            out = pipeline(
                prompt=list(prompts),
                negative_prompt=None if sampling.negative_prompt is None else [sampling.negative_prompt] * len(prompts),
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                height=sampling.height,
                width=sampling.width,
                generator=[Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
            )
    finally:
        for module, mode in modes:
            module.training = mode
    pictures: Tensor = out.images.float().cpu()
    return pictures


@contextmanager
def _contexts(backbone: StableDiffusion) -> Iterator[None]:
    """Begin a context for each call of the denoiser: the pipeline calls it, not the backbone."""

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        backbone.contexts.begin({"time": time}).put("time", time)

    handle = backbone.denoiser.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
