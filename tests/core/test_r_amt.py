"""R-AMT: masks, the gradient through the threshold, gradient dropout, files of bits, and what a run is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_backbones import TinyCLIP, TinyViT
from torch import Tensor

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter, Run
from peft_modal.attach.lifecycle import Losses
from peft_modal.attach.merge import merge_
from peft_modal.errors import AttachError, ConfigError, FileFormatError, TrainingError
from peft_modal.methods.compose import Compose
from peft_modal.methods.lora import LoRA
from peft_modal.methods.r_amt import RAMT, Mask, RegularisedMasks, gate


def make_mask(values: list[float], *, threshold: float = 5e-3) -> Mask:
    mask = Mask((len(values),), threshold=threshold, init=1e-2)
    with torch.no_grad():
        mask.mask_logit.copy_(torch.tensor(values))
    return mask


def masks_of(adapter: Adapter) -> dict[str, Mask]:
    return {name: module for name, module in adapter.named_modules() if isinstance(module, Mask)}


def shake(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mask in masks_of(adapter).values():
            mask.mask_logit.uniform_(0.0, 1e-2, generator=generator)


def test_a_value_on_the_threshold_drops_the_weight() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert make_mask([5e-3, 5.1e-3, -1.0, 1.0])(weight).tolist() == [0.0, 2.0, 0.0, 4.0]


@pytest.mark.parametrize("threshold", [5e-3, 0.1, 0.3])
def test_the_comparison_is_the_same_in_every_precision(threshold: float) -> None:
    mask = Mask((1,), threshold=threshold, init=1.0)
    with torch.no_grad():
        mask.mask_logit.fill_(threshold)
    assert not mask.kept().any()
    assert not mask.double().kept().any()


def test_the_gradient_passes_the_threshold_and_is_that_of_the_product() -> None:
    mask = make_mask([0.0, 1.0, 5.0])
    weight, gradient = torch.tensor([2.0, -3.0, 4.0]), torch.tensor([1.0, 10.0, 100.0])
    mask(weight).backward(gradient)
    assert mask.mask_logit.grad is not None
    assert mask.mask_logit.grad.tolist() == [2.0, -30.0, 400.0]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_file_has_a_bit_for_each_weight_and_gives_the_same_mask(kept: list[bool]) -> None:
    mask = make_mask([1e-2 if keep else 0.0 for keep in kept])
    bits = mask.packed()["mask_bits"]
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-len(kept) // 8)
    assert bool(bits[0] & 128) == kept[0]
    other = Mask((len(kept),), threshold=5e-3, init=1e-2)
    other.refuse("mask", {"mask_bits": bits})
    other.unpack({"mask_bits": bits})
    assert other.kept().tolist() == kept


@pytest.mark.parametrize("bits", [torch.zeros(2, dtype=torch.uint8), torch.zeros(1)])
def test_bits_of_another_number_or_type_are_refused(bits: Tensor) -> None:
    with pytest.raises(FileFormatError, match="a bit for each of 3 weights is 1 bytes"):
        make_mask([0.0, 0.0, 0.0]).refuse("mask", {"mask_bits": bits})


def test_the_default_is_the_patch_embedding_and_all_of_attention_and_a_file_is_an_eighth() -> None:
    backbone = TinyCLIP()
    adapter = RAMT(sites={"roles": ["embed", "attn"], "stacks": ["visual"]}).attach(backbone)
    assert list(masks_of(adapter)) == [
        "adapter.visual.conv1",
        *(f"adapter.visual.blocks.{i}.attn.{part}" for i in range(2) for part in ("qkv", "out")),
    ]
    width, entries = 32, 2 * 4 * 32 * 32 + 32 * 3 * 4 * 4
    assert adapter.counts()["adapter"] == entries
    state = adapter.state()
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) == entries // 8
    assert state["adapter.visual.blocks.0.attn.qkv.mask_bits"].shape == (3 * width * width // 8,)
    assert not any(adapter.decay.get(name, True) for name in adapter.named_trained())


def test_masks_merge_and_load_exactly() -> None:
    backbone, other = TinyCLIP(), TinyCLIP()
    adapter, loaded = RAMT(gate_strength=0).attach(backbone), RAMT(gate_strength=0).attach(other)
    shake(adapter)
    loaded.load(adapter.state())
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    assert torch.equal(other(batch).tokens, before)
    kept = {name: mask.kept() for name, mask in masks_of(adapter).items()}
    stored = backbone.network.visual.conv1.weight.detach().clone()
    merge_(backbone)
    torch.testing.assert_close(backbone(batch).tokens, before)
    assert torch.equal(backbone.network.visual.conv1.weight, stored * kept["adapter.visual.conv1"])


def test_the_gate_keeps_what_agrees_and_drops_by_the_paper_what_does_not() -> None:
    own, other = torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([1.0, -3.0, 3.0, 1.0])
    assert gate(own, other, torch.full((4,), 0.24), 1.0).tolist() == [1.0, 1.0, -1.0, 0.0]  # P is 1, 1/4, 1/4
    assert gate(own, other, torch.full((4,), 0.26), 1.0).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert gate(own, other, torch.full((4,), 0.26), 0.3).tolist() == pytest.approx([1.0, 0.7, -0.7, 0.0])
    tiny = torch.tensor([1e-9])
    assert gate(tiny, tiny, torch.tensor([0.6]), 1.0).item() == 0.0  # the constant pulls P towards 1/2


class Model:
    """Logits of a tiny network, as a task's forward pass gives them."""

    def __init__(self, **options: Any) -> None:
        self.backbone = TinyViT(depth=2)
        self.adapter = RAMT(**options).attach(self.backbone)
        self.batch = self.backbone.example_batch()
        self.run = next(module for module in self.adapter.modules() if isinstance(module, RegularisedMasks))
        self.run.on_fit_start(Run(10, [], torch.Generator(), {}, forward=self.forward, gives_logits=True))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.backbone(batch).tokens[:, 0]

    def losses(self) -> dict[str, Tensor]:
        logits = self.forward(self.batch)
        label = torch.arange(len(logits))
        own = {"loss": torch.nn.functional.cross_entropy(logits, label)}
        return {**own, **self.run.penalty(self.batch, logits)}

    def gradients(self, scale: float = 1.0) -> list[Tensor]:
        torch.manual_seed(3)
        losses = {name: value * scale for name, value in self.losses().items()}
        self.run.compute_gradients(losses, dict, lambda loss: loss.backward())
        return [mask.mask_logit.grad.clone() for mask in masks_of(self.adapter).values()]


