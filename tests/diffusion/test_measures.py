"""Measures of generated pictures: what they are, that they tell good from bad, and that a run leaves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import write_images
from tiny_runs import metrics_of
from torch import Tensor, nn

from peft_modal.cli.main import main
from peft_modal.data.drawn import draw_scenes
from peft_modal.data.seeding import seeded
from peft_modal.errors import ConfigError, DataError, WeightsError
from peft_modal_diffusion.drawn import DrawnPictures
from peft_modal_diffusion.measures import Measuring, clip_score, distances, measure
from peft_modal_diffusion.networks import open_towers
from peft_modal_diffusion.probes import Probe, drift

Folders = Callable[[str], Path]


class MeanColour(nn.Module):
    """Three features."""

    num_features = 3

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.float().mean((2, 3)) / 255


def test_fid_is_the_distance_of_two_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(60, 3, 4, 4, generator=generator)
    drawn = 0.5 * torch.rand(40, 3, 4, 4, generator=generator)
    fid, kid = distances(MeanColour(), list(real), list(drawn))
    a, b = (((x * 255).round() / 255).double().mean((2, 3)) for x in (real, drawn))
    covariances = torch.cov(a.T), torch.cov(b.T)
    crossed = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * crossed
    assert fid == pytest.approx(float(wanted), rel=1e-3)
    assert kid > 0


def test_kid_does_not_depend_on_or_move_the_global_generator() -> None:
    pictures = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    first = distances(MeanColour(), list(pictures[:10]), list(pictures[10:]))
    state = torch.get_rng_state()
    assert distances(MeanColour(), list(pictures[:10]), list(pictures[10:])) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_nano_clip_tells_right_captions_from_wrong_ones() -> None:
    drawn = draw_scenes(24, seeded("clip score"), objects=1)
    towers = open_towers("nano")
    right = clip_score(towers, drawn.images, drawn.captions)
    wrong = clip_score(towers, drawn.images, drawn.captions[12:] + drawn.captions[:12])
    with torch.no_grad():
        image = nn.functional.normalize(towers.get_image_features(drawn.images * 2 - 1), dim=-1)
        text = nn.functional.normalize(towers.get_text_features(towers.tokenizer(list(drawn.captions)), None), dim=-1)
    assert right == pytest.approx(100 * float((image * text).sum(1).mean()), abs=0.3)  # pixels are bytes
    assert right > wrong + 5


def test_pictures_of_other_sizes_are_resized_for_the_network() -> None:
    towers = open_towers("nano")
    large = nn.functional.interpolate(draw_scenes(2, seeded("large")).images, 96, mode="nearest")
    features = towers((large * 255).to(torch.uint8))
    assert features.shape == (2, towers.num_features)
    assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-5)


def test_a_clip_of_transformers_can_judge_too(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    from peft_modal_clip.tokenizer import hf_tokenizer

    tokenizer = hf_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    towers = open_towers(str(tmp_path))
    assert towers((torch.rand(3, 3, 20, 30) * 255).to(torch.uint8)).shape == (3, 8)
    assert 0 <= clip_score(towers, torch.rand(2, 3, 16, 16), ["a red circle", "a ring " * 30]) <= 100


def test_a_network_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be opened"):
        Measuring(pictures=4, clip_network=str(tmp_path)).check()
    with pytest.raises(ConfigError, match="two pictures"):
        Measuring(pictures=1).check()
    Measuring(pictures=0, clip_network=str(tmp_path)).check()  # nothing is measured with it


class Data:
    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = tuple(probes)

    def probes(self) -> tuple[Probe, ...]:
        return self._probes


def test_probes_are_measured_on_both_models_with_the_same_seeds() -> None:
    asked: list[tuple[Any, ...]] = []

    def draws(value: float) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            asked.append((value, tuple(prompts), tuple(seeds)))
            return torch.full((len(prompts), 3, 2, 2), value)

        return draw

    bright: Callable[[Tensor], Tensor] = lambda pictures: pictures.mean((1, 2, 3)) > 0.5  # noqa: E731
    data = Data([Probe(("a", "b"), {"concept": bright}), Probe(("c",), {}, is_prior=True)])
    figures = measure(Measuring(prior_prompts=("d",)), data, draws(0.8), draws(0.3))
    assert figures["pictures/concept"] == 1.0
    assert figures["pictures/untouched_concept"] == 0.0
    assert figures["pictures/drift"] == pytest.approx(0.5)
    assert asked[:2] == [(0.8, ("a", "b"), (0, 1)), (0.3, ("a", "b"), (0, 1))]
    assert [prompts for _, prompts, _ in asked[4:]] == [("d",), ("d",)]


def test_drift_is_a_mean_over_pictures() -> None:
    moved = torch.zeros(2, 3, 4, 4)
    moved[0] = 0.6
    assert drift(moved, torch.zeros(2, 3, 4, 4)) == pytest.approx(0.3)


def test_data_without_pictures_cannot_be_compared_with() -> None:
    with pytest.raises(DataError, match="has no pictures to compare with"):
        measure(Measuring(pictures=2), object(), lambda *_: torch.zeros(2, 3, 8, 8), lambda *_: torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("kind", ["subject", "style"])
def test_true_pictures_of_a_concept_pass_its_check_and_others_do_not(kind: Any) -> None:
    data = DrawnPictures(kind=kind, val_count=100)
    concept, objects = data.probes()
    (check,) = concept.checks.values()
    pictures = torch.stack([sample["pixels"] for sample in data.load("val")]) / 2 + 0.5
    assert check(pictures).float().mean() >= 0.97
    assert check(draw_scenes(400, seeded("not it"), pairs="all").images).float().mean() <= 0.1
    assert len(objects.prompts) == 48
    assert objects.is_prior
    true = torch.cat(
        [
            draw_scenes(1, seeded("object", i), pairs="all", objects=1, colour=i % 8, shape=i // 8, ground=1).images
            for i in range(48)
        ]
    )
    assert objects.checks["colour"](true).float().mean() >= 0.95


def test_scenes_beside_a_concept_are_marked_and_drawn_anew() -> None:
    data = DrawnPictures(kind="subject", count=6, batch_size=4, prior=True)
    data.setup("fit")
    source = data.train_source(data.load("train"))
    first, second = source.batch(0, 0), source.batch(1, 0)
    assert first["prior"].tolist() == [False] * 4 + [True] * 4
    assert first["pixels"].shape == (8, 3, 32, 32)
    assert all("creature" in caption for caption in first["caption"][:4])
    assert not any("creature" in caption for caption in first["caption"][4:])
    assert not torch.equal(first["pixels"][4:], second["pixels"][4:])
    with pytest.raises(ConfigError, match="nothing new"):
        DrawnPictures(kind="scenes", prior=True)


def test_a_run_on_own_pictures_is_cut_to_the_network_and_measured(toy_folders: Folders, tmp_path: Path) -> None:
    root = write_images(tmp_path / "mine", 4)
    run = tmp_path / "run"
    code = main(
        [
            "fit", "--config", "diffusion_lora.yaml", f"--backbone.weights={toy_folders('toy')}", "--data=folder",
            f"--data.root={root}", "--data.caption=a red sun", "--data.batch_size=2", "--trainer.max_epochs=1",
            "--trainer.enable_progress_bar=false", "--task.measure_pictures=3", "--task.sample_steps=2",
            "--task.prior_prompts=[a cat]", "--task.prompts=null", "--out", str(run),
        ]
    )  # fmt: skip
    assert code == 0
    figures = metrics_of(run)
    for name in ("fid", "kid", "clip_score"):
        assert {f"pictures/{name}", f"pictures/untouched_{name}"} <= figures.keys()
    assert figures["pictures/drift"] > 0
    assert "Measured pictures" in (run / "report.html").read_text()
