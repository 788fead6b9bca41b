"""The vision modality as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

PLUGIN: Final = Plugin(
    name="vision",
    extra="vision",
    requires=("timm",),
    renderer="peft_modal_vision.render:render",
    backbones={
        "vit": Entry(
            "peft_modal_vision.backbone:ViT",
            summary="timm's vision transformers: ViT, DeiT, DINOv2 and v3, MAE, EVA, CLIP's towers.",
            paper="Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929",
        ),
        "swin": Entry(
            "peft_modal_vision.backbone:Swin",
            summary="timm's Swin transformers.",
            paper="Liu et al., Swin Transformer, ICCV 2021, arXiv:2103.14030",
        ),
        "convnext": Entry(
            "peft_modal_vision.backbone:ConvNeXt",
            summary="timm's ConvNeXt and ConvNeXt V2.",
            paper="Liu et al., A ConvNet for the 2020s, CVPR 2022, arXiv:2201.03545",
        ),
    },
    data={
        "patterns": Entry("peft_modal_vision.data:Patterns", summary="Generated textured shapes, made in seconds."),
        "folder": Entry("peft_modal_vision.data:Folder", summary="Your own pictures, one folder a class."),
        "digits": Entry(
            "peft_modal_vision.digits:Digits",
            summary="scikit-learn's handwritten digits, real and small.",
            paper="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
            requires=("sklearn",),
        ),
        "vtab": Entry(
            "peft_modal_vision.vtab:Vtab",
            summary="VTAB-1k: a task's lists of a thousand training pictures.",
            paper="Zhai et al., A Large-scale Study of Representation Learning, 2019, arXiv:1910.04867",
        ),
        "fgvc": Entry(
            "peft_modal_vision.fgvc:Fgvc",
            summary="FGVC in the JSON layout of VPT; CUB as published.",
            paper="Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv:2203.12119",
        ),
        "fewshot": Entry(
            "peft_modal_vision.fewshot:FewShot",
            summary="Few-shot sets with the lists of NOAH.",
            paper="Zhang et al., Neural Prompt Search, 2022, arXiv:2206.04673",
        ),
        "scenes": Entry("peft_modal_vision.masks:Scenes", summary="Generated scenes with a mask, made in seconds."),
        "masks": Entry("peft_modal_vision.masks:Masks", summary="Your own pictures with masks; ADE20K, Pascal VOC."),
    },
    tasks={
        "segmentation": Entry(
            "peft_modal_vision.segmentation:Segmentation", summary="A class for every pixel, mean IoU."
        ),
    },
)
