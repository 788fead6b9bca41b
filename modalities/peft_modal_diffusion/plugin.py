"""The diffusion modality as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Flag, Plugin

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
    methods={
        "textual_inversion": Entry(
            "peft_modal_diffusion.textual_inversion:TextualInversion",
            summary="New meanings for a few rare words of the text encoder.",
            paper="Gal et al., An Image is Worth One Word, ICLR 2023, arXiv:2208.01618",
            requires=_NEEDS,
        ),
    },
    data={
        "folder": Entry(
            "peft_modal_diffusion.data:Folder", summary="Your own pictures with captions, from files beside them."
        ),
        "subject": Entry(
            "peft_modal_diffusion.data:Subject",
            summary="A few pictures of one subject, and of its class against forgetting.",
            paper="Ruiz et al., DreamBooth, CVPR 2023, arXiv:2208.12242",
        ),
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
    exporters={
        "diffusers": Entry(
            "peft_modal_diffusion.exporting:export_diffusers",
            summary="LoRA and DoRA as diffusers saves them (pipeline.load_lora_weights); --out is a folder, or a "
            ".safetensors file.",
            requires=("diffusers", "transformers", "peft"),
        ),
        "kohya": Entry(
            "peft_modal_diffusion.exporting:export_kohya",
            summary="LoRA as kohya's scripts save it, for ComfyUI and the web UIs; --out likewise.",
            requires=("diffusers", "transformers", "peft"),
        ),
        "embeddings": Entry(
            "peft_modal_diffusion.textual_inversion:export_embeddings",
            summary="Words of textual inversion as learned_embeds.safetensors (pipeline.load_textual_inversion).",
            requires=_NEEDS,
        ),
        "delta": Entry(
            "peft_modal_diffusion.delta:export_delta",
            summary="The changed entries of a sparse adapter such as SaRA's; apply_delta of "
            "peft_modal_diffusion.delta adds them to a pipeline of diffusers.",
            requires=_NEEDS,
        ),
    },
    importer="peft_modal_diffusion.importing:read_lora_file",
    predict_flags={
        "prompt": Flag("what to draw; repeat it for several", metavar="TEXT", repeatable=True),
        "negative": Flag("what pictures shall not show", metavar="TEXT"),
        "count": Flag("pictures of each prompt (default 1), with the seeds from --seed on", "N", "integer"),
        "steps": Flag("steps of the sampler (default: task.sample_steps)", "N", "integer"),
        "guidance": Flag("classifier-free guidance, 1 for none (default: task.guidance)", "NUMBER", "number"),
        "size": Flag("of the pictures in pixels: WIDTHxHEIGHT, or one number (default: the model's)", metavar="SIZE"),
    },
)
