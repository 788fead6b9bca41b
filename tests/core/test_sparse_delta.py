"""Trained entries against a dense weight with the entries written in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from numeric import assert_close, draw, gradients, projection_loss, randomise
from plain_backbone import PlainBackbone, attach
from tiny_backbones import TinyViT
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import AnatomyBuilder
from peft_modal.attach import Adapter, SparseEntries, merge_, sparse_attachment
from peft_modal.errors import AttachError, FileFormatError
from peft_modal.tasks.clipping import FrozenGradients
from peft_modal.tasks.optim import parameter_groups


def linear_backbone() -> PlainBackbone:
    net = nn.Sequential(nn.Linear(4, 6)).double()
    randomise(net, seed=2)

    def describe(b: AnatomyBuilder) -> None:
        b.fused("op", "0", {f"op.{i}": f"part{i}" for i in range(3)}, name="whole")

    return PlainBackbone(net, describe, example=(3, 4))


def sparse(backbone: PlainBackbone, site: str, index: list[int], *, name: str = "default") -> Adapter:
    return attach(
        backbone, lambda a: a.sparse(backbone.anatomy.site(site), torch.tensor(index, dtype=torch.int64)), name=name
    )


def entries_of(adapter: Adapter, name: str = "0.weight") -> SparseEntries:
    found = adapter.adapter.get_submodule(name)
    assert isinstance(found, SparseEntries)
    return found


def shift(entries: SparseEntries, *, seed: int = 5) -> None:
    with torch.no_grad():
        entries.values.add_(draw(*entries.values.shape, seed=seed, dtype=entries.values.dtype))


def dense(backbone: PlainBackbone, *adapters: Adapter, factors: Sequence[float] = (1.0,)) -> Tensor:
    """The weight as loaded, with the changes of all entries added."""
    loaded = backbone.network[0].weight.detach()
    weight = loaded.flatten().clone()
    for adapter, factor in zip(adapters, factors, strict=True):
        index, values = entries_of(adapter).tuned()
        weight[index.long()] += factor * (values - loaded.flatten()[index.long()])
    return weight.view_as(loaded)


def test_entries_start_at_the_loaded_values_and_change_nothing() -> None:
    backbone = linear_backbone()
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    adapter = sparse(backbone, "whole", [5, 0, 23])
    assert torch.equal(entries_of(adapter).values, backbone.network[0].weight.flatten()[[5, 0, 23]])
    assert entries_of(adapter).index.dtype == torch.int32
    assert torch.equal(backbone(batch).tokens, before)


@pytest.mark.parametrize("kept_copy", [True, False])
def test_the_gradient_is_the_gathered_dense_gradient(kept_copy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Once through the copy that a CPU keeps, once through the fresh one of other devices.
    monkeypatch.setattr(sparse_attachment, "_is_worth_keeping", lambda _: kept_copy)
    index = [5, 0, 23, 11]
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", index)
    shift(entries_of(adapter))
    values, layer = entries_of(adapter).values, backbone.network[0]
    x = draw(2, 3, 4).requires_grad_()
    weight = dense(backbone, adapter).requires_grad_()
    expected = functional.linear(x, weight, layer.bias)
    actual = backbone({"x": x}).tokens
    assert_close(actual, expected)
    wanted_x, wanted_dense = gradients(projection_loss(expected), [x, weight])
    got_x, got = gradients(projection_loss(actual), [x, values])
    assert_close(got_x, wanted_x)
    assert torch.equal(got, wanted_dense.flatten()[index])


@pytest.mark.parametrize("kept_copy", [True, False])
def test_positions_in_a_slice_count_from_its_first_row(kept_copy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attachment, "_is_worth_keeping", lambda _: kept_copy)
    backbone = linear_backbone()
    adapter = sparse(backbone, "part1", [0, 7])
    entries = entries_of(adapter, "part1")
    assert torch.equal(entries.values, backbone.network[0].weight[2:4].flatten()[[0, 7]])
    with torch.no_grad():
        entries.values.fill_(9.0)
    changed = backbone.network[0].weight.detach().clone()
    changed[2, 0] = changed[3, 3] = 9.0
    changed.requires_grad_()
    x = draw(2, 3, 4)
    actual, expected = backbone({"x": x}).tokens, functional.linear(x, changed, backbone.network[0].bias)
    assert_close(actual, expected)
    (got,), (wanted,) = (gradients(projection_loss(y), [p]) for y, p in ((actual, entries.values), (expected, changed)))
    assert_close(got, wanted[2:4].flatten()[[0, 7]])


def test_the_changes_of_two_adapters_add_up_each_with_its_factor() -> None:
    backbone = linear_backbone()
    first = sparse(backbone, "whole", [0, 1], name="first")
    second = sparse(backbone, "whole", [1, 2], name="second")
    shift(entries_of(first), seed=1)
    shift(entries_of(second), seed=2)
    first.weight, second.weight = 0.6, 0.3
    a, b = entries_of(first).values, entries_of(second).values
    weight = dense(backbone, first, second, factors=(0.6, 0.3)).requires_grad_()
    x = draw(2, 3, 4)
    actual, expected = backbone({"x": x}).tokens, functional.linear(x, weight, backbone.network[0].bias)
    assert_close(actual, expected)
    (wanted,) = gradients(projection_loss(expected), [weight])
    got = gradients(projection_loss(actual), [a, b])
    assert_close(got[0], 0.6 * wanted.flatten()[[0, 1]])
    assert_close(got[1], 0.3 * wanted.flatten()[[1, 2]])
    merge_(backbone)
    assert_close(backbone({"x": x}).tokens, expected)


def test_the_optimiser_state_has_the_size_of_the_entries() -> None:
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", [3, 9])
    optimizer = torch.optim.AdamW(adapter.parameters())
    projection_loss(backbone(backbone.example_batch()).tokens).backward()
    optimizer.step()
    sizes = {key: value.numel() for key, value in optimizer.state[entries_of(adapter).values].items()}
    assert sizes == {"step": 1, "exp_avg": 2, "exp_avg_sq": 2}
    assert backbone.network[0].weight.grad is None
    assert adapter.counts() == {"adapter": 2, "backbone": 0, "training_only": 0}


def test_an_empty_choice_is_allowed_and_changes_nothing() -> None:
    backbone = linear_backbone()
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    adapter = sparse(backbone, "whole", [])
    output = backbone(batch).tokens
    assert torch.equal(output, before)
    assert not output.requires_grad
    assert not entries_of(adapter).values.requires_grad
    fresh = sparse(linear_backbone(), "whole", [1, 2])
    fresh.load(adapter.state())
    assert entries_of(fresh).values.numel() == 0


def test_a_file_holds_positions_and_changes() -> None:
    adapter = sparse(linear_backbone(), "whole", [5, 0, 23])
    loaded = entries_of(adapter).values.detach().clone()
    shift(entries_of(adapter))
    state = adapter.state()
    assert list(state) == ["adapter.0.weight.index", "adapter.0.weight.delta"]
    assert state["adapter.0.weight.index"].tolist() == [0, 5, 23]
    assert torch.equal(state["adapter.0.weight.delta"], (entries_of(adapter).values - loaded)[[1, 0, 2]])


def test_what_a_file_gives_back_computes_the_same_to_the_bit() -> None:
    # Change and value round differently where they are far apart; the forward pass goes by the change.
    net = nn.Sequential(nn.Linear(300, 300))
    randomise(net, std=0.05)
    backbones = [PlainBackbone(copy.deepcopy(net), lambda b: b.op("op", "0"), example=(300,)) for _ in range(2)]
    index = torch.arange(90_000)
    first, second = (attach(b, lambda a, b=b: a.sparse(b.anatomy.site("0"), index)) for b in backbones)
    with torch.no_grad():
        scale = 10.0 ** draw(90_000, seed=3, dtype=torch.float32)
        entries_of(first).values.copy_(entries_of(first).values.roll(1) * scale)
    second.load(first.state())
    batch = backbones[0].example_batch()
    assert torch.equal(backbones[1](batch).tokens, backbones[0](batch).tokens)
    for name, value in second.state().items():
        assert torch.equal(value, first.state()[name])
    merge_(backbones[0])
    assert torch.equal(backbones[1](batch).tokens, backbones[0](batch).tokens)


@pytest.mark.parametrize("training_only", [False, True])
def test_a_state_with_another_number_of_entries_resizes_on_load(training_only: bool) -> None:
    source = linear_backbone()
    saved = sparse(source, "whole", [5, 0, 23, 7])
    shift(entries_of(saved))
    entries_of(saved).narrow(torch.tensor([True, False, True, True]))
    target = linear_backbone()
    adapter = sparse(target, "whole", [1])
    adapter.load(saved.state(training_only=training_only), training_only=training_only)
    entries = entries_of(adapter)
    assert entries.index.tolist() == ([5, 23, 7] if training_only else [0, 5, 7, 23])
    assert entries.kept_index.tolist() == ([0] if training_only else [])
    assert entries.index.dtype == torch.int32
    assert entries.values.requires_grad
    assert entries.values.dtype == torch.float64
    batch = source.example_batch()
    assert_close(target(batch).tokens, source(batch).tokens)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("index", lambda t: t[:2], r"'adapter\.0\.weight\.index' has shape \(2,\), 'adapter\.0\.weight\.delta' \(3,\)"),
        ("index", lambda t: t + 20, r"'adapter\.0\.weight\.index' does not fit 'whole': a position is outside the 24"),
        ("index", lambda t: t * 0, "a position is chosen twice"),
        ("index", lambda t: t.double(), "must be integers"),
        ("delta", lambda t: t.long(), "real numbers"),
    ],
)
def test_what_does_not_fit_is_refused_on_load_and_nothing_is_changed(
    name: str, change: Callable[[Tensor], Tensor], sentence: str
) -> None:
    adapter = sparse(linear_backbone(), "whole", [5, 0, 23])
    before = adapter.state()
    state = dict(before)
    state[f"adapter.0.weight.{name}"] = change(state[f"adapter.0.weight.{name}"])
    with pytest.raises(FileFormatError, match=sentence):
        adapter.load(state)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state().items())


def test_entries_that_left_training_keep_their_values_and_those_that_stay_their_place() -> None:
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", [5, 0, 23, 11])
    entries = entries_of(adapter)
    shift(entries)
    batch = backbone.example_batch()
    before, all_values = backbone(batch).tokens, entries.values.detach().clone()
    former, kept = entries.narrow(torch.tensor([False, True, True, False]))
    assert former.numel() == 4
    assert kept.tolist() == [1, 2]
    assert entries.index.tolist() == [0, 23]
    assert torch.equal(entries.values, all_values[[1, 2]])
    assert torch.equal(backbone(batch).tokens, before)
    assert adapter.counts()["adapter"] == 2
    (gradient,) = gradients(projection_loss(backbone(batch).tokens), [entries.values])
    assert gradient.shape == (2,)
    index, values = entries.tuned()
    assert index.tolist() == [0, 5, 11, 23]
    assert torch.equal(values, all_values[[1, 0, 3, 2]])
    entries.widen()
    assert entries.index.tolist() == [0, 5, 11, 23]
    assert torch.equal(entries.values, values)
    assert torch.equal(backbone(batch).tokens, before)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [([24], "outside the 24 entries"), ([-1], "outside the 24 entries"), ([3, 4, 3], "chosen twice")],
)
def test_a_bad_position_is_refused(index: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sparse(linear_backbone(), "whole", index)


def test_entries_of_a_bfloat16_weight_are_float32_and_rounded_once_when_written() -> None:
    net = nn.Sequential(nn.Linear(4, 6)).bfloat16()
    backbone = PlainBackbone(net, lambda b: b.op("op", "0"), example=(4,))
    adapter = attach(backbone, lambda a: a.sparse(backbone.anatomy.site("0"), torch.tensor([0, 5])))
    values = entries_of(adapter).values
    assert values.dtype == torch.float32
    with torch.no_grad():
        values.copy_(torch.tensor([0.1001, -0.3003]))
    seen = input_weights(net[0])
    projection_loss(backbone(backbone.example_batch()).tokens).backward()
    assert values.grad is not None
    assert values.grad.dtype == torch.float32
    assert seen[0].flatten()[[0, 5]].tolist() == torch.tensor([0.1001, -0.3003], dtype=torch.bfloat16).tolist()


def input_weights(module: nn.Linear) -> list[Tensor]:
    """Filled at each call with the weight that the call reads."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda own, _: seen.append(own.weight))
    return seen


