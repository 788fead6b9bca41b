"""Draws the README's picture: test clouds of the generated solids with the prediction of a tuned model.

python docs/pointcloud_picture.py runs/.../adapter.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import peft_modal
from peft_modal.report.style import RIGHT, WRONG, styled
from peft_modal_pointcloud.render import render

COLUMNS, ROWS = 6, 2


def main(adapter: str) -> None:
    """Write `pointcloud.png` beside this file: one test cloud of each class."""
    model = peft_modal.load(adapter)
    data = model.composed.nodes["data"].build()
    data.setup("test")
    batches = list(data.test_dataloader())
    points, labels = (torch.cat([batch[key] for batch in batches]) for key in ("points", "label"))
    first = [int((labels == label).nonzero()[0]) for label in range(len(model.class_names))]
    probabilities = model({"points": points[first]}).softmax(-1)
    with styled():
        figure = Figure(figsize=(2 * COLUMNS, 2.25 * ROWS), layout="constrained")
        for index, axes in enumerate(figure.subplots(ROWS, COLUMNS).flat):
            axes.set_axis_off()
            axes.set_aspect("equal")
            render(axes, {"points": points[first[index]]}, None)
            truth, found = model.class_names[index], model.class_names[int(probabilities[index].argmax())]
            share = 100 * float(probabilities[index].max())
            text = f"{found} {share:.0f} %" if truth == found else f"{found} {share:.0f} % ({truth})"
            axes.set_title(text.replace("_", " "), loc="center", color=RIGHT if truth == found else WRONG)
        figure.savefig(Path(__file__).with_name("pointcloud.png"), dpi=110, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1])
