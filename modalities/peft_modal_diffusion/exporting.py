"""LoRA in the two layouts that programs around Stable Diffusion read: diffusers', and that of kohya's scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_modal.api import Exported, Model
from peft_modal.attach import Adapter
from peft_modal.errors import FileFormatError
from peft_modal.hf.files import lora_settings
from peft_modal.hf.pairs import Pair, pairs_of
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.families import Family
from peft_modal_diffusion.reference import Reference

DIFFUSERS_NAME: Final = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
_SUFFIX: Final = ".safetensors"
_INSTEAD: Final = (
    "`merge` writes a complete pipeline with any adapter that merges, `export --format delta` the changed entries of a "
    "sparse one"
)
Parts = Mapping[str, Mapping[str, Pair]]
"""Pairs by component of the pipeline and path inside it."""


def export_diffusers(model: Model, out: Path) -> Exported:
    """Write a LoRA (or DoRA) as diffusers saves one: `pytorch_lora_weights.safetensors` in a folder, or the named file.

    The scale is folded into `up`, so that alpha is the rank: readers that take no notice of the header's
    `lora_adapter_metadata`, where diffusers keeps alpha, find the same strength.

    Raises:
        ConfigError: The adapter is not of a pipeline's denoiser.
        FileFormatError: Part of it is no low-rank pair, or diffusers computes something else from the file.
    """
    import diffusers

    reference = Reference.of(model.backbone)
    family = reference.backbone.layout.family
    layers: dict[str, dict[str, Tensor]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for part, pairs in _parts(model.adapter).items():
        is_text = part != family.denoiser
        named = {_text_path(path) if is_text else path: _unscaled(pair) for path, pair in pairs.items()}
        layers[part] = {
            name: tensor.contiguous()
            for path, pair in named.items()
            for name, tensor in _diffusers_names(path, pair, is_text=is_text)
        }
        inner = {path.removeprefix("text_model."): pair for path, pair in named.items()}
        modules = model.backbone.network.get_submodule(part).named_modules()
        settings[part] = lora_settings(inner, [path.removeprefix("text_model.") for path, _ in modules])

    def save(path: Path) -> None:
        getattr(diffusers, family.pipeline).save_lora_weights(
            path.parent, weight_name=path.name,
            **{f"{part}_lora_layers": tensors for part, tensors in layers.items()},
            **{f"{part}_lora_adapter_metadata": values for part, values in settings.items()},
        )  # fmt: skip

    file = out if out.suffix == _SUFFIX else out / DIFFUSERS_NAME
    return _exported(reference, file, save)


def export_kohya(model: Model, out: Path) -> Exported:
    """Write a LoRA as kohya's scripts do, which ComfyUI and the web UIs read: one file, alpha beside each pair.

    Raises:
        ConfigError: The adapter is not of a pipeline's denoiser.
        FileFormatError: Part of it is no low-rank pair, the layout has no place for it, or diffusers computes something
            else from the file.
    """
    reference = Reference.of(model.backbone)
    family = reference.backbone.layout.family
    if family.name == "sd3":
        raise FileFormatError(
            "kohya's layout for Stable Diffusion 3 has the module names of another implementation; use --format "
            "diffusers, which ComfyUI reads, too"
        )
    parts = _parts(model.adapter)
    pairs = [pair for found in parts.values() for pair in found.values()]
    if any(pair.magnitude is not None for pair in pairs):
        raise FileFormatError(
            "programs disagree about DoRA in kohya's layout (diffusers leaves `dora_scale` out, ComfyUI divides by the "
            "norm of the untouched weight); use --format diffusers, or merge"
        )
    tensors: dict[str, Tensor] = {}
    for part, found in parts.items():
        for path, pair in (found if part == family.denoiser else _readable(found)).items():
            name = _kohya_name(part, path, family)
            tensors |= {
                f"{name}.lora_down.weight": pair.down.contiguous(),
                f"{name}.lora_up.weight": pair.up.contiguous(),
                f"{name}.alpha": torch.tensor(pair.scale * pair.rank),
            }
    metadata = _kohya_metadata(model, reference.backbone, pairs)
    file = out if out.suffix == _SUFFIX else out / "lora.safetensors"
    return _exported(reference, file, lambda path: save_file(tensors, path, metadata=metadata))


def _parts(adapter: Adapter) -> Parts:
    """The pairs of an adapter that is nothing but LoRA.

    Raises:
        FileFormatError: It is something else.
    """
    try:
        pairs = pairs_of(adapter)
    except FileFormatError as error:
        raise FileFormatError(f"{error}; {_INSTEAD}") from error
    own = [name for name in adapter.state() if name.startswith("backbone.")]
    if own:
        raise FileFormatError(f"'{own[0]}' is trained itself, which has no place in a LoRA file; {_INSTEAD}")
    parts: dict[str, dict[str, Pair]] = {}
    for pair in pairs:
        part, _, path = pair.holder.partition(".")
        if pair.tensor != "weight":
            raise FileFormatError(f"'{pair.holder}.{pair.tensor}' is no module's weight; {_INSTEAD}")
        parts.setdefault(part, {})[path] = pair
    return parts


def _unscaled(pair: Pair) -> Pair:
    return replace(pair, up=pair.up * pair.scale, scale=1.0)


def _text_path(path: str) -> str:
    """A module of a CLIP text encoder, as files have always called it."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def _diffusers_names(path: str, pair: Pair, *, is_text: bool) -> list[tuple[str, Tensor]]:
    down, up = ("lora_linear_layer.down", "lora_linear_layer.up") if is_text else ("lora_A", "lora_B")
    named = [(f"{path}.{down}.weight", pair.down), (f"{path}.{up}.weight", pair.up)]
    vector = "lora_magnitude_vector.weight" if is_text else "lora_magnitude_vector"
    return named if pair.magnitude is None else [*named, (f"{path}.{vector}", pair.magnitude)]


