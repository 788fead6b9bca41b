"""Text-to-image fine-tuning: predict the noise, velocity or flow in the noisy latents of captioned pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from lightning.pytorch import LightningDataModule
from torch import Generator, Tensor, nn

from peft_modal.attach import Adapter
from peft_modal.data.seeding import seeded
from peft_modal.errors import ConfigError
from peft_modal.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
from peft_modal.report import Section
from peft_modal.tasks.base import Stage, Task
from peft_modal.tasks.predicting import PredictRequest
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.data import Pictures, Subject
from peft_modal_diffusion.drawing import check_request, draw_request
from peft_modal_diffusion.generation import Sampling, generate, make_class_pictures, side_of
from peft_modal_diffusion.latents import TextCache
from peft_modal_diffusion.measures import Measuring, measure, measures_section
from peft_modal_diffusion.objectives import (
    Density,
    DiffusionObjective,
    FlowObjective,
    FlowWeighting,
    NoisyBatch,
    offset_noise,
    weighted_error,
)
from peft_modal_diffusion.pictures import UNTOUCHED, SampleFolder
from peft_modal_diffusion.surroundings import Surroundings

_PIXELS_AT_ONCE: Final = 2**20
_MOST_AT_ONCE: Final = 48
"""Of pictures to measure, drawn together."""


@dataclass(frozen=True)
class Denoised:
    """A training step's prediction and what it is compared with."""

    predicted: Tensor
    noisy: NoisyBatch
    is_prior: Tensor
    """Which samples belong to the class's own pictures (B,)."""


