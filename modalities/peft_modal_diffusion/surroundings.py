"""What stands around the denoiser: autoencoder, tokenizers, text encoders and scheduler, frozen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.errors import WeightsError
from peft_modal.files import fingerprint
from peft_modal_diffusion.families import Family
from peft_modal_diffusion.layout import Layout, open_part, opened

T5_LENGTH: Final = 256
"""Tokens of T5 that Stable Diffusion 3 reads behind CLIP's: what its pipeline in diffusers takes by itself."""


class Surroundings:
    """The frozen parts of a pipeline; empty until `open`.

    Args:
        layout: Where they come from.
        t5: Whether the T5 encoder is opened where there is one; without it its place is taken by zeros.
    """

    def __init__(self, layout: Layout, *, t5: bool = True) -> None:
        self.layout = layout
        self.t5 = layout.family.t5 if t5 and layout.has_t5 else None
        """Name of the T5 encoder; None: its place is taken by zeros."""
        self.parts: dict[str, Any] = {}
        """By component name, as `diffusers` calls them."""

    def open(self, own: Mapping[str, nn.Module]) -> None:
        """Open every part.

        Args:
            own: Parts that the backbone's network holds itself.

        Raises:
            WeightsError: One is missing or corrupt.
        """
        family, layout = self.layout.family, self.layout
        parts: dict[str, Any] = dict(own)
        for name in family.text_encoders:
            if name not in parts:
                class_name = type(text_encoder_of(layout, name, on_meta=True)).__name__
                parts[name] = open_part(layout, name, class_name, library="transformers")
            parts |= _tokenizer(layout, name, parts[name], "CLIPTokenizer")
        if self.t5 is not None:
            parts[self.t5] = open_part(layout, self.t5, "T5EncoderModel", library="transformers")
            parts |= _tokenizer(layout, self.t5, parts[self.t5], "T5Tokenizer")
        parts["vae"] = open_part(layout, "vae", "AutoencoderKL")
        parts |= _schedulers(layout)
        for name, part in parts.items():
            if isinstance(part, nn.Module) and name not in own:
                part.requires_grad_(requires_grad=False).eval()
        self.parts = parts

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 — the libraries' own classes
        """A part.

        Raises:
            WeightsError: The weights have none, or were not loaded.
        """
        if name not in self.parts:
            raise WeightsError(
                f"there is no '{name}' around this denoiser: they were not loaded, or belong to a size for measuring"
            )
        return self.parts[name]

    def fingerprint(self, name: str) -> str:
        """A hash of a part's weights with its configuration, for the names of what is cached of it."""
        config = self[name].config
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        text = json.dumps(settings, sort_keys=True, default=str)
        return fingerprint(self[name].state_dict())[:32] + hashlib.sha256(text.encode()).hexdigest()[:16]

    def to(self, device: torch.device) -> None:
        """Move what has weights."""
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                part.to(device)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Tokens of each text encoder, padded and cut to its length: `ids`, `ids_2` (B, L) int64."""
        found = {}
        for name in self.layout.family.text_encoders:
            tokenizer = self[name.replace("text_encoder", "tokenizer")]
            ids = tokenizer(
                list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            ).input_ids  # fmt: skip
            found[name.replace("text_encoder", "ids")] = ids
        return found

    def too_long(self, caption: str) -> bool:
        """Whether a caption loses words."""
        return any(
            len(self[name](caption).input_ids) > self[name].model_max_length for name in self.layout.family.tokenizers
        )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str], *, width: int) -> dict[str, Tensor]:
        """What the denoiser reads of captions: `states` (B, L, width), and `pooled` (B, P) where the family has it.

        Args:
            captions: The captions.
            width: Width of the denoiser's text input; SD 3 pads to it.
        """
        family, tokens = self.layout.family, self.tokenize(captions)
        found = []
        for name in family.text_encoders:
            encoder = self[name]
            device = next(encoder.parameters()).device
            found.append(states_of(encoder, tokens[name.replace("text_encoder", "ids")].to(device), family))
        states, pooled = join_states(found, family, width, self.encode_t5(captions))
        return {"states": states} if pooled is None else {"states": states, "pooled": pooled}

    @torch.no_grad()
    def encode_t5(self, captions: Sequence[str]) -> Tensor | None:
        """States of the T5 encoder (B, `T5_LENGTH`, D); None without one."""
        if self.t5 is None:
            return None
        tokenizer, encoder = self[self.t5.replace("text_encoder", "tokenizer")], self[self.t5]
        ids = tokenizer(
            list(captions), padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        # As the pipeline does: padding is attended to.
        states: Tensor = encoder(ids.to(encoder.device))[0]
        return states

    def no_caption(self, count: int, *, width: int) -> dict[str, Tensor]:
        """What the denoiser reads of `count` samples without a caption, where guidance starts; see `encode_text`."""
        found = self.encode_text([""] * count, width=width)
        return {key: torch.zeros_like(value) for key, value in found.items()} if self.layout.zeroes_empty else found

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents' posterior, (B, C, h, w) each, of pixels in -1..1."""
        vae = self["vae"]
        # SDXL's autoencoder overflows in float16.
        with torch.autocast(vae.device.type, enabled=False):
            posterior = vae.encode(pixels.to(next(vae.parameters()))).latent_dist
        shift, scale = self._shift(posterior.mean), self._scale(posterior.mean)
        return (posterior.mean - shift) * scale, posterior.std * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0..1 of scaled latents."""
        vae = self["vae"]
        raw = latents / self._scale(latents) + self._shift(latents)
        with torch.autocast(vae.device.type, enabled=False):
            return (vae.decode(raw.to(next(vae.parameters()))).sample / 2 + 0.5).clamp(0, 1)

    def _scale(self, like: Tensor) -> Tensor:
        config = self["vae"].config
        factor = torch.tensor(float(config.scaling_factor)).to(like)
        std = getattr(config, "latents_std", None)
        return factor if std is None else factor / torch.tensor(std).to(like).view(1, -1, 1, 1)

    def _shift(self, like: Tensor) -> Tensor:
        config = self["vae"].config
        mean = getattr(config, "latents_mean", None)
        if mean is not None:
            return torch.tensor(mean).to(like).view(1, -1, 1, 1)
        return torch.tensor(float(getattr(config, "shift_factor", None) or 0.0)).to(like)


def text_encoder_of(layout: Layout, name: str, *, on_meta: bool = False) -> nn.Module:
    """A CLIP text encoder with random weights; with projection where the family uses pooled states of it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = {key: value for key, value in layout.configs[name].items() if not key.startswith("_")}
    projects = layout.family.name == "sd3" or (layout.family.name == "sdxl" and name == "text_encoder_2")
    cls = CLIPTextModelWithProjection if projects else CLIPTextModel
    with torch.device("meta" if on_meta else torch.get_default_device()):
        encoder: nn.Module = cls(CLIPTextConfig(**config))
        return encoder.eval()