def test_without_masks_the_model_is_the_teacher_and_its_loss_pulls_nowhere() -> None:
    model = Model(norm_weight=0.0)
    general = model.losses()["general"]
    found = torch.autograd.grad(general, [mask.mask_logit for mask in masks_of(model.adapter).values()])
    assert all(float(gradient.abs().max()) < 1e-5 for gradient in found)
    teacher = model.run.teacher(model.batch)
    shake(model.adapter)
    assert torch.equal(model.run.teacher(model.batch), teacher)
    assert not torch.equal(model.forward(model.batch), teacher)
    assert not teacher.requires_grad


def test_gradients_of_micro_batches_add_up_and_scaling_changes_nothing() -> None:
    model = Model(gate_strength=1.0)
    shake(model.adapter)
    once = model.gradients()
    assert any(bool((gradient == 0).any()) for gradient in once)
    twice = model.gradients()
    for one, both in zip(once, twice, strict=True):
        torch.testing.assert_close(both, 2 * one)
    for mask in masks_of(model.adapter).values():
        mask.mask_logit.grad = None
    for one, scaled in zip(once, model.gradients(2.0**10), strict=True):
        torch.testing.assert_close(scaled, 2.0**10 * one)


def test_what_is_trained_beside_the_masks_learns_from_the_task_alone() -> None:
    backbone = TinyViT(depth=2)
    adapter = Compose(methods=[RAMT(gate_strength=1.0), LoRA(sites=["mlp"], rank=2)]).attach(backbone)
    run = next(module for module in adapter.modules() if isinstance(module, RegularisedMasks))
    run.on_fit_start(Run(10, [], torch.Generator(), {}, forward=lambda batch: backbone(batch).tokens[:, 0],
                         gives_logits=True))  # fmt: skip
    shake(adapter)
    batch = backbone.example_batch()
    logits = backbone(batch).tokens[:, 0]
    losses = {"loss": logits.square().mean(), **run.penalty(batch, logits)}
    own = next(p for name, p in adapter.named_trained().items() if "blocks.1.mlp" in name)
    (expected,) = torch.autograd.grad(losses["loss"], [own], retain_graph=True)
    run.compute_gradients(losses, dict, lambda loss: loss.backward())
    torch.testing.assert_close(own.grad, expected)


