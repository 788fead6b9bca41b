"""The point-cloud modality as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

PLUGIN: Final = Plugin(
    name="pointcloud",
    extra="pointcloud",
    requires=("trimesh",),
    renderer="peft_modal_pointcloud.render:render",
    backbones={
        "point_mae": Entry(
            "peft_modal_pointcloud.backbone:PointMAEBackbone",
            summary="Transformer over point patches; also Point-BERT, ACT and ReCon weights.",
            paper="Pang et al., Point-MAE, ECCV 2022, arXiv:2203.06604",
        ),
    },
    methods={
        "idpt": Entry(
            "peft_modal_pointcloud.idpt:IDPT",
            summary="A prompt made for each cloud by a graph network over its tokens.",
            paper="Zha et al., Instance-aware Dynamic Prompt Tuning, ICCV 2023, arXiv:2304.07221",
        ),
    },
    heads={
        "masked_decoder": Entry(
            "peft_modal_pointcloud.pretraining:MaskedDecoderHead",
            summary="The decoder of masked pre-training; dropped afterwards.",
            paper="Pang et al., Point-MAE, ECCV 2022, arXiv:2203.06604",
        ),
    },
    data={
        "solids": Entry("peft_modal_pointcloud.data:Solids", summary="Generated objects, made in seconds."),
        "folder": Entry("peft_modal_pointcloud.data:Folder", summary="Your own meshes and clouds, one folder a class."),
    },
    tasks={
        "masked_autoencoding": Entry(
            "peft_modal_pointcloud.pretraining:MaskedAutoencoding",
            summary="Reconstruct hidden patches; needs no labels.",
            paper="Pang et al., Point-MAE, ECCV 2022, arXiv:2203.06604",
        ),
    },
)