def uses_penultimate_only(encoder: nn.Module, family: Family) -> bool:
    """Whether nothing behind the penultimate layer is read: no last state, and no pooled one."""
    return family.name != "sd" and getattr(encoder, "text_projection", None) is None


def states_of(encoder: nn.Module, ids: Tensor, family: Family) -> tuple[Tensor, Tensor | None]:
    """States (B, L, D) that a family takes from one encoder, and the projected pooled state (B, P) where it has one."""
    if family.name == "sd":
        return encoder(ids).last_hidden_state, None
    # The penultimate layer, without the final norm: what the last layer is given. `output_hidden_states` would show it
    # before hooks that were hung later have changed it.
    body: Any = encoder.get_submodule("text_model") if hasattr(encoder, "text_model") else encoder
    given = _Input()
    handle = body.encoder.layers[-1].register_forward_pre_hook(given, prepend=True, with_kwargs=True)
    try:
        out = encoder(ids)
    finally:
        handle.remove()
    return given.tensor, getattr(out, "text_embeds", None)


class _Input:
    """A hook that keeps what a module is given."""

    tensor: Tensor

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.tensor = args[0] if args else kwargs["hidden_states"]


def join_states(
    found: Sequence[tuple[Tensor, Tensor | None]], family: Family, width: int, t5_states: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What the denoiser reads of all encoders together."""
    states = torch.cat([state for state, _ in found], dim=-1)
    pooled = [vector for _, vector in found if vector is not None]
    if family.name == "sd3":
        states = functional.pad(states, (0, width - states.shape[-1]))
        if t5_states is None:
            t5_states = states.new_zeros(len(states), T5_LENGTH, width)
        states = torch.cat([states, t5_states], dim=1)
    return states, torch.cat(pooled, dim=-1) if pooled else None


def _tokenizer(layout: Layout, text_encoder: str, encoder: Any, class_name: str) -> dict[str, Any]:  # noqa: ANN401
    """The tokenizer of a text encoder, by its component name.

    Raises:
        WeightsError: It is missing, or has more tokens than the encoder.
    """
    name = text_encoder.replace("text_encoder", "tokenizer")
    tokenizer = open_part(layout, name, class_name, library="transformers")
    where = f"backbone.weights: '{name}' of '{layout.source}'"
    # transformers makes an empty one where there are no files.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise WeightsError(f"{where} has no words: it is missing or incomplete")
    if len(tokenizer) > encoder.config.vocab_size:
        raise WeightsError(
            f"{where} has {len(tokenizer)} tokens, but its text encoder reads {encoder.config.vocab_size}"
        )
    return {name: tokenizer}


def _schedulers(layout: Layout) -> dict[str, Any]:
    """`scheduler`, whose noise levels training follows, and `sampler`, which the pipeline's own file names.

    Raises:
        WeightsError: The file is missing, or names no scheduler of diffusers.
    """
    import diffusers

    training = "FlowMatchEulerDiscreteScheduler" if layout.family.name == "sd3" else "DDPMScheduler"
    scheduler = open_part(layout, "scheduler", training)
    with opened(layout.source, "scheduler"):
        config, _ = scheduler.load_config(layout.source, subfolder="scheduler", return_unused_kwargs=True)
        sampler = getattr(diffusers, config.get("_class_name", training), None)
    if sampler is None:
        raise WeightsError(f"'{layout.source}': the scheduler '{config['_class_name']}' is none of diffusers")
    return {"scheduler": scheduler, "sampler": sampler.from_config(config)}
