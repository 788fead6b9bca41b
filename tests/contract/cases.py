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
    "lora_trunc_normal": _configured("lora", sites=["attn", "mlp"], rank=4, init="trunc_normal"),
    "lora_last_block": _configured("lora", sites={"roles": ["mlp"], "blocks": "last: 1"}, rank=4),
    "lora_normal": _configured("lora", rank=3, init="trunc_normal"),
    "houlsby": _configured("houlsby", hidden_dim=8, dropout=0.2),
    "houlsby_parallel": _configured("houlsby", hidden_dim=8, form="parallel", train_norms=True, init="normal"),
    "houlsby_input": _configured("houlsby", hidden_dim=8, form="input"),
    "pfeiffer": _configured("pfeiffer", hidden_dim=8, activation="silu", blocks=[0]),
    "pfeiffer_attention": _configured("pfeiffer", hidden_dim=8, form="parallel", residual=True, place="attn"),
    "pfeiffer_replaces": _configured("pfeiffer", hidden_dim=8, residual=False),
    "adaptformer": _configured("adaptformer", hidden_dim=8),
    "adaptformer_norm_in": _configured("adaptformer", hidden_dim=8, norm="in", scale="learned"),
    # Not with a learned scale: the norm divides by it, so its gradient is rounding noise.
    "adaptformer_norm_out": _configured("adaptformer", hidden_dim=8, norm="out", scale=1.0, dropout=0.5),
    "vpt_deep": _configured("vpt", num_tokens=3),
    "vpt_shallow": _configured("vpt", num_tokens=3, deep=False, init="normal", dropout=0.2),
    "vpt_end": _configured("vpt", num_tokens=3, place="end"),
    "vpt_read": _configured("vpt", num_tokens=3, export=True),
    "prefix": _configured("prefix", num_tokens=3),
    "ssf": _configured("ssf"),
    "ssf_linears": _configured("ssf", sites=["attn.qkv", "attn.q", "attn.out", "mlp"]),
    "fact_tt": _configured("fact", rank=3, dropout=0.0),
    "fact_tk": _configured("fact", form="tk", rank=3, sites=["mlp"], scale=0.5, dropout=0.2),
    "bi_adaptformer": _configured("bi_adaptformer", hidden_dim=4),
    "bi_adaptformer_4": _configured("bi_adaptformer", hidden_dim=3, bits=4, scale=0.5, dropout=0.3),
    "bi_lora": _configured("bi_lora", hidden_dim=4, dropout=0.0),
    "bi_lora_2": _configured("bi_lora", sites=["mlp"], hidden_dim=4, bits=2, scale=0.5),
    "spt": _configured("spt", rank=2, budget=1.0, unit=1000.0, dropout=0.0, drop_path=0.0),
    "spt_adapter": _configured("spt", form="adapter", sites=["mlp"], rank=2, budget=0.8, unit=1000.0, train_cls=False),
    "mosa": _configured("mosa", hidden_dim=4),
    "mosa_houlsby": _configured("mosa", hidden_dim=4, experts=3, share="none", style="houlsby", split="row"),
    "mosa_columns": _configured(
        "mosa",
        hidden_dim=6,
        experts=2,
        share="up",
        split="column",
        activation="silu",
        scale=0.5,
        dropout=0.3,
        deep_consistency=0.5,
    ),
    "mosa_pfeiffer": _configured("mosa", hidden_dim=4, share="up", style="pfeiffer", consistency=0.0),
    "snell": _configured("snell", rank=4, sparsity=0.6, dropout=0.0, drop_path=0.0),
    "snell_dense": _configured("snell", sites=["mlp"], rank=6, pieces=3, sparsity=0.0, train_cls=False),
    "snell_paper": _configured("snell", sites=["mlp"], rank=4, sparsity=0.5, threshold="paper"),
    "snella": _configured("snella", rank=4, initial_sparsity=0.3, dropout=0.0, drop_path=0.0),
    "snella_mixk": _configured("snella", sites=["mlp"], rank=4, form="mixk"),
    "loca": _configured("loca", num_frequencies=12, location_steps=0),
    "loca_dense": _configured(
        "loca", sites=["mlp"], num_frequencies=12, alpha=2.0, location_steps=0, transform="dense"
    ),
    "loca_dropout": _configured("loca", sites=["mlp"], num_frequencies=12, location_steps=0, dropout=0.3),
    "r_amt": _configured("r_amt", gate_strength=0.0),
    "r_amt_chosen": _configured("r_amt", sites=["attn", "mlp", "conv"], tensors=2, gate_strength=0.0),
    "r_amt_regularised": _configured("r_amt", sites=["mlp"], gate_strength=0.5),
    "repadapter": _configured("repadapter", hidden_dim=4, dropout=0.0, norm_penalty=0.1),
    "repadapter_mlp": _configured("repadapter", sites=["mlp.in"], hidden_dim=4, groups=4, scale=0.5),
    "convpass": _configured("convpass", hidden_dim=4),
    "convpass_mlp": _configured("convpass", hidden_dim=4, places="mlp", conv_init="xavier", drop_path=0.2),
    "consolidator": _configured("consolidator", groups=[2]),
    "consolidator_shuffled": _configured("consolidator", sites=["mlp"], groups=[2, 4], shuffle=True, drop_path=0.2),
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
    "vit_reference": _vit_of_a_protocol,
    # The ViT and the U-Net are the registered backbones' `tiny`.
    "mmdit": partial(StableDiffusion, weights="random", architecture="toy_sd35"),
}

