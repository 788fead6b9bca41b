"""The CLIP modality as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Flag, Plugin

PLUGIN: Final = Plugin(
    name="clip",
    extra="clip",
    requires=("open_clip",),
    backbones={
        "open_clip": Entry(
            "peft_modal_clip.backbone:OpenCLIPBackbone",
            summary="CLIP of open_clip: the nano, or any model with a ViT or ResNet by name, folder or hub id.",
            paper="Radford et al., CLIP, ICML 2021, arXiv:2103.00020",
            requires=("open_clip",),
        ),
    },
    data={
        "folder": Entry("peft_modal_clip.folder:Folder", summary="Your own photos by class, with their names."),
        "fewshot": Entry(
            "peft_modal_clip.fewshot:FewShotSet",
            summary="The eleven few-shot sets of CoOp, base to new, and four more tests of ImageNet.",
            paper="Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134",
        ),
        "captions": Entry(
            "peft_modal_clip.captioned:CaptionedPictures",
            summary="Your own pictures with captions.",
        ),
        "drawn_pairs": Entry("peft_modal_clip.data:DrawnPairs", summary="Generated pictures with captions."),
        "neon_signs": Entry(
            "peft_modal_clip.signs:NeonSigns", summary="Generated neon signs of 48 classes, a few of each to train on."
        ),
    },
    tasks={
        "classification": Entry(
            "peft_modal_clip.classification:ClassNames",
            summary="Classify pictures by the names of the classes, zero-shot at the start.",
            paper="Radford et al., CLIP, ICML 2021, arXiv:2103.00020",
            requires=("open_clip",),
        ),
        "contrastive": Entry(
            "peft_modal_clip.contrastive:Contrastive",
            summary="Match pictures and captions; measures retrieval and zero-shot classification.",
            paper="Radford et al., CLIP, ICML 2021, arXiv:2103.00020",
            requires=("open_clip",),
        ),
    },
    predict_flags={
        "classes": Flag(
            "names to choose among instead of the trained ones, a comma between them; double quotes around one that "
            "has a comma",
            metavar="NAMES",
        ),
    },
)
