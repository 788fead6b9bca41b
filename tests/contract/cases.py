"""Method configurations and backbones that the contract tests combine; plugins join through the registry."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from tiny_backbones import TinyViT

from peft_modal.anatomy import Anatomy, Backbone
from peft_modal.errors import RegistryError
from peft_modal.methods.base import Method
from peft_modal.registry import Listed, Registry, default_registry
from peft_modal.testing.matrix import load_entry
from peft_modal_diffusion.backbone import StableDiffusion


@cache
def registry() -> Registry:
    """What is installed; in a checkout that is not, the plugins that its pyproject.toml names."""
    installed = default_registry()
    if any(source.plugin.name == "core" for source in installed.installed):
        return installed
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plugins = []
    for group, points in project["entry-points"].items():
        for target in points.values() if group.startswith("peft_modal.") else ():
            module, _, attribute = target.partition(":")
            if _exists(module):
                plugins.append((getattr(importlib.import_module(module), attribute), project["name"]))
    return Registry.from_plugins(plugins)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True)
class Configuration:
    """One registered method with arguments; `method` makes it when a test runs."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def method(self) -> Method:
        found = registry()
        cls = found.load(found.resolve("method", self.name, modality=None))
        arguments = {key: _made(value) for key, value in self.arguments.items()}
        return cls(**arguments)


def _made(value: Any) -> Any:
    if isinstance(value, Configuration):
        return value.method()
    return [_made(item) for item in value] if isinstance(value, list) else value


def _configured(name: str, **arguments: Any) -> Configuration:
    return Configuration(name, arguments)


def _vit_of_a_protocol() -> Backbone:
    """What most authors' code does: drop-path stays active in the frozen network, the class token is always trained."""
    backbone = TinyViT(frozen_mode="reference", drop_path=0.3)
    old = backbone.anatomy
    backbone.anatomy = Anatomy(
        sites=old.sites, ports=old.ports, layouts=old.layouts, depth=old.depth, always_trained=("cls_token",)
    )
    return backbone


CONFIGURATIONS: dict[str, Configuration] = {
    "full": _configured("full"),
    "linear_probe": _configured("linear_probe"),
    "bitfit": _configured("bitfit"),
    "norm_tuning": _configured("norm_tuning"),
    "lora": _configured("lora", rank=4),
    "lora_linears": _configured("lora", sites=["attn", "mlp"], rank=4, alpha=8),
    "lora_convs": _configured("lora", sites=["embed", "conv"], rank=2),
    "lora_fused": _configured("lora", sites=["attn.qkv"], rank=4, alpha=8, rank_stabilised=True),
    "lora_dropout": _configured("lora", sites=["attn", "mlp"], rank=4, dropout=0.3, init="gaussian"),
    "lora_last_block": _configured("lora", sites={"roles": ["mlp"], "blocks": "last: 1"}, rank=4),
    "houlsby": _configured("houlsby", hidden_dim=8, dropout=0.2),
    "pfeiffer": _configured("pfeiffer", hidden_dim=8, activation="silu", blocks=[0]),
    "adaptformer": _configured("adaptformer", hidden_dim=8),
    "adaptformer_norm_in": _configured("adaptformer", hidden_dim=8, norm="in", scale="learned"),
    # Not with a learned scale: the norm divides by it, so its gradient is rounding noise.
    "adaptformer_norm_out": _configured("adaptformer", hidden_dim=8, norm="out", scale=1.0, dropout=0.5),
    "vpt_deep": _configured("vpt", num_tokens=3),
    "vpt_shallow": _configured("vpt", num_tokens=3, deep=False, init="normal", dropout=0.2),
    "vpt_end": _configured("vpt", num_tokens=3, place="end"),
    "ssf": _configured("ssf"),
    "ssf_linears": _configured("ssf", sites=["attn.qkv", "attn.q", "attn.out", "mlp"]),
    "sara": _configured("sara", share=0.1),
    "hf_dora": _configured("hf", tuner="dora", config={"r": 4}),
    "hf_pissa": _configured("hf", tuner="pissa", sites=["mlp"], config={"r": 4, "lora_alpha": 8}),
    "hf_oft": _configured("hf", tuner="oft", sites=["attn.qkv", "attn.out"], config={"oft_block_size": 4}),
    "hf_dropout": _configured("hf", tuner="lora", sites=["mlp"], config={"r": 4, "lora_dropout": 0.3}),
    "compose": _configured(
        "compose",
        methods=[
            _configured("lora", rank=2),
            _configured("vpt", num_tokens=2, deep=False),
            _configured("adaptformer", hidden_dim=4),
        ],
    ),
    "compose_weights": _configured(
        "compose",
        methods=[
            _configured("norm_tuning"),
            _configured("lora", sites=["attn.q", "mlp"], rank=2),
            _configured("ssf", sites=["norm", "mlp"]),
        ],
    ),
}

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "vit": TinyViT,
    "vit_reference": _vit_of_a_protocol,
    # The U-Net is the registered backbone's `tiny`.
    "mmdit": partial(StableDiffusion, weights="random", architecture="toy_sd35"),
}

