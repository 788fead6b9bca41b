"""Trained entries against a dense weight with the entries written in."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close, draw, gradients, projection_loss, randomise
from plain_backbone import PlainBackbone, attach
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import AnatomyBuilder
from peft_modal.attach import Adapter, SparseEntries
from peft_modal.errors import FileFormatError


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


def entries_of(adapter: Adapter, site: str = "whole") -> SparseEntries:
    found = adapter.adapter.get_submodule(site)
    assert isinstance(found, SparseEntries)
    return found


def test_entries_start_at_the_loaded_values_and_change_nothing() -> None:
    backbone = linear_backbone()
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    adapter = sparse(backbone, "whole", [5, 0, 23])
    assert torch.equal(entries_of(adapter).values, backbone.network[0].weight.flatten()[[5, 0, 23]])
    assert torch.equal(backbone(batch).tokens, before)


def test_the_gradient_is_the_gathered_dense_gradient() -> None:
    index = [5, 0, 23, 11]
    backbone = linear_backbone()
    adapter = sparse(backbone, "whole", index)
    randomise(adapter)
    values, layer = entries_of(adapter).values, backbone.network[0]
    x = draw(2, 3, 4).requires_grad_()
    dense = layer.weight.detach().flatten().index_copy(0, torch.tensor(index), values.detach()).view(6, 4)
    dense.requires_grad_()
    expected = functional.linear(x, dense, layer.bias)
    actual = backbone({"x": x}).tokens
    assert_close(actual, expected)
    wanted_x, wanted_dense = gradients(projection_loss(expected), [x, dense])
    got_x, got = gradients(projection_loss(actual), [x, values])
    assert_close(got_x, wanted_x)
    assert torch.equal(got, wanted_dense.flatten()[index])


def test_positions_in_a_slice_count_from_its_first_row() -> None:
    backbone = linear_backbone()
    adapter = sparse(backbone, "part1", [0, 7])
    entries = entries_of(adapter, "part1")
    assert torch.equal(entries.values, backbone.network[0].weight[2:4].flatten()[[0, 7]])
    with torch.no_grad():
        entries.values.fill_(9.0)
    changed = backbone.network[0].weight.detach().clone()
    changed[2, 0] = changed[3, 3] = 9.0
    x = draw(2, 3, 4)
    assert_close(backbone({"x": x}).tokens, functional.linear(x, changed, backbone.network[0].bias))


def test_two_adapters_on_overlapping_entries_let_the_later_win() -> None:
    backbone = linear_backbone()
    first = sparse(backbone, "whole", [0, 1], name="first")
    second = sparse(backbone, "whole", [1, 2], name="second")
    randomise(first, seed=1)
    randomise(second, seed=2)
    a, b = entries_of(first).values, entries_of(second).values
    layer = backbone.network[0]
    weight = layer.weight.detach().flatten().index_copy(0, torch.tensor([0, 1]), a)
    weight = weight.index_copy(0, torch.tensor([1, 2]), b).view(6, 4)
    x = draw(2, 3, 4)
    actual, expected = backbone({"x": x}).tokens, functional.linear(x, weight, layer.bias)
    assert_close(actual, expected)
    wanted = gradients(projection_loss(expected), [a, b])
    got = gradients(projection_loss(actual), [a, b])
    assert_close(got[0], wanted[0])
    assert_close(got[1], wanted[1])
    assert got[0][1] == 0  # covered by the second adapter


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
    (gradient,) = gradients(projection_loss(output), [entries_of(adapter).values])
    assert gradient.shape == (0,)
    fresh = sparse(linear_backbone(), "whole", [1, 2])
    fresh.load(adapter.state())
    assert entries_of(fresh).values.numel() == 0


def test_a_state_with_another_number_of_entries_resizes_on_load() -> None:
    source = linear_backbone()
    saved = sparse(source, "whole", [5, 0, 23])
    randomise(saved)
    target = linear_backbone()
    adapter = sparse(target, "whole", [1])
    adapter.load(saved.state())
    entries = entries_of(adapter)
    assert entries.index.tolist() == [5, 0, 23]
    assert entries.index.dtype == torch.int64
    assert entries.values.requires_grad
    assert entries.values.dtype == torch.float64
    batch = source.example_batch()
    assert torch.equal(target(batch).tokens, source(batch).tokens)


def test_values_and_index_of_different_lengths_are_refused_on_load() -> None:
    adapter = sparse(linear_backbone(), "whole", [1])
    state = sparse(linear_backbone(), "whole", [5, 0, 23]).state()
    state["adapter.whole.index"] = state["adapter.whole.index"][:2]
    with pytest.raises(
        FileFormatError, match=r"tensor 'adapter\.whole\.index' has shape \(2,\), this method has \(3,\)"
    ):
        adapter.load(state)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [([24], "outside the 24 entries"), ([-1], "outside the 24 entries"), ([3, 4, 3], "chosen twice")],
)
def test_a_bad_position_is_refused(index: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sparse(linear_backbone(), "whole", index)


def test_entries_of_a_bfloat16_weight_keep_their_own_precision_under_autocast() -> None:
    weight = draw(6, 4, dtype=torch.bfloat16)
    entries = SparseEntries(weight, torch.tensor([0, 5])).float()
    with torch.autocast("cpu", torch.bfloat16):
        written = entries(weight)
    assert written.dtype == torch.bfloat16
    (gradient,) = gradients(projection_loss(written), [entries.values])
    assert gradient.dtype == torch.float32


def test_the_gradient_of_a_computed_base_leaves_out_the_written_entries() -> None:
    base = draw(3, 2).requires_grad_()
    entries = SparseEntries(base, torch.tensor([1, 4])).double()
    leaves: list[Tensor] = [base, entries.values]

    def write(_base: Tensor, _values: Tensor) -> Tensor:
        return entries(_base)

    assert torch.autograd.gradcheck(write, leaves)
