"""Branches against the block written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numeric import assert_close, draw, gradients, projection_loss, randomise
from plain_backbone import AttentionBlock, PlainBackbone, attach, stream_backbone
from tiny_backbones import TinyCLIP
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Context, Port, Segment, TokenLayout
from peft_modal.errors import AttachError
from peft_modal.methods.bottleneck import Bottleneck

LAYOUT = TokenLayout(segments=(Segment("cls", 1), Segment("points", None)), body="points", prompt_index=1)


def port(backbone: PlainBackbone, role: str, block: int = 1) -> Port:
    return backbone.anatomy.port(role, stack="blocks", block=block)


def small_mlp(seed: int = 4) -> nn.Module:
    module = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8)).double()
    randomise(module, seed=seed)
    return module


def run_by_hand(x: Tensor, block_of: Callable[[int, AttentionBlock, Tensor], Tensor]) -> Tensor:
    net = stream_backbone(layout=LAYOUT).network  # the same weights, with nothing attached
    x = x + net.pos
    for i, block in enumerate(net.blocks):
        x = block_of(i, block, x)
    return net.norm(x)


def attention(block: AttentionBlock, x: Tensor) -> Tensor:
    q, k, v = block.qkv(block.norm1(x)).chunk(3, dim=-1)
    return block.proj((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v)


def check(
    backbone: PlainBackbone, module: nn.Module, block_of: Callable[[int, AttentionBlock, Tensor], Tensor]
) -> None:
    x = draw(2, 5, 8).requires_grad_()
    leaves = [x, *module.parameters()]
    actual, expected = backbone({"x": x}).tokens, run_by_hand(x, block_of)
    assert_close(actual, expected)
    for got, wanted in zip(
        gradients(projection_loss(actual), leaves), gradients(projection_loss(expected), leaves), strict=True
    ):
        assert_close(got, wanted)


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_a_parallel_branch_adds_what_it_makes_of_the_tapped_tensor(weight: float) -> None:
    backbone, module = stream_backbone(layout=LAYOUT), small_mlp()
    adapter = attach(backbone, lambda a: a.branch(port(backbone, "mlp.norm.in"), port(backbone, "block.out"), module))
    adapter.weight = weight

    def block_of(i: int, block: AttentionBlock, x: Tensor) -> Tensor:
        middle = x + attention(block, x)
        out = middle + block.mlp(block.norm2(middle))
        return out + weight * module(middle) if i == 1 else out

    check(backbone, module, block_of)


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_a_sequential_branch_replaces_the_tensor(weight: float) -> None:
    backbone, module = stream_backbone(layout=LAYOUT), small_mlp()
    at = port(backbone, "mlp.out")
    adapter = attach(backbone, lambda a: a.branch(at, at, module, mode="apply"))
    adapter.weight = weight

    def block_of(i: int, block: AttentionBlock, x: Tensor) -> Tensor:
        x = x + attention(block, x)
        m = block.mlp(block.norm2(x))
        return x + ((1 - weight) * m + weight * module(m) if i == 1 else m)

    check(backbone, module, block_of)


class Joined(nn.Module):
    """f(stream + branch) - 2 branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f = small_mlp()

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        return self.f(stream + branch) - 2 * branch


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_a_joining_branch_replaces_a_tensor_by_what_it_makes_of_two(weight: float) -> None:
    backbone, module = stream_backbone(layout=LAYOUT), Joined()
    adapter = attach(
        backbone, lambda a: a.branch(port(backbone, "block.in"), port(backbone, "mlp.out"), module, mode="join")
    )
    adapter.weight = weight

    def block_of(i: int, block: AttentionBlock, x: Tensor) -> Tensor:
        middle = x + attention(block, x)
        m = block.mlp(block.norm2(middle))
        return middle + ((1 - weight) * m + weight * module(x, m) if i == 1 else m)

    check(backbone, module, block_of)


