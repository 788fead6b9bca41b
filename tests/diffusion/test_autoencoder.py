"""The autoencoder as a backbone, its task, its whitening, and the generated pictures as data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from peft_modal.errors import WeightsError
from peft_modal.methods.full import Full
from peft_modal_diffusion.autoencoder import AutoencoderBackbone, Autoencoding, psnr, whiten
from peft_modal_diffusion.drawn import DrawnPictures
from peft_modal_heads.identity import Identity

Folders = Callable[[str], Path]
TOY = {"channels": [4, 8], "groups": 2, "layers": 2, "sample_size": 16}


def make_task(**options: Any) -> Autoencoding:
    backbone = AutoencoderBackbone.tiny()
    adapter = Full().attach(backbone)
    return Autoencoding(backbone, adapter, Identity(backbone.feature_spec(), 0), (), **options)


def pixels(count: int = 3, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(4)) * 2 - 1


# The task.


def test_the_loss_is_absolute_plus_squared_error_and_a_weighted_divergence() -> None:
    task = make_task(kl_weight=0.1).eval()
    batch = {"pixels": pixels()}
    features = task(batch)
    losses = task.losses(batch, features)

    posterior = task.backbone.network.encode(batch["pixels"]).latent_dist
    difference = task.backbone.network.decode(posterior.mean).sample - batch["pixels"]
    torch.testing.assert_close(losses["loss"], difference.abs().mean() + (difference**2).mean())
    # diffusers sums over the latents of a picture.
    torch.testing.assert_close(losses["divergence"], 0.1 * posterior.kl().mean() / posterior.mean[0].numel())
    assert set(losses) == {"loss", "divergence"}


def test_training_draws_latents_and_evaluation_takes_their_mean() -> None:
    task = make_task()
    batch = {"pixels": pixels()}
    drawn = [task.train()(batch).tokens for _ in range(2)]
    taken = [task.eval()(batch).tokens for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(*taken)


def test_psnr_is_in_decibels_of_the_full_range() -> None:
    black = torch.full((1, 3, 4, 4), -1.0)
    assert float(psnr(black, -black)) == pytest.approx(0.0)
    assert float(psnr(black, black + 0.2)) == pytest.approx(20.0, abs=1e-4)
    assert psnr(torch.cat([black, black]), torch.cat([black, black + 0.2])).tolist() == pytest.approx([100.0, 20.0])


# Weights.


def test_a_pipelines_folder_fills_the_network(toy_folders: Folders) -> None:
    backbone = AutoencoderBackbone(weights=str(toy_folders("toy") / "vae"), **{**TOY, "layers": 1})
    backbone.load_weights()
    expected = diffusers.AutoencoderKL.from_pretrained(toy_folders("toy"), subfolder="vae").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in backbone.network.state_dict().items())


def test_weights_that_do_not_fit_end_in_a_sentence(toy_folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be opened: Error"):
        AutoencoderBackbone(weights=str(toy_folders("toy") / "vae"), **TOY).load_weights()
    folder = shutil.copytree(toy_folders("toy") / "vae", tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    for weights in (folder, tmp_path / "nowhere.safetensors"):
        with pytest.raises(WeightsError) as caught:
            AutoencoderBackbone(weights=str(weights), **{**TOY, "layers": 1}).load_weights()
        assert "\n" not in str(caught.value)


# Whitening.


def test_whitening_changes_no_reconstruction_and_leaves_latents_of_mean_0_and_deviation_1() -> None:
    backbone = AutoencoderBackbone.tiny()
    network = backbone.network
    batch = pixels(64)
    with torch.no_grad():
        # Channels as unlike as they come.
        network.quant_conv.weight[:4] *= torch.tensor([0.2, 1.0, 5.0, 30.0]).view(4, 1, 1, 1)
        network.quant_conv.bias[:4] += torch.tensor([-3.0, 0.0, 2.0, 10.0])
        before = network.encode(batch).latent_dist
        noise = torch.randn(before.mean.shape, generator=torch.Generator().manual_seed(1))
        expected = network.decode(before.mean + before.std * noise).sample
        means, stds = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        whiten(network, means, stds)
        after = network.encode(batch).latent_dist
        found = network.decode(after.mean + after.std * noise).sample

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(after.std, before.std / stds.view(1, 4, 1, 1), rtol=1e-5, atol=0)


def test_an_autoencoder_without_its_convolutions_cannot_be_whitened() -> None:
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
        norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    with pytest.raises(WeightsError, match="no 1x1 convolutions around its latents"):
        whiten(network, torch.zeros(4), torch.ones(4))


# Generated pictures.


@pytest.mark.parametrize("kind", ["scenes", "open_ended", "subject", "style"])
def test_generated_pictures_follow_from_the_seed_the_epoch_and_the_place(kind: str) -> None:
    options = {"kind": kind, "steps": 3, "count": 5, "val_count": 3, "resolution": 16, "batch_size": 2}
    first, again, other = (DrawnPictures(**options, seed=seed) for seed in (1, 1, 2))
    for data in (first, again, other):
        data.setup("fit")
    sources = [data.train_source(data._sets["train"]) for data in (first, again, other)]
    batch = sources[0].batch(1, 1)

    assert len(sources[0]) == (3 if kind in {"scenes", "open_ended"} else 2)
    assert batch["pixels"].shape == (2, 3, 16, 16)
    assert -1.0 <= float(batch["pixels"].min()) < float(batch["pixels"].max()) <= 1.0
    assert len(batch["caption"]) == len(set(batch["key"])) == 2
    assert all(batch["caption"]) == (kind != "open_ended")
    repeated = sources[1].batch(1, 1)
    assert torch.equal(batch["pixels"], repeated["pixels"])
    assert (batch["caption"], batch["key"]) == (repeated["caption"], repeated["key"])
    assert not torch.equal(batch["pixels"], sources[2].batch(1, 1)["pixels"])
    assert not torch.equal(batch["pixels"], sources[0].batch(2, 1)["pixels"])


@pytest.mark.parametrize("kind", ["scenes", "subject"])
def test_validation_pictures_are_held_out_and_fixed(kind: str) -> None:
    data = DrawnPictures(kind=kind, steps=2, count=4, val_count=20, resolution=16, batch_size=4)
    data.setup("fit")
    batches, again = (list(data.val_dataloader()) for _ in range(2))
    shown = torch.cat([batch["pixels"] for batch in batches])
    trained = data.train_source(data._sets["train"]).batch(0, 0)["pixels"]

    assert len(shown) == 20
    assert len({key for batch in batches for key in batch["key"]}) == 20
    assert torch.equal(shown, torch.cat([batch["pixels"] for batch in again]))
    assert not (shown[:, None] == trained[None]).flatten(2).all(-1).any()
    assert data.preprocessing == {"resolution": 16, "range": [-1, 1]}