_NO_TOKENS = "this network has no token sequence"
_NO_PROMPTS = "the causal mask and the positions have a fixed length"
_NO_FUSED = r"no sites match roles=\('attn.qkv',\)"
_NO_MLP = r"no sites match roles=\('mlp',\)"
_NO_PORTS = r"no ports match roles=\('(attn.out|mlp.out|mlp.norm.in)',\)"

REFUSED: dict[tuple[str, str], str] = {
    ("textual_inversion", "autoencoder"): "not part of this network",
    ("lora_convs", "open_clip"): "'text.token_embedding' takes no low-rank update",
    ("lora_dropout", "open_clip"): "is read inside a function",
    ("lora_convs", "stable_diffusion"): "token_embedding' takes no low-rank update",
    **{("lora_fused", name): _NO_FUSED for name in ("mmdit", "stable_diffusion", "autoencoder")},
    **{
        (method, name): reason
        for method in ("vpt_deep", "vpt_shallow", "vpt_end", "compose")
        for name, reason in (("mmdit", _NO_TOKENS), ("stable_diffusion", _NO_PROMPTS), ("autoencoder", _NO_TOKENS))
    },
    # Convolutions and one attention at a time: there are no transformer blocks.
    **{(method, "autoencoder"): _NO_MLP for method in ("lora_last_block", "hf_pissa", "hf_dropout")},
    **{
        (method, "autoencoder"): _NO_PORTS
        for method in ("houlsby", "pfeiffer", "adaptformer", "adaptformer_norm_in", "adaptformer_norm_out")
    },
}
"""Combinations that cannot work, with what the sentence must say."""

READS_VALUES = frozenset({"sara"})
"""Configurations that choose what is trained by the weights, so that nothing can be counted without them."""

EXEMPT: dict[tuple[str, str], Collection[str]] = {
    # The temperature of the contrastive loss is not part of the features.
    ("full", "open_clip"): ("backbone.logit_scale",),
    # Stable Diffusion 3's last block computes queries of the text and reads nothing that they give.
    **{
        (method, "mmdit"): tuple(f"{part}.transformer.transformer_blocks.1.attn.{name}" for name in names)
        for method, part, names in (
            ("full", "backbone", ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")),
            ("bitfit", "backbone", ("add_q_proj.bias",)),
            ("norm_tuning", "backbone", ("norm_added_q.weight",)),
            ("sara", "adapter", ("add_q_proj.weight.values", "add_q_proj.bias.values")),
            ("ssf", "adapter", ("add_q_proj.scale", "add_q_proj.shift")),
            ("compose_weights", "backbone.0_norm_tuning", ("norm_added_q.weight",)),
        )
    },
}
"""Trained tensors that need no gradient."""


BF16_TOLERANCE: dict[tuple[str, str], float] = {
    # LayerNorm behind a branch that starts near zero divides by its small deviation and so magnifies rounding.
    ("adaptformer_norm_out", "point_mae"): 0.25,
    ("adaptformer_norm_out", "mmdit"): 0.25,
    # The generator takes neighbours and maxima of tokens that the backbone computes in bf16: where two are nearly
    # equal, rounding, which differs between processors, sends the gradient to the other one.
    ("idpt", "point_mae"): 0.25,
}
"""Combinations whose gradients part further from float32 under bf16 than the contract's 0.05, and why."""


@cache
def _registered() -> dict[str, Listed]:
    """Backbones and methods of plugins by test name; those without a `tiny` are reported by the matrix."""
    entries = [entry for entry in registry().entries() if entry.state == "ok" and entry.modality]
    return {f"{entry.noun}:{entry.name}": entry for entry in entries if entry.noun in {"backbone", "method"}}


def registered_backbones() -> list[str]:
    """Names of the plugins' backbones that can be imported and offer `tiny`."""
    return [entry.name for entry in _registered().values() if entry.noun == "backbone" and _offers_tiny(entry)]


def _offers_tiny(entry: Listed) -> bool:
    try:
        return hasattr(load_entry(registry(), entry), "tiny")
    except RegistryError:
        return False  # test_matrix.py fails with the reason, once


def combinations() -> list[tuple[str, str]]:
    """Every (configuration, backbone) to try: core methods everywhere, a plugin's methods in its own modality."""
    pairs = [(name, backbone) for name in CONFIGURATIONS for backbone in (*BACKBONES, *registered_backbones())]
    for entry in _registered().values():
        if entry.noun == "method":
            own = [
                name for name in registered_backbones() if _registered()[f"backbone:{name}"].modality == entry.modality
            ]
            pairs += [(entry.name, backbone) for backbone in own]
    return pairs


def make_method(configuration: str) -> Method:
    """The method of a configuration, or of a plugin with its own example."""
    if configuration in CONFIGURATIONS:
        return CONFIGURATIONS[configuration].method()
    cls: Any = load_entry(registry(), _registered()[f"method:{configuration}"])
    return cls.example() if hasattr(cls, "example") else cls()


@cache
def _prototype(name: str) -> Backbone:
    if name in BACKBONES:
        return BACKBONES[name]()
    return load_entry(registry(), _registered()[f"backbone:{name}"]).tiny()


def backbone_factory(name: str) -> Callable[[], Backbone]:
    """Makes copies of one small backbone."""
    return lambda: copy.deepcopy(_prototype(name))
