"""SPT: sensitivities and allocations of a small ViT, and one block with modules, single entries and whole vectors."""

from __future__ import annotations

import re
from typing import Any

import torch
from tiny_backbones import TinyViT
from torch import Tensor
from torch.nn import functional

from golden_runners.golden_case import GoldenCase
from golden_runners.single_block import BareBlocks
from peft_modal.methods.spt import SPT, Allocation
from peft_modal.methods.spt.method import SPTRun, sensitivities
from peft_modal.methods.spt.places import places_of

_SITES = ("q", "k", "v", "proj", "fc1", "fc2")


def allocation(case: GoldenCase) -> None:
    """Stage 1 for every budget of the case."""
    width, depth, batch_size = (case.setting(name) for name in ("embed_dim", "depth", "batch_size"))
    backbone = TinyViT(
        depth=depth, width=width, num_heads=case.setting("num_heads"), img_size=case.setting("img_size"),
        patch_size=case.setting("patch_size"), mlp_ratio=case.setting("mlp_ratio"),
        drop_path=case.setting("drop_path"),
    )  # fmt: skip
    case.require("num_classes", case.shape("param.head.weight")[0])
    case.require("topk_sizes", "ceil(0.02*i*unit) for i=1..79")
    case.require("structured_vector", True)
    case.require("fixed_overhead", width)
    state = {name: _fused(case, "param.", name) for name in backbone.network.state_dict()}
    backbone.network.load_state_dict(state)
    weight, bias = case.take("param.head.weight"), case.take("param.head.bias")
    method = SPT(
        form=case.choice("structured_type", {"lora": "lora", "adapter": "adapter"}), rank=case.setting("rank"),
        unit=case.setting("unit_params"), alpha=case.setting("alpha"), beta=case.setting("beta"),
        structured_only=case.setting("structured_only", False),
    )  # fmt: skip
    adapter = method.attach(backbone)
    (run,) = (module for module in adapter.modules() if isinstance(module, SPTRun))
    images, labels = case.take("in.images"), case.take("in.labels").long()
    batches = [
        {"image": images[i * batch_size : (i + 1) * batch_size], "label": labels[i * batch_size : (i + 1) * batch_size]}
        for i in range(case.setting("batches"))
    ]

    def loss(batch: Any) -> dict[str, Tensor]:
        logits = functional.linear(backbone(batch).tokens[:, 0], weight, bias)
        return {"loss": functional.cross_entropy(logits, batch["label"])}

    found = sensitivities(backbone, run.places, batches, loss)
    for name, value in found.items():
        case.compare(f"out.sensitivity.{name}", value)
    targets = [method.target(place) for place in run.places.values()]
    budgets = case.json["budgets"]
    for (text, record), ours in zip(budgets.items(), run.allocate(found, [float(b) for b in budgets]), strict=True):
        tuned = [
            [
                f"blocks.{i}.{'attn' if site in _SITES[:4] else 'mlp'}.{site}.weight" in ours.structured
                for site in _SITES
            ]
            for i in range(depth)
        ]
        case.compare(f"out.budget_{text}.tuned_matrices", torch.tensor(tuned).long())
        case.compare(f"out.budget_{text}.unstructured_indexes", ours.positions(targets))
        if list(ours.vectors) != record["tuned_vectors"]:
            case.report(f"budget {text}: differs by vectors, {ours.vectors}")
        if abs(ours.total - record["total_params_in_units"]) > 1e-4:
            case.report(f"budget {text}: differs by cost, {ours.total}")


