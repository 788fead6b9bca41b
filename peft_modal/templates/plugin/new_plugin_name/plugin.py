"""What this distribution registers; it is read by `list`, so it imports nothing heavy."""

from __future__ import annotations

from peft_modal.registry import Entry, Plugin

PLUGIN = Plugin(
    name="new_plugin_name",
    backbones={
        "encoder": Entry(
            "new_plugin_name.backbone:Encoder",
            summary="Small transformer over a sequence of vectors.",
        ),
    },
    methods={
        "branch": Entry(
            "new_plugin_name.method:Branch", summary="A trained branch beside the MLP."
        ),
    },
    heads={
        "mean_linear": Entry(
            "new_plugin_name.head:MeanLinear",
            summary="Mean over the steps, then a linear.",
        ),
    },
    data={
        "waves": Entry(
            "new_plugin_name.data:Waves", summary="Generated waves of three shapes."
        ),
        "folder": Entry(
            "new_plugin_name.data:Folder",
            summary="Your own .npy files, one folder a class.",
        ),
    },
    configs=("new_plugin_name.configs",),
    renderer="new_plugin_name.rendering:render",
)
