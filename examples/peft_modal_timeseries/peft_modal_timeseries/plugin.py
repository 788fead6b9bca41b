"""What this distribution registers; `list` and `--help` read it, so it imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

PLUGIN: Final = Plugin(
    name="timeseries",
    backbones={
        "patch_transformer": Entry(
            "peft_modal_timeseries.backbone:PatchTransformerBackbone",
            summary="Transformer over patches of all channels, in one sequence.",
            paper="patches as tokens: Nie et al., PatchTST, ICLR 2023, arXiv:2211.14730",
        ),
    },
    methods={
        "conv_adapter": Entry(
            "peft_modal_timeseries.conv_adapter:ConvAdapter",
            summary="A bottleneck beside the MLP that convolves along time.",
        ),
    },
    heads={
        "attentive_pooling": Entry(
            "peft_modal_timeseries.heads:AttentivePooling",
            summary="Class token and a learned weighting of all patches, then a linear.",
        ),
    },
    data={
        "signals": Entry("peft_modal_timeseries.data:Signals", summary="Generated signals, made in a second."),
        "archive": Entry(
            "peft_modal_timeseries.data:Archive", summary="A data set of the UCR and UEA archives, .ts or .tsv."
        ),
        "folder": Entry("peft_modal_timeseries.data:Folder", summary="Your own series as CSV, one folder a class."),
    },
    configs=("peft_modal_timeseries.configs",),
    renderer="peft_modal_timeseries.rendering:render",
)
