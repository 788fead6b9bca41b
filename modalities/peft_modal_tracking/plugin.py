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
        "got10k": Entry(
            "peft_modal_tracking.files:GOT10k",
            summary="GOT-10k as published.",
            paper="Huang et al., GOT-10k, TPAMI 2021, arXiv:1810.11981",
        ),
        "lasot": Entry(
            "peft_modal_tracking.files:LaSOT",
            summary="LaSOT as published.",
            paper="Fan et al., LaSOT, CVPR 2019, arXiv:1809.07845",
        ),
        "trackingnet": Entry(
            "peft_modal_tracking.files:TrackingNet",
            summary="TrackingNet as published.",
            paper="Mueller et al., TrackingNet, ECCV 2018, arXiv:1803.10794",
        ),
        "otb": Entry(
            "peft_modal_tracking.files:OTB",
            summary="OTB as published, to test on.",
            paper="Wu et al., Object Tracking Benchmark, TPAMI 2015",
        ),
        "folder": Entry(
            "peft_modal_tracking.files:Folder", summary="Your own videos or folders of frames, with boxes."
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
