"""PointGST: Morton order, Laplacians, bases, and one adapter given its bases."""

from __future__ import annotations

import torch
from torch import Tensor

from golden_runners.golden_case import GoldenCase
from peft_modal.anatomy.layout import Segment, TokenLayout
from peft_modal.anatomy.sites import Port
from peft_modal_pointcloud import spectral
from peft_modal_pointcloud.pointgst import SpectralAdapter

TRANSFORMS = {"U @ x (forward), U^T @ x (inverse)": "reference", "U^T @ x (forward), U @ x (inverse)": "paper"}


def adapter(case: GoldenCase) -> None:
    """Everything from the centres to the gradients."""
    prefix, local = case.setting("prefix_tokens"), case.setting("local")
    case.require("coordinate_multiplier", spectral.GRID)
    case.require("key_axis_order", "y,x,z")
    case.require("dropout", 0.0)
    centres = case.take("in.center")
    batch, groups, _ = centres.shape
    case.require("batch", batch)
    case.require("groups", groups)
    order, inverse = spectral.morton_order(centres)
    case.compare("out.morton_key", spectral.morton_key(centres))
    case.compare("out.order", order)
    case.compare("out.inverse_order", inverse)
    chunks = spectral.local_chunks(centres, order, local)
    case.compare("out.center_sorted", chunks.reshape(centres.shape))
    _graph(case, "global", centres, (batch, groups, groups))
    _graph(case, "local", chunks, (batch, groups // local, local, local))

    transform = case.choice("transform", TRANSFORMS)
    dim = case.setting("dim")
    layout = TokenLayout(segments=(Segment("cls", prefix), Segment("patches", None)), body="points", prompt_index=None)
    tap = Port("block.mid", "mlp.norm.in", "blocks", 0, "norm2", "in", dim, frozenset({"read"}))
    module = SpectralAdapter(
        tap, layout, rank=case.setting("rank"), local=local, scale=case.setting("scale"), basis="reference",
        transform=transform,
    )  # fmt: skip
    case.fill(module, lambda name: f"param.{name}")
    x = case.take("in.x").requires_grad_()
    given = case.take("in.order")
    case.compare("out.order", given)
    case.compare("out.inverse_order", case.take("in.inverse_order"))
    stacked = spectral.stacked_transform(
        case.take("in.basis_global"), case.take("in.basis_local"), given, transform=transform
    )
    y = module.adapt(x, stacked, slice(prefix, prefix + groups))
    case.compare("out.y", y)
    (y * case.take("in.loss_weight")).sum().backward()
    case.compare_gradient("x", x.grad)
    for name, parameter in module.named_parameters():
        case.compare_gradient(name, parameter.grad)


def _graph(case: GoldenCase, kind: str, points: Tensor, shape: tuple[int, ...]) -> None:
    weights, smallest = spectral.adjacency(points, basis="reference")
    case.compare(f"out.min_distance_{kind}", smallest)
    case.compare(f"out.adjacency_{kind}", weights.view(shape))
    case.compare(f"out.laplacian_{kind}", spectral.laplacian(weights).view(shape))
    # Signs of eigenvectors are the library's.
    basis = spectral.spectral_basis(points, basis="reference").view(shape)
    theirs = case.tensors[f"out.basis_{kind}"]
    case.compare(f"out.basis_{kind}", basis * torch.sign((basis * theirs).sum(-2, keepdim=True)))
