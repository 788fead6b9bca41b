"""The diffusion modality as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

_NEEDS: Final = ("diffusers", "transformers")

PLUGIN: Final = Plugin(
    name="diffusion",
    extra="diffusion",
    requires=_NEEDS,
    backbones={
        "stable_diffusion": Entry(
            "peft_modal_diffusion.backbone:StableDiffusion",
            summary="The denoiser of Stable Diffusion 1.x, 2.x, XL or 3, from a diffusers folder or the hub.",
            paper="Rombach et al., High-Resolution Image Synthesis with Latent Diffusion, CVPR 2022, arXiv:2112.10752",
            requires=_NEEDS,
        ),
        "autoencoder": Entry(
            "peft_modal_diffusion.autoencoder:AutoencoderBackbone",
            summary="The autoencoder between pictures and latents.",
            paper="Rombach et al., High-Resolution Image Synthesis with Latent Diffusion, CVPR 2022, arXiv:2112.10752",
            requires=("diffusers",),
        ),
    },
    data={
        "drawn": Entry(
            "peft_modal_diffusion.drawn:DrawnPictures",
            summary="Generated captioned pictures, and two new concepts to learn; made in seconds.",
        ),
    },
    tasks={
        "text_to_image": Entry(
            "peft_modal_diffusion.text_to_image:TextToImage",
            summary="Fine-tune on captioned pictures, with prior preservation where the data has it.",
            paper="Rombach et al., High-Resolution Image Synthesis with Latent Diffusion, CVPR 2022, arXiv:2112.10752",
            requires=_NEEDS,
        ),
        "autoencoding": Entry(
            "peft_modal_diffusion.autoencoder:Autoencoding",
            summary="Rebuild pictures through latents.",
            paper="Rombach et al., High-Resolution Image Synthesis with Latent Diffusion, CVPR 2022, arXiv:2112.10752",
        ),
    },
)
