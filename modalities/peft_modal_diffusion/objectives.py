"""What a denoiser is trained to predict, and how each sample counts: pure functions of latents, noise and time.

Shapes: latents z, noise and predictions are (B, C, H, W); everything per sample is (B,), float32.

Sources: Ho et al., DDPM, 2020, arXiv:2006.11239; Salimans and Ho, v-prediction, 2022, arXiv:2202.00512; Hang et al.,
Min-SNR, 2023, arXiv:2303.09556; Esser et al., SD3, 2024, arXiv:2403.03206; Zhou et al., DREAM, 2023, arXiv:2312.00210.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from peft_modal.errors import ConfigError

Prediction = Literal["epsilon", "v_prediction", "sample"]
Density = Literal["logit_normal", "mode", "uniform"]
FlowWeighting = Literal["none", "sigma_sqrt", "cosmap"]

_MODE_SCALE = 1.29


@dataclass(frozen=True)
class NoisyBatch:
    """Inputs and target of one training step."""

    noisy: Tensor
    """z_t."""
    target: Tensor
    time: Tensor
    """What the denoiser is told, (B,)."""
    weight: Tensor
    """Factor of each sample's loss, (B,)."""


class DiffusionObjective:
    """Discrete-time diffusion: z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps.

    Args:
        alphas_cumprod: abar of every training time step, (T,), from the pipeline's scheduler.
        prediction: What the denoiser predicts, from the scheduler's `prediction_type`.
        min_snr_gamma: Weight samples by min(snr, gamma) / snr (epsilon), / (snr + 1) (v), or min(snr, gamma) (sample).
            None: all count alike.

    Raises:
        ConfigError: The prediction is unknown, or min-SNR weights are undefined for this schedule.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction, *, min_snr_gamma: float | None = None) -> None:
        if prediction not in {"epsilon", "v_prediction", "sample"}:
            raise ConfigError(
                f"the scheduler's prediction_type '{prediction}' is none of epsilon, v_prediction, sample"
            )
        self.alphas_cumprod = alphas_cumprod.to(torch.float32)
        self.prediction = prediction
        self.min_snr_gamma = min_snr_gamma
        if min_snr_gamma is not None and prediction == "epsilon" and float(self.alphas_cumprod.min()) <= 0.0:
            raise ConfigError(
                "task.min_snr_gamma: this scheduler ends at zero signal (zero terminal SNR), where the weight of an "
                "epsilon prediction is a division by zero; leave it out, or use a v-prediction model"
            )

    def draw_times(self, count: int, generator: Generator | None = None) -> Tensor:
        """Integer time steps, uniform over the schedule, (count,)."""
        return torch.randint(0, len(self.alphas_cumprod), (count,), generator=generator)

    def __call__(
        self, latents: Tensor, noise: Tensor, time: Tensor, *, perturbation: Tensor | None = None
    ) -> NoisyBatch:
        """Noisy latents, target and weights.

        Args:
            latents: z, scaled as the denoiser expects.
            noise: eps; offset noise is part of it and so of the target.
            time: Integer time steps.
            perturbation: Added to the noise that builds z_t, not to the target (input perturbation).
        """
        abar = self.alphas_cumprod.to(latents.device)[time]
        signal, sigma = _per_sample(abar.sqrt(), latents), _per_sample((1 - abar).sqrt(), latents)
        added = noise if perturbation is None else noise + perturbation
        noisy = signal * latents + sigma * added
        targets = {"epsilon": lambda: noise, "sample": lambda: latents,
                   "v_prediction": lambda: signal * noise - sigma * latents}  # fmt: skip
        return NoisyBatch(noisy, targets[self.prediction](), time, self.weights(time).to(latents.device))

    def weights(self, time: Tensor) -> Tensor:
        """Min-SNR weight of each sample, ones without it."""
        if self.min_snr_gamma is None:
            return torch.ones(len(time))
        abar = self.alphas_cumprod[time.cpu()]
        snr = abar / (1 - abar)
        clamped = snr.clamp(max=self.min_snr_gamma)
        if self.prediction == "epsilon":
            return clamped / snr
        return clamped / (snr + 1) if self.prediction == "v_prediction" else clamped

    def dream(self, batch: NoisyBatch, predicted: Tensor, *, power: float) -> NoisyBatch:
        """Rectify input and target by the model's own error (DREAM); for epsilon predictions.

        Args:
            batch: What the model saw.
            predicted: Its prediction, without gradient.
            power: p of lambda = sqrt(1 - abar)^p.
        """
        abar = self.alphas_cumprod.to(batch.noisy.device)[batch.time]
        sigma = _per_sample((1 - abar).sqrt(), batch.noisy)
        delta = sigma**power * (batch.target - predicted)
        return NoisyBatch(batch.noisy + sigma * delta, batch.target + delta, batch.time, batch.weight)


class FlowObjective:
    """Rectified flow as Stable Diffusion 3 trains it: z_t = (1 - sigma) z + sigma eps, sigma from the scheduler.

    Args:
        sigmas: Noise level of each training step, shifted as the scheduler does, (T,) or (T + 1,).
        timesteps: What the denoiser is told for each, (T,).
        density: How steps are drawn.
        logit_mean: Mean of the normal below the sigmoid of `logit_normal`.
        logit_std: Its standard deviation.
        weighting: Weight by sigma.
        precondition_outputs: Compare x0 = z_t - sigma * prediction with z, which counts an error of the velocity
            sigma^2 times; else the velocity eps - z itself.
    """

    def __init__(
        self, sigmas: Tensor, timesteps: Tensor, *, density: Density = "logit_normal", logit_mean: float = 0.0,
        logit_std: float = 1.0, weighting: FlowWeighting = "none", precondition_outputs: bool = True,
    ) -> None:  # fmt: skip
        self.sigmas = sigmas.to(torch.float32)
        self.timesteps = timesteps.to(torch.float32)
        self.density = density
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.weighting = weighting
        self.precondition_outputs = precondition_outputs

    def draw_times(self, count: int, generator: Generator | None = None) -> Tensor:
        """Positions in the schedule, (count,)."""
        if self.density == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.randn(count, generator=generator))
        else:
            u = torch.rand(count, generator=generator)
            if self.density == "mode":
                u = 1 - u - _MODE_SCALE * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        last = len(self.timesteps) - 1
        return (u * len(self.timesteps)).long().clamp(0, last)

    def __call__(
        self, latents: Tensor, noise: Tensor, time: Tensor, *, perturbation: Tensor | None = None
    ) -> NoisyBatch:
        """Noisy latents, target and weights; see `DiffusionObjective`."""
        sigma = self.sigmas.to(latents.device)[time]
        level = _per_sample(sigma, latents)
        added = noise if perturbation is None else noise + perturbation
        noisy = (1 - level) * latents + level * added
        target = latents if self.precondition_outputs else noise - latents
        return NoisyBatch(noisy, target, self.timesteps.to(latents.device)[time], self.weights(sigma))

    def predicted(self, batch: NoisyBatch, output: Tensor, time: Tensor) -> Tensor:
        """What is compared with the target."""
        if not self.precondition_outputs:
            return output
        return batch.noisy - _per_sample(self.sigmas.to(output.device)[time], output) * output

    def weights(self, sigma: Tensor) -> Tensor:
        """Weight of each sample by its noise level."""
        if self.weighting == "sigma_sqrt":
            return sigma**-2.0
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return torch.ones_like(sigma)


def offset_noise(noise: Tensor, strength: float, generator: Generator | None = None) -> Tensor:
    """Noise with a random shift per sample and channel; the shifted noise is what is predicted, too."""
    shift = torch.randn(*noise.shape[:2], 1, 1, generator=generator)
    return noise + strength * shift.to(noise)


def weighted_error(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error in float32, mean per sample times its weight, (B,)."""
    error = (predicted.float() - target.float()) ** 2
    return error.flatten(1).mean(1) * weight


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *(1 for _ in like.shape[1:]))