def test_no_dense_gradient_is_kept() -> None:
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", [3, 9])
    projection_loss(backbone(backbone.example_batch()).tokens).backward()
    kept = [t for m in (backbone, adapter) for t in m.parameters() if t.grad is not None]
    assert [t.grad.shape for t in kept if t.grad is not None] == [(2,)]


def test_a_graph_of_other_values_is_not_silently_back_propagated() -> None:
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", [3, 9])
    batch = {"x": draw(2, 3, 4).requires_grad_()}
    first, again = (projection_loss(backbone(batch).tokens) for _ in range(2))
    (first + again).backward()  # two passes with the same values

    stale = projection_loss(backbone(batch).tokens)
    shift(entries_of(adapter))
    backbone(batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.parametrize("kept_copy", [True, False])
def test_values_written_past_autograd_are_seen(kept_copy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attachment, "_is_worth_keeping", lambda _: kept_copy)
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", [3, 9])
    batch = backbone.example_batch()
    backbone(batch)
    entries_of(adapter).values.data += 1.0  # as averaged weights are swapped in
    expected = functional.linear(batch["x"], dense(backbone, adapter), backbone.network[0].bias)
    assert_close(backbone(batch).tokens, expected)


def test_a_base_that_is_loaded_anew_is_seen() -> None:
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", [3, 9])
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    backbone.network.load_state_dict({k: 2 * v for k, v in backbone.network.state_dict().items()})
    after = backbone(batch).tokens
    assert not torch.equal(after, before)
    weight = backbone.network[0].weight.detach().flatten().clone()
    weight[[3, 9]] = entries_of(adapter).values.detach()
    assert_close(after, functional.linear(batch["x"], weight.view(6, 4), backbone.network[0].bias))


def test_a_first_pass_in_inference_mode_leaves_training_possible() -> None:
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", [3, 9])
    batch = backbone.example_batch()
    with torch.inference_mode():
        backbone(batch)
    projection_loss(backbone(batch).tokens).backward()
    assert entries_of(adapter).values.grad is not None


def test_a_copy_does_not_take_the_written_tensor_along() -> None:
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", [3, 9])
    batch = backbone.example_batch()
    backbone(batch)
    shift(entries_of(adapter))
    wanted = functional.linear(batch["x"], dense(backbone, adapter), backbone.network[0].bias)
    twin, its_adapter = copy.deepcopy((backbone, adapter))
    assert_close(twin(batch).tokens, wanted)
    shift(entries_of(its_adapter))
    assert_close(backbone(batch).tokens, wanted)


def test_a_weight_in_another_memory_format_is_indexed_row_by_row() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    randomise(net)
    backbone = PlainBackbone(net, lambda b: b.op("op", "0"), example=(3, 5, 5))
    adapter = attach(backbone, lambda a: a.sparse(backbone.anatomy.site("0"), torch.tensor([1, 30, 107])))
    batch = backbone.example_batch()
    shift(entries_of(adapter))
    plain = backbone(batch).tokens
    (wanted,) = gradients(projection_loss(plain), [entries_of(adapter).values])
    net.to(memory_format=torch.channels_last)
    assert not net[0].weight.is_contiguous()
    assert_close(backbone(batch).tokens, plain)
    (got,) = gradients(projection_loss(backbone(batch).tokens), [entries_of(adapter).values])
    assert_close(got, wanted)


def test_a_tensor_that_no_module_reads_is_written_for_the_backbones_call() -> None:
    backbone = TinyViT(depth=1)
    adapter = attach(backbone, lambda a: a.sparse(backbone.anatomy.site("pos_embed"), torch.tensor([2, 40])))
    batch = backbone.example_batch()
    bare = backbone(batch).tokens
    with torch.no_grad():
        entries_of(adapter, "pos_embed").values.add_(0.5)
    changed = backbone(batch).tokens
    assert not torch.equal(changed, bare)
    projection_loss(changed).backward()
    assert entries_of(adapter, "pos_embed").values.grad is not None
    assert "pos_embed" not in vars(backbone.network)
    adapter.detach()
    assert not backbone._forward_hooks
    assert not backbone._forward_pre_hooks
    assert torch.equal(backbone(batch).tokens, bare)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x).tanh())


