"""The tracking modality as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

_LORAT: Final = "Lin et al., Tracking Meets LoRA, ECCV 2024, arXiv:2403.05231"

PLUGIN: Final = Plugin(
    name="tracking",
    extra="tracking",
    requires=("timm",),
    backbones={
        "lorat": Entry(
            "peft_modal_tracking.backbone:LoRAT",
            summary="One-stream tracker on timm's vision transformers, DINOv2 above all.",
            paper=_LORAT,
        ),
    },
)