def test_branches_at_one_port_act_in_order_of_attachment() -> None:
    backbone, first, second = stream_backbone(layout=LAYOUT), small_mlp(1), small_mlp(2)
    at = port(backbone, "mlp.out")
    attach(backbone, lambda a: a.branch(at, at, first, mode="apply"), name="first")
    attach(backbone, lambda a: a.branch(at, at, second, mode="apply"), name="second")

    def block_of(i: int, block: AttentionBlock, x: Tensor) -> Tensor:
        x = x + attention(block, x)
        m = block.mlp(block.norm2(x))
        return x + (second(first(m)) if i == 1 else m)

    check(backbone, first, block_of)


def test_one_module_may_serve_several_blocks_and_counts_once() -> None:
    backbone, module = stream_backbone(layout=LAYOUT), small_mlp()

    def build(a: object) -> None:
        for i in range(3):
            at = port(backbone, "mlp.out", i)
            a.branch(at, at, module, mode="apply", name="shared" if i == 0 else "")

    adapter = attach(backbone, build)

    def block_of(_i: int, block: AttentionBlock, x: Tensor) -> Tensor:
        x = x + attention(block, x)
        return x + module(block.mlp(block.norm2(x)))

    check(backbone, module, block_of)
    assert adapter.counts()["adapter"] == sum(p.numel() for p in module.parameters())
    assert len(adapter.state()) == 4


class WithContext(nn.Module):
    """Adds a published value."""

    uses_context = True

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x + context.get("shift")


class Publishing(PlainBackbone):
    """Publishes a value before its first block."""

    @override
    def extract(self, batch: object, context: Context) -> object:
        context.put("shift", 3.0)
        return super().extract(batch, context)


def test_a_module_that_asks_for_the_context_gets_it() -> None:
    backbone = Publishing(
        nn.Sequential(nn.Identity(), nn.Linear(2, 2)), lambda b: b.port("x", "0", "out", width=2), example=(2,)
    )
    at = backbone.anatomy.port("x", stack="blocks", block=None)
    attach(backbone, lambda a: a.branch(at, at, WithContext(), mode="apply"))
    x = draw(2, 2, dtype=torch.float32)
    assert_close(backbone({"x": x}).tokens, backbone.network[1](x + 3.0))


def test_a_tuple_output_is_changed_at_its_item_only() -> None:
    backbone = TinyCLIP()
    at = backbone.anatomy.port("attn.out", stack="visual", block=1)
    module = nn.Linear(32, 32)
    randomise(module)
    attach(backbone, lambda a: a.branch(at, at, module, mode="apply"))
    reference = TinyCLIP()
    attn = reference.network.visual.transformer.resblocks[1].attn
    attn.register_forward_hook(lambda _m, _args, output: (module(output[0]), *output[1:]))
    batch = backbone.example_batch()
    assert torch.equal(backbone(batch).tokens, reference(batch).tokens)


class Keyword(nn.Module):
    """Calls its part with a keyword, and without one on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Doubled()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(hidden=x)


class Doubled(nn.Module):
    """2 x."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * hidden


@pytest.mark.parametrize("item", ["hidden", 0, "other"])
def test_an_input_is_found_by_its_keyword_and_a_missing_one_is_an_error(item: str | int) -> None:
    backbone = PlainBackbone(Keyword(), lambda b: b.port("x", "part", "in", width=2, item=item), example=(2,))
    at = backbone.anatomy.port("x", stack="blocks", block=None)
    module = nn.Linear(2, 2)
    attach(backbone, lambda a: a.branch(at, at, module, mode="apply"))
    x = draw(3, 2, dtype=torch.float32)
    if item == "hidden":
        assert_close(backbone({"x": x}).tokens, 2 * module(x))
    else:
        with pytest.raises(AttachError, match=f"the module is called without its input {item!r}"):
            backbone({"x": x})


