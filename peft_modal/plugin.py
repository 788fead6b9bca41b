"""The core's own plugin: methods and tasks that work for every modality."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

PLUGIN: Final = Plugin(
    name="core",
    modality="",
    extra="hf",
    methods={
        "full": Entry("peft_modal.methods.full:Full", summary="Every backbone tensor is trained."),
        "linear_probe": Entry("peft_modal.methods.linear_probe:LinearProbe", summary="Only the head is trained."),
        "bitfit": Entry(
            "peft_modal.methods.bitfit:BitFit",
            summary="Only bias vectors are trained.",
            paper="Ben Zaken et al., BitFit, ACL 2022, arXiv:2106.10199",
        ),
        "norm_tuning": Entry(
            "peft_modal.methods.norm_tuning:NormTuning", summary="Only scales and shifts of normalisation layers."
        ),
        "lora": Entry(
            "peft_modal.methods.lora:LoRA",
            summary="Low-rank updates of weights.",
            paper="Hu et al., LoRA, ICLR 2022, arXiv:2106.09685",
        ),
        "houlsby": Entry(
            "peft_modal.methods.houlsby:Houlsby",
            summary="Bottleneck adapters after attention and after the MLP.",
            paper="Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019, arXiv:1902.00751",
        ),
        "pfeiffer": Entry(
            "peft_modal.methods.pfeiffer:Pfeiffer",
            summary="One bottleneck adapter per block, after the MLP.",
            paper="Pfeiffer et al., AdapterFusion, EACL 2021, arXiv:2005.00247",
        ),
        "adaptformer": Entry(
            "peft_modal.methods.adaptformer:AdaptFormer",
            summary="A scaled bottleneck parallel to the MLP.",
            paper="Chen et al., AdaptFormer, NeurIPS 2022, arXiv:2205.13535",
        ),
        "vpt": Entry(
            "peft_modal.methods.vpt:VPT",
            summary="Learned prompt tokens, shallow or at every block.",
            paper="Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv:2203.12119",
        ),
        "ssf": Entry(
            "peft_modal.methods.ssf:SSF",
            summary="Scale and shift after every operation, merged afterwards.",
            paper="Lian et al., Scaling & Shifting Your Features, NeurIPS 2022, arXiv:2210.08823",
        ),
        "sara": Entry(
            "peft_modal.methods.sara:SaRA",
            summary="The entries of smallest magnitude, with state of their number.",
            paper="Hu et al., SaRA, ICLR 2025, arXiv:2409.06633",
        ),
        "hf": Entry(
            "peft_modal.methods.hf:HF",
            summary="Weight-space tuners of Hugging Face peft: DoRA, PiSSA, VeRA, OFT, FourierFT, CorDA, ...",
            requires=("peft",),
        ),
        "compose": Entry("peft_modal.methods.compose:Compose", summary="Several methods on one backbone."),
    },
    tasks={
        "classification": Entry(
            "peft_modal.tasks.classification:Classification", summary="One label per sample, cross-entropy."
        ),
    },
    exporters={
        "peft": Entry(
            "peft_modal.cli.export:export_peft",
            summary="A folder that Hugging Face peft loads, for LoRA and DoRA; the head, for which it has no place, "
            "goes into rest.safetensors beside it.",
            requires=("peft",),
        ),
    },
)
