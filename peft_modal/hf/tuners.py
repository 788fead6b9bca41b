"""Which of peft's tuners the bridge carries, and why it does not carry the others; needs neither torch nor peft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal


@dataclass(frozen=True)
class Tuner:
    """One of peft's weight-space tuners: for each layer it is an affine map made of the layer's weight and bias."""

    init: str = "init_weights"
    """Key of its configuration that chooses the initialisation."""
    identity: tuple[object, ...] = (True,)
    """Values of that key with which a fresh tuner leaves the output as it is."""
    changes_bias: bool = False
    """Whether the map's constant term differs from the layer's bias."""
    kernels: Literal["any", "square", "single"] = "any"
    """Convolutions that peft computes rightly: it takes both sides of a kernel for equally long (`square`), or adds up
    overlapping windows (`single`: kernels of one point only)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values in place of peft's own defaults, and why below."""
    derived: tuple[str, ...] = ()
    """Buffers that peft computes again from the base weights at loading. They are kept in the file: another machine's
    singular vectors may have other signs."""


TUNERS: Final[Mapping[str, Tuner]] = MappingProxyType(
    {
        "lora": Tuner(
            init="init_lora_weights",
            identity=(True, "gaussian", "olora", "pissa", "corda", "eva", "mica", "orthogonal"),
        ),
        "boft": Tuner(kernels="square"),
        "c3a": Tuner(),
        "deft": Tuner(),
        "delora": Tuner(),
        "fourierft": Tuner(),
        "frod": Tuner(defaults={"progressbar": False}, derived=("frod_U",)),
        "glora": Tuner(changes_bias=True),
        "gralora": Tuner(),
        "hira": Tuner(),
        "hra": Tuner(kernels="square"),
        "ia3": Tuner(init="init_ia3_weights", changes_bias=True),
        "loha": Tuner(),
        "lokr": Tuner(),
        "miss": Tuner(),
        "oft": Tuner(kernels="single"),
        "peanut": Tuner(),
        "psoft": Tuner(derived=("_psoft_A_cache", "_psoft_B_cache")),
        "randlora": Tuner(),
        "road": Tuner(changes_bias=True),
        # Without a seed of its own the choice of entries would be lost between saving and loading.
        "shira": Tuner(defaults={"random_seed": 0}),
        "supertuning": Tuner(),
        "tinylora": Tuner(),
        "unilora": Tuner(identity=()),
        "vblora": Tuner(init="", identity=()),
        "vera": Tuner(),
        "waveft": Tuner(),
    }
)
"""By the lower-case value of peft's `PeftType`."""

PRESETS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = MappingProxyType(
    {
        "dora": ("lora", {"use_dora": True}),
        "rslora": ("lora", {"use_rslora": True}),
        "pissa": ("lora", {"init_lora_weights": "pissa"}),
        "olora": ("lora", {"init_lora_weights": "olora"}),
        "corda": ("lora", {"init_lora_weights": "corda"}),
        "eva": ("lora", {"init_lora_weights": "eva"}),
        "mica": ("lora", {"init_lora_weights": "mica"}),
    }
)
"""What peft has no tuner of its own for: a tuner, and the keys of its configuration that make it."""

_PROMPTS: Final = "it is made for transformers' language models; `vpt` learns prompt tokens here"

REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "adalora": "it moves ranks between layers by statistics of the whole run, which an adapter file does not hold; "
        "use `tuner: lora` with `rank_pattern`",
        "adamss": "it masks and re-weights subspaces during the run by statistics that an adapter file does not hold; "
        "use `tuner: psoft`",
        "adaption_prompt": _PROMPTS,
        "beft": "it trains biases, which `bitfit` does here",
        "cartridge": _PROMPTS,
        "cpt": _PROMPTS,
        "lily": "its router depends on the input, so no weight amounts to it; use `tuner: lora`",
        "ln_tuning": "it trains normalisation layers, which `norm_tuning` does here",
        "multitask_prompt_tuning": _PROMPTS,
        "osf": "it changes gradients by hooks on its parameters, which can neither be copied nor stored; use "
        "`tuner: pissa`",
        "p_tuning": _PROMPTS,
        "poly": "it needs a task number with every batch, so no weight amounts to it; use `tuner: lora`",
        "prefix_tuning": _PROMPTS,
        "prompt_tuning": _PROMPTS,
        "pvera": "it draws its update at random in every forward pass; use `tuner: vera`",
        "shadow": "it runs a second transformer beside the network; use `tuner: lora`",
        "trainable_tokens": "it trains rows of a language model's token embedding; use `full` with a selection",
        "xlora": "it mixes finished LoRA adapters by the input, so no weight amounts to it; use `tuner: lora`",
    }
)
"""Why peft's other tuners cannot be bridged, and what works instead."""

_OURS: Final = "is chosen by `sites`"
_TREE: Final = "changes or saves modules of the network, which stays as it is here"
_VARIANT: Final = "makes LoRA depend on more than the layer's weight"

DECIDED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "target_modules": _OURS,
        "exclude_modules": _OURS,
        "layers_to_transform": _OURS,
        "layers_pattern": _OURS,
        "target_parameters": _OURS,
        "feedforward_modules": "follows the roles: sites with the role `mlp.out` are scaled at their input",
        "modules_to_save": "is not needed: the head is always trained and saved; name other tensors by `compose` with "
        "`full`",
        "bias": "is not needed: train biases by `compose` with `bitfit`",
        "trainable_token_indices": _TREE,
        "layer_replication": _TREE,
        "ensure_weight_tying": _TREE,
        "loftq_config": "changes the base weights to a quantised form, which stays as it is here",
        "lora_ga_config": "needs gradients of the base weights, which never have any here",
        "alora_invocation_tokens": _VARIANT,
        "arrow_config": _VARIANT,
        "kasa_config": _VARIANT,
        "monteclora_config": _VARIANT,
        "use_bdlora": _VARIANT,
        "use_qalora": _VARIANT,
        "qalora_group_size": _VARIANT,
        "velora_config": _VARIANT,
        "megatron_config": "is for Megatron's layers",
        "megatron_core": "is for Megatron's layers",
        "runtime_config": "is for quantised layers on a GPU",
        "runtime_offload_base_weight": "is for base weights off the device",
        "boft_n_butterfly_factor": "needs a CUDA extension that peft builds where it can, and is 1 where it cannot",
        "fan_in_fan_out": "follows the network's layers",
        "task_type": "is for language models",
        "peft_type": "is chosen by `tuner`",
        "peft_version": "is written by peft",
        "auto_mapping": "is written by peft",
        "base_model_name_or_path": "is written by peft",
        "revision": "is written by peft",
        "inference_mode": "is decided by what runs",
        "save_only_topk_weights": "loses what training needs to go on",
        "sample_at_inference": "is random at inference",
    }
)
"""Keys of peft's configurations that are decided here, with the reason."""
