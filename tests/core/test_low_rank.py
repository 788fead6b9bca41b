"""Low-rank updates against F.linear and F.conv with the changed weight written out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from numeric import assert_close, draw, gradients, projection_loss, randomise
from plain_backbone import PlainBackbone, attach
from tiny_backbones import TinyCLIP, TinyViT
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import AnatomyBuilder, Backbone
from peft_modal.attach import Adapter, LowRankUpdate
from peft_modal.attach.low_rank_function import LowRankLinear
from peft_modal.errors import AttachError


def operation(module: nn.Module, *, example: tuple[int, ...], parts: int = 0) -> PlainBackbone:
    """A backbone that is one operation called `op`, in float64; its rows split into `parts` slices."""
    module = module.double()
    randomise(module, seed=2)

    def describe(b: AnatomyBuilder) -> None:
        if parts:
            b.fused("op", "0", {f"op.{i}": f"part{i}" for i in range(parts)}, name="whole")
        else:
            b.op("op", "0", name="op")

    return PlainBackbone(nn.Sequential(module), describe, example=example)


def with_updates(backbone: Backbone, *sites: str, name: str = "default", **options: float) -> Adapter:
    def build(adapter: Adapter) -> None:
        for i, site_name in enumerate(sites):
            site = backbone.anatomy.site(site_name)
            adapter.low_rank(site, LowRankUpdate(site.shape, rank=2 + i, **options))

    adapter = attach(backbone, build, name=name).double()
    randomise(adapter, seed=7)
    return adapter


def update_of(adapter: Adapter, site: str) -> LowRankUpdate:
    found = adapter.adapter.get_submodule(site)
    assert isinstance(found, LowRankUpdate)
    return found


def check(backbone: PlainBackbone, adapter: Adapter, x: Tensor, formula: Callable[[Tensor], Tensor]) -> None:
    """Output, and gradients of the input and of every trained tensor."""
    leaves = [x.requires_grad_(), *adapter.parameters()]
    actual, expected = backbone({"x": x}).tokens, formula(x)
    assert_close(actual, expected)
    for got, wanted in zip(
        gradients(projection_loss(actual), leaves), gradients(projection_loss(expected), leaves), strict=True
    ):
        assert_close(got, wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=["matrix", "sequence", "grid"])
def test_a_linear_equals_its_weight_plus_the_product(bias: bool, shape: tuple[int, ...]) -> None:
    backbone = operation(nn.Linear(4, 6, bias=bias), example=shape)
    adapter = with_updates(backbone, "op", scale=0.7)
    layer, update = backbone.network[0], update_of(adapter, "op")
    check(
        backbone, adapter, draw(5, *shape),
        lambda x: functional.linear(x, layer.weight + 0.7 * update.up @ update.down, layer.bias),
    )  # fmt: skip


def test_slices_of_a_fused_weight_change_their_own_rows() -> None:
    backbone = operation(nn.Linear(4, 9), example=(3, 4), parts=3)
    adapter = with_updates(backbone, "part0", "part2", scale=1.3)
    layer, first, last = backbone.network[0], update_of(adapter, "part0"), update_of(adapter, "part2")

    def formula(x: Tensor) -> Tensor:
        zero = torch.zeros(3, 4, dtype=x.dtype)
        change = torch.cat([first.up @ first.down, zero, last.up @ last.down])
        return functional.linear(x, layer.weight + 1.3 * change, layer.bias)

    check(backbone, adapter, draw(2, 3, 4), formula)


def test_two_adapters_on_one_module_add_up() -> None:
    backbone = operation(nn.Linear(4, 6), example=(3, 4), parts=2)
    one = with_updates(backbone, "whole", name="one")
    other = with_updates(backbone, "part1", name="other")
    layer, a, b = backbone.network[0], update_of(one, "whole"), update_of(other, "part1")
    x = draw(2, 3, 4)
    expected = functional.linear(x, layer.weight + a.up @ a.down, layer.bias)
    expected = expected + functional.pad(functional.linear(x, b.up @ b.down), (3, 0))
    assert_close(backbone({"x": x}).tokens, expected)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9), functional.conv1d),
    "2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), (3, 7, 6), functional.conv2d),
    "2d without bias": (nn.Conv2d(3, 4, 1, bias=False), (3, 4, 4), functional.conv2d),
    "2d same": (nn.Conv2d(3, 4, 3, padding="same"), (3, 5, 5), functional.conv2d),
    "3d": (nn.Conv3d(2, 3, 2, dilation=2), (2, 4, 4, 4), functional.conv3d),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_keeps_its_stride_padding_and_dilation(case: str) -> None:
    module, shape, conv = CONVOLUTIONS[case]
    backbone = operation(copy.deepcopy(module), example=shape)
    adapter = with_updates(backbone, "op", scale=0.4)
    layer, update = backbone.network[0], update_of(adapter, "op")

    def formula(x: Tensor) -> Tensor:
        change = torch.einsum("or,ri->oi", update.up.flatten(1), update.down.flatten(1)).view_as(layer.weight)
        return conv(x, layer.weight + 0.4 * change, layer.bias, layer.stride, layer.padding, layer.dilation)

    check(backbone, adapter, draw(2, *shape), formula)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_convolution_keeps_its_padding_mode(mode: str) -> None:
    backbone = operation(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), example=(3, 5, 5))
    adapter = with_updates(backbone, "op")
    layer, update = backbone.network[0], update_of(adapter, "op")

    def formula(x: Tensor) -> Tensor:
        change = (update.up.flatten(1) @ update.down.flatten(1)).view_as(layer.weight)
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode=mode), layer.weight + change, layer.bias)

    check(backbone, adapter, draw(2, 3, 5, 5), formula)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "it is a convolution with 2 groups"),
        (nn.LayerNorm(4), "its operation is 'norm'; low-rank updates act on linears and convolutions"),
        (nn.Embedding(4, 4), "its operation is 'embedding'"),
    ],
    ids=["grouped", "norm", "embedding"],
)
def test_what_takes_no_low_rank_update_is_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    backbone = operation(module, example=(4,))
    with pytest.raises(AttachError, match=f"'op' takes no low-rank update: {reason}"):
        with_updates(backbone, "op")


def test_a_packed_attention_weight_is_updated_in_the_weight() -> None:
    backbone = TinyCLIP().double()
    adapter = with_updates(backbone, "visual.blocks.0.attn.v", "visual.blocks.1.attn.out", scale=0.5)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in _clip_batch().items()}
    actual = backbone(batch).tokens

    adapter.detach()
    reference = copy.deepcopy(backbone)
    v, out = update_of(adapter, "visual.blocks.0.attn.v"), update_of(adapter, "visual.blocks.1.attn.out")
    with torch.no_grad():
        blocks = reference.network.visual.transformer.resblocks
        blocks[0].attn.in_proj_weight[64:96] += 0.5 * v.up @ v.down
        blocks[1].attn.out_proj.weight += 0.5 * out.up @ out.down
    assert_close(actual, reference(batch).tokens)


def _clip_batch() -> dict[str, Tensor]:
    return TinyCLIP().example_batch()


def test_dropout_is_refused_where_there_is_no_call() -> None:
    backbone = TinyCLIP()
    with pytest.raises(AttachError, match=r"'visual\.blocks\.0\.attn\.q' is read inside a function.*set dropout to 0"):
        with_updates(backbone, "visual.blocks.0.attn.q", dropout=0.1)


def test_dropout_zeroes_inputs_of_the_update_only_and_only_while_training() -> None:
    backbone = operation(nn.Linear(4, 6), example=(3, 4))
    adapter = with_updates(backbone, "op", dropout=0.5)
    layer, update = backbone.network[0], update_of(adapter, "op")
    x = draw(64, 3, 4).requires_grad_()
    base, change = functional.linear(x, layer.weight, layer.bias), update.up @ update.down

    adapter.eval()
    assert_close(backbone({"x": x}).tokens, base + functional.linear(x, change))
    adapter.train()
    torch.manual_seed(11)
    actual = backbone({"x": x}).tokens
    torch.manual_seed(11)
    expected = base + functional.linear(functional.dropout(x, 0.5), change)
    assert_close(actual, expected)
    leaves = [x, *adapter.parameters()]
    for got, wanted in zip(
        gradients(projection_loss(actual), leaves), gradients(projection_loss(expected), leaves), strict=True
    ):
        assert_close(got, wanted)


def test_every_gradient_has_the_strides_of_its_parameter() -> None:
    backbone = operation(nn.Linear(4, 9), example=(3, 4), parts=3)
    adapter = with_updates(backbone, "part0", "part1")
    # Asked for directly: `.grad` would be a copy with the right strides, which costs what is to be saved.
    found = gradients(projection_loss(backbone({"x": draw(2, 3, 4)}).tokens), adapter.parameters())
    for (name, parameter), gradient in zip(adapter.named_parameters(), found, strict=True):
        assert gradient.stride() == parameter.stride(), name


def test_the_function_passes_gradcheck_in_all_its_inputs() -> None:
    x, weight, bias = draw(3, 4, seed=1), draw(5, 4, seed=2), draw(5, seed=3)
    factors = (draw(2, 4, seed=4), draw(1, 4, seed=5), draw(2, 2, seed=6), draw(3, 1, seed=7))
    leaves = [t.requires_grad_() for t in (x, weight, bias, *factors)]
    slices = ((0, 2, 0.5), (2, 5, 2.0))
    assert torch.autograd.gradcheck(lambda a, w, b, *f: LowRankLinear.apply(a, w, b, slices, *f), leaves)


def test_overlapping_slices_add_up_in_the_gradient_too() -> None:
    x, weight = draw(3, 4, seed=1), draw(5, 4, seed=2)
    factors = (draw(2, 4, seed=4), draw(1, 4, seed=5), draw(5, 2, seed=6), draw(2, 1, seed=7))
    leaves = [t.requires_grad_() for t in (x, weight, *factors)]
    slices = ((0, 5, 1.0), (1, 3, -1.0))
    assert torch.autograd.gradcheck(lambda a, w, *f: LowRankLinear.apply(a, w, None, slices, *f), leaves)


def test_a_computed_weight_below_an_update_still_gets_its_gradient() -> None:
    backbone = operation(nn.Linear(4, 6), example=(3, 4))
    layer, gain = backbone.network[0], Gain()

    def build(adapter: Adapter) -> None:
        site = backbone.anatomy.site("op")
        adapter.reparametrise(site, gain, name="gain")
        adapter.low_rank(site, LowRankUpdate(site.shape, rank=2))

    adapter = attach(backbone, build).double()
    randomise(adapter, seed=7)
    update = update_of(adapter, "op")
    check(
        backbone, adapter, draw(2, 3, 4),
        lambda x: functional.linear(x, gain.value * layer.weight + update.up @ update.down, layer.bias),
    )  # fmt: skip


class Gain(nn.Module):
    """W times a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.value * weight