class TextToImage(Task):
    """The training loss of Stable Diffusion on captioned pictures, with prior preservation where the data has it.

    What is predicted follows the pipeline's scheduler: epsilon, v, the sample, or for Stable Diffusion 3 the flow.
    Samples that the data marks `prior` (DreamBooth: Ruiz et al., 2023, arXiv:2208.12242) count `prior_weight` times in
    a mean of their own.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program.
        head: Supplied by the program; `identity`.
        class_names: Not used; supplied by the program.
        lr: See `Task`; of adapters. Methods that train the network's own tensors want less, 1e-5.
        weight_decay: See `Task`.
        clip_norm: See `Task`.
        min_snr_gamma: Weight samples by their signal-to-noise ratio, clamped here (Hang et al., 2023,
            arXiv:2303.09556); 5 is usual. Null: all alike.
        noise_offset: Strength of a shift of the noise per channel; 0.05 to 0.1 lets a model learn very dark and very
            bright pictures.
        input_perturbation: Strength of additional noise in the input only (Ning et al., 2023, arXiv:2301.11706).
        caption_dropout: Share of training samples whose caption is left out; 0.05 to 0.1 keeps guidance working.
        dream_power: Rectify input and target by the model's error (Zhou et al., 2023, arXiv:2312.00210), with this
            power; costs a second forward pass. Null: off.
        prior_weight: Weight of the loss on prior samples.
        density: How Stable Diffusion 3's noise levels are drawn.
        weighting: How they are weighted.
        precondition_outputs: Whether the flow's error is measured on the sample.
        cache: Encode pictures and captions once and keep the result on disk (`PEFT_MODAL_CACHE`); needs fixed crops.
        prompts: Pictures of these are drawn before training and after every validation, with fixed seeds, and shown in
            the report.
        sample_steps: Steps of the sampler for them.
        guidance: Their classifier-free guidance.
        measure_pictures: After a run, draw so many pictures of the training captions, by the tuned and by the untouched
            model, and compare them with the training pictures: `pictures/fid`, `pictures/kid`, `pictures/clip_score`.
        feature_network: What FID and KID are measured with: `inception` as in papers (torch-fidelity fetches it), or a
            CLIP: `nano`, which is shipped and knows generated pictures only, a folder, or a hub name.
        clip_network: What the CLIP score is measured with: `openai/clip-vit-large-patch14` in papers, or as above.
        prior_prompts: Prompts whose pictures shall stay as they were; `pictures/drift` tells how far they moved.
        options: Other arguments of `Task`.

    Raises:
        ConfigError: The backbone is none of this modality, or an option does not go with its scheduler.
    """

    share_metrics: ClassVar[frozenset[str]] = frozenset({"concept", "colour"})
    compared: ClassVar[tuple[str, ...]] = (
        "pictures/concept", "pictures/colour", "pictures/drift", "pictures/fid", "pictures/clip_score",
    )  # fmt: skip
    balanced: ClassVar[tuple[str, str] | None] = ("pictures/fid", "pictures/clip_score")

    def __init__(
        self,
        backbone: StableDiffusion,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        lr: NonNegativeFloat = 1e-4,
        weight_decay: NonNegativeFloat = 0.01,
        clip_norm: PositiveFloat | None = 1.0,
        min_snr_gamma: PositiveFloat | None = None,
        noise_offset: NonNegativeFloat = 0.0,
        input_perturbation: NonNegativeFloat = 0.0,
        caption_dropout: Share = 0.0,
        dream_power: PositiveFloat | None = None,
        prior_weight: NonNegativeFloat = 1.0,
        density: Density = "logit_normal",
        weighting: FlowWeighting = "none",
        precondition_outputs: bool = True,
        cache: bool = False,
        prompts: list[str] | None = None,
        sample_steps: PositiveInt = 25,
        guidance: NonNegativeFloat = 4.0,
        measure_pictures: NonNegativeInt = 0,
        feature_network: str = "nano",
        clip_network: str = "nano",
        prior_prompts: list[str] | None = None,
        **options: Any,  # noqa: ANN401 — typed by `Task`
    ) -> None:
        del class_names
        if not isinstance(backbone, StableDiffusion):
            raise ConfigError(f"task 'text_to_image' needs backbone 'stable_diffusion', not {type(backbone).__name__}")
        super().__init__(backbone, adapter, head, lr=lr, weight_decay=weight_decay, clip_norm=clip_norm, **options)
        self.noise_offset = noise_offset
        self.input_perturbation = input_perturbation
        self.caption_dropout = caption_dropout
        self.dream_power = dream_power
        self.prior_weight = prior_weight
        self.min_snr_gamma = min_snr_gamma
        self.density: Density = density
        self.weighting: FlowWeighting = weighting
        self.precondition_outputs = precondition_outputs
        self.cache = cache
        self._texts: TextCache | None = None
        self.prompts = tuple(prompts or ())
        self.sampling = Sampling(steps=sample_steps, guidance=guidance)
        self.measuring = Measuring(measure_pictures, tuple(prior_prompts or ()), feature_network, clip_network)
        self._measured: dict[str, float] = {}
        self._objective: DiffusionObjective | FlowObjective | None = None
        self._no_caption: dict[str, Tensor] = {}

    @property
    def surroundings(self) -> Surroundings:
        """The frozen parts around the denoiser."""
        found: Surroundings = self.backbone.surroundings  # type: ignore[assignment]
        return found

    @property
    def objective(self) -> DiffusionObjective | FlowObjective:
        """What the pipeline's scheduler says the denoiser predicts.

        Raises:
            ConfigError: An option does not go with it.
        """
        if self._objective is None:
            scheduler = self.surroundings["scheduler"]
            if hasattr(scheduler, "alphas_cumprod"):
                prediction = scheduler.config.prediction_type
                if self.dream_power is not None and prediction != "epsilon":
                    raise ConfigError(
                        f"task.dream_power goes with epsilon predictions; this pipeline's is {prediction}"
                    )
                self._objective = DiffusionObjective(
                    scheduler.alphas_cumprod, prediction, min_snr_gamma=self.min_snr_gamma
                )
            else:
                for key in ("min_snr_gamma", "dream_power"):
                    if getattr(self, key) is not None:
                        raise ConfigError(f"task.{key} does not go with flow matching; leave it out")
                self._objective = FlowObjective(
                    scheduler.sigmas, scheduler.timesteps, density=self.density, weighting=self.weighting,
                    precondition_outputs=self.precondition_outputs,
                )  # fmt: skip
        return self._objective

    def before_fit(self, data: LightningDataModule) -> None:
        """Refuse what cannot work before anything is written, make pictures of the class, and fill the caches.

        Raises:
            ConfigError: The data's pictures cannot be cached.
        """
        _ = self.objective
        self.measuring.check()
        self.before_test(data)
        device = _device()
        if isinstance(data, Subject):
            self._to(device)
            make_class_pictures(self.backbone, data, self.sampling)  # type: ignore[arg-type]
        if not self.cache:
            return
        if not isinstance(data, Pictures):
            raise ConfigError(
                f"task.cache: the pictures of {type(data).__name__} are drawn anew and cannot be cached; leave it out"
            )
        self._to(device)
        around = self.surroundings
        data.cache_latents(around.encode_images, encoder=around.fingerprint("vae"), dtype="float32")
        if self.backbone.tune == "denoiser":
            encoders: tuple[str, ...] = self.backbone.layout.family.text_encoders  # type: ignore[union-attr,assignment]
            mark = "+".join(around.fingerprint(name) for name in encoders)
            self._texts = TextCache(self._encode_text, encoder=mark, dtype="float32")
            self._texts.fill(data.captions())

    def before_test(self, data: LightningDataModule) -> None:
        """Let pictures be cut to the network's own resolution where no other was asked for."""
        if isinstance(data, Pictures):
            assert isinstance(self.backbone, StableDiffusion)
            data.suit(side_of(self.backbone))

    def _to(self, device: torch.device) -> None:
        self.backbone.to(device)
        for adapter in self.backbone.adapters.values():
            adapter.to(device)
        self.surroundings.to(device)

    def on_fit_start(self) -> None:
        """Bring the frozen parts to the device, too, where they are still needed."""
        if not self.cache or self.prompts:
            self.surroundings.to(self.device)
        super().on_fit_start()
        if self.prompts and not self._samples().has(UNTOUCHED):
            self.adapter.enable(on=False)
            self._draw_samples(UNTOUCHED)
            self.adapter.enable(on=True)

    def _generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        assert isinstance(self.backbone, StableDiffusion)
        return generate(self.backbone, prompts, seeds, self.sampling)

    def on_validation_end(self) -> None:
        """Draw the prompts with what would be saved now."""
        if self.prompts and not self.trainer.sanity_checking:
            self._draw_samples(f"epoch-{self.current_epoch + 1:04d}")
        super().on_validation_end()

    def report_sections(self) -> tuple[Section, ...]:
        """The pictures over time, and what pictures were measured to be."""
        found = (self._samples().section() if self.prompts else None, measures_section(self._measured))
        return (*(section for section in found if section is not None), *super().report_sections())

    def _samples(self) -> SampleFolder:
        return SampleFolder(Path(self.trainer.default_root_dir), self.prompts)

    def _draw_samples(self, column: str) -> None:
        seeds = range(len(self.prompts))
        pictures = self._generate(self.prompts, seeds)
        settings = [self.sampling.settings(prompt, seed) for prompt, seed in zip(self.prompts, seeds, strict=True)]
        self._samples().write(column, pictures, settings)

    def final_figures(self, data: LightningDataModule) -> dict[str, float]:
        """Draw what the data's probes and the configuration ask for, and measure it."""
        self._to(_device())
        assert isinstance(self.backbone, StableDiffusion)
        at_once = min(max(_PIXELS_AT_ONCE // side_of(self.backbone) ** 2, 1), _MOST_AT_ONCE)

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            chunks = range(0, len(prompts), at_once)
            return torch.cat([self._generate(prompts[i : i + at_once], seeds[i : i + at_once]) for i in chunks])

        def draw_untouched(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            self.adapter.enable(on=False)
            try:
                return draw(prompts, seeds)
            finally:
                self.adapter.enable(on=True)

        self._measured = measure(self.measuring, data, draw, draw_untouched)
        return self._measured

    def on_test_start(self) -> None:
        """See `on_fit_start`."""
        self.surroundings.to(self.device)

    def forward(self, batch: Mapping[str, Any]) -> Denoised:
        """Add noise to the batch's latents and let the denoiser predict.

        While training, everything random comes from torch's global generator; else from the samples' keys, so that
        every validation sees the same noise.
        """
        generators = None if self.training else [seeded("denoise", key) for key in batch["key"]]
        latents = self._latents(batch, generators)
        objective = self.objective
        noise = _normal(latents.shape, generators).to(latents)
        if self.noise_offset and self.training:
            noise = offset_noise(noise, self.noise_offset)
        perturbation = None
        if self.input_perturbation and self.training:
            perturbation = self.input_perturbation * torch.randn(latents.shape).to(latents)
        if generators is None:
            time = objective.draw_times(len(latents))
        else:
            time = torch.cat([objective.draw_times(1, generator) for generator in generators])
        noisy = objective(latents, noise, time.to(latents.device), perturbation=perturbation)
        text = self._text(batch, latents.device)
        if self.dream_power is not None and self.training:
            assert isinstance(objective, DiffusionObjective)
            with torch.no_grad():
                predicted = self._predict(noisy, text)
            noisy = objective.dream(noisy, predicted, power=self.dream_power)
        predicted = self._predict(noisy, text)
        if isinstance(objective, FlowObjective):
            predicted = objective.predicted(noisy, predicted, time.to(latents.device))
        prior = batch.get("prior")
        is_prior = torch.zeros(len(latents), dtype=torch.bool) if prior is None else prior
        return Denoised(predicted, noisy, is_prior.to(latents.device))

    def losses(self, batch: Mapping[str, Any], output: Denoised) -> dict[str, Tensor]:
        """Mean weighted squared error, of the data's own samples and of prior samples each."""
        del batch
        error = weighted_error(output.predicted, output.noisy.target, output.noisy.weight)
        is_prior = output.is_prior
        found = {"loss": error[~is_prior].mean()} if not bool(is_prior.all()) else {}
        if bool(is_prior.any()):
            found["prior"] = self.prior_weight * error[is_prior].mean()
        return found

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: Denoised) -> None:
        """The loss is the metric; what pictures look like is told by the report."""

    @classmethod
    def check_request(cls, request: PredictRequest) -> None:
        """Refuse what cannot be drawn, before weights are loaded."""
        check_request(request)

    def predict_with(self, request: PredictRequest) -> list[dict[str, Any]]:
        """Draw pictures of prompts; one row for each."""
        assert isinstance(self.backbone, StableDiffusion)
        self._to(_device())
        return draw_request(self.backbone, request, self.sampling)

    def _predict(self, noisy: NoisyBatch, text: Mapping[str, Tensor]) -> Tensor:
        return self.head(self.backbone({"sample": noisy.noisy, "time": noisy.time, **text}))

    def _latents(self, batch: Mapping[str, Any], generators: list[Generator] | None) -> Tensor:
        if "latent_mean" in batch:
            mean, std = batch["latent_mean"], batch["latent_std"]
        else:
            mean, std = self.surroundings.encode_images(batch["pixels"])
        return mean + std * _normal(mean.shape, generators).to(mean)

    def _text(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """What the denoiser is told beside the latents; of captions that are dropped, that there is none."""
        captions = list(batch["caption"])
        dropped = torch.rand(len(captions)) < self.caption_dropout if self.training else torch.zeros(len(captions)) > 0
        found = self._tokens(captions, dropped) if self.backbone.tune == "denoiser_and_text" else self._states(batch)
        found = {name: value.to(device) for name, value in found.items()}
        if "states" in found and bool(dropped.any()):
            self._no_caption = self._no_caption or self.surroundings.no_caption(1, width=self._text_width)
            gone = dropped.to(device)
            for name, value in self._no_caption.items():
                found[name] = torch.where(gone.view(-1, *(1 for _ in value.shape[1:])), value.to(device), found[name])
        if self.backbone.layout.family.name == "sdxl":  # type: ignore[union-attr]
            found["time_ids"] = self._time_ids(batch).to(device=device, dtype=torch.float32)
        return found

    def _states(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What frozen text encoders make of the captions, by them or from a cache."""
        if "states" in batch:
            return {key: batch[key] for key in ("states", "pooled") if key in batch}
        captions = list(batch["caption"])
        return self._encode_text(captions) if self._texts is None else self._texts(captions)

    def _encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        return self.surroundings.encode_text(captions, width=self._text_width)

    def _tokens(self, captions: list[str], dropped: Tensor) -> dict[str, Tensor]:
        """Tokens for text encoders that are tuned; what a cache says of the captions is no longer true."""
        captions = ["" if gone else caption for gone, caption in zip(dropped.tolist(), captions, strict=True)]
        tokens = self.surroundings.tokenize(captions)
        t5_states = self.surroundings.encode_t5(captions)
        found = tokens if t5_states is None else {**tokens, "t5_states": t5_states}
        return {**found, "captioned": ~dropped} if self.backbone.layout.zeroes_empty else found  # type: ignore[union-attr]

    @property
    def _text_width(self) -> int:
        return int(self.backbone.text_width)  # type: ignore[arg-type]

    def _time_ids(self, batch: Mapping[str, Any]) -> Tensor:
        """SDXL's conditions: original size, crop offset and target size of each picture, each as (rows, columns).

        Data that does not tell them has whole pictures.
        """
        if "original_size" in batch:
            return torch.cat([batch[key] for key in ("original_size", "crop", "target_size")], dim=1)
        if "pixels" in batch:
            size = tuple(batch["pixels"].shape[2:])
        else:
            factor = 2 ** (len(self.surroundings["vae"].config.block_out_channels) - 1)
            size = tuple(factor * side for side in batch["latent_mean"].shape[2:])
        return torch.tensor([(*size, 0, 0, *size)] * len(batch["caption"]))


def _device() -> torch.device:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


def _normal(shape: torch.Size, generators: list[Generator] | None) -> Tensor:
    if generators is None:
        return torch.randn(shape)
    return torch.stack([torch.randn(shape[1:], generator=generator) for generator in generators])
