"""The context of a forward pass: how long it lives, and when it is refused."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 — what is tested is that a copy through pickle starts empty

import pytest
import torch
from numeric import assert_close, gradients, projection_loss
from tiny_backbones import TinyViT
from torch import Tensor

from peft_modal.anatomy import Context, Contexts, in_backward
from peft_modal.errors import ContextError
from peft_modal.methods.vpt import VPT


def vit_with_prompts(*, checkpointing: bool, deep: bool = False) -> tuple[TinyViT, list[Tensor]]:
    backbone = TinyViT()
    adapter = VPT(num_tokens=2, deep=deep).attach(backbone)
    backbone.blocks_for_checkpointing(enabled=checkpointing)
    return backbone, list(adapter.parameters())


def test_a_value_is_computed_once_and_shared() -> None:
    context = Context({})
    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.zeros(1)

    assert context.once("basis", compute) is context.once("basis", compute)
    assert len(calls) == 1


def test_a_shared_value_carries_no_gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not Context({}).once("basis", lambda: x * 2).requires_grad


def test_a_published_value_is_read_and_a_missing_one_lists_what_is_there() -> None:
    context = Context({})
    context.put("centres", 1)
    assert context.get("centres") == 1
    with pytest.raises(ContextError, match="this forward pass has no 'time'; it has centres"):
        context.get("time")
    with pytest.raises(ContextError, match="it has nothing"):
        Context({}).get("time")


def test_there_is_no_context_before_the_first_forward() -> None:
    with pytest.raises(ContextError, match="call the backbone, not its network"):
        Contexts().current()


def test_a_network_called_past_its_backbone_is_refused() -> None:
    backbone, _ = vit_with_prompts(checkpointing=False)
    with pytest.raises(ContextError, match="call the backbone"):
        backbone.network(backbone.example_batch()["image"])


def test_the_context_outlives_its_forward_and_ends_with_the_next() -> None:
    backbone, _ = vit_with_prompts(checkpointing=False)
    batch = backbone.example_batch()
    backbone(batch)
    first = backbone.contexts.current()
    assert first.batch is batch
    backbone(backbone.example_batch(3))
    assert backbone.contexts.current() is not first


def test_in_backward_is_true_only_while_autograd_runs() -> None:
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: object, x: Tensor) -> Tensor:
            seen.append(in_backward())
            return x.clone()

        @staticmethod
        def backward(_ctx: object, grad: Tensor) -> Tensor:
            seen.append(in_backward())
            return grad

    Probe.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert seen == [False, True]
    assert not in_backward()


@pytest.mark.parametrize("deep", [True, False], ids=["fresh", "surviving"])
def test_checkpointing_changes_no_gradient(deep: bool) -> None:
    results = []
    for checkpointing in (False, True):
        backbone, parameters = vit_with_prompts(checkpointing=checkpointing, deep=deep)
        loss = projection_loss(backbone(backbone.example_batch()).tokens)
        results.append(gradients(loss, parameters))
    for plain, recomputed in zip(*results, strict=True):
        assert_close(recomputed, plain, tolerance=1e-6)


def test_two_open_forwards_with_checkpointing_are_refused_in_backward() -> None:
    backbone, _ = vit_with_prompts(checkpointing=True)
    first = projection_loss(backbone(backbone.example_batch()).tokens)
    second = projection_loss(backbone(backbone.example_batch()).tokens, seed=98)
    with pytest.raises(ContextError, match="computed again while 2 forward passes are open"):
        (first + second).backward()


def test_two_open_forwards_without_checkpointing_sum_their_gradients() -> None:
    backbone, parameters = vit_with_prompts(checkpointing=False)
    batch = backbone.example_batch()
    alone = [gradients(projection_loss(backbone(batch).tokens, seed=seed), parameters) for seed in (98, 99)]
    both = projection_loss(backbone(batch).tokens, seed=98) + projection_loss(backbone(batch).tokens, seed=99)
    for together, one, other in zip(gradients(both, parameters), *alone, strict=True):
        assert_close(together, one + other, tolerance=1e-6)


def test_backward_after_each_forward_is_always_allowed() -> None:
    backbone, _ = vit_with_prompts(checkpointing=True)
    kept = []
    for _ in range(3):
        output = backbone(backbone.example_batch()).tokens
        kept.append(output)  # the graph's output stays alive, its backward is over
        projection_loss(output).backward()


def test_a_forward_whose_graph_is_gone_is_no_longer_open() -> None:
    backbone, _ = vit_with_prompts(checkpointing=True)
    backbone(backbone.example_batch())
    projection_loss(backbone(backbone.example_batch()).tokens).backward()


def test_a_forward_without_gradients_between_forward_and_backward_disturbs_nothing() -> None:
    plain, parameters = vit_with_prompts(checkpointing=True)
    batch = plain.example_batch()
    expected = gradients(projection_loss(plain(batch).tokens), parameters)

    backbone, parameters = vit_with_prompts(checkpointing=True)
    loss = projection_loss(backbone(batch).tokens)
    with torch.no_grad():
        backbone(backbone.example_batch(5))
    for actual, wanted in zip(gradients(loss, parameters), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_copies_start_without_a_context() -> None:
    backbone, _ = vit_with_prompts(checkpointing=False)
    output = backbone(backbone.example_batch()).tokens
    assert output.requires_grad
    for duplicate in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        with pytest.raises(ContextError, match="no forward pass has started"):
            duplicate.contexts.current()
    backbone.contexts.current()
