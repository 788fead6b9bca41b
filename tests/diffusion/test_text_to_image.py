"""The text-to-image task: what the denoiser is given, what trains, and whole runs that stop and go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from tiny_backbones import TinyViT
from tiny_runs import measured, metrics_of, tensors_of
from torch import Tensor
from torch.utils.data import DataLoader
from toy_training import latent_batch, make_task, total

import peft_modal.running.fit as fit_module
from peft_modal.attach import Adapter, LifeCycle
from peft_modal.cli.main import main
from peft_modal.errors import ConfigError
from peft_modal.methods.full import Full
from peft_modal.methods.lora import LoRA
from peft_modal_diffusion.text_to_image import TextToImage

Folders = Callable[[str], Path]
CAPTIONS = ["a red sun", "a cat", "sks", "a dog"]


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def pixel_batch(captions: list[str]) -> dict[str, Any]:
    return {
        "pixels": pictures(len(captions)),
        "caption": captions,
        "key": [f"sample {i}" for i in range(len(captions))],
    }


def given_to_the_backbone(task: TextToImage, batch: dict[str, Any]) -> dict[str, Tensor]:
    """What the backbone is called with in one training step."""
    seen: list[dict[str, Tensor]] = []
    handle = task.backbone.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    task(batch)
    handle.remove()
    return seen[-1]


# What the denoiser is given.


@pytest.mark.parametrize("size", ["toy", "toy_xl", "toy_sd3"])
def test_cached_latents_and_texts_give_the_loss_of_pictures_and_captions(toy_folders: Folders, size: str) -> None:
    task = make_task(toy_folders(size))
    batch = pixel_batch(CAPTIONS)
    mean, std = task.surroundings.encode_images(batch["pixels"])
    texts = task.surroundings.encode_text(CAPTIONS, width=task.backbone.text_width)
    cached = {"latent_mean": mean, "latent_std": std, **texts, "caption": CAPTIONS, "key": batch["key"]}
    losses = []
    for given in (batch, cached, {**cached, "latent_std": torch.zeros_like(std)}):
        torch.manual_seed(1)
        losses.append(total(task, given))

    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])  # a latent is drawn, not taken at its mean


def test_latents_are_scaled_as_the_autoencoder_says(toy_folders: Folders) -> None:
    surroundings = make_task(toy_folders("toy_sd3")).surroundings
    vae = surroundings["vae"]
    with torch.no_grad():
        posterior = vae.encode(pictures(2)).latent_dist
    mean, std = surroundings.encode_images(pictures(2))
    torch.testing.assert_close(mean, (posterior.mean - 0.0609) * 1.5305)
    torch.testing.assert_close(std, posterior.std * 1.5305)
    with torch.no_grad():
        expected = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(surroundings.decode(mean), expected, rtol=0, atol=1e-5)

    vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0, 2.0, 4.0, 4.0])
    offsets, deviations = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1), torch.tensor([2.0, 2, 4, 4]).view(1, 4, 1, 1)
    mean, std = surroundings.encode_images(pictures(2))
    torch.testing.assert_close(mean, (posterior.mean - offsets) * 1.5305 / deviations)
    torch.testing.assert_close(surroundings.decode(mean), expected, rtol=0, atol=1e-5)


def test_the_autoencoder_computes_in_single_precision_whatever_the_run_does(toy_folders: Folders) -> None:
    surroundings = make_task(toy_folders("toy")).surroundings
    expected = surroundings.encode_images(pictures(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = surroundings.encode_images(pictures(2))
        decoded = surroundings.decode(found[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(decoded, surroundings.decode(found[0]))


@pytest.mark.parametrize("size", ["toy", "toy_xl"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_dropped_caption_is_what_guidance_starts_from(
    toy_folders: Folders, monkeypatch: pytest.MonkeyPatch, size: str, cached: bool
) -> None:
    task = make_task(toy_folders(size), caption_dropout=0.5)
    width = task.backbone.text_width
    captions = CAPTIONS * 2
    full = task.surroundings.encode_text(captions, width=width)
    empty = task.surroundings.no_caption(1, width=width)
    encoded: list[int] = []
    encode = type(task.surroundings).encode_text
    monkeypatch.setattr(
        type(task.surroundings), "encode_text",
        lambda self, texts, *, width: (encoded.append(len(texts)), encode(self, texts, width=width))[1],
    )  # fmt: skip
    batch = {**latent_batch(captions), **(full if cached else {})}
    found = [given_to_the_backbone(task, batch) for _ in range(2)]

    for name in full:
        for given in found:
            dropped = [torch.equal(given[name][i], empty[name][0]) for i in range(8)]
            kept = [torch.equal(given[name][i], full[name][i]) for i in range(8)]
            assert all(a != b for a, b in zip(dropped, kept, strict=True))
            assert 0 < sum(dropped) < 8
    # A cache is worth nothing if dropping one caption means to encode them all.
    assert encoded == ([1] if cached else [8, 1, 8])
    assert not empty["states"].any() if size == "toy_xl" else empty["states"].any()


@pytest.mark.parametrize("size", ["toy", "toy_xl"])
def test_tuned_text_encoders_drop_captions_likewise(toy_folders: Folders, size: str) -> None:
    frozen = make_task(toy_folders(size), caption_dropout=1.0)
    tuned = make_task(toy_folders(size), caption_dropout=1.0, tune="denoiser_and_text")
    outputs = []
    for task in (frozen, tuned):
        torch.manual_seed(2)
        outputs.append(task(latent_batch(CAPTIONS)).predicted.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)


def test_tuned_text_encoders_do_not_trust_a_cache(toy_folders: Folders) -> None:
    task = make_task(toy_folders("toy"), tune="denoiser_and_text")
    stale = {"states": torch.zeros(4, 6, 12)}
    losses = []
    for more in ({}, stale):
        torch.manual_seed(2)
        losses.append(total(task, {**latent_batch(CAPTIONS), **more}))
    assert torch.equal(*losses)


def test_sdxl_is_told_sizes_and_crop_in_rows_and_columns(toy_folders: Folders) -> None:
    task = make_task(toy_folders("toy_xl"))
    told = {"original_size": (30, 40), "crop": (2, 3), "target_size": (16, 24)}
    batch = {**latent_batch(["a cat"] * 2), **{key: torch.tensor([value] * 2) for key, value in told.items()}}
    assert given_to_the_backbone(task, batch)["time_ids"].tolist() == [[30, 40, 2, 3, 16, 24]] * 2
    # Pictures that nobody has cut.
    for bare in (latent_batch(["a cat"]), pixel_batch(["a cat"])):
        assert given_to_the_backbone(task, bare)["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


@pytest.mark.parametrize("size", ["toy", "toy_sd3"])
def test_validation_depends_on_nothing_but_the_sample(toy_folders: Folders, size: str) -> None:
    noisy = {"caption_dropout": 1.0, "noise_offset": 1.0, "input_perturbation": 1.0}
    tasks = [make_task(toy_folders(size), **options).eval() for options in ({}, noisy)]
    batch = latent_batch(CAPTIONS, std=0.5)
    alone = {key: value[2:3] for key, value in batch.items()}
    with torch.no_grad():
        first = tasks[0](batch)
        torch.manual_seed(9)
        again = tasks[1](batch)
        one = tasks[0](alone)
        other = tasks[0]({**alone, "key": ["another"]})

    assert torch.equal(first.predicted, again.predicted)
    assert torch.equal(first.noisy.target, again.noisy.target)
    assert torch.equal(first.noisy.time[2:3], one.noisy.time)
    assert torch.equal(first.noisy.noisy[2:3], one.noisy.noisy)
    assert not torch.equal(one.noisy.noisy, other.noisy.noisy)


# What trains.


class Norms(LifeCycle):
    """Writes down the norm of all gradients before and after clipping."""

    def __init__(self, parameters: Callable[[], list[Tensor]]) -> None:
        super().__init__()
        self.parameters_of = parameters
        self.found: list[float] = []

    def _norm(self) -> None:
        self.found.append(float(torch.stack([p.grad.norm() for p in self.parameters_of()]).norm()))

    def after_backward(self, micro_batch: int) -> None:
        self._norm()

    def before_step(self, step: int) -> None:
        self._norm()


class WithNorms(LoRA):
    def build(self, adapter: Adapter) -> None:
        super().build(adapter)
        self.norms = Norms(lambda: list(adapter.named_trained().values()))
        adapter.listen(self.norms)


def train(task: TextToImage, batch: dict[str, Any], **options: Any) -> pl.Trainer:
    """Two steps and a validation."""
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(task, *(DataLoader([batch] * count, batch_size=None) for count in (2, 1)))
    return trainer


@pytest.mark.parametrize(("limit", "acts"), [(None, False), (1e-3, True), (1e3, False)])
def test_clipping_acts_where_the_norm_is_larger(toy_folders: Folders, limit: float | None, acts: bool) -> None:
    method = WithNorms(rank=2)
    train(make_task(toy_folders("toy"), method=method, clip_norm=limit), latent_batch(CAPTIONS))
    before, after = method.norms.found[::2], method.norms.found[1::2]
    assert all(1e-3 < norm < 1e3 for norm in before)
    assert after == pytest.approx([1e-3] * 2 if acts else before, rel=1e-3)


def test_defaults_are_those_of_the_training_scripts(toy_folders: Folders) -> None:
    task = make_task(toy_folders("toy"))
    assert (task.lr, task.weight_decay, task.clip_norm, task.betas) == (1e-4, 0.01, 1.0, (0.9, 0.999))


def test_half_precision_runs_train_in_single_precision(toy_folders: Folders) -> None:
    task = make_task(toy_folders("toy"), lr=0.01)
    before = {name: value.detach().clone() for name, value in task.named_trained().items()}
    trainer = train(task, pixel_batch(CAPTIONS), precision="bf16-mixed")
    state = trainer.optimizers[0].state

    for name, value in task.named_trained().items():
        assert value.dtype == state[value]["exp_avg"].dtype == torch.float32
        assert not torch.equal(value, before[name]) or "down" in name
    assert {p.dtype for p in task.backbone.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("size", ["toy", "toy_xl", "toy_sd3"])
def test_denoiser_and_text_both_train(toy_folders: Folders, size: str) -> None:
    task = make_task(toy_folders(size), method=Full(), tune="denoiser_and_text")
    total(task, latent_batch(CAPTIONS)).backward()
    trained = task.adapter.named_trained()
    parts = {name.split(".")[1] for name in trained}

    assert parts == {name for name, _ in task.backbone.network.named_children()}
    still = [name for name, p in trained.items() if p.grad is None or not bool(p.grad.any())]
    read = {f"backbone.{site.path}" for site in task.backbone.anatomy.sites}
    # What the last block of SD 3 makes of the text is not read; its keys and values are.
    assert [name for name in still if name in read and "transformer_blocks.1.attn.add_q_proj" not in name] == []


# What is refused.


def test_another_modalitys_backbone_is_refused(toy_folders: Folders) -> None:
    backbone = TinyViT()
    with pytest.raises(ConfigError, match="task 'text_to_image' needs backbone 'stable_diffusion', not TinyViT"):
        TextToImage(backbone, LoRA(rank=2).attach(backbone), torch.nn.Identity(), ())


# Whole runs.


RUN = [
    "--backbone=stable_diffusion", "--method=lora", "--method.rank=2", "--method.dropout=0.1", "--head=identity",
    "--task=text_to_image", "--task.lr=0.05", "--task.caption_dropout=0.3", "--task.noise_offset=0.1",
    "--task.ema_decay=0.9", "--task.prompts=[a red sun, sks]", "--task.sample_steps=2", "--data=drawn",
    "--data.kind=subject", "--data.count=6", "--data.val_count=4", "--data.resolution=16", "--data.batch_size=2",
    "--trainer.max_epochs=3", "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


class InterruptAt(Callback):
    """Ctrl-C at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def drawn(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("samples/**/*.png"))}


