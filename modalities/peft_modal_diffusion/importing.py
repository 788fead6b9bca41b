"""LoRA files of diffusers and of kohya's scripts, read by diffusers itself: what it makes of them is what they mean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from peft_modal.anatomy import Backbone
from peft_modal.errors import ConfigError, FileFormatError
from peft_modal.hf.files import LoraFolder
from peft_modal.hf.pairs import Pair
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.exporting import DIFFUSERS_NAME
from peft_modal_diffusion.layout import in_one_sentence, quiet

_NAME: Final = "default"


def read_lora_file(path: Path, backbone: Backbone) -> LoraFolder:
    """The pairs of a LoRA file, for the modules of a backbone's network.

    Args:
        path: A `.safetensors` file, or a folder with diffusers' `pytorch_lora_weights.safetensors`.
        backbone: What it is for; its weights do not matter.

    Raises:
        ConfigError: The backbone is no denoiser, or lacks a text encoder that the file adapts.
        FileFormatError: It is no LoRA file that diffusers reads, or not one for this network.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(backbone, StableDiffusion):
        raise ConfigError(f"only 'stable_diffusion' takes LoRA files of diffusers, not {type(backbone).__name__}")
    file = path / DIFFUSERS_NAME if path.is_dir() else path
    _refuse_unreadable(file)
    parts = dict(copy.deepcopy(backbone.network).named_children())
    with quiet():
        modules = _load(file, backbone, parts)
    pairs = tuple(
        _pair(f"{part}.{name}", module)
        for part, network in parts.items()
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer) and _NAME in module.lora_A
    )
    if len(pairs) != modules:
        raise FileFormatError(
            f"'{file}' adapts {modules} modules, of which diffusers finds {len(pairs)} here; it is a LoRA of "
            "another model, or in a layout that diffusers reads in part only"
        )
    return LoraFolder(pairs, {}, {})


def _refuse_unreadable(file: Path) -> None:
    if file.suffix != ".safetensors" or not file.is_file():
        raise FileFormatError(f"'{file}' is no .safetensors file; pickles (.bin, .pt) are never opened")
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"'{file}' is no readable safetensors file ({error})") from error
    if any(name.endswith(".dora_scale") for name in names):
        raise FileFormatError(
            f"'{file}' holds DoRA in kohya's layout (`dora_scale`), of which programs make different things; "
            "export it in diffusers' layout where it was trained"
        )


def _load(file: Path, backbone: StableDiffusion, parts: dict[str, Any]) -> int:
    """Let diffusers load a file into components; gives how many modules it is for.

    Raises:
        ConfigError: It adapts a text encoder that is not among them.
        FileFormatError: diffusers cannot load it.
    """
    import diffusers

    family = backbone.layout.family
    cls = getattr(diffusers, family.pipeline)
    denoiser = parts[family.denoiser]
    options = {"unet_config": denoiser.config} if family.name == "sdxl" else {}
    with in_one_sentence(f"diffusers cannot load '{file}' as a LoRA of this network", FileFormatError):
        found = cls.lora_state_dict(
            str(file.parent), weight_name=file.name, return_lora_metadata=True, use_safetensors=True, **options
        )
        # Of the transformer families there are no alphas beside the tensors.
        state, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
        absent = {key.partition(".")[0] for key in state} - set(parts)
        if absent & set(family.text_encoders):
            raise ConfigError(
                f"backbone.tune: '{file}' adapts the text encoder, too; import it with "
                "--backbone.tune=denoiser_and_text"
            )
        if absent or not state:
            raise FileFormatError(f"'{file}' is no LoRA of a {family.pipeline} in diffusers' layout")
        common = {"adapter_name": _NAME, "metadata": metadata}
        if family.denoiser == "unet":
            cls.load_lora_into_unet(state, network_alphas=alphas, unet=denoiser, **common)
        else:
            cls.load_lora_into_transformer(state, transformer=denoiser, **common)
        for name in set(parts) - {family.denoiser}:
            cls.load_lora_into_text_encoder(
                state, network_alphas=alphas, text_encoder=parts[name], prefix=name, **common
            )  # fmt: skip
    return sum(".lora_A." in key or key.endswith(".down.weight") for key in state)


def _pair(holder: str, layer: Any) -> Pair:  # noqa: ANN401 — peft's own class
    vectors = layer.lora_magnitude_vector
    magnitude = vectors[_NAME].weight.detach() if _NAME in vectors else None
    return Pair(
        holder, "weight", layer.lora_A[_NAME].weight.detach(), layer.lora_B[_NAME].weight.detach(),
        float(layer.scaling[_NAME]), magnitude,
    )  # fmt: skip
