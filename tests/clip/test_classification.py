"""Classification by names: logits, texts that are embedded when they have to be, and base to new."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clip_tasks import make, pictures
from torch.nn import functional

from peft_modal.errors import ConfigError, DataError
from peft_modal.methods.base import Method
from peft_modal.methods.full import Full
from peft_modal.methods.linear_probe import LinearProbe
from peft_modal.methods.lora import LoRA
from peft_modal_clip.classification import texts_of
from peft_modal_clip.signs import NeonSigns


def test_logits_are_scaled_similarities_with_the_mean_of_the_templates() -> None:
    task = make(templates=["a {}", "{} at night"])
    with torch.no_grad():
        network: Any = task.backbone.network
        ids = task.backbone.tokenize(["a red circle", "red circle at night"])
        text = functional.normalize(network.encode_text(ids, normalize=True).mean(0), dim=0)
        image = network.encode_image(pictures(), normalize=True)
        logits = task({"image": pictures()})
    torch.testing.assert_close(logits[:, 0], network.logit_scale.exp() * image @ text)
    assert logits.shape == (3, 3)


def test_texts_are_class_by_class_and_without_underscores() -> None:
    assert texts_of(("a_b", "c"), ("x {}", "{}!")) == ["x a b", "a b!", "x c", "c!"]


@pytest.mark.parametrize(
    ("method", "is_trained"),
    [(LinearProbe(), False), (LoRA(sites={"roles": ["attn.q"], "stacks": ["visual"]}, rank=2), False),
     (LoRA(sites={"roles": ["attn.q"], "stacks": ["text"]}, rank=2), True), (Full(), True)],
)  # fmt: skip
def test_texts_are_embedded_once_unless_their_tower_is_trained(method: Method, is_trained: bool) -> None:
    task = make(method).train()
    first = task.class_embeddings()
    assert first.requires_grad == is_trained
    assert (task.class_embeddings() is first) != is_trained
    task.eval()
    second = task.class_embeddings()
    assert not second.requires_grad
    assert task.class_embeddings() is second
    task.adapter.enable(False)
    assert (task.class_embeddings() is second) == (not is_trained) or torch.equal(task.class_embeddings(), second)


def test_a_changed_text_tower_is_seen_by_the_next_evaluation() -> None:
    task = make(LoRA(sites={"roles": ["attn.q"], "stacks": ["text"]}, rank=2))
    before = task({"image": pictures()}).detach()
    task.train()
    task({"image": pictures()})
    with torch.no_grad():
        for parameter in task.adapter.named_trained().values():
            parameter.add_(1.0)
    after = task.eval()({"image": pictures()})
    assert not torch.allclose(before, after)


def test_each_half_is_measured_with_its_own_names() -> None:
    names = tuple("abcde")
    task = make(names=names, base_to_new=True)
    assert task.num_base == 3
    logits = torch.tensor([[0.0, 1, 2, 9, 9], [9, 9, 9, 1, 2]])
    batch = {"label": torch.tensor([2, 3])}
    own = task._own_half(batch, logits)
    assert own.argmax(-1).tolist() == [2, 4]
    assert torch.isfinite(task.evaluation_losses(batch, logits)["loss"])
    task.train()
    assert task({"image": pictures()}).shape == (3, 3)


def test_a_new_class_in_training_is_refused() -> None:
    task = make(base_to_new=True).train()
    with pytest.raises(DataError, match=r"the training data has 'green ring'; set data\.classes to base"):
        task.losses({"label": torch.tensor([0, 2])}, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"templates": []}, "the list is empty"), ({"templates": ["a photo"]}, "'a photo' has no {}")],
)
def test_templates_without_a_place_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make(**options)


def test_signs_of_half_the_classes_are_those_of_all() -> None:
    everything, half = (
        NeonSigns(shots=2, seed=3).load("train"),
        NeonSigns(classes="base", shots=2, seed=3).load("train"),
    )
    assert len(everything) == 96
    assert half.labels.tolist() == [*range(24), *range(24)]
    assert torch.equal(half.images, everything.images[everything.labels < 24])


def test_more_shots_include_the_fewer_and_the_seed_leaves_the_test_pictures() -> None:
    few, many = NeonSigns(shots=1).load("train"), NeonSigns(shots=3).load("train")
    assert torch.equal(few.images, many.images[:48])
    assert not torch.equal(few.images, NeonSigns(shots=1, seed=1).load("train").images)
    tests = [NeonSigns(test_per_class=1, seed=seed).load("test").images for seed in (0, 1)]
    assert torch.equal(*tests)


def test_the_prompt_of_the_data_is_taken_unless_another_was_asked_for() -> None:
    task = make()
    assert task.templates == ("a photo of a {}.",)
    before = task.class_embeddings()
    task.suit({"resolution": 32})
    assert task.templates == ("a photo of a {}.",)
    task.suit({"templates": ["{} texture."]})
    assert task.templates == ("{} texture.",)
    assert not torch.equal(task.class_embeddings(), before)
    own = make(templates=["my {}"])
    own.suit({"templates": ["{} texture."]})
    assert own.templates == ("my {}",)


def test_macro_f1_is_the_mean_over_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make()
    monkeypatch.setattr(task, "log_dict", lambda *_, **__: None)
    logits = torch.eye(3)[[0, 0, 0, 1, 2, 2]]
    task.update_metrics("test", {"label": torch.tensor([0, 0, 1, 1, 1, 2])}, logits)
    found = task.metrics["test_metrics"].compute()
    # By class: precision 2/3, 1, 1/2 and recall 1, 1/3, 1.
    assert float(found["test/macro_f1"]) == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert float(found["test/accuracy"]) == pytest.approx(4 / 6)
