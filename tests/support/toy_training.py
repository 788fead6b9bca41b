"""A text-to-image task on a toy pipeline, ready to be called without a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_modal.methods.base import Method
from peft_modal.methods.lora import LoRA
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.text_to_image import TextToImage
from peft_modal_heads.identity import Identity


def open_backbone(folder: Path, **arguments: Any) -> StableDiffusion:
    """A pipeline's folder as a backbone."""
    backbone = StableDiffusion(weights=str(folder), **arguments)
    backbone.load_weights()
    return backbone


def make_task(
    folder: Path, *, method: Method | None = None, tune: Any = "denoiser", scheduler: dict[str, Any] | None = None,
    **options: Any,
) -> TextToImage:  # fmt: skip
    """A task in training mode.

    Args:
        folder: Of the pipeline.
        method: LoRA by default.
        tune: See `StableDiffusion`.
        scheduler: Changes of the configuration of the scheduler that training follows.
        options: Of the task.
    """
    backbone = open_backbone(folder, tune=tune)
    if scheduler:
        old = backbone.surroundings.parts["scheduler"]
        backbone.surroundings.parts["scheduler"] = type(old).from_config(old.config, **scheduler)
    adapter = (method or LoRA(rank=2)).attach(backbone, generator=torch.Generator().manual_seed(0))
    head = Identity(spec=backbone.feature_spec(), num_outputs=0)
    return TextToImage(backbone, adapter, head, (), **options).train()


def latent_batch(captions: Sequence[str], *, std: float = 0.0) -> dict[str, Any]:
    """Cached latents of 16 x 16 pictures with captions."""
    mean = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return {
        "latent_mean": mean, "latent_std": torch.full_like(mean, std), "caption": list(captions),
        "key": [f"sample {i}" for i in range(len(captions))],
    }  # fmt: skip


def total(task: TextToImage, batch: dict[str, Any]) -> torch.Tensor:
    """The loss that training minimises."""
    return torch.stack(list(task.losses(batch, task(batch)).values())).sum()
