"""Adapters on toy pipelines, with random values in place of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numeric import randomise
from torch import Tensor

from peft_modal.api import Model, build
from peft_modal.compose import Composed, compose
from peft_modal.files import Header, fingerprint, save_adapter, versions
from peft_modal.methods.base import Method
from peft_modal.tasks.tensors import tensors_of
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.generation import Sampling, generate
from peft_modal_heads.identity import Identity

PROMPTS = ("a red cat", "sks dog")
GUIDANCE = 3.0


def toy_config(pipeline: Path, method: Mapping[str, Any], *, tune: str = "denoiser", **data: Any) -> Composed:
    """The configuration of a run on a toy pipeline; `data` are more arguments of its data."""
    return compose({
        "backbone": {"name": "stable_diffusion", "weights": str(pipeline), "tune": tune}, "method": dict(method),
        "head": {"name": "identity"}, "task": {"name": "text_to_image"},
        "data": {"name": "drawn", "count": 2, "val_count": 2, **data},
    })  # fmt: skip


def attach_toy(backbone: StableDiffusion, method: Method, composed: Composed) -> Model:
    """Attach a method with random values to a backbone, whose former adapters leave it."""
    for adapter in list(backbone.adapters.values()):
        adapter.detach()
    adapter = method.attach(backbone)
    randomise(adapter)
    return Model(backbone, adapter, Identity(spec=backbone.feature_spec(), num_outputs=0), (), composed)


def save_toy_adapter(path: Path, composed: Composed, *, seed: int = 1) -> Path:
    """Write the adapter file of a configuration, with values that follow from `seed`, and return its path."""
    model = build(composed, ())
    randomise(model.adapter, seed=seed)
    header = Header(
        composed.to_dict(), fingerprint(model.backbone.network.state_dict()), versions=versions(),
        facts=model.adapter.facts(),
    )  # fmt: skip
    save_adapter(path, tensors_of(model.adapter, model.head), header)
    return path


def our_pictures(backbone: StableDiffusion) -> Tensor:
    """Pictures (2, 3, 16, 16) of `PROMPTS` after two steps."""
    return generate(backbone, PROMPTS, [0, 1], Sampling(steps=2, guidance=GUIDANCE))
