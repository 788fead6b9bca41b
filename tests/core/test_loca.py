"""LoCA: the transform, the turns of coefficients and positions, their rate, and what a run tells."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import TinyViT

from peft_modal.attach import Run
from peft_modal.attach.merge import merge_
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.loca import LoCA, Spectrum, cosines
from peft_modal.tasks.optim import parameter_groups


def spectrum(transform: str = "sparse", *, steps: int | None = None, count: int = 9) -> Spectrum:
    torch.manual_seed(0)
    made = Spectrum((14, 20), count, alpha=0.7, location_steps=steps, transform=transform)
    torch.nn.init.normal_(made.coef)
    return made


@pytest.mark.parametrize("side", [1, 2, 14, 33])
def test_the_transform_is_orthonormal(side: int) -> None:
    matrix = cosines(side, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(side, dtype=torch.float64))


def test_both_ways_to_transform_give_the_same_also_where_places_coincide() -> None:
    one, other = spectrum("sparse"), spectrum("dense")
    with torch.no_grad():
        for made in (one, other):
            made.location[:, 1] = made.location[:, 0]
    torch.testing.assert_close(one.delta(), other.delta())


def learns(made: Spectrum) -> tuple[bool, bool]:
    made.coef.grad = made.location.grad = None
    made(torch.zeros(14, 20)).square().sum().backward()
    return made.coef.grad is not None, made.location.grad is not None


def test_coefficients_and_positions_take_turns_and_then_positions_stay() -> None:
    made = spectrum(steps=65).train()
    turns = [learns(made) for _ in range(80)]
    assert all(a != b for a, b in turns[:65])
    trains_coef = [a for a, _ in turns]
    assert trains_coef[:65] == [i % 30 < 10 for i in range(65)]
    assert turns[65:] == [(True, False)] * 15


def test_evaluation_counts_nothing() -> None:
    made = spectrum(steps=10).eval()
    assert learns(made) == (True, True)
    assert int(made.step) == 0


def test_the_counter_is_part_of_a_checkpoint() -> None:
    adapter = LoCA(num_frequencies=5).attach(TinyViT()).train()
    backbone = adapter.backbone.train()
    for _ in range(12):
        backbone(backbone.example_batch())
    state = adapter.state(training_only=True)
    assert {int(value) for name, value in state.items() if name.endswith(".step")} == {12}
    fresh = LoCA(num_frequencies=5).attach(TinyViT()).train()
    fresh.load(state, training_only=True)
    tokens = fresh.backbone(fresh.backbone.example_batch()).tokens
    tokens.square().sum().backward()
    grads = {name.rpartition(".")[2]: parameter.grad for name, parameter in fresh.named_trained().items()}
    assert grads["coef"] is None
    assert grads["location"] is not None


def test_a_recomputed_block_is_counted_once() -> None:
    adapter = LoCA(num_frequencies=5).attach(TinyViT()).train()
    backbone = adapter.backbone.train()
    backbone.blocks_for_checkpointing(enabled=True)
    for _ in range(3):
        backbone(backbone.example_batch()).tokens.square().sum().backward()
    steps = {int(value) for name, value in adapter.state().items() if name.endswith(".step")}
    assert steps == {3}


def test_a_run_tells_how_long_positions_are_trained() -> None:
    adapter = LoCA(num_frequencies=5, location_share=0.25).attach(TinyViT())
    named = adapter.named_trained()
    optimizer = torch.optim.AdamW(named.values())
    run = Run(total_steps=40, optimizers=[optimizer], generator=torch.Generator(), named_parameters=named)
    adapter.events.on_fit_start(run)
    spectra = [module for module in adapter.modules() if isinstance(module, Spectrum)]
    assert spectra
    assert {module.location_steps for module in spectra} == {10}


def test_positions_have_a_rate_of_their_own() -> None:
    adapter = LoCA(num_frequencies=5, location_lr=3e-5).attach(TinyViT())
    groups = parameter_groups(
        adapter.named_trained(), lr=1e-2, weight_decay=0.1, decay=adapter.decay, own_lr=adapter.lr
    )
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in adapter.named_trained().items():
        assert rates[id(parameter)] == (3e-5 if name.endswith(".location") else 1e-2)


def test_it_merges_exactly() -> None:
    backbone = TinyViT()
    adapter = LoCA(num_frequencies=40).attach(backbone).eval()
    with torch.no_grad():
        for name, parameter in adapter.named_trained().items():
            if name.endswith(".coef"):
                parameter.normal_()
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    merge_(backbone)
    torch.testing.assert_close(backbone(batch).tokens, before, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_updates_input_alone() -> None:
    backbone, plain = TinyViT(), TinyViT()
    adapters = [
        LoCA(num_frequencies=40, dropout=p, location_steps=0).attach(b) for p, b in ((0.9, backbone), (0.0, plain))
    ]
    batch = backbone.example_batch()
    untouched = plain(batch).tokens
    torch.testing.assert_close(backbone(batch).tokens, untouched)  # it starts at zero
    with torch.no_grad():
        for one, other in zip(adapters[0].named_trained().values(), adapters[1].named_trained().values(), strict=True):
            one.normal_() if one.dim() == 1 else one.uniform_()
            other.copy_(one)

    outputs = [b(batch).tokens for b in (backbone.eval(), plain.eval())]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(adapters[0].named_trained().values(), adapters[1].named_trained().values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)

    adapters[0].train()
    draws = [backbone(batch).tokens for _ in range(2)]
    assert not torch.allclose(*draws)
    merge_(backbone)
    torch.testing.assert_close(backbone.eval()(batch).tokens, outputs[1], rtol=1e-4, atol=1e-4)


def test_dropout_of_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.dropout: expected a number from 0 to below 1, got 1\.0"):
        LoCA(dropout=1.0)


def test_convolutions_are_refused() -> None:
    with pytest.raises(AttachError, match=r"'patch_embed\.proj' is no linear"):
        LoCA(sites=["embed"]).attach(TinyViT())