@pytest.mark.usefixtures("_workspace")
def test_a_run_that_was_interrupted_equals_one_that_was_not(
    toy_folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", *RUN, f"--backbone.weights={toy_folders('toy')}", "--backbone.tune=denoiser_and_text"]
    assert main([*arguments, "--out", "run"]) == 0, capsys.readouterr().err
    make = fit_module.make_trainer

    def interrupted(*args: Any, **options: Any) -> pl.Trainer:
        trainer = make(*args, **options)
        trainer.callbacks.insert(0, InterruptAt(2))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "make_trainer", interrupted)
        assert main([*arguments, "--out", "stopped"]) == 130
    assert set(drawn("stopped")) == {
        f"samples/{c}/0{i}.png" for c in ("untouched", "epoch-0001", "epoch-0002") for i in (0, 1)
    }
    assert main([*arguments, "--out", "stopped"]) == 0

    assert tensors_of("stopped") == tensors_of("run")
    assert measured("stopped") == measured("run")
    assert Path("stopped/metrics.csv").read_text() == Path("run/metrics.csv").read_text()
    assert drawn("stopped") == drawn("run")
    assert len(set(drawn("run").values())) == 8
    assert metrics_of("run")["val/loss"] < 10
    page = Path("run/report.html").read_text()
    assert "Generated pictures" in page
    assert capsys.readouterr().err.count("warning") == 0

    # Nothing of the older run is taken for the new one's.
    assert main([*arguments, "--trainer.max_epochs=1", "--backbone.tune=denoiser", "--out", "run", "--overwrite"]) == 0
    assert {Path(name).parent.name for name in drawn("run")} == {"untouched", "epoch-0001"}


@pytest.mark.usefixtures("_workspace")
def test_a_size_for_measuring_cannot_be_trained(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["fit", *RUN, "--backbone.weights=random", "--backbone.architecture=toy", "--out", "run"])
    assert code == 2
    assert "there is no 'scheduler' around this denoiser" in capsys.readouterr().err
    assert not Path("run/config.yaml").exists()
