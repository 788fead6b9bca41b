"""Operations in place of a module's own: called, stacked, weighted, folded, refused."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close, draw, randomise
from plain_backbone import PlainBackbone, attach
from tiny_backbones import TinyViT
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from peft_modal.anatomy import AnatomyBuilder
from peft_modal.attach import Adapter, LowRankUpdate, Operation, merge_
from peft_modal.errors import AttachError


class Turned(Operation):
    """y = scale * (W x + b), and optionally dropout before."""

    changes_bias = True

    def __init__(self, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(draw(width, seed=3))
        self.has_dropout = dropout > 0

    @override
    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias) * self.scale

    @override
    def fold_weight(self, weight: Tensor) -> Tensor:
        return self.scale[:, None] * weight

    @override
    def fold_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self.scale * bias


def backbone() -> PlainBackbone:
    net = nn.Sequential(nn.Linear(4, 5)).double()
    randomise(net, seed=2)
    return PlainBackbone(net, lambda b: b.op("op", "0", name="op"), example=(3, 4))


def operate(plain: PlainBackbone, *, name: str = "default", dropout: float = 0.0) -> Adapter:
    return attach(
        plain, lambda a: a.operate(plain.anatomy.site("op"), Turned(5, dropout=dropout)), name=name
    ).double()  # fmt: skip


def low_rank(plain: PlainBackbone, *, name: str) -> Adapter:
    site = plain.anatomy.site("op")
    adapter = attach(plain, lambda a: a.low_rank(site, LowRankUpdate(site.shape, rank=2)), name=name).double()
    randomise(adapter, seed=7)
    return adapter


@pytest.mark.parametrize("order", ["operation first", "update first"])
def test_a_low_rank_update_is_added_behind_the_operation_in_either_order(order: str) -> None:
    plain = backbone()
    adapters = {}
    for what in ("turned", "lora") if order == "operation first" else ("lora", "turned"):
        adapters[what] = operate(plain, name=what) if what == "turned" else low_rank(plain, name=what)
    x = plain.example_batch()["x"]
    weight, bias = plain.tensor("0.weight"), plain.tensor("0.bias")
    scale = adapters["turned"].adapter.op.scale
    delta = adapters["lora"].adapter.op.delta()
    expected = functional.linear(x, scale[:, None] * weight + delta, scale * bias)
    assert_close(plain({"x": x}).tokens, expected)
    merge_(plain)
    assert_close(plain({"x": x}).tokens, expected)


def test_two_operations_act_one_on_the_other() -> None:
    plain = backbone()
    one, other = operate(plain, name="one"), operate(plain, name="other")
    with torch.no_grad():
        other.adapter.op.scale.add_(1.0)
    x = plain.example_batch()["x"]
    factor = one.adapter.op.scale * other.adapter.op.scale
    expected = functional.linear(x, plain.tensor("0.weight"), plain.tensor("0.bias")) * factor
    assert_close(plain({"x": x}).tokens, expected)
    gradients = torch.autograd.grad(plain({"x": x}).tokens.sum(), [one.adapter.op.scale, other.adapter.op.scale])
    assert all(bool(gradient.any()) for gradient in gradients)
    merge_(plain)
    assert_close(plain({"x": x}).tokens, expected)


def test_a_weight_lies_between_the_modules_own_operation_and_the_other() -> None:
    plain = backbone()
    x = plain.example_batch()["x"]
    bare = plain({"x": x}).tokens
    adapter = operate(plain)
    full = plain({"x": x}).tokens
    adapter.weight = 0.25
    expected = 0.75 * bare + 0.25 * full
    assert_close(plain({"x": x}).tokens, expected)
    merge_(plain)
    assert_close(plain({"x": x}).tokens, expected)


def test_the_module_is_itself_again_after_the_last_is_gone() -> None:
    plain = backbone()
    one, other = operate(plain, name="one"), operate(plain, name="other")
    one.detach()
    assert "forward" in plain.network[0].__dict__
    other.detach()
    assert "forward" not in plain.network[0].__dict__
    assert not [key for key in plain.shared if key != "order"]


def test_dropout_cannot_lie_below_another_operation() -> None:
    plain = backbone()
    operate(plain, name="one", dropout=0.1)
    with pytest.raises(AttachError, match="dropout already"):
        operate(plain, name="other")
    assert list(plain.adapters) == ["one"]


def test_a_slice_is_refused() -> None:
    vit = TinyViT(depth=1)
    with pytest.raises(AttachError, match=r"'blocks.0.attn.q' is a slice of 'blocks.0.attn.qkv.weight'"):
        attach(vit, lambda a: a.operate(vit.anatomy.site("blocks.0.attn.q"), Turned(32)))


@pytest.mark.parametrize(("dropout", "sentence"), [(0.1, "cannot be dropped"), (0.0, "changes the bias too")])
def test_what_only_a_call_can_do_is_refused_where_there_is_none(dropout: float, sentence: str) -> None:
    net = nn.Sequential(nn.Linear(4, 5)).double()

    def describe(b: AnatomyBuilder) -> None:
        b.read("op", "0", owner="0", name="op")

    plain = PlainBackbone(net, describe, example=(3, 4))
    with pytest.raises(AttachError, match=sentence):
        operate(plain, dropout=dropout)
    assert not plain.adapters
