"""Stable Diffusion as a backbone: the denoiser with its anatomy, and the frozen parts around it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peft_modal.anatomy import AnatomyBuilder, Backbone, Context, Features, FeatureSpec, FrozenMode
from peft_modal.errors import ConfigError, MergeError
from peft_modal.files import making_folder
from peft_modal_diffusion.anatomy import (
    describe_joint_transformer,
    describe_text_encoder,
    describe_unet,
    text_layout,
)
from peft_modal_diffusion.layout import NANO, Layout, layout_of_size, open_part, open_pipeline, quiet, read_layout
from peft_modal_diffusion.surroundings import (
    Surroundings,
    join_states,
    states_of,
    text_encoder_of,
    uses_penultimate_only,
)

Tuned = Literal["denoiser", "denoiser_and_text"]


class StableDiffusion(Backbone):
    """The denoiser of Stable Diffusion 1.x, 2.x, XL and 3.

    Rombach et al., 2022, arXiv:2112.10752; Podell et al., 2023, arXiv:2307.01952; Esser et al., 2024, arXiv:2403.03206.

    `network` holds what a method may act on: the U-Net or transformer, and with `tune: denoiser_and_text` the CLIP text
    encoders. Autoencoder, tokenizers, scheduler and the other text encoders stay outside of it, in `surroundings`, and
    are never trained.

    Args:
        weights: `nano` (shipped), a diffusers pipeline folder, a hub name, or `random`: a random denoiser between the
            parts of the nano pipeline.
        tune: What methods may act on.
        architecture: A published size (`sd15`, `sd2`, `sdxl`, `sd3`), or a toy of each family (`toy`, `toy_xl`,
            `toy_sd3`, `toy_sd35`), for `random` weights. It has nothing around it: for measuring, not for pictures.
        denoiser: Changes of the denoiser's configuration, with `random` weights.
        t5: Whether Stable Diffusion 3's T5 encoder reads captions, too, where the weights have one: 4.7 billion
            parameters that the network can do without.
        frozen_mode: See `Backbone`.
        init_seed: Seed of random weights.

    Raises:
        ConfigError: `architecture` or `denoiser` is given for weights that have their own.
        WeightsError: There is no such pipeline, or its family is not supported.
    """

    modality: ClassVar[str] = "diffusion"
    merged_is_folder: ClassVar[bool] = True

    def __init__(
        self,
        *,
        weights: str = NANO,
        tune: Tuned = "denoiser",
        architecture: str | None = None,
        denoiser: dict[str, Any] | None = None,
        t5: bool = True,
        frozen_mode: FrozenMode = "eval",
        init_seed: int = 0,
    ) -> None:
        if weights != "random" and (architecture or denoiser):
            key = "architecture" if architecture else "denoiser"
            raise ConfigError(f"backbone.{key}: '{weights}' has its own sizes; this key goes with weights=random")
        if weights != "random":
            layout = read_layout(weights)
        else:
            layout = layout_of_size(architecture) if architecture else read_layout(NANO)
        family = layout.family
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            network = _network(layout, tune, denoiser or {})
        b = AnatomyBuilder(network, stack=family.denoiser)
        texts = family.text_encoders if tune == "denoiser_and_text" else ()
        for name in texts:
            encoder = network.get_submodule(name)
            describe_text_encoder(b, encoder, name, _stack(name), penultimate=uses_penultimate_only(encoder, family))
        describe = describe_unet if family.denoiser == "unet" else describe_joint_transformer
        describe(b, network.get_submodule(family.denoiser), family.denoiser)
        anatomy = b.build(layouts={_stack(name): text_layout() for name in texts})
        super().__init__(network, anatomy, frozen_mode=frozen_mode)
        self.weights = weights
        self.layout = layout
        self.tune: Tuned = tune
        self._texts = texts
        # Not registered: it is no part of the network that an adapter belongs to.
        self.__dict__["surroundings"] = Surroundings(layout, t5=t5)

    surroundings: Surroundings

    @classmethod
    def tiny(cls) -> StableDiffusion:
        """A U-Net and a text encoder at toy size, both tuned, with random weights and nothing around them."""
        return cls(weights="random", architecture="toy", tune="denoiser_and_text")

    def load_weights(self) -> None:
        """Fill the network, and open the parts around it.

        Raises:
            WeightsError: A part is missing, corrupt, or of another architecture.
        """
        family = self.layout.family
        for name in (*self._texts, family.denoiser):
            if self.weights == "random" and name == family.denoiser:
                continue
            is_denoiser = name == family.denoiser
            class_name = family.denoiser_class if is_denoiser else self._text_class(name)
            library = "diffusers" if is_denoiser else "transformers"
            part = open_part(self.layout, name, class_name, library=library)
            # Assigned, not copied: the random values are freed one by one.
            self.network.get_submodule(name).load_state_dict(part.state_dict(), assign=True)
        self.network.requires_grad_(requires_grad=False)
        if self.layout.source:
            own = {name: self.network.get_submodule(name) for name in self._texts}
            self.surroundings.open(own)

    def _text_class(self, name: str) -> str:
        return type(self.network.get_submodule(name)).__name__

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net or transformer."""
        return self.network.get_submodule(self.layout.family.denoiser)

    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """The denoiser's output (B, C, H, W) as `tokens`.

        Args:
            batch: `sample` (B, C, H, W), `time` (B,); the text as `states` (B, L, D) and where the family has them
                `pooled` (B, P) and `time_ids` (B, 6), or, where text encoders are tuned, as `ids` of each of them:
                `ids`, `ids_2` (B, L), with `t5_states` (B, L, D) where there is a T5 encoder, and `captioned` (B,) bool
                where the family reads zeros for no caption.
            context: Gets `time`.
        """
        context.put("time", batch["time"])
        return Features(denoise(self.layout, dict(self.network.named_children()), batch), None)

    @property
    def text_width(self) -> int:
        """Width of the text that the denoiser reads."""
        return _text_width(dict(self.denoiser.config))  # type: ignore[arg-type]

    def example_batch(self, batch_size: int = 2) -> dict[str, Any]:
        """Random latents, times and text."""
        generator = torch.Generator().manual_seed(0)
        denoiser: Any = self.denoiser
        family, config = self.layout.family, dict(denoiser.config)
        side = int(config["sample_size"])
        batch: dict[str, Any] = {
            "sample": torch.randn(batch_size, int(config["in_channels"]), side, side, generator=generator),
            "time": torch.randint(0, 1000, (batch_size,), generator=generator),
        }
        if self._texts:
            for name in self._texts:
                encoder: Any = self.network.get_submodule(name)
                text = encoder.config
                length = int(text.max_position_embeddings)
                ids = torch.randint(1, int(text.vocab_size) - 1, (batch_size, length), generator=generator)
                # Methods that give words a meaning take the last ones of the table where there is no tokenizer.
                ids[:, 1] = int(text.vocab_size) - 2
                ids[:, -1] = int(text.eos_token_id)
                batch[_ids(name)] = ids
        else:
            batch["states"] = torch.randn(batch_size, 8, self.text_width, generator=generator)
            if family.name == "sd3":
                batch["pooled"] = torch.randn(batch_size, int(config["pooled_projection_dim"]), generator=generator)
            if family.name == "sdxl":
                width = int(config["projection_class_embeddings_input_dim"]) - 6 * int(
                    config["addition_time_embed_dim"]
                )
                batch["pooled"] = torch.randn(batch_size, width, generator=generator)
        if family.name == "sdxl":
            batch["time_ids"] = torch.full((batch_size, 6), float(side))
        return {key: value.to(self.device) for key, value in batch.items()}

    def feature_spec(self) -> FeatureSpec:
        """Channels of the output; it is a picture, not the tokens of a stack."""
        return replace(super().feature_spec(), layout=None)

    @property
    def feature_width(self) -> int:
        """Channels of the denoiser's output."""
        return int(self.denoiser.config["out_channels"])  # type: ignore[index]

    def architecture(self) -> dict[str, Any]:
        """A pipeline folder has sizes of its own."""
        return {"architecture": None, "denoiser": None}

    def save_merged(self, path: Path, state: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Write a complete pipeline, as diffusers does: with what is around the denoiser, all in one type.

        Raises:
            MergeError: There is nothing around the denoiser.
            WriteError: It cannot be written.
        """
        del document  # a folder of diffusers says of itself what diffusers reads
        if not self.layout.source:
            raise MergeError(
                f"a denoiser of a size for measuring has no pipeline around it, so '{path}' cannot be written"
            )
        dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        with making_folder(path) as folder, quiet():
            own = {name: copy.deepcopy(part).to(dtype) for name, part in self.network.named_children()}
            open_pipeline(self.layout, dtype=dtype, **own).save_pretrained(folder)

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Compute the denoiser's blocks again during backward instead of keeping their activations.

        Those of text encoders are kept: captions are short, and transformers does it in training mode only, in which a
        frozen network is not.
        """
        denoiser: Any = self.denoiser
        (denoiser.enable_gradient_checkpointing if enabled else denoiser.disable_gradient_checkpointing)()


def denoise(layout: Layout, parts: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> Tensor:
    """What a denoiser makes of a batch (B, C, H, W).

    Args:
        layout: Says what it reads.
        parts: The denoiser, and the text encoders where the batch holds tokens, by their names in a pipeline.
        batch: See `StableDiffusion.extract`.
    """
    family = layout.family
    states, pooled = batch.get("states"), batch.get("pooled")
    # Where text encoders are tuned, what was made of the captions before is no longer true.
    if all(name in parts and _ids(name) in batch for name in family.text_encoders):
        found = [states_of(parts[name], batch[_ids(name)], family) for name in family.text_encoders]
        states, pooled = join_states(
            found, family, _text_width(layout.configs[family.denoiser]), batch.get("t5_states")
        )
        if "captioned" in batch:
            states = states * batch["captioned"][:, None, None]
            pooled = None if pooled is None else pooled * batch["captioned"][:, None]
    denoiser, sample, time = parts[family.denoiser], batch["sample"], batch["time"]
    if family.name == "sd3":
        return denoiser(sample, encoder_hidden_states=states, pooled_projections=pooled, timestep=time).sample
    added = {"text_embeds": pooled, "time_ids": batch["time_ids"]} if family.name == "sdxl" else None
    return denoiser(sample, time, encoder_hidden_states=states, added_cond_kwargs=added).sample


def _text_width(config: Mapping[str, Any]) -> int:
    return int(config.get("joint_attention_dim", config.get("cross_attention_dim", 0)))


def _network(layout: Layout, tune: Tuned, changes: Mapping[str, Any]) -> nn.Module:
    import diffusers

    family = layout.family
    network = nn.Module()
    if tune == "denoiser_and_text":
        for name in family.text_encoders:
            network.add_module(name, text_encoder_of(layout, name))
    cls = getattr(diffusers, family.denoiser_class)
    config = {key: value for key, value in layout.configs[family.denoiser].items() if not key.startswith("_")}
    network.add_module(family.denoiser, cls(**{**config, **changes}))
    return network


def _ids(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "ids")


def _stack(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "text")


def ids_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Batch keys of the tokens of text encoders."""
    return tuple(_ids(name) for name in names)
