"""IDPT's prompt generators alone, with frozen and with batch statistics."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from golden_runners.golden_case import GoldenCase
from golden_runners.point_network import PROMPT_MODULES
from golden_runners.reading import input_of, output_of
from peft_modal_pointcloud.idpt_generator import NEGATIVE_SLOPE, build_prompt_generator, feature_knn
from peft_modal_pointcloud.network import Block

VARIANTS = {
    "mlp": "mlp",
    "light": "dgcnn_light",
    "light1": "dgcnn_light",
    "light2": "dgcnn_light2",
    "dgcnn_light": "dgcnn_light",
    "dgcnn_light2": "dgcnn_light2",
    "dgcnn": "dgcnn",
    "transformer": "transformer",
}
BY_GRAPH_LAYERS = {0: "mlp", 1: "dgcnn_light", 2: "dgcnn_light2", 3: "dgcnn"}


def generators(case: GoldenCase) -> None:
    """The main generator, and each variant whose tensors carry its name in front."""
    batch, num_tokens, dim = case.shape("in.tokens")
    case.require("batch", batch)
    case.require("num_tokens", num_tokens)
    case.require("dim", dim)
    case.require("negative_slope", NEGATIVE_SLOPE)
    prefixes = {name.split(".")[0] for name in case.tensors if name.split(".")[1:2] == ["param"]}
    for prefix in sorted(prefixes):
        assert prefix in VARIANTS, f"{case.name}: generator '{prefix}' is unknown; known: {list(VARIANTS)}"
        _variant(case, VARIANTS[prefix], f"{prefix}.")
    layers = sum(name.startswith("edge") and name.endswith(".weight") and "_bn" not in name
                 for name in case.names("param."))  # fmt: skip
    guess = BY_GRAPH_LAYERS.get(layers, "dgcnn") if "param.fuse.weight" in case else "transformer"
    _variant(case, case.choice("prompt_module", PROMPT_MODULES, default=guess), "")


def _variant(case: GoldenCase, module: str, prefix: str) -> None:
    probe = case.take("in.prompt_probe")
    for mode in ("eval", "train"):
        generator = _build(case, module, prefix)
        generator.train(mode == "train")
        edges = {name: edge for name, edge in generator.named_children() if name.startswith("edge") and "_" not in name}
        entering = {name: input_of(edge) for name, edge in edges.items()}
        leaving = {name: output_of(edge) for name, edge in edges.items()}
        tokens = case.take("in.tokens").requires_grad_()
        prompt = generator(tokens)
        prompt.backward(probe)
        case.compare(f"{prefix}out.prompt_{mode}", prompt)
        for name, edge in edges.items():
            case.compare(f"{prefix}out.{name}_{mode}", leaving[name][0])
            layer = name.removeprefix("edge")
            neighbours = feature_knn(entering[name][0], edge.k)
            case.compare(f"{prefix}out.knn_idx_layer{layer}_{mode}", neighbours)
        gradients: dict[str, Tensor | None] = {name: p.grad for name, p in generator.named_parameters()}
        for name, gradient in {**gradients, "tokens": tokens.grad}.items():
            case.compare_gradient(name, gradient, prefix=f"{prefix}grad_{mode}", sums=f"{prefix}gradsum_{mode}")
        if mode == "train":
            for name, value in generator.state_dict().items():
                case.compare(f"{prefix}out.after_train.{name}", value)


def _build(case: GoldenCase, module: str, prefix: str) -> nn.Module:
    dim, k = case.setting("dim"), case.setting("k")
    make_block = None
    if module == "transformer":
        heads = case.setting("num_heads")
        ratio = case.setting("mlp_ratio", 4.0)
        make_block = functools.partial(Block, dim, num_heads=heads, mlp_ratio=ratio)
    generator = build_prompt_generator(module, dim=dim, k=k, make_block=make_block)

    def rename(name: str) -> str:
        full = f"{prefix}param.{name}"
        return full if full in case else f"{prefix}param.{name.removeprefix('block.')}"

    case.fill(generator, rename)
    for norm in generator.modules():
        if isinstance(norm, torch.nn.BatchNorm1d):
            case.require("bn_eps", norm.eps)
            case.require("bn_momentum", norm.momentum)
    return generator