def test_a_tied_tensor_is_trained_once_and_written_everywhere() -> None:
    net = Tied().double()
    backbone = PlainBackbone(net, lambda b: [b.op("op", "into"), b.op("op", "out")], example=(4,))
    adapter = attach(backbone, lambda a: a.sparse(backbone.anatomy.site("out"), torch.tensor([1, 14])))
    assert list(adapter.named_trained()) == ["adapter.out.weight.values"]
    entries = entries_of(adapter, "out.weight")
    shift(entries)
    weight = net.into.weight.detach().flatten().clone()
    weight[[1, 14]] = entries.values.detach()
    weight = weight.view(4, 4).requires_grad_()
    batch = backbone.example_batch()
    hidden = functional.linear(batch["x"], weight, net.into.bias).tanh()
    expected, actual = functional.linear(hidden, weight, net.out.bias), backbone(batch).tokens
    assert_close(actual, expected)
    (wanted,), (got,) = (gradients(projection_loss(y), [p]) for y, p in ((expected, weight), (actual, entries.values)))
    assert_close(got, wanted.flatten()[[1, 14]])
    with pytest.raises(AttachError, match="entries of 'into' are trained twice by one adapter"):
        adapter.sparse(backbone.anatomy.site("into"), torch.tensor([1]))
    merge_(backbone)
    assert net.out.weight is net.into.weight
    assert_close(backbone(batch).tokens, expected)


