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
        "idpt_parts": Entry(
            "peft_modal_pointcloud.idpt_parts:IDPTParts",
            summary="IDPT's form for part segmentation: a prompt for each depth.",
            paper="Zha et al., Instance-aware Dynamic Prompt Tuning, ICCV 2023, arXiv:2304.07221",
        ),
        "pointgst": Entry(
            "peft_modal_pointcloud.pointgst:PointGST",
            summary="A bottleneck in the spectral domain of the patch centres, beside the MLP.",
            paper="Liang et al., PEFT in Spectral Domain for Point Cloud Learning, TPAMI 2025, arXiv:2410.08114",
        ),
        "point_peft": Entry(
            "peft_modal_pointcloud.point_peft:PointPEFT",
            summary="Prompts from a bank of training features, adapters that pool tokens in space, and biases.",
            paper="Tang et al., Point-PEFT, AAAI 2024, arXiv:2310.03059",
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
        "solids_fewshot": Entry(
            "peft_modal_pointcloud.fewshot:SolidsFewShot", summary="Few-shot folds of the generated objects."
        ),
        "folder": Entry("peft_modal_pointcloud.data:Folder", summary="Your own meshes, clouds and scans, by folder."),
        "scanobjectnn": Entry(
            "peft_modal_pointcloud.scanobjectnn:ScanObjectNN",
            summary="ScanObjectNN: real scans, three variants.",
            paper="Uy et al., Revisiting Point Cloud Classification, ICCV 2019, arXiv:1908.04616",
            requires=("h5py",),
        ),
        "modelnet40": Entry(
            "peft_modal_pointcloud.modelnet:ModelNet40",
            summary="ModelNet40: CAD models, as text or pickled.",
            paper="Wu et al., 3D ShapeNets, CVPR 2015, arXiv:1406.5670",
        ),
        "modelnet_fewshot": Entry(
            "peft_modal_pointcloud.fewshot:ModelNetFewShot",
            summary="Few-shot folds of ModelNet40.",
            paper="Yu et al., Point-BERT, CVPR 2022, arXiv:2111.14819",
        ),
        "part_solids": Entry(
            "peft_modal_pointcloud.part_data:PartSolids", summary="Generated objects whose parts are known."
        ),
        "shapenet_part": Entry(
            "peft_modal_pointcloud.part_data:ShapeNetPart",
            summary="ShapeNetPart as published: 16 categories, 50 parts.",
            paper="Yi et al., A Scalable Active Framework for Region Annotation, SIGGRAPH Asia 2016",
        ),
    },
    tasks={
        "part_segmentation": Entry(
            "peft_modal_pointcloud.part_segmentation:PartSegmentation",
            summary="A part for every point, instance and class mIoU.",
        ),
        "masked_autoencoding": Entry(
            "peft_modal_pointcloud.pretraining:MaskedAutoencoding",
            summary="Reconstruct hidden patches; needs no labels.",
            paper="Pang et al., Point-MAE, ECCV 2022, arXiv:2203.06604",
        ),
    },
)
