"""Pictures from a denoiser: diffusers' own pipeline around the modules as they are, adapters included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from peft_modal.data.progress import progress
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.data import Subject
from peft_modal_diffusion.pictures import save_png


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
    options: dict[str, dict[str, Any]] = {
        "sd": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        "sdxl": {"add_watermarker": False, "force_zeros_for_empty_prompt": backbone.layout.zeroes_empty},
        "sd3": {"text_encoder_3": None, "tokenizer_3": None},
    }
    parts = {**options[family.name], **backbone.surroundings.parts, **dict(backbone.network.named_children())}
    # The pipeline's scheduler is the one that samples, not the one that training follows.
    parts["scheduler"] = parts.pop("sampler")
    pipeline = getattr(diffusers, family.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def side_of(backbone: StableDiffusion) -> int:
    """Sides in pixels of the pictures that a denoiser was trained for."""
    denoiser: Any = backbone.denoiser
    return int(denoiser.config["sample_size"]) * 2 ** (len(backbone.surroundings["vae"].config.block_out_channels) - 1)


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
    # The adapters' own modules are no part of the backbone.
    everything = [*backbone.modules(), *(part for a in backbone.adapters.values() for part in a.modules())]
    modes = [(module, module.training) for module in everything]
    backbone.eval()
    for adapter in backbone.adapters.values():
        adapter.eval()
    backbone.surroundings.to(backbone.device)
    try:
        pipeline = pipeline_of(backbone)
        with _contexts(backbone):
            out = pipeline(
                **_texts(backbone, prompts, sampling),
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


def make_class_pictures(backbone: StableDiffusion, data: Subject, sampling: Sampling, *, batch_size: int = 4) -> None:
    """Draw the pictures of the class that are missing, by the untouched model; what is there stays.

    Args:
        backbone: With its weights.
        data: Says where they go, how many there shall be, and of what.
        sampling: How.
        batch_size: The most at once.

    Raises:
        WriteError: One cannot be written.
    """
    if data.class_root is None or data.class_prompt is None:
        return
    missing = range(len(data.class_images()), data.num_class_images)
    adapters = [adapter for adapter in backbone.adapters.values() if adapter.is_enabled]
    for adapter in adapters:
        adapter.enable(on=False)
    try:
        with progress("pictures of the class", len(missing)) as advance:
            for start in range(0, len(missing), batch_size):
                seeds = missing[start : start + batch_size]
                prompts = [data.class_prompt] * len(seeds)
                for picture, seed in zip(generate(backbone, prompts, seeds, sampling), seeds, strict=True):
                    path = data.class_root / f"generated-{seed:04d}.png"
                    save_png(picture, path, sampling.settings(data.class_prompt, seed))
                advance(len(seeds))
    finally:
        for adapter in adapters:
            adapter.enable(on=True)


def _texts(backbone: StableDiffusion, prompts: Sequence[str], sampling: Sampling) -> dict[str, Tensor]:
    """Prompts as a pipeline takes them encoded: by itself it would not see all that adapters do to a text encoder."""
    width, surroundings = backbone.text_width, backbone.surroundings
    backbone.contexts.begin({})
    found = {"": surroundings.encode_text(prompts, width=width)}
    if sampling.guidance > 1:
        found["negative_"] = (
            surroundings.no_caption(len(prompts), width=width)
            if sampling.negative_prompt is None
            else surroundings.encode_text([sampling.negative_prompt] * len(prompts), width=width)
        )
    names = {"states": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    return {sign + names[name]: value for sign, texts in found.items() for name, value in texts.items()}


@contextmanager
def _contexts(backbone: StableDiffusion) -> Iterator[None]:
    """Begin a context for each call of the denoiser: the pipeline calls it, not the backbone."""

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        sample = args[0] if args else kwargs["hidden_states"]
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        # Pipelines give one time for all samples, or one each.
        time = time.expand(len(sample))
        backbone.contexts.begin({"time": time}).put("time", time)

    handle = backbone.denoiser.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