_NO_TOKENS = "this network has no token sequence"
_NO_PROMPTS = "the causal mask and the positions have a fixed length"
_NO_FUSED = r"no sites match roles=\('attn.qkv',\)"
_NO_MLP = r"no sites match roles=\('mlp',\)"
_NO_PORTS = r"no ports match roles=\('(attn.out|mlp.out|mlp.norm.in)',\)"
_NO_ATTENTION = r"no ports match roles=\('attn.(norm.)?out',\)"

REFUSED: dict[tuple[str, str], str] = {
    ("textual_inversion", "autoencoder"): "not part of this network",
    ("lora_convs", "open_clip"): "'text.token_embedding' takes no low-rank update",
    ("lora_dropout", "open_clip"): "is read inside a function",
    ("lora_convs", "stable_diffusion"): "token_embedding' takes no low-rank update",
    **{("lora_fused", name): _NO_FUSED for name in ("mmdit", "stable_diffusion", "autoencoder")},
    **{
        (method, name): reason
        for method in ("vpt_deep", "vpt_shallow", "vpt_end", "vpt_read", "compose")
        for name, reason in (("mmdit", _NO_TOKENS), ("stable_diffusion", _NO_PROMPTS), ("autoencoder", _NO_TOKENS))
    },
    **dict.fromkeys(
        (
            *(("convpass", name) for name in ("mmdit", "stable_diffusion", "point_mae")),
            *(("convpass_mlp", name) for name in ("mmdit", "stable_diffusion", "point_mae", "convnext")),
        ),
        "none of its blocks works on a grid of patches",
    ),
    **dict.fromkeys(
        (("convpass", "autoencoder"), ("convpass_mlp", "autoencoder"), ("convpass", "convnext")),
        r"no ports match roles=\('(attn|mlp).norm.out',\)",
    ),
    **{(method, "open_clip"): "is read inside a function" for method in ("repadapter", "consolidator")},
    ("repadapter_mlp", "autoencoder"): r"no sites match roles=\('mlp.in',\)",
    **{
        (method, "autoencoder"): _NO_MLP
        for method in ("fact_tk", "consolidator_shuffled", "bi_lora_2", "loca_dense", "loca_dropout")
    },
    **{(method, "autoencoder"): _NO_PORTS for method in ("mosa", "mosa_columns")},
    **{(method, "convnext"): "'blocks.0.mlp.branch' on axis 1" for method in ("mosa", "mosa_columns")},
    ("mosa_pfeiffer", "autoencoder"): _NO_PORTS,
    ("mosa_houlsby", "autoencoder"): r"no ports match roles=\('block.out',\)",
    ("mosa_houlsby", "convnext"): "has its channels on axis 1",
    **{("mosa_houlsby", name): "has no port '" for name in ("mmdit", "stable_diffusion")},
    ("spt_adapter", "autoencoder"): _NO_MLP,
    **{(method, "autoencoder"): _NO_MLP for method in ("snell_dense", "snell_paper", "snella_mixk")},
    **{
        (method, name): reason
        for method in ("bi_adaptformer", "bi_adaptformer_4")
        for name, reason in (("autoencoder", _NO_PORTS), ("convnext", "'blocks.0.mlp.branch' on axis 1"))
    },
    **{(f"vpt_{kind}", "swin"): "its blocks attend within windows" for kind in ("deep", "shallow", "end", "read")},
    ("compose", "swin"): "its blocks attend within windows",
    **{(f"vpt_{kind}", "convnext"): _NO_TOKENS for kind in ("deep", "shallow", "end", "read")},
    ("prefix", "mmdit"): "it carries no token sequence",
    ("prefix", "open_clip"): "computes keys and values inside a function",
    ("prefix", "stable_diffusion"): _NO_PROMPTS,
    ("prefix", "swin"): "its blocks attend within windows",
    **{
        (method, name): _NO_ATTENTION
        for method in ("prefix", "houlsby_parallel", "houlsby_input", "pfeiffer_attention")
        for name in ("autoencoder", "convnext")
    },
    ("pfeiffer_replaces", "autoencoder"): _NO_PORTS,
    **{(f"adaptformer{form}", "convnext"): "'blocks.0.mlp.branch' on axis 1" for form in ("", "_norm_in", "_norm_out")},
    # There is no attention.
    **{
        (method, "convnext"): "no sites match roles=\\('attn.q"
        for method in ("lora", "lora_fused", "lora_normal", "hf_oft", "compose", "bi_lora", "loca")
    },
    ("houlsby", "convnext"): _NO_PORTS,
    ("lora_convs", "convnext"): "a convolution with 8 groups",
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
    # Behind two factors that start at zero their gradient comes in the third step; tests/pointcloud/test_pointgst.py
    # waits for it.
    ("pointgst", "point_mae"): ("*.norm_global.*", "*.norm_local.*"),
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
"""Trained tensors that need no gradient, or none within two steps."""


BF16_TOLERANCE: dict[tuple[str, str], float] = {
    # LayerNorm behind a branch that starts near zero divides by its small deviation and so magnifies rounding.
    ("adaptformer_norm_out", "point_mae"): 0.25,
    ("adaptformer_norm_out", "mmdit"): 0.25,
    ("adaptformer_norm_out", "stable_diffusion"): 0.25,
    # Its norm stands on the MLP's output, which is small here, and magnifies that one's rounding.
    ("mosa_pfeiffer", "vit_reference"): 0.25,
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


VARIANTS_ON = frozenset({"vit", "stable_diffusion"})
"""Backbones for further configurations of a method by day: fused attention, and attention of four linears and
convolutions."""


def combinations(*, everything: bool = False) -> list[tuple[str, str]]:
    """The (configuration, backbone) to try: core methods everywhere, a plugin's methods in its own modality.

    The first configuration of each method meets every backbone; its further ones meet those of `VARIANTS_ON`, and with
    `everything` all.
    """
    first = {configuration.name: name for name, configuration in reversed(CONFIGURATIONS.items())}
    pairs = [
        (name, backbone)
        for name, configuration in CONFIGURATIONS.items()
        for backbone in (*BACKBONES, *registered_backbones())
        if everything or first[configuration.name] == name or backbone in VARIANTS_ON
    ]
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
