"""The shared heads as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

PLUGIN: Final = Plugin(
    name="heads",
    modality="",
    heads={
        "dense_linear": Entry(
            "peft_modal_heads.dense_linear:DenseLinear", summary="A class for every pixel, by one 1x1 convolution."
        ),
        "setr_pup": Entry(
            "peft_modal_heads.setr:SETRPUP",
            summary="Convolutions that double the resolution in turn.",
            paper="Zheng et al., SETR, CVPR 2021, arXiv:2012.15840",
        ),
        "tracking_mlp": Entry(
            "peft_modal_heads.tracking_mlp:TrackingMLP",
            summary="A score and a box for every cell of the search picture.",
            paper="Lin et al., Tracking Meets LoRA, ECCV 2024, arXiv:2403.05231",
        ),
        "upernet": Entry(
            "peft_modal_heads.upernet:UPerNet",
            summary="Pooling and feature pyramid over four maps.",
            paper="Xiao et al., Unified Perceptual Parsing, ECCV 2018, arXiv:1807.10221",
        ),
        "identity": Entry("peft_modal_heads.identity:Identity", summary="The backbone's tokens as they are."),
        "bi_linear": Entry(
            "peft_modal_heads.bi_linear:BiLinearHead",
            summary="Pooled features, one linear of 1-bit weights.",
            paper="Jie et al., Revisiting the Parameter Efficiency of Adapters, ICCV 2023, arXiv:2307.16867",
        ),
        "linear": Entry(
            "peft_modal_heads.linear:LinearHead", summary="Pooled features, optional BatchNorm, one linear."
        ),
        "pointcloud_mlp": Entry(
            "peft_modal_heads.pointcloud_mlp:PointCloudMLP",
            summary="The three-layer head of point-cloud fine-tuning.",
            paper="Pang et al., Point-MAE, ECCV 2022, arXiv:2203.06604",
        ),
        "pointcloud_parts": Entry(
            "peft_modal_heads.pointcloud_parts:PointCloudParts",
            summary="A part for every point, from three depths.",
            paper="Pang et al., Point-MAE, ECCV 2022, arXiv:2203.06604",
        ),
    },
)
