"""Pictures from a denoiser: those of diffusers' own pipeline, with what adapters change, and as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from toy_training import open_backbone

from peft_modal.attach import Adapter
from peft_modal.methods.adaptformer import AdaptFormer
from peft_modal.methods.base import Method
from peft_modal.methods.lora import LoRA
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.generation import Sampling, generate, pipeline_of
from peft_modal_diffusion.pictures import MOST_COLUMNS, UNTOUCHED, SampleFolder, read_settings, save_png

Folders = Callable[[str], Path]
PROMPTS, SEEDS = ["a red sun", "sks dog"], [3, 4]
SAMPLING = Sampling(steps=3, guidance=4.0)


def by_diffusers(folder: Path, sampling: Sampling) -> Tensor:
    """What plain diffusers draws from a folder."""
    left_out = {"text_encoder_3": None, "tokenizer_3": None} if folder.name.startswith("toy_sd3") else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        # Also where nothing is recorded, torch multiplies in another order by weights that could take a gradient.
        if isinstance(part, nn.Module):
            part.requires_grad_(requires_grad=False)
    return pipeline(
        PROMPTS, num_inference_steps=sampling.steps, guidance_scale=sampling.guidance,
        generator=[Generator().manual_seed(seed) for seed in SEEDS], output_type="pt",
        negative_prompt=None if sampling.negative_prompt is None else [sampling.negative_prompt] * 2,
    ).images  # fmt: skip


def disturbed(backbone: StableDiffusion, method: Method) -> Adapter:
    """Attach with an effect that can be seen."""
    adapter = method.attach(backbone, generator=Generator().manual_seed(0))
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return adapter


@pytest.mark.parametrize(
    ("size", "sampling"),
    [
        ("toy", SAMPLING),
        ("toy", Sampling(steps=3, guidance=1.0)),
        ("toy_xl", SAMPLING),
        ("toy_xl", Sampling(steps=2, negative_prompt="a cat")),
        ("toy_sd3", Sampling(steps=2)),
        ("toy_sd35", Sampling(steps=2, negative_prompt="a cat")),
    ],
)
@pytest.mark.parametrize("tune", ["denoiser", "denoiser_and_text"])
def test_an_untouched_model_draws_what_diffusers_draws_bit_for_bit(
    toy_folders: Folders, size: str, sampling: Sampling, tune: str
) -> None:
    found = generate(open_backbone(toy_folders(size), tune=tune), PROMPTS, SEEDS, sampling)
    assert found.shape == (2, 3, 16, 16)
    assert torch.equal(found, by_diffusers(toy_folders(size), sampling))
    assert not torch.equal(found[0], found[1])


def test_the_sampler_is_the_pipelines_own_and_training_does_not_touch_it(toy_folders: Folders) -> None:
    backbone = open_backbone(toy_folders("toy"))
    pipeline = pipeline_of(backbone)
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler
    assert pipeline.scheduler is backbone.surroundings["sampler"]
    assert pipeline.unet is backbone.denoiser
    before = backbone.surroundings["scheduler"].timesteps.clone()
    generate(backbone, PROMPTS, SEEDS, SAMPLING)
    assert torch.equal(backbone.surroundings["scheduler"].timesteps, before)


def test_a_picture_does_not_depend_on_its_neighbours(toy_folders: Folders) -> None:
    backbone = open_backbone(toy_folders("toy"))
    both = generate(backbone, PROMPTS, SEEDS, SAMPLING)
    alone = generate(backbone, PROMPTS[1:], SEEDS[1:], SAMPLING)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sites", ["attn", {"roles": ["attn"], "stacks": ["text"]}], ids=["everywhere", "text"])
def test_an_adapter_acts_until_it_is_switched_off(toy_folders: Folders, sites: object) -> None:
    backbone = open_backbone(toy_folders("toy"), tune="denoiser_and_text")
    bare = generate(backbone, PROMPTS, SEEDS, SAMPLING)
    adapter = disturbed(backbone, LoRA(sites=sites, rank=2))
    changed = generate(backbone, PROMPTS, SEEDS, SAMPLING)
    adapter.enable(on=False)

    assert not torch.allclose(changed, bare, atol=1e-3)
    assert torch.equal(generate(backbone, PROMPTS, SEEDS, SAMPLING), bare)


class Scaled(Method):
    """Scales the outputs of all blocks by a trained number of the time, as a method that knows the step does."""

    identity_at_init = True

    def build(self, adapter: Adapter) -> None:
        self.module = ByTime(adapter)
        for i, port in enumerate(p for p in adapter.backbone.anatomy.ports if p.role == "block.out"):
            adapter.branch(port, port, self.module, name="by_time" if i == 0 else "", mode="apply")


class ByTime(nn.Module):
    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.__dict__["contexts"] = adapter.backbone.contexts
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(tuple(self.contexts.current().get("time").tolist()))
        return self.scale * x


@pytest.mark.parametrize("size", ["toy", "toy_sd3"])
def test_methods_see_one_time_for_each_sample(toy_folders: Folders, size: str) -> None:
    backbone = open_backbone(toy_folders(size))
    method = Scaled()
    method.attach(backbone)
    generate(backbone, PROMPTS, SEEDS, Sampling(steps=2))
    assert len(method.module.seen) == 2
    assert {len(times) for times in method.module.seen} == {4}  # with and without their prompts


class Counted(Method):
    """Reads what a forward pass shares from a text encoder's block."""

    identity_at_init = True

    def build(self, adapter: Adapter) -> None:
        port = adapter.backbone.anatomy.port("block.out", stack="text", block=0)
        adapter.branch(port, port, Shared(adapter), mode="apply")


