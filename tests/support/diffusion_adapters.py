"""Adapter files on toy pipelines, with random values in place of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numeric import randomise

from peft_modal.api import build
from peft_modal.compose import compose
from peft_modal.files import Header, fingerprint, save_adapter, versions
from peft_modal.tasks.tensors import tensors_of


def save_toy_adapter(
    path: Path, pipeline: Path, method: Mapping[str, Any], *, tune: str = "denoiser", seed: int = 1, **data: Any
) -> Path:  # fmt: skip
    """Write an adapter file and return its path.

    Args:
        path: Where to.
        pipeline: Folder of the backbone.
        method: Its node.
        tune: What of the pipeline it acts on.
        seed: Of the values.
        data: Other arguments of the data node.
    """
    config = {
        "backbone": {"name": "stable_diffusion", "weights": str(pipeline), "tune": tune}, "method": dict(method),
        "head": {"name": "identity"}, "task": {"name": "text_to_image"},
        "data": {"name": "drawn", "count": 2, "val_count": 2, **data},
    }  # fmt: skip
    composed = compose(config)
    model = build(composed, ())
    randomise(model.adapter, seed=seed)
    header = Header(composed.to_dict(), fingerprint(model.backbone.network.state_dict()), versions=versions())
    save_adapter(path, tensors_of(model.adapter, model.head), header)
    return path
