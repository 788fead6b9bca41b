"""A classifier of pictures by names on the nano CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_modal.methods.base import Method
from peft_modal.methods.lora import LoRA
from peft_modal_clip.backbone import OpenCLIPBackbone
from peft_modal_clip.classification import ClassNames
from peft_modal_heads.identity import Identity

NAMES = ("red_circle", "blue square", "green ring")


def make(method: Method | None = None, names: tuple[str, ...] = NAMES, **options: Any) -> ClassNames:
    backbone = OpenCLIPBackbone(weights="nano")
    backbone.load_weights()
    adapter = (method or LoRA(sites={"roles": ["attn.q"], "stacks": ["visual"]}, rank=2)).attach(backbone)
    head = Identity(spec=backbone.feature_spec(), num_outputs=len(names))
    return ClassNames(backbone, adapter, head, names, **options).eval()


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
