"""Checkpoints of point transformers in their sources' layouts, at tiny size."""

from __future__ import annotations

import argparse
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from peft_modal_pointcloud.masked import MaskedDecoder


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def without_cls(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in {"cls_token", "cls_pos"}}


def junk(*names: str) -> dict[str, Tensor]:
    return {name: torch.full((2, 2), 9.0) for name in names}


def point_mae(state: dict[str, Tensor]) -> dict[str, object]:
    decoder = MaskedDecoder(dim=8, depth=1, num_heads=2, group_size=4).state_dict()
    weights = OrderedDict({**prefixed("module.MAE_encoder.", without_cls(state)), **prefixed("module.", decoder)})
    return {
        "base_model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": []},
        "epoch": 300,
        "metrics": {"acc": np.float64(91.5)},
        "best_metrics": {"acc": np.float32(92.0)},
    }


def fine_tuned(state: dict[str, Tensor]) -> dict[str, object]:
    generator = junk("blocks.cls.conv1.0.weight", "blocks.cls.bn1.weight", "cls_head_finetune.0.weight", "prompt_pos")
    return {"base_model": prefixed("module.", {**state, **generator}), "epoch": np.int64(4)}


def point_bert(state: dict[str, Tensor]) -> dict[str, object]:
    copies = {name: tensor + 1.0 for name, tensor in state.items()}
    extra = junk(
        "transformer_q.cls_head.0.weight", "transformer_q.lm_head.weight", "transformer_q.mask_token",
        "dvae.encoder.first_conv.0.weight", "queue", "queue_ptr",
    )  # fmt: skip
    weights = {**prefixed("transformer_k.", copies), **prefixed("transformer_q.", state), **extra}
    return {"base_model": prefixed("module.", weights), "args": argparse.Namespace(config="cfgs/pretrain.yaml")}


def act(state: dict[str, Tensor]) -> dict[str, object]:
    extra = junk("ACT_encoder.lm_head.weight", "ACT_encoder.cls_head.0.weight", "dvae.codebook", "ACT_decoder.weight")
    return {"base_model": {**prefixed("ACT_encoder.", state), **extra}}


def recon(state: dict[str, Tensor]) -> dict[str, object]:
    contrast = [
        f"blocks.blocks.{i}.{layer}"
        for i in range(2)
        for layer in ("norm1_contrast.weight", "norm2_contrast.bias", "mlp_contrast.fc1.weight",
                      "attn_contrast.q.weight", "attn_contrast.kv.weight", "attn_contrast.proj.bias")
    ]  # fmt: skip
    tokens = ("img_token", "img_pos", "text_token", "text_pos")
    extra = junk(*(f"MAE_encoder.{name}" for name in (*contrast, *tokens)), "img_proj.weight", "teacher.x")
    return {"base_model": {**prefixed("MAE_encoder.", state), **extra}}


def segmentation(state: dict[str, Tensor]) -> dict[str, object]:
    return {"model_state_dict": prefixed("module.", state), "class_avg_iou": np.float64(0.83)}


LAYOUTS = {
    "point-mae": point_mae, "fine-tuned": fine_tuned, "point-bert": point_bert, "act": act, "recon": recon,
    "segmentation": segmentation,
    "model-entry": lambda state: {"model": state},
    "state-dict-entry": lambda state: {"state_dict": prefixed("base_model.", state)},
    "plain": dict,
}  # fmt: skip
