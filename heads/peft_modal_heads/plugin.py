"""The shared heads as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

PLUGIN: Final = Plugin(
    name="heads",
    modality="",
    heads={
        "identity": Entry("peft_modal_heads.identity:Identity", summary="The backbone's tokens as they are."),
        "linear": Entry(
            "peft_modal_heads.linear:LinearHead", summary="Pooled features, optional BatchNorm, one linear."
        ),
        "pointcloud_mlp": Entry(
            "peft_modal_heads.pointcloud_mlp:PointCloudMLP",
            summary="The three-layer head of point-cloud fine-tuning.",
            paper="Pang et al., Point-MAE, ECCV 2022, arXiv:2203.06604",
        ),
    },
)