def test_the_slot_is_empty_after_a_forward_and_after_a_checkpointed_backward() -> None:
    backbone, module = stream_backbone(layout=LAYOUT), small_mlp()
    adapter = attach(backbone, lambda a: a.branch(port(backbone, "mlp.norm.in"), port(backbone, "block.out"), module))
    backbone.blocks_for_checkpointing(enabled=True)
    loss = projection_loss(backbone(backbone.example_batch()).tokens)
    (branch,) = adapter.attachments
    assert branch.slot is None
    loss.backward()
    adapter.events.after_backward(0)
    assert branch.slot is None


def test_checkpointing_with_dropout_in_the_branch_changes_no_gradient() -> None:
    results = []
    for checkpointing in (False, True):
        backbone = stream_backbone(layout=LAYOUT)
        module = Bottleneck(8, hidden_dim=4, activation="relu", dropout=0.5).double()
        randomise(module)
        adapter = attach(
            backbone,
            lambda a, b=backbone, m=module: a.branch(port(b, "mlp.norm.in"), port(b, "block.out"), m),
        )
        adapter.train()
        backbone.blocks_for_checkpointing(enabled=checkpointing)
        torch.manual_seed(3)
        loss = projection_loss(backbone(backbone.example_batch()).tokens)
        results.append(gradients(loss, adapter.parameters()))
    for plain, recomputed in zip(*results, strict=True):
        assert_close(recomputed, plain, tolerance=1e-12)


def test_ports_of_different_blocks_are_refused() -> None:
    backbone = stream_backbone(layout=LAYOUT)
    with pytest.raises(AttachError, match=r"'blocks\.0\.mlp\.norm\.in' and 'blocks\.1\.block\.out' lie in different"):
        attach(backbone, lambda a: a.branch(port(backbone, "mlp.norm.in", 0), port(backbone, "block.out"), small_mlp()))


def test_applying_at_another_port_than_read_is_refused() -> None:
    backbone = stream_backbone(layout=LAYOUT)
    with pytest.raises(AttachError, match="tap and inject must be the same port"):
        attach(
            backbone,
            lambda a: a.branch(port(backbone, "mlp.norm.in"), port(backbone, "block.out"), small_mlp(), mode="apply"),
        )


def test_a_port_without_the_access_is_refused() -> None:
    backbone = PlainBackbone(
        nn.Sequential(nn.Linear(2, 2)), lambda b: b.port("x", "0", "out", width=2, allows=("read",)), example=(2,)
    )
    at = backbone.anatomy.port("x", stack="blocks", block=None)
    with pytest.raises(AttachError, match=r"port 'blocks\.x' allows read, not 'replace'"):
        attach(backbone, lambda a: a.branch(at, at, nn.Linear(2, 2), mode="apply"))
    with pytest.raises(AttachError, match=r"port 'blocks\.x' allows read, not 'add'"):
        attach(backbone, lambda a: a.branch(at, at, nn.Linear(2, 2)))


def test_an_inject_that_runs_before_its_tap_is_an_error() -> None:
    backbone = stream_backbone(layout=LAYOUT)
    attach(backbone, lambda a: a.branch(port(backbone, "mlp.out"), port(backbone, "mlp.norm.in"), small_mlp()))
    with pytest.raises(AttachError, match=r"'blocks\.1\.mlp\.norm\.in' runs before 'blocks\.1\.mlp\.out'"):
        backbone(backbone.example_batch())


def test_a_method_that_does_not_propagate_takes_no_branch() -> None:
    backbone = stream_backbone(layout=LAYOUT)
    at = port(backbone, "mlp.out")
    with pytest.raises(AttachError, match="so a branch in it would get no gradient"):
        attach(backbone, lambda a: a.branch(at, at, small_mlp(), mode="apply"), propagates=False)


def test_two_modules_of_one_name_are_refused() -> None:
    backbone = stream_backbone(layout=LAYOUT)
    at = port(backbone, "mlp.out")

    def build(a: object) -> None:
        a.branch(at, at, small_mlp(), mode="apply")
        a.branch(at, at, small_mlp(), mode="apply")

    with pytest.raises(ValueError, match=r"two modules of one adapter are called 'blocks\.1\.mlp\.out'"):
        attach(backbone, build)
