"""The tracking modality as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Flag, Plugin

_LORAT: Final = "Lin et al., Tracking Meets LoRA, ECCV 2024, arXiv:2403.05231"

PLUGIN: Final = Plugin(
    name="tracking",
    extra="tracking",
    requires=("timm", "av"),
    renderer="peft_modal_tracking.render:render",
    backbones={
        "lorat": Entry(
            "peft_modal_tracking.backbone:LoRAT",
            summary="One-stream tracker on timm's vision transformers, DINOv2 above all.",
            paper=_LORAT,
            requires=("timm",),
        ),
    },
    data={
        "moving_objects": Entry(
            "peft_modal_tracking.data:MovingObjects",
            summary="Generated videos of textured things that move and hide each other.",
        ),
    },
    tasks={
        "tracking": Entry(
            "peft_modal_tracking.tracking:Tracking",
            summary="Follow one target; success, precision, and GOT-10k's AO.",
            paper=_LORAT,
        ),
    },
    predict_flags={
        "box": Flag("where the target is in the first frame, in pixels", metavar="X,Y,W,H"),
        "layout": Flag("of a data set to follow: got10k, lasot, trackingnet, otb or folder", metavar="NAME"),
        "results": Flag("result files besides: got10k, lasot, trackingnet, otb or pytracking", metavar="NAME"),
    },
)
