"""What a denoiser is trained to predict, against the formulas of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from toy_training import latent_batch, make_task, total

from peft_modal.errors import ConfigError
from peft_modal.methods.full import Full
from peft_modal_diffusion import text_to_image
from peft_modal_diffusion.objectives import DiffusionObjective, FlowObjective, offset_noise, weighted_error

Folders = Callable[[str], Path]
STEPS = torch.tensor([0, 500, 999])
RATE = 0.1


def alphas() -> Tensor:
    """abar of Stable Diffusion's schedule, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def tensors(*shape: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, Tensor], None]:
    """Let a task take this noise and these times in place of random ones."""

    def fix(noise: Tensor, time: Tensor) -> None:
        monkeypatch.setattr(text_to_image, "_normal", lambda _shape, _generators: noise)
        for objective in (DiffusionObjective, FlowObjective):
            monkeypatch.setattr(objective, "draw_times", lambda *_arguments: time)

    return fix


# One step of training equals the formula.


def diffusion_loss(denoiser: Callable[..., Tensor], z: Tensor, eps: Tensor, t: Tensor, prediction: str) -> Tensor:
    abar = alphas().float()[t].view(-1, 1, 1, 1)
    predicted = denoiser(abar.sqrt() * z + (1 - abar).sqrt() * eps, t)
    target = {"epsilon": eps, "sample": z, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * z}[prediction]
    return ((predicted - target) ** 2).mean()


def flow_loss(denoiser: Callable[..., Tensor], z: Tensor, eps: Tensor, t: Tensor, *, precondition: bool) -> Tensor:
    shift, linear = 3.0, torch.linspace(1000, 1, 1000)[t] / 1000
    sigma = shift * linear / (1 + (shift - 1) * linear)
    level = sigma.view(-1, 1, 1, 1)
    z_t = (1 - level) * z + level * eps
    predicted = denoiser(z_t, 1000 * sigma)
    return ((z_t - level * predicted - z) ** 2).mean() if precondition else ((predicted - (eps - z)) ** 2).mean()