def test_a_small_update_survives_bfloat16_autocast() -> None:
    backbone = operation(nn.Linear(64, 64, bias=False), example=(16, 64)).float()
    adapter = with_updates(backbone, "op").float()
    layer, update = backbone.network[0], update_of(adapter, "op")
    with torch.no_grad():
        # W [z, z] = 0 for W = [A, -A]: what comes out is the update alone, however large W is.
        layer.weight[:, 32:] = -layer.weight[:, :32]
        update.up.mul_(1e-3)
    z = draw(4, 16, 32, dtype=torch.float32)
    x = torch.cat([z, z], dim=-1)
    exact = functional.linear(x.double(), update.delta().detach().double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        beside_the_call = backbone({"x": x}).tokens.double()
        in_the_weight = functional.linear(x, layer.weight + update.delta()).double()
    assert float((beside_the_call - exact).norm() / exact.norm()) < 0.02
    assert float((in_the_weight - exact).norm() / exact.norm()) > 0.5  # else this test would show nothing


def test_gradients_under_autocast_are_float32_and_close_to_exact() -> None:
    results = []
    for autocast in (False, True):
        backbone = operation(nn.Linear(32, 48), example=(16, 32), parts=3)
        adapter = with_updates(backbone, "part0", "part2")
        if autocast:
            backbone.float()
            adapter.float()
        x = draw(4, 16, 32).to(torch.float32 if autocast else torch.float64)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = backbone({"x": x}).tokens
        assert y.dtype == (torch.bfloat16 if autocast else torch.float64)
        results.append(gradients((y.double() * draw(*y.shape, seed=99)).sum(), adapter.parameters()))
    for exact, rough in zip(*results, strict=True):
        assert rough.dtype == torch.float32
        assert float((rough - exact).norm() / exact.norm()) < 0.03


def test_updates_start_as_the_identity_to_the_bit() -> None:
    backbone = TinyViT()
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    sites = [s.name for s in backbone.anatomy.sites if s.role in {"attn.out", "mlp.in", "mlp.out", "embed"}]
    attach(
        backbone,
        lambda a: [
            a.low_rank(backbone.anatomy.site(n), LowRankUpdate(backbone.anatomy.site(n).shape, rank=2)) for n in sites
        ],
    )
    assert torch.equal(backbone(batch).tokens, before)


def test_the_first_module_computes_no_gradient_of_its_input() -> None:
    backbone = operation(nn.Linear(4, 6), example=(3, 4))
    with_updates(backbone, "op")
    y = backbone({"x": draw(2, 3, 4)}).tokens
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "LowRankLinearBackward"
    assert [function for function, _ in y.grad_fn.next_functions[:3]] == [None, None, None]  # x, weight, bias


def test_initial_factors_have_the_stated_spread() -> None:
    kaiming = LowRankUpdate((64, 400), rank=50)
    largest = float(kaiming.down.detach().abs().max())
    assert 0.95 * 400**-0.5 < largest <= 400**-0.5
    gaussian = LowRankUpdate((64, 400), rank=50, init="gaussian")
    assert abs(float(gaussian.down.detach().std()) - 1 / 50) < 0.001
    for update in (kaiming, gaussian):
        assert not update.up.any()