def test_a_task_without_logits_is_refused_unless_nothing_is_compared() -> None:
    adapter = RAMT().attach(TinyViT())
    with pytest.raises(TrainingError, match=r"set method\.gate_strength to 0"):
        adapter.events.on_fit_start(Run(1, [], torch.Generator(), {}, forward=lambda batch: batch))
    assert not RAMT(gate_strength=0.0).attach(TinyViT()).events.wants("compute_gradients")


@pytest.mark.parametrize(("travel", "warns"), [(7.4e-3, True), (7.6e-3, False)])
def test_a_run_too_short_for_any_mask_to_flip_is_said(
    caplog: pytest.LogCaptureFixture, travel: float, warns: bool
) -> None:
    adapter = RAMT(gate_strength=0.0).attach(TinyViT())
    with caplog.at_level(logging.WARNING):
        adapter.events.on_fit_start(Run(1, [], torch.Generator(), {}, learning_rates=lambda _: travel))
    assert ("the learning rates of all steps add up to" in caplog.text) == warns


def test_what_is_gone_is_counted() -> None:
    adapter = RAMT(gate_strength=0.0).attach(TinyViT(depth=2))
    assert set(adapter.events.site_entries().values()) == {0}
    shake(adapter)
    gone = adapter.events.site_entries()
    assert gone == {
        name.removeprefix("adapter."): int((~mask.kept()).sum()) for name, mask in masks_of(adapter).items()
    }
    adapter.events.on_epoch_start(1)
    share = sum(gone.values()) / adapter.counts()["adapter"]
    assert adapter.events.figures()["masked_share"] == pytest.approx(share)


def test_masks_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.init: 0\.005 is not above method\.threshold"):
        RAMT(init=5e-3)


def squares(backbone: Backbone) -> Losses:
    return lambda batch: {"loss": backbone(batch).tokens.square().mean()}


def test_tensors_are_chosen_by_the_mean_pull_on_their_masks() -> None:
    backbone, wide = TinyViT(), TinyViT()
    batches = [backbone.example_batch(2), backbone.example_batch(3)]
    everything = RAMT(sites=["attn", "mlp"], gate_strength=0.0).attach(wide)
    pull = dict.fromkeys(masks_of(everything), 0.0)
    for batch in batches:
        for mask in masks_of(everything).values():
            mask.mask_logit.grad = None
        squares(wide)(batch)["loss"].backward()
        for name, mask in masks_of(everything).items():
            pull[name] += float(mask.mask_logit.grad.abs().mean())

    adapter = RAMT(sites=["attn", "mlp"], tensors=3, gate_strength=0.0).attach(backbone)
    assert not masks_of(adapter)
    adapter.events.prepare(iter(batches), squares(backbone))

    assert set(masks_of(adapter)) == set(sorted(pull, key=lambda name: -pull[name])[:3])
    assert not any(parameter.requires_grad for parameter in backbone.network.parameters())
    loaded = RAMT(sites=["attn", "mlp"], tensors=3, gate_strength=0.0).attach(TinyViT())
    shake(adapter)
    loaded.events.rebuild(adapter.facts())
    loaded.load(adapter.state())
    assert {name: mask.kept().tolist() for name, mask in masks_of(loaded).items()} == {
        name: mask.kept().tolist() for name, mask in masks_of(adapter).items()
    }


def test_a_choice_needs_batches_and_as_many_tensors() -> None:
    backbone = TinyViT()
    with pytest.raises(AttachError, match=r"method\.tensors: 99 are asked for, method\.sites selects \d+"):
        RAMT(sites=["attn"], tensors=99).attach(backbone)
    adapter = RAMT(sites=["attn"], tensors=1, gate_strength=0.0).attach(backbone)
    with pytest.raises(TrainingError, match="there is none"):
        adapter.events.prepare([], squares(backbone))
    with pytest.raises(TrainingError, match="was not calibrated"):
        adapter.events.on_fit_start(Run(1, [], torch.Generator(), {}))
    with pytest.raises(FileFormatError, match="masks 'nowhere', which is none"):
        adapter.events.rebuild({"r_amt_choice": {"masked": ["nowhere"]}})