def test_a_tensor_tied_to_one_without_a_site_is_refused() -> None:
    backbone = PlainBackbone(Tied(), lambda b: b.op("op", "into"), example=(4,))
    with pytest.raises(AttachError, match=r"'into' is tied to 'out\.weight', which the anatomy does not list"):
        attach(backbone, lambda a: a.sparse(backbone.anatomy.site("into"), torch.tensor([1])))


@pytest.mark.parametrize(("decay", "weight", "bias"), [(None, True, False), (True, True, True), (False, False, False)])
def test_entries_decay_as_their_tensor_would_unless_said(decay: bool | None, weight: bool, bias: bool) -> None:
    backbone = PlainBackbone(nn.Sequential(nn.Linear(4, 6)), lambda b: b.op("op", "0"), example=(4,))

    def build(adapter: Adapter) -> None:
        for site in ("0", "0.bias"):
            adapter.sparse(backbone.anatomy.site(site), torch.tensor([1]), decay=decay)

    adapter = attach(backbone, build)
    assert adapter.decay == {"adapter.0.weight.values": weight, "adapter.0.bias.values": bias}
    groups = parameter_groups(adapter.named_trained(), lr=0.1, weight_decay=0.5, decay=adapter.decay)
    decayed = sum(len(group["params"]) for group in groups if group["weight_decay"])
    assert decayed == weight + bias


def test_a_norm_over_frozen_gradients_counts_every_entry_once() -> None:
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", [3, 9])
    shift(entries_of(adapter))
    weight = dense(backbone, adapter).requires_grad_()
    batch, layer = backbone.example_batch(), backbone.network[0]
    bias = layer.bias.detach().clone().requires_grad_()
    wanted = gradients(projection_loss(functional.linear(batch["x"], weight, bias)), [weight, bias])
    norm = torch.cat([g.flatten() for g in wanted]).norm()

    frozen = FrozenGradients(backbone)
    projection_loss(backbone(batch).tokens).backward()
    frozen.clip(adapter.parameters(), float(norm) / 2)
    frozen.detach()

    grad = entries_of(adapter).values.grad
    assert grad is not None
    assert_close(grad, wanted[0].flatten()[[3, 9]] / 2, tolerance=1e-5)
