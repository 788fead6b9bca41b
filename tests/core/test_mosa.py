"""MoSA: styles, splits, routes, masked gradients, the merged file, the second pass, and counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_backbones import TinyViT
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.attach import Adapter, Run
from peft_modal.errors import AttachError, ConfigError, FileFormatError
from peft_modal.methods.mosa import ExpertLinear, MixtureBottleneck, MoSA, owners, symmetric_divergence
from peft_modal_vision.backbone import ViT


@given(
    st.integers(1, 7), st.integers(1, 9), st.integers(1, 6), st.sampled_from(["entry", "row", "column"]), st.booleans()
)
def test_parts_are_disjoint_and_complete_even_where_scores_are_equal(rows, columns, experts, split, ties) -> None:
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)).round(decimals=1 if ties else 6)
    found = owners(scores, experts, split)
    assert found.shape == scores.shape
    assert int(found.max()) < experts
    if split == "row":
        assert bool((found == found[:, :1]).all())
    if split == "column":
        assert bool((found == found[:1]).all())
    if split == "entry":
        counts = torch.bincount(found.flatten().long(), minlength=experts)
        assert int(counts.max()) - int(counts.min()) <= 1


def test_an_experts_part_ends_at_the_floor_in_whole_numbers() -> None:
    scores = torch.arange(18.0).view(3, 6)
    # 5 / 6 of 18 is 15; the product of floats (1 / 6) * 5 * 18 is a little less.
    assert torch.bincount(owners(scores, 6, "entry").flatten()).tolist() == [3] * 6
    assert torch.bincount(owners(scores.flatten()[:10].view(2, 5), 4, "entry").flatten()).tolist() == [2, 3, 2, 3]
    assert owners(scores.flip(0), 3, "row")[:, 0].tolist() == [2, 1, 0]


def adapters(*, depth: int = 2, **options: Any) -> Adapter:
    return MoSA(**{"hidden_dim": 4, **options}).attach(TinyViT(depth=depth))


def shift(adapter: Adapter, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.named_trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def by_hand(style: str, backbone: TinyViT, bottlenecks: list[MixtureBottleneck], x: Tensor) -> Tensor:
    """The first block as the card writes it, with expert 1 below and expert 2 above."""
    block = copy.deepcopy(backbone.network.blocks[0])
    for module in block.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()

    def a(bottleneck: MixtureBottleneck, y: Tensor, act: Any, scale: float) -> Tensor:
        down, up = ((getattr(s, f"weight_{e}"), getattr(s, f"bias_{e}")) for s, e in
                    ((bottleneck.down, 1), (bottleneck.up, 2)))  # fmt: skip
        return scale * functional.linear(act(functional.linear(y, *down)), *up)

    def norm(y: Tensor) -> Tensor:
        own = bottlenecks[0].norm
        return functional.layer_norm(y, y.shape[-1:], own.weight, own.bias, eps=1e-6)

    h = x + block.attn(block.norm1(x))
    if style == "adaptformer":
        return h + block.mlp(block.norm2(h)) + a(bottlenecks[0], norm(h), functional.gelu, 0.1)
    if style == "pfeiffer":
        m = block.mlp(block.norm2(h))
        return h + m + a(bottlenecks[0], norm(m), functional.relu, 1.0)
    x1 = h + a(bottlenecks[0], h, functional.silu, 1.0)
    x2 = x1 + block.mlp(block.norm2(x1))
    return x2 + a(bottlenecks[1], x2, functional.silu, 1.0)


@pytest.mark.parametrize("style", ["adaptformer", "pfeiffer", "houlsby"])
def test_a_training_pass_is_the_one_written_down(style: str) -> None:
    adapter = adapters(style=style, share="none", dropout=0.0, blocks=[0])
    shift(adapter)
    for mixture in mixtures(adapter):
        mixture.down.fixed, mixture.up.fixed = 1, 2
    adapter.train()
    block = adapter.backbone.network.blocks[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = by_hand(style, adapter.backbone, mixtures(adapter), x)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_what_a_style_has_can_be_asked_for_otherwise() -> None:
    plain, other = (
        mixtures(adapters(style="pfeiffer", **options))[0]
        for options in ({}, {"activation": "gelu", "scale": 0.5, "dropout": 0.2})
    )
    assert (plain.activation, plain.scale, plain.dropout) == ("relu", 1.0, 0.0)
    assert (other.activation, other.scale, other.dropout) == ("gelu", 0.5, 0.2)
    assert MoSA().dropout == 0.1
    assert MoSA(dropout=0.0).dropout == 0.0


def test_dropout_zeroes_hidden_channels_and_no_outputs() -> None:
    mixture = mixtures(adapters(hidden_dim=1, dropout=0.5))[0].train()
    for e in range(4):
        nn.init.ones_(mixture.up.get_parameter(f"weight_{e}"))
    out = mixture(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    # With one hidden channel an output is zero in all its channels, or in none.
    zero = out == 0
    assert bool((zero.all(-1) | ~zero.any(-1)).all())
    assert 0 < int(zero.all(-1).sum()) < 64


def mixtures(adapter: Adapter) -> list[MixtureBottleneck]:
    return [module for module in adapter.modules() if isinstance(module, MixtureBottleneck)]


def train_pass(adapter: Adapter, seed: int = 0) -> None:
    adapter.train()
    torch.manual_seed(seed)
    backbone = adapter.backbone
    backbone(backbone.example_batch()).tokens.square().sum().backward()
    adapter.events.after_backward(0)


def test_only_the_active_experts_learn_and_only_what_they_own() -> None:
    adapter = adapters(share="none", dropout=0.0)
    for mixture in mixtures(adapter):
        nn.init.normal_(mixture.up.get_parameter("weight_2"))
        mixture.down.fixed, mixture.up.fixed = 1, 2
    train_pass(adapter)
    for mixture in mixtures(adapter):
        for side, active in ((mixture.down, 1), (mixture.up, 2)):
            for e in range(4):
                gradient = side.get_parameter(f"weight_{e}").grad
                if e != active:
                    assert gradient is None
                    continue
                assert gradient is not None
                assert bool(gradient[side.owner == e].any())
                assert not bool(gradient[side.owner != e].any())
            # Biases belong to every expert.
            assert side.get_parameter(f"bias_{active}").grad is not None


def test_routes_are_drawn_for_every_pass_and_block() -> None:
    adapter = adapters(share="down").train()
    drawn: list[int] = []
    for mixture in mixtures(adapter):
        original = mixture.up.run
        mixture.up.run = lambda x, expert, o=original: (drawn.append(expert), o(x, expert))[1]
    for _ in range(20):
        adapter.backbone(adapter.backbone.example_batch())
    assert set(drawn) == {0, 1, 2, 3}
    assert drawn[0::2] != drawn[1::2]


def step_of_two_passes(adapter: Adapter) -> None:
    run = run_of(adapter)
    adapter.events.on_fit_start(run)
    adapter.train()
    torch.manual_seed(3)
    batch = adapter.backbone.example_batch()
    assert run.forward is not None
    output = run.forward(batch)
    terms = adapter.events.penalty(batch, output)
    torch.stack([output.square().sum(), *terms.values()]).sum().backward()
    adapter.events.after_backward(0)


@pytest.mark.parametrize("style", ["adaptformer", "pfeiffer", "houlsby"])
def test_blocks_of_both_passes_take_their_own_routes_again_when_they_are_recomputed(style: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        adapter = adapters(depth=4, style=style, share="none", dropout=0.2, deep_consistency=0.5)
        shift(adapter)
        adapter.backbone.blocks_for_checkpointing(enabled=checkpointed)
        step_of_two_passes(adapter)
        gradients.append({name: p.grad for name, p in adapter.named_trained().items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_of_several_experts_stay_where_each_owns() -> None:
    adapter = adapters(share="down", dropout=0.0)
    for micro_batch, active in enumerate((1, 3)):
        for mixture in mixtures(adapter):
            mixture.up.fixed = active
        adapter.train()
        adapter.backbone(adapter.backbone.example_batch()).tokens[:, :, 0].sum().backward()
        adapter.events.after_backward(micro_batch)
    for mixture in mixtures(adapter):
        up = mixture.up
        assert [e for e in range(4) if up.get_parameter(f"weight_{e}").grad is not None] == [1, 3]
        for e in (1, 3):
            gradient = up.get_parameter(f"weight_{e}").grad
            assert gradient is not None
            assert bool(gradient[up.owner == e].any())
            assert not bool(gradient[up.owner != e].any())


def test_the_optimiser_leaves_an_expert_alone_that_is_no_longer_active() -> None:
    adapter = adapters(share="down", dropout=0.0)
    optimizer = torch.optim.AdamW(adapter.named_trained().values(), lr=0.1, weight_decay=0.5)
    (up, *_) = [mixture.up for mixture in mixtures(adapter)]
    seen = []
    for active in (1, 2):
        for mixture in mixtures(adapter):
            mixture.up.fixed = active
        optimizer.zero_grad()
        train_pass(adapter)
        optimizer.step()
        seen.append((up.get_parameter("weight_1").detach().clone(), up.get_parameter("weight_2").detach().clone()))
    assert bool(seen[0][0].any())
    assert torch.equal(seen[1][0], seen[0][0])
    assert not bool(seen[0][1].any())
    assert bool(seen[1][1].any())


def test_the_merged_adapter_has_a_share_of_each_experts_change() -> None:
    linear = ExpertLinear(6, 5, experts=4)
    linear.fill(torch.zeros(5, 6))
    with torch.no_grad():
        for e in range(4):
            linear.get_parameter(f"weight_{e}").add_((linear.owner == e) * 8.0)
    assert torch.equal(linear.packed()["weight"], torch.full((5, 6), 2.0))


def test_the_mean_takes_the_experts_place_when_training_is_over() -> None:
    adapter = adapters(share="none", experts=3)
    shift(adapter)
    counts, file = adapter.counts(), adapter.state()
    batch = adapter.backbone.example_batch()
    before = adapter.eval().backbone.eval()(batch).tokens

    adapter.events.finalise()

    assert sum(p.numel() for p in adapter.parameters()) == sum(tensor.numel() for tensor in file.values())
    assert adapter.counts() == counts
    assert all(torch.equal(adapter.state()[name], tensor) for name, tensor in file.items())
    assert torch.equal(adapter.backbone(batch).tokens, before)
    adapter.events.finalise()
    with pytest.raises(ConfigError, match="no mixture left to train"):
        adapter.events.on_fit_start(run_of(adapter))


def test_a_loaded_file_is_one_plain_adapter() -> None:
    adapter = adapters(experts=3)
    shift(adapter)
    loaded = adapters(experts=3)
    loaded.load(adapter.state())
    loaded.adopt({})
    assert sum(p.numel() for p in loaded.parameters()) == sum(tensor.numel() for tensor in adapter.state().values())
    assert all(torch.equal(loaded.state()[name], tensor) for name, tensor in adapter.state().items())


def test_a_file_holds_one_adapter_and_a_checkpoint_all_experts() -> None:
    adapter = adapters()
    train_pass(adapter)
    with torch.no_grad():
        for parameter in adapter.named_trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    file = adapter.state()
    assert not any("weight_1" in name or "owner" in name for name in file)
    loaded = adapters()
    loaded.load(file)
    batch = adapter.backbone.example_batch()
    torch.testing.assert_close(
        loaded.eval().backbone.eval()(batch).tokens, adapter.eval().backbone.eval()(batch).tokens, rtol=1e-5, atol=1e-6
    )
    resumed = MoSA(hidden_dim=4).attach(TinyViT(depth=2), generator=torch.Generator().manual_seed(9))
    state = adapter.state(training_only=True)
    assert any(name.endswith(".owner") for name in state)
    resumed.load(state, training_only=True)
    assert all(torch.equal(resumed.state(training_only=True)[name], value) for name, value in state.items())
    key = next(name for name in file if name.endswith("up.weight"))
    with pytest.raises(FileFormatError, match="has shape"):
        loaded.load({**file, key: file[key][:, :1]})


@pytest.mark.parametrize(("hidden", "stored", "trained"), [(64, 1_208_064, 3_005_184), (16, 322_752, 792_768)])
def test_counts_are_those_of_the_card(hidden: int, stored: int, trained: int) -> None:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    adapter = MoSA(hidden_dim=hidden).attach(ViT(model="custom", weights="random", sizes=sizes))
    assert sum(tensor.numel() for tensor in adapter.state().values()) == stored
    assert sum(parameter.numel() for parameter in adapter.named_trained().values()) == trained
    assert adapter.counts() == {"adapter": stored, "backbone": 0, "training_only": trained - stored}


def run_of(adapter: Adapter, *, gives_logits: bool = True) -> Run:
    named = adapter.named_trained()
    optimizer = torch.optim.AdamW(named.values())

    def forward(batch: Any) -> torch.Tensor:
        return adapter.backbone(batch).tokens[:, 0]

    return Run(4, [optimizer], torch.Generator(), named, forward=forward, gives_logits=gives_logits)


def test_a_second_pass_has_to_agree_with_the_first() -> None:
    adapter = adapters(depth=4, share="none", dropout=0.5, consistency=2.0, deep_consistency=0.01).train()
    shift(adapter)
    run = run_of(adapter)
    adapter.events.on_fit_start(run)
    batch = adapter.backbone.example_batch()
    assert run.forward is not None
    torch.manual_seed(5)
    first = run.forward(batch)
    deep_first = _outputs(adapter)
    second = run.forward(batch)
    deep_second = _outputs(adapter)
    torch.manual_seed(5)
    found = adapter.events.penalty(batch, run.forward(batch))

    # The first two of four blocks; each pass had numbers of its own.
    assert len(deep_first) == 2
    assert not torch.equal(first, second)
    squares = sum(functional.mse_loss(one, two) for one, two in zip(deep_first, deep_second, strict=True))
    torch.testing.assert_close(found["consistency"], 2.0 * symmetric_divergence(first, second))
    torch.testing.assert_close(found["deep_consistency"], 2.0 * 0.01 / 4 * squares)
    assert float(found["deep_consistency"].detach()) > 0
    quiet = adapters(consistency=0.0)
    quiet.events.on_fit_start(run_of(quiet))
    assert not quiet.events.penalty(batch, run.forward(batch))


def _outputs(adapter: Adapter) -> list[Tensor]:
    return list(adapter.backbone.contexts.current().taps.values())


def test_a_task_without_classes_is_refused_before_the_first_step() -> None:
    adapter = adapters()
    with pytest.raises(ConfigError, match=r"method\.consistency: this task has no class logits"):
        adapter.events.on_fit_start(run_of(adapter, gives_logits=False))
    quiet = adapters(consistency=0.0)
    quiet.events.on_fit_start(run_of(quiet, gives_logits=False))


def test_the_divergence_is_symmetric_and_zero_for_equals() -> None:
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    assert float(symmetric_divergence(a, b)) == pytest.approx(float(symmetric_divergence(b, a)))
    assert float(symmetric_divergence(a, a)) == pytest.approx(0.0, abs=1e-7)
    p, q = a.softmax(-1), b.softmax(-1)
    written = 0.5 * ((q * (q / p).log()).sum(-1) + (p * (p / q).log()).sum(-1)).mean()
    torch.testing.assert_close(symmetric_divergence(a, b), written, rtol=1e-4, atol=1e-6)
    # Of maps the mean is over positions as well.
    repeated = [x[:, :, None, None].expand(4, 5, 2, 3) for x in (a, b)]
    assert float(symmetric_divergence(*repeated)) == pytest.approx(float(symmetric_divergence(a, b)), rel=1e-5)


def test_deep_consistency_needs_the_second_pass() -> None:
    with pytest.raises(ConfigError, match=r"method\.deep_consistency"):
        MoSA(consistency=0.0, deep_consistency=0.01)


def test_deep_consistency_needs_an_adapted_block_in_the_first_half() -> None:
    with pytest.raises(AttachError, match="'deep_consistency' could compare"):
        adapters(depth=4, deep_consistency=0.01, blocks="last: 2")


@pytest.mark.parametrize(
    "options", [{"share": "both"}, {"style": "plain"}, {"split": "blocks"}, {"experts": 0}, {"experts": 256}]
)
def test_an_unknown_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{next(iter(options))}"):
        MoSA(**options)


@pytest.mark.parametrize(("split", "channels"), [("row", 4), ("column", 4), ("entry", 128)])
def test_every_expert_needs_something_to_own(split: str, channels: int) -> None:
    adapters(split=split, share="down" if split == "column" else "up", experts=channels)
    with pytest.raises(AttachError, match="cannot each own"):
        adapters(split=split, share="down" if split == "column" else "up", experts=channels + 1)