def assert_one_step_equals(
    folder: Path, network: torch.nn.Module, loss: Callable[..., Tensor], **options: object
) -> None:
    """Let the product and `loss` make one SGD step each with the same noise and times, which are 0, 500 and 999."""
    task = make_task(folder, method=Full(), **options)
    batch = latent_batch(["a red sun", "a cat", "sks"])
    noise = tensors(3, 4, 8, 8, count=1)[0]
    text = task.surroundings.encode_text(batch["caption"], width=task.backbone.text_width)

    ours = task.adapter.named_trained()
    total(task, batch).backward()
    with torch.no_grad():
        for parameter in ours.values():
            parameter.sub_(RATE * parameter.grad)

    theirs = dict(network.named_parameters())
    gradients = torch.autograd.grad(loss(network, text, batch["latent_mean"], noise, STEPS), list(theirs.values()))
    kind = task.backbone.layout.family.denoiser
    moved = 0.0
    for (name, parameter), gradient in zip(theirs.items(), gradients, strict=True):
        expected = parameter.detach() - RATE * gradient
        torch.testing.assert_close(ours[f"backbone.{kind}.{name}"].detach(), expected, rtol=0, atol=1e-6)
        moved = max(moved, float((RATE * gradient).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_one_step_of_diffusion_equals_the_formula(toy_folders: Folders, fixed, prediction: str) -> None:
    fixed(tensors(3, 4, 8, 8, count=1)[0], STEPS)
    unet = diffusers.UNet2DConditionModel.from_pretrained(toy_folders("toy"), subfolder="unet")

    def loss(unet, text, z, eps, t) -> Tensor:
        return diffusion_loss(lambda z_t, t: unet(z_t, t, text["states"]).sample, z, eps, t, prediction)

    assert_one_step_equals(toy_folders("toy"), unet, loss, scheduler={"prediction_type": prediction})


@pytest.mark.parametrize("precondition", [True, False])
def test_one_step_of_flow_equals_the_formula(toy_folders: Folders, fixed, precondition: bool) -> None:
    fixed(tensors(3, 4, 8, 8, count=1)[0], STEPS)
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(toy_folders("toy_sd3"), subfolder="transformer")

    def loss(transformer, text, z, eps, t) -> Tensor:
        def denoise(z_t: Tensor, time: Tensor) -> Tensor:
            return transformer(z_t, text["states"], text["pooled"], time).sample

        return flow_loss(denoise, z, eps, t, precondition=precondition)

    assert_one_step_equals(toy_folders("toy_sd3"), transformer, loss, precondition_outputs=precondition)


# Noise.


def test_offset_noise_shifts_every_channel_and_becomes_the_target() -> None:
    noise, z = tensors(2, 4, 8, 8, count=2)
    shifted = offset_noise(noise, 0.1, torch.Generator().manual_seed(1))
    shift = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(shifted - noise, (0.1 * shift).expand_as(noise), rtol=0, atol=1e-6)

    batch = DiffusionObjective(alphas(), "epsilon")(z, shifted, torch.tensor([10, 900]))
    assert torch.equal(batch.target, shifted)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_input_perturbation_changes_the_input_and_not_the_target(kind: str) -> None:
    noise, z, more = tensors(2, 4, 8, 8, count=3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "flow":
        objective = FlowObjective(scheduler.sigmas, scheduler.timesteps, precondition_outputs=False)
        level = scheduler.sigmas[torch.tensor([10, 900])]
    else:
        objective = DiffusionObjective(alphas(), kind)
        level = (1 - alphas().float()[torch.tensor([10, 900])]).sqrt()
    plain, perturbed = (objective(z, noise, torch.tensor([10, 900]), perturbation=p) for p in (None, 0.1 * more))

    assert torch.equal(plain.target, perturbed.target)
    added = level.view(-1, 1, 1, 1) * 0.1 * more
    torch.testing.assert_close(perturbed.noisy - plain.noisy, added, rtol=0, atol=1e-6)


# Weights.


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_at_both_ends_and_in_the_middle(prediction: str) -> None:
    abar = alphas()[STEPS]
    snr = abar / (1 - abar)
    clamped = torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64))
    expected = {"epsilon": clamped / snr, "v_prediction": clamped / (snr + 1), "sample": clamped}[prediction]
    objective = DiffusionObjective(alphas(), prediction, min_snr_gamma=5.0)

    torch.testing.assert_close(objective.weights(STEPS).double(), expected, rtol=3e-4, atol=0)
    z, noise = tensors(3, 4, 2, 2, count=2)
    assert torch.equal(objective(z, noise, STEPS).weight, objective.weights(STEPS))
    # At t = 0 the clamp acts, at t = 999 it does not.
    assert snr[0] > 5 > snr[2]
    assert torch.equal(DiffusionObjective(alphas(), prediction).weights(STEPS), torch.ones(3))


def test_a_schedule_without_signal_at_its_end_has_no_weight_for_epsilon() -> None:
    ending = diffusers.DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    assert float(ending[-1]) == 0.0

    with pytest.raises(ConfigError, match=r"task\.min_snr_gamma: .*zero terminal SNR"):
        DiffusionObjective(ending, "epsilon", min_snr_gamma=5.0)
    assert float(DiffusionObjective(ending, "v_prediction", min_snr_gamma=5.0).weights(STEPS)[2]) == 0.0
    assert DiffusionObjective(ending, "epsilon").weights(STEPS).isfinite().all()


def test_an_unknown_prediction_is_named() -> None:
    with pytest.raises(ConfigError, match="prediction_type 'flow_prediction' is none of"):
        DiffusionObjective(alphas(), "flow_prediction")


def test_the_error_is_taken_in_single_precision_per_sample() -> None:
    predicted, target = (t.to(torch.bfloat16) for t in tensors(2, 4, 8, 8, count=2))
    found = weighted_error(predicted, target, torch.tensor([1.0, 0.25]))
    expected = [functional.mse_loss(predicted[i].float(), target[i].float()) * w for i, w in ((0, 1.0), (1, 0.25))]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_prior_preservation_is_the_sum_of_two_halves_with_weights_of_their_own(
    toy_folders: Folders, fixed, gamma: float | None
) -> None:
    # One picture of each: a weight for both would be spread over one loss.
    noise, time = tensors(2, 4, 8, 8, count=1)[0], torch.tensor([20, 700])
    fixed(noise, time)
    task = make_task(toy_folders("toy"), min_snr_gamma=gamma, prior_weight=0.5)
    batch = {**latent_batch(["a sks dog", "a dog"]), "prior": torch.tensor([False, True])}
    losses = task.losses(batch, task(batch))

    unet = diffusers.UNet2DConditionModel.from_pretrained(toy_folders("toy"), subfolder="unet")
    states = task.surroundings.encode_text(batch["caption"], width=12)["states"]
    halves = []
    for i in (0, 1):
        one = slice(i, i + 1)

        def denoise(z_t: Tensor, t: Tensor, one: slice = one) -> Tensor:
            return unet(z_t, t, states[one]).sample

        loss = diffusion_loss(denoise, batch["latent_mean"][one], noise[one], time[one], "epsilon")
        snr = alphas()[time[i]] / (1 - alphas()[time[i]])
        halves.append(float(loss.detach()) * (1.0 if gamma is None else min(float(snr), gamma) / float(snr)))
    assert set(losses) == {"loss", "prior"}
    assert float(losses["loss"]) == pytest.approx(halves[0], rel=1e-4)
    assert float(losses["prior"]) == pytest.approx(0.5 * halves[1], rel=1e-4)


def test_a_batch_of_prior_pictures_alone_has_no_loss_of_others(toy_folders: Folders) -> None:
    task = make_task(toy_folders("toy"))
    batch = {**latent_batch(["a dog"]), "prior": torch.tensor([True])}
    assert set(task.losses(batch, task(batch))) == {"prior"}


# DREAM.


def test_dream_rectifies_input_and_target_by_the_models_error(toy_folders: Folders, fixed) -> None:
    eps, time = tensors(2, 4, 8, 8, count=1)[0], torch.tensor([100, 800])
    fixed(eps, time)
    task = make_task(toy_folders("toy"), dream_power=2.0)
    batch = latent_batch(["a cat", "a dog"])
    found = task(batch)

    unet = diffusers.UNet2DConditionModel.from_pretrained(toy_folders("toy"), subfolder="unet")
    states = task.surroundings.encode_text(batch["caption"], width=12)["states"]
    abar = alphas().float()[time].view(-1, 1, 1, 1)
    sigma = (1 - abar).sqrt()
    z_t = abar.sqrt() * batch["latent_mean"] + sigma * eps
    with torch.no_grad():
        delta = sigma**2.0 * (eps - unet(z_t, time, states).sample)
        expected = unet(z_t + sigma * delta, time, states).sample
    torch.testing.assert_close(found.noisy.target, eps + delta, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.predicted, expected, rtol=0, atol=1e-5)
    assert not found.noisy.target.requires_grad
    assert found.predicted.requires_grad
    assert not torch.allclose(expected, unet(z_t, time, states).sample, atol=1e-3)


# Flow.


def flow(**options: object) -> FlowObjective:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return FlowObjective(scheduler.sigmas, scheduler.timesteps, **options)


@pytest.mark.parametrize("density", ["logit_normal", "mode", "uniform"])
def test_steps_are_drawn_with_the_density(density: str) -> None:
    found = flow(density=density, logit_mean=0.5, logit_std=0.8).draw_times(4000, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    if density == "logit_normal":
        expected = torch.sigmoid(0.5 + 0.8 * torch.randn(4000, generator=generator))
    else:
        expected = torch.rand(4000, generator=generator)
    if density == "mode":
        expected = 1 - expected - 1.29 * (torch.cos(math.pi / 2 * expected) ** 2 - 1 + expected)

    assert torch.equal(found, (1000 * expected).floor().long())
    assert 0 <= int(found.min()) < int(found.max()) <= 999


def test_a_draw_at_the_very_end_stays_in_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_shape, **_options: torch.tensor([0.0, 1.0]))
    assert flow(density="mode").draw_times(2).tolist() == [999, 0]


def test_weights_follow_the_noise_level() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(flow(weighting="sigma_sqrt").weights(sigma), torch.tensor([100.0, 4.0, 1 / 0.81]))
    expected = torch.tensor([2 / (math.pi * v) for v in (0.82, 0.5, 0.82)])
    torch.testing.assert_close(flow(weighting="cosmap").weights(sigma), expected)
    assert torch.equal(flow().weights(sigma), torch.ones(3))


def test_preconditioned_errors_are_those_of_the_velocity_times_sigma_squared() -> None:
    z, noise, output = tensors(3, 4, 8, 8, count=3)
    errors = []
    for precondition in (True, False):
        objective = flow(precondition_outputs=precondition)
        batch = objective(z, noise, STEPS)
        errors.append(weighted_error(objective.predicted(batch, output, STEPS), batch.target, batch.weight))
    torch.testing.assert_close(errors[0], flow().sigmas[STEPS] ** 2 * errors[1], rtol=1e-3, atol=1e-7)


# Options that do not go with a scheduler.


@pytest.mark.parametrize(
    ("size", "options", "sentence"),
    [
        ("toy_sd3", {"min_snr_gamma": 5.0}, r"task\.min_snr_gamma does not go with flow matching"),
        ("toy_sd3", {"dream_power": 1.0}, r"task\.dream_power does not go with flow matching"),
        ("toy", {"dream_power": 1.0, "scheduler": {"prediction_type": "v_prediction"}}, r"task\.dream_power goes with"),
        ("toy", {"min_snr_gamma": 5.0, "scheduler": {"rescale_betas_zero_snr": True}}, r"task\.min_snr_gamma: "),
    ],
)  # fmt: skip
def test_an_option_that_does_not_go_with_the_scheduler_is_refused_before_the_run(
    toy_folders: Folders, size: str, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_task(toy_folders(size), **options).before_fit(None)