class Shared(nn.Module):
    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.__dict__["contexts"] = adapter.backbone.contexts

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * self.contexts.current().once("shared", lambda: torch.ones(()))


def test_methods_on_text_encoders_find_a_context(toy_folders: Folders) -> None:
    plain, backbone = (open_backbone(toy_folders("toy"), tune="denoiser_and_text") for _ in range(2))
    Counted().attach(backbone)
    found, expected = (generate(network, PROMPTS, SEEDS, SAMPLING) for network in (backbone, plain))
    assert torch.equal(found, expected)


def test_pictures_are_drawn_in_evaluation_mode_and_modes_come_back(toy_folders: Folders) -> None:
    backbone = open_backbone(toy_folders("toy"), frozen_mode="reference")
    adapter = disturbed(backbone, AdaptFormer(hidden_dim=4, dropout=0.5))
    backbone.eval()
    adapter.eval()
    expected = generate(backbone, PROMPTS, SEEDS, SAMPLING)
    backbone.train()
    adapter.train()
    adapter.adapter.eval()  # whoever has set a part of it otherwise finds it so
    modes = {name: module.training for part in (backbone, adapter) for name, module in part.named_modules()}
    torch.manual_seed(8)
    state = torch.get_rng_state()

    assert torch.equal(generate(backbone, PROMPTS, SEEDS, SAMPLING), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for part in (backbone, adapter) for n, m in part.named_modules()} == modes
    adapter.train()
    assert torch.equal(generate(backbone, PROMPTS, SEEDS, SAMPLING), expected)


# As files.


def test_a_png_tells_how_it_was_made(tmp_path: Path) -> None:
    picture = torch.rand(3, 5, 7, generator=Generator().manual_seed(0))
    settings = SAMPLING.settings("a red sun: “größer”", 7)
    save_png(picture, tmp_path / "a.png", settings)

    assert read_settings(tmp_path / "a.png") == settings
    assert settings["seed"] == 7
    assert settings["steps"] == 3
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (7, 5)
        assert json.loads(image.text["parameters"])["prompt"] == "a red sun: “größer”"
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(pixels, (picture * 255).round().byte())


def test_the_grid_shows_the_untouched_model_and_epochs_evenly(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, PROMPTS)
    assert folder.section() is None
    pictures = torch.rand(2, 3, 4, 4, generator=Generator().manual_seed(0))
    settings = [{}, {}]
    for epoch in (1, 2, 3):
        folder.write(f"epoch-{epoch:04d}", pictures, settings)
    folder.write(UNTOUCHED, pictures, settings)
    assert folder.columns() == (UNTOUCHED, "epoch-0001", "epoch-0002", "epoch-0003")
    chart = folder.section().blocks[0]
    assert chart.data == {"prompts": PROMPTS, "columns": [UNTOUCHED, "epoch 1", "epoch 2", "epoch 3"]}

    for epoch in range(4, 21):
        folder.write(f"epoch-{epoch:04d}", pictures, settings)
    columns = folder.columns()
    assert len(columns) == MOST_COLUMNS
    assert (columns[0], columns[1], columns[-1]) == (UNTOUCHED, "epoch-0001", "epoch-0020")
    # A column that was never finished is none.
    (tmp_path / "samples" / "epoch-0020" / "01.png").unlink()
    assert folder.columns()[-1] == "epoch-0019"
    assert not folder.has("epoch-0020")


def test_the_grid_is_drawn(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    folder = SampleFolder(tmp_path, ["a", "a very long prompt that has to be broken into several lines " * 3])
    colours = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4)
    folder.write(UNTOUCHED, colours[:2], [{}, {}])
    folder.write("epoch-0001", colours[1:], [{}, {}])
    figure = Figure()
    folder.section().blocks[0].draw(figure)
    shown = [tuple(axes.images[0].get_array()[0, 0].tolist()) for axes in figure.axes]
    assert shown == [(255, 0, 0), (0, 255, 0), (0, 255, 0), (0, 0, 255)]
    assert [axes.get_title() for axes in figure.axes[:2]] == [UNTOUCHED, "epoch 1"]
    assert figure.axes[2].get_ylabel().count("\n") == 3