def _readable(pairs: Mapping[str, Pair]) -> Mapping[str, Pair]:
    """Pairs of a text encoder, with one of zeros where diffusers would else not read them.

    diffusers 0.42 recognises projections of the attention in this layout by an output projection among them.
    """
    attention = [path.rpartition(".")[0] for path in pairs if path.endswith((".q_proj", ".k_proj", ".v_proj"))]
    if not attention or any(path.endswith(".out_proj") for path in pairs):
        return pairs
    one = next(pair for path, pair in pairs.items() if path.startswith(attention[0]))
    # Projections of CLIP's attention are square.
    zeros = replace(one, down=torch.zeros_like(one.down), up=torch.zeros_like(one.up))
    return {**pairs, f"{attention[0]}.out_proj": zeros}


def _kohya_name(part: str, path: str, family: Family) -> str:
    if part != family.denoiser:
        prefix = "lora_te" if family.name == "sd" else "lora_te2" if part == "text_encoder_2" else "lora_te1"
        return f"{prefix}_{_text_path(path).replace('.', '_')}"
    # Readers know the embedding of SDXL's sizes by its original name only.
    for ours, theirs in (("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2")):
        path = theirs if path == ours else path
    return f"lora_unet_{path.replace('.', '_')}"


def _kohya_metadata(model: Model, backbone: StableDiffusion, pairs: list[Pair]) -> dict[str, str]:
    """What programs show of a file, and by which they know its base."""
    layout, around = backbone.layout, backbone.surroundings
    config = layout.configs[layout.family.denoiser]
    velocity = around["scheduler"].config.prediction_type == "v_prediction"
    if layout.family.name == "sdxl":
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif config.get("cross_attention_dim") == 1024:
        version, architecture = "sd_v2", "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
    else:
        version, architecture = "sd_v1", "stable-diffusion-v1"
    rank = Counter(pair.rank for pair in pairs).most_common(1)[0][0]
    alpha = Counter(pair.scale * pair.rank for pair in pairs).most_common(1)[0][0]
    side = int(config["sample_size"]) * 2 ** (len(around["vae"].config.block_out_channels) - 1)
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": version + ("_v" if velocity else ""),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"LoRA of {layout.source.rstrip('/').rpartition('/')[2]}",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "modelspec.resolution": f"{side}x{side}",
    }
    phrase = model.composed.nodes["data"].kwargs.get("instance_prompt")
    return {**found, "modelspec.trigger_phrase": phrase} if phrase else found


def _exported(reference: Reference, file: Path, save: Callable[[Path], None]) -> Exported:
    deviation = reference.write(
        file, save, lambda pipeline, path: pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    )
    return Exported((file,), (f"checked with diffusers: outputs differ by at most {deviation:.2g}",))
