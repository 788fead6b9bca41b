import math

import pytest
import torch
from open_clip.loss import ClipLoss
from tiny_backbones import TinyCLIP, TinyViT
from torch.nn import functional

from peft_modal.errors import ConfigError
from peft_modal.methods.full import Full
from peft_modal.methods.linear_probe import LinearProbe
from peft_modal_clip.backbone import OpenCLIPBackbone
from peft_modal_clip.contrastive import Contrastive, Embeddings, same_texts
from peft_modal_heads.identity import Identity


def make_task(backbone=None, method=None, **options) -> Contrastive:
    backbone = backbone or TinyCLIP()
    adapter = (method or LinearProbe()).attach(backbone)
    names = ("a red circle", "a blue ring", "a pink cross")
    return Contrastive(backbone, adapter, Identity(backbone.feature_spec(), 3), names, **options)


def embeddings(count: int = 5, dim: int = 4, seed: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image, text = (functional.normalize(torch.randn(count, dim, generator=generator), dim=-1) for _ in range(2))
    return Embeddings(image, text)


def test_the_loss_is_that_of_open_clip_where_no_captions_are_alike():
    task, found = make_task(), embeddings()
    batch = {"caption": [f"caption {i}" for i in range(5)]}
    reference = ClipLoss()(found.image, found.text, task.backbone.similarity_scale)
    assert task.losses(batch, found)["loss"].item() == pytest.approx(reference.item(), rel=1e-5)


def test_equal_captions_are_right_answers_for_each_other():
    task = make_task()
    text = functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    found = Embeddings(text, text)
    scale = float(task.backbone.similarity_scale)
    # Two captions share one direction: each is right with half of the target, and both have the same logit.
    first = -math.log(math.exp(scale) / (2 * math.exp(scale) + 1))
    last = -math.log(math.exp(scale) / (math.exp(scale) + 2))
    expected = (2 * first + last) / 3
    assert task.losses({"caption": ["a", "a", "b"]}, found)["loss"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("key", ["caption", "text"])
def test_same_texts_are_found(key):
    values = ["x", "y", "x"] if key == "caption" else torch.tensor([[1, 2], [1, 3], [1, 2]])
    assert same_texts({key: values}).tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_the_scale_is_capped():
    task, found = make_task(max_scale=10.0), embeddings()
    batch = {"caption": list("abcde")}
    task.backbone.network.logit_scale.fill_(math.log(10))
    at_the_cap = task.losses(batch, found)["loss"]
    task.backbone.network.logit_scale.fill_(math.log(80))
    assert task.losses(batch, found)["loss"].item() == pytest.approx(at_the_cap.item(), rel=1e-5)
    task.backbone.network.logit_scale.fill_(math.log(5))
    assert task.losses(batch, found)["loss"].item() != pytest.approx(at_the_cap.item(), rel=1e-3)


def test_full_training_reaches_both_towers_and_the_scale():
    backbone = TinyCLIP()
    task = make_task(backbone, Full())
    batch = backbone.example_batch(4)
    task.losses(batch, task(batch))["loss"].backward()
    missing = [name for name, p in task.named_trained().items() if p.grad is None]
    assert missing == []
    assert task.named_trained()["backbone.logit_scale"].grad != 0


def test_embeddings_have_length_one():
    task = make_task()
    image, text = task(task.backbone.example_batch(3))
    assert image.shape == text.shape == (3, 16)
    assert torch.allclose(torch.cat([image, text]).norm(dim=-1), torch.ones(6))


@pytest.mark.parametrize("held_out", [None, [False, True, True, True]])
def test_zero_shot_accuracies_count_what_was_seen_apart(monkeypatch, held_out):
    backbone = OpenCLIPBackbone(weights="random", vision_layers=1, text_layers=1)
    task = make_task(backbone)
    logged = {}
    monkeypatch.setattr(task, "log", lambda name, value, **_: logged.update({name: value}))
    task.on_validation_epoch_start()
    classes = functional.normalize(backbone({"caption": list(task.class_names)}).tokens[:, 0], dim=-1)
    # The pictures look exactly like classes 0, 1, 2, 2; the last one is labelled wrongly.
    output = Embeddings(classes[[0, 1, 2, 2]], classes[[0, 1, 2, 2]])
    batch = {"label": torch.tensor([0, 1, 2, 0])}
    if held_out is not None:
        batch["held_out"] = torch.tensor(held_out)
    task.update_metrics("val", batch, output)
    task.update_metrics("val", batch, output)
    figures = {name: float(metric.compute()) for name, metric in logged.items()}
    if held_out is None:
        assert figures == {"val/accuracy": 0.75}
    else:
        assert figures == pytest.approx({"val/accuracy_seen": 1.0, "val/accuracy_held_out": 2 / 3})


def test_the_names_of_classes_go_into_the_template(monkeypatch):
    task = make_task(template="a photo of {}")
    seen = []
    monkeypatch.setattr(
        task.backbone, "tokenize", lambda texts: seen.extend(texts) or torch.ones(3, 8, dtype=torch.long)
    )
    task._embed_classes()
    assert seen == ["a photo of a red circle", "a photo of a blue ring", "a photo of a pink cross"]


def test_classes_are_embedded_anew_for_every_evaluation():
    backbone = OpenCLIPBackbone(weights="random", vision_layers=1, text_layers=1)
    task = make_task(backbone)
    before = task._embed_classes()
    backbone.network.text_projection.normal_()
    task._classes = before
    task.on_test_epoch_start()
    assert task._classes is None
    assert not torch.allclose(task._embed_classes(), before)


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_has_one_place_for_the_name(template):
    with pytest.raises(ConfigError, match=r"task\.template"):
        make_task(template=template)


def test_another_kind_of_backbone_is_refused():
    with pytest.raises(ConfigError, match="needs a backbone of pictures and texts, got TinyViT"):
        make_task(TinyViT())


def test_a_decay_rate_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"task.betas: \[0.9, 1.0\] has a 1"):
        make_task(betas=(0.9, 1.0))