def block(case: GoldenCase) -> None:
    """Stage 2 of one block."""
    form = {"spt-lora-block": "lora", "spt-adapter-block": "adapter"}[case.slug]
    for prose in ("placement", "activation", "order"):
        case.setting(prose, "")
    case.choice("mode", {"eval": False}, default="eval")
    dim, hidden = case.setting("dim"), case.shape("base.mlp.fc1.weight")[0]
    backbone = BareBlocks(
        width=dim, num_heads=case.setting("num_heads"), mlp_ratio=hidden / dim, qkv_bias=True,
        norm_eps=case.setting("norm_eps"),
    )  # fmt: skip
    names = list(backbone.network.state_dict())
    backbone.network.load_state_dict({name: _fused(case, "base.", name, "blocks.0.") for name in names})
    method = SPT(form=form, rank=case.setting("rank"), dropout=0.0, drop_path=0.0, norm_entries=True)
    adapter = method.attach(backbone)
    (run,) = (module for module in adapter.modules() if isinstance(module, SPTRun))
    places = places_of(backbone.anatomy, method.sites)
    paths = [f"{'attn' if site in _SITES[:4] else 'mlp'}.{site}" for site in _SITES]
    structured = [path for path, on in zip(paths, case.setting("structured"), strict=True) if on]
    vectors = [name for name in (n.removeprefix("blocks.0.") for n in places) if f"param.{name}" in case]
    entries = {}
    for name in case.names("in.index."):
        index = case.take(f"in.index.{name}").long()
        shape = places[f"blocks.0.{name}"].shape
        entries[f"blocks.0.{name}"] = index[:, 0] if len(shape) == 1 else index[:, 0] * shape[1] + index[:, 1]
    run.attach(
        Allocation(
            tuple(f"blocks.0.{path}.weight" for path in structured), tuple(f"blocks.0.{v}" for v in vectors), entries
        )
    )
    trained = adapter.named_trained()
    slots = dict(_slots(trained, places, entries, vectors))
    assert slots.keys() == trained.keys(), f"{case.name}: {sorted(set(trained) ^ set(slots))}"
    with torch.no_grad():
        for name, parts in slots.items():
            for theirs, where, is_delta in parts:
                value = case.take(f"param.{theirs}")
                if is_delta:
                    trained[name][where] += value
                else:
                    trained[name].copy_(value)
    backbone.eval()
    adapter.eval()
    x = case.take("in.x").requires_grad_()
    y = backbone({"tokens": x}).tokens
    case.compare("out.y", y)
    y.backward(case.take("in.cotangent"))
    case.compare_gradient("x", x.grad)
    for name, parts in slots.items():
        gradient = trained[name].grad
        assert gradient is not None, f"{case.name}: '{name}' has no gradient"
        for theirs, where, is_delta in parts:
            case.compare_gradient(theirs, gradient[where] if is_delta else gradient)


def _slots(trained: Any, places: Any, entries: Any, vectors: list[str]) -> Any:
    """Our tensor, and for each of theirs in it the name, the positions, and whether it is a change."""
    for name in trained:
        short = re.sub(r"^(adapter|backbone)\.(entries\.)?blocks\.0\.", "", name)
        found = re.fullmatch(r"(.*)\.(down|up)(\.weight|\.bias)?", short)
        if found is not None:
            yield name, [(f"{found[1]}.{found[2]}{found[3] or '.weight'}", slice(None), False)]
        elif short.endswith(".values"):
            tensor = short.removesuffix(".values")
            tensor = tensor if tensor.endswith(("weight", "bias")) else f"{tensor}.weight"
            yield name, _parts(tensor, places, entries)
        else:
            yield name, [(short, slice(None), False)]


def _parts(tensor: str, places: Any, entries: Any) -> list[tuple[str, slice, bool]]:
    """The slices of a fused bias whose entries lie in one tensor of ours, in order."""
    parts, first = [], 0
    for key, index in entries.items():
        place = places[key]
        own = place.site.path if not place.is_matrix else key
        if own.removeprefix("blocks.0.") != tensor:
            continue
        path, _, kind = key.removeprefix("blocks.0.").rpartition(".")
        parts.append((f"{path}.sparse.{kind}_delta", slice(first, first + len(index)), True))
        first += len(index)
    return parts


def _fused(case: GoldenCase, prefix: str, name: str, strip: str = "") -> Tensor:
    """A tensor of ours; q, k and v are theirs one by one, and one that is tuned whole may stand among the trained."""
    short = name.removeprefix(strip)
    head, _, tensor = short.rpartition(".")
    if head.endswith("attn.qkv"):
        parts = [f"{head.removesuffix('qkv')}{part}.{tensor}" for part in ("q", "k", "v")]
        return torch.cat([case.take(_stored(case, prefix, part)) for part in parts])
    return case.take(_stored(case, prefix, short))


def _stored(case: GoldenCase, prefix: str, name: str) -> str:
    return f"{prefix}{name}" if f"{prefix}{name}" in case else f"param.{name}"
