"""Prompts against a hand-written loop that keeps the tokens in the sequence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from numeric import assert_close, draw, gradients, projection_loss
from plain_backbone import attach, stream_backbone
from tiny_backbones import TinyCLIP, TinyUNet, TinyViT
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Context, Features, Port, Segment, TokenLayout
from peft_modal.attach import Adapter, PromptSource
from peft_modal.errors import AttachError
from peft_modal.methods.vpt import VPT

Place = Literal["prefix", "end"]


def layout(*, repeats: bool) -> TokenLayout:
    segments = (Segment("cls", 1), Segment("points", None))
    return TokenLayout(segments=segments, body="points", prompt_index=1, repeats_positions=repeats)


class Tokens(PromptSource):
    """Prompts and, on demand, positions of their own for every block."""

    def __init__(self, *, count: int, blocks: int = 3, positions: bool = True, seed: int = 1) -> None:
        super().__init__()
        self.prompt = nn.ParameterList(nn.Parameter(draw(count, 8, seed=seed + i)) for i in range(blocks))
        self.pos = nn.ParameterList(
            nn.Parameter(draw(count, 8, seed=seed + 10 + i)) for i in range(blocks if positions else 0)
        )

    @override
    def tokens(self, context: Context, block: int) -> Tensor:
        return self.prompt[block]

    @override
    def positions(self, block: int) -> Tensor | None:
        return self.pos[block] if len(self.pos) else None


def add_prompts(
    adapter: Adapter,
    source: PromptSource,
    *,
    count: int,
    survives: bool,
    place: Place = "prefix",
    blocks: Sequence[int] = (0, 1, 2),
    export: str | None = None,
    name: str = "prompts",
) -> None:
    adapter.prompts(
        "blocks", blocks, source, num_tokens=count, survives=survives, place=place, export=export, name=name
    )


def by_hand(
    x: Tensor,
    sets: Sequence[tuple[Tokens, bool, Place, Sequence[int]]],
    *,
    repeats: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The stream with every set of prompts in its sequence: tokens without prompts, and the normed prompts."""
    net = stream_backbone(layout=layout(repeats=repeats)).network
    x = x if repeats else x + net.pos
    carried: list[Tensor | None] = [None for _ in sets]
    for i, block in enumerate(net.blocks):
        rest = x + net.pos if repeats else x
        prefix, end = [], []
        for k, (source, survives, place, blocks) in enumerate(sets):
            if i not in blocks:
                continue
            tokens = carried[k] if survives and i != blocks[0] else source.prompt[i].expand(x.shape[0], -1, -1)
            assert tokens is not None
            position = source.positions(i)
            tokens = tokens if position is None else tokens + position
            if place == "prefix":
                prefix.insert(0, (k, tokens))
            else:
                end.append((k, tokens))
        spans = [(-1, rest[:, :1]), *prefix, (-2, rest[:, 1:]), *end]
        y = block(torch.cat([part for _, part in spans], dim=1))
        pieces = dict(zip([k for k, _ in spans], y.split([p.shape[1] for _, p in spans], dim=1), strict=True))
        x = torch.cat([pieces[-1], pieces[-2]], dim=1)
        for k in range(len(sets)):
            carried[k] = pieces.get(k, carried[k])
    return net.norm(x), [net.norm(c) for c in carried if c is not None]


def check(features: Features, expected: Tensor, leaves: list[Tensor]) -> None:
    assert_close(features.tokens, expected)
    for got, wanted in zip(
        gradients(projection_loss(features.tokens), leaves), gradients(projection_loss(expected), leaves), strict=True
    ):
        assert_close(got, wanted)


CASES = list(itertools.product([True, False], [True, False], ["prefix", "end"]))


@pytest.mark.parametrize(
    ("survives", "repeats", "place"),
    CASES,
    ids=["-".join(("surviving" if s else "fresh", "repeated" if r else "once", p)) for s, r, p in CASES],
)
def test_inserted_and_stripped_equals_kept_in_the_sequence(survives: bool, repeats: bool, place: Place) -> None:
    backbone = stream_backbone(layout=layout(repeats=repeats))
    source = Tokens(count=2, positions=repeats)
    attach(backbone, lambda a: add_prompts(a, source, count=2, survives=survives, place=place))
    x = draw(3, 5, 8).requires_grad_()
    expected, _ = by_hand(x, [(source, survives, place, (0, 1, 2))], repeats=repeats)
    used = [p for p in source.parameters() if not survives or p not in set(source.prompt[1:])]
    check(backbone({"x": x}), expected, [x, *used])


@pytest.mark.parametrize("survives", [True, False], ids=["surviving", "fresh"])
def test_prompts_of_some_blocks_touch_only_those(survives: bool) -> None:
    backbone = stream_backbone(layout=layout(repeats=True))
    source = Tokens(count=3)
    attach(backbone, lambda a: add_prompts(a, source, count=3, survives=survives, blocks=(1, 2)))
    x = draw(2, 5, 8).requires_grad_()
    expected, _ = by_hand(x, [(source, survives, "prefix", (1, 2))], repeats=True)
    check(backbone({"x": x}), expected, [x, source.prompt[1], source.pos[1], source.pos[2]])


@pytest.mark.parametrize("places", list(itertools.product(["prefix", "end"], repeat=2)), ids="-".join)
def test_two_stacked_sets_stay_apart(places: tuple[Place, Place]) -> None:
    backbone = stream_backbone(layout=layout(repeats=True))
    first, second = Tokens(count=2, seed=1), Tokens(count=3, seed=50)
    attach(backbone, lambda a: add_prompts(a, first, count=2, survives=True, place=places[0]), name="first")
    attach(backbone, lambda a: add_prompts(a, second, count=3, survives=False, place=places[1]), name="second")
    x = draw(2, 5, 8).requires_grad_()
    sets = [(first, True, places[0], (0, 1, 2)), (second, False, places[1], (0, 1, 2))]
    expected, _ = by_hand(x, sets, repeats=True)
    check(backbone({"x": x}), expected, [x, first.prompt[0], *first.pos, *second.parameters()])


def test_two_stacked_sets_come_off_in_either_order() -> None:
    for kept, gone in (("first", "second"), ("second", "first")):
        backbone = stream_backbone(layout=layout(repeats=True))
        sources = {"first": Tokens(count=2, seed=1), "second": Tokens(count=3, seed=50)}
        adapters = {
            name: attach(
                backbone,
                lambda a, s=source: add_prompts(a, s, count=s.prompt[0].shape[0], survives=True),
                name=name,
            )
            for name, source in sources.items()
        }
        adapters[gone].detach()
        x = draw(2, 5, 8)
        expected, _ = by_hand(x, [(sources[kept], True, "prefix", (0, 1, 2))], repeats=True)
        assert_close(backbone({"x": x}).tokens, expected)


def test_an_export_passes_through_the_final_norm_and_carries_its_gradient() -> None:
    backbone = stream_backbone(layout=layout(repeats=True))
    source = Tokens(count=2)
    adapter = attach(backbone, lambda a: add_prompts(a, source, count=2, survives=True, export="prompt"))
    assert backbone.feature_spec().exports == {"prompt": 2}
    x = draw(3, 5, 8).requires_grad_()
    features = backbone({"x": x})
    expected, (prompt,) = by_hand(x, [(source, True, "prefix", (0, 1, 2))], repeats=True)
    assert features.extras["prompt"].shape == (3, 2, 8)
    assert_close(features.extras["prompt"], prompt)
    assert_close(features.tokens, expected)
    leaves = [x, source.prompt[0], *source.pos]
    for got, wanted in zip(
        gradients(projection_loss(features.extras["prompt"]), leaves),
        gradients(projection_loss(prompt), leaves),
        strict=True,
    ):
        assert_close(got, wanted)
    adapter.detach()
    assert backbone.feature_spec().exports == {}
    assert "prompt" not in backbone({"x": x}).extras


def test_a_disabled_adapter_exports_nothing() -> None:
    backbone = stream_backbone(layout=layout(repeats=True))
    adapter = attach(backbone, lambda a: add_prompts(a, Tokens(count=2), count=2, survives=True, export="prompt"))
    adapter.enable(on=False)
    assert "prompt" not in backbone(backbone.example_batch()).extras
    adapter.enable()
    assert "prompt" in backbone(backbone.example_batch()).extras


class Generated(PromptSource):
    """Prompts made from the batch by a BatchNorm and a linear, with dropout on demand."""

    def __init__(self, *, momentum: float | None = 0.1, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=momentum).double()
        self.linear = nn.Linear(8, 8).double()
        self.dropout = nn.Dropout(dropout)

    @override
    def tokens(self, context: Context, block: int) -> Tensor:
        pooled = self.norm(context.batch["x"].mean(dim=1))
        return self.dropout(self.linear(pooled))[:, None, :].expand(-1, 2, -1)


@pytest.mark.parametrize("survives", [True, False], ids=["surviving", "fresh"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["exponential", "cumulative"])
def test_checkpointing_moves_no_statistics_twice(momentum: float | None, survives: bool) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = stream_backbone(layout=layout(repeats=True))
        source = Generated(momentum=momentum)
        adapter = attach(backbone, lambda a, s=source: add_prompts(a, s, count=2, survives=survives))
        adapter.train()
        backbone.blocks_for_checkpointing(enabled=checkpointing)
        grads = []
        for step in range(2):
            loss = projection_loss(backbone({"x": draw(4, 5, 8, seed=step)}).tokens)
            grads += gradients(loss, adapter.parameters())
        results.append((grads, [b.clone() for b in source.norm.buffers()]))
        assert source.norm.momentum == momentum
    (plain, plain_buffers), (recomputed, recomputed_buffers) = results
    for got, wanted in zip(recomputed, plain, strict=True):
        assert_close(got, wanted, tolerance=1e-12)
    for got, wanted in zip(recomputed_buffers, plain_buffers, strict=True):
        assert torch.equal(got, wanted)


def test_checkpointing_replays_the_dropout_of_prompts() -> None:
    results = []
    for checkpointing in (False, True):
        backbone = TinyViT()
        adapter = VPT(num_tokens=4, dropout=0.5).attach(backbone)
        adapter.train()
        backbone.blocks_for_checkpointing(enabled=checkpointing)
        torch.manual_seed(5)
        loss = projection_loss(backbone(backbone.example_batch()).tokens)
        results.append(gradients(loss, adapter.parameters()))
    for plain, recomputed in zip(*results, strict=True):
        assert_close(recomputed, plain, tolerance=1e-6)


def test_prompts_of_a_real_vit_equal_tokens_kept_in_its_sequence() -> None:
    backbone = TinyViT().double()
    adapter = VPT(num_tokens=3, deep=False).attach(backbone).double()
    x = backbone.example_batch()["image"].double()
    actual = backbone({"image": x}).tokens
    prompt = adapter.adapter.get_submodule("blocks").prompt[0]
    net = TinyViT().double().network
    h = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    h = torch.cat([h[:, :1], prompt.expand(2, -1, -1), h[:, 1:]], dim=1)
    h = net.norm(net.blocks(h))
    assert_close(actual, torch.cat([h[:, :1], h[:, 4:]], dim=1))


def test_stacks_that_take_no_prompts_are_refused_with_the_reason() -> None:
    clip, unet = TinyCLIP(), TinyUNet()
    with pytest.raises(AttachError, match="'text' takes no prompts: the causal mask has a fixed length"):
        attach(clip, lambda a: a.prompts("text", [0], Tokens(count=2), num_tokens=2, survives=True))
    with pytest.raises(AttachError, match=r"'unet\.down' takes no prompts: it carries no token sequence"):
        attach(unet, lambda a: a.prompts("unet.down", [0], Tokens(count=2), num_tokens=2, survives=True))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"blocks": ()}, "no block is chosen"),
        ({"blocks": (1, 3)}, r"blocks \[1, 3\] are outside 0\.\.2"),
        ({"blocks": (0, 2), "survives": True}, r"surviving prompts enter consecutive blocks, not \[0, 2\]"),
        (
            {"blocks": (0, 1), "survives": True, "export": "prompt"},
            "the head reads prompts behind the last block 2, these leave after block 1",
        ),
    ],
)
def test_blocks_that_do_not_suit_are_refused(options: dict[str, object], sentence: str) -> None:
    backbone = stream_backbone(layout=layout(repeats=True))
    options = {"survives": False, **options}
    with pytest.raises(AttachError, match=f"prompts in 'blocks': {sentence}"):
        attach(backbone, lambda a: add_prompts(a, Tokens(count=2), count=2, **options))


def test_fresh_prompts_may_leave_blocks_out() -> None:
    backbone = stream_backbone(layout=layout(repeats=True))
    source = Tokens(count=2)
    attach(backbone, lambda a: add_prompts(a, source, count=2, survives=False, blocks=(2, 0)))
    x = draw(2, 5, 8)
    expected, _ = by_hand(x, [(source, False, "prefix", (0, 2))], repeats=True)
    assert_close(backbone({"x": x}).tokens, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fresh_prompts_are_exported_as_they_enter_and_as_they_leave(checkpointing: bool) -> None:
    backbone = stream_backbone(layout=layout(repeats=True))
    backbone.blocks_for_checkpointing(enabled=checkpointing)
    source = Tokens(count=2)
    adapter = attach(
        backbone, lambda a: add_prompts(a, source, count=2, survives=False, blocks=(0, 2), export="prompt")
    )
    assert backbone.feature_spec().exports == {"prompt": 8}
    x = draw(2, 5, 8)
    features = backbone({"x": x})

    expected, (left_last,) = by_hand(x, [(source, False, "prefix", (0, 2))], repeats=True)
    net = stream_backbone(layout=layout(repeats=True)).network
    rest = x + net.pos
    entering = [net.norm(source.prompt[i].expand(2, -1, -1)) for i in (0, 2)]
    first = torch.cat([rest[:, :1], (source.prompt[0] + source.pos[0]).expand(2, -1, -1), rest[:, 1:]], dim=1)
    left_first = net.norm(net.blocks[0](first)[:, 1:3])
    exported = torch.cat([*entering, left_first, left_last], dim=1)
    assert_close(features.tokens, expected)
    assert_close(features.extras["prompt"], exported)
    leaves = [source.prompt[i] for i in (0, 2)] + [source.pos[i] for i in (0, 2)]
    ours = gradients(projection_loss(features.extras["prompt"]) + projection_loss(features.tokens), leaves)
    wanted = gradients(projection_loss(exported) + projection_loss(expected), leaves)
    for got, right in zip(ours, wanted, strict=True):
        assert_close(got, right)

    adapter.detach()
    assert backbone.feature_spec().exports == {}
    assert not backbone.contexts.inserted


def test_two_exports_of_one_name_are_refused() -> None:
    backbone = stream_backbone(layout=layout(repeats=True))

    def build(a: Adapter) -> None:
        add_prompts(a, Tokens(count=2), count=2, survives=True, export="prompt")

    attach(backbone, build, name="first")
    with pytest.raises(AttachError, match="another adapter already hands 'prompt' to the head"):
        attach(backbone, build, name="second")


def test_a_method_that_does_not_propagate_takes_no_prompts() -> None:
    backbone = stream_backbone(layout=layout(repeats=True))
    with pytest.raises(AttachError, match="so a prompt in it would get no gradient"):
        attach(backbone, lambda a: add_prompts(a, Tokens(count=2), count=2, survives=True), propagates=False)


def test_pooling_never_sees_a_prompt() -> None:
    backbone = stream_backbone(layout=layout(repeats=True))
    attach(backbone, lambda a: add_prompts(a, Tokens(count=2), count=2, survives=True))
    assert backbone(backbone.example_batch()).tokens.shape == (2, 5, 8)


class Watch(nn.Module):
    """A branch that adds nothing and keeps the data tokens it was shown."""

    uses_context = True

    def __init__(self, port: Port, layout: TokenLayout) -> None:
        super().__init__()
        self.port, self.layout = port, layout
        self.seen: Tensor | None = None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self.seen = x[:, context.data_tokens(self.port, self.layout, x.shape[1])].detach()
        return 0 * x


@pytest.mark.parametrize("sets", [(), ("prefix",), ("end",), ("prefix", "end", "prefix")])
@pytest.mark.parametrize("repeats", [True, False])
def test_a_branch_finds_the_data_tokens_among_prompts(sets: tuple[Place, ...], repeats: bool) -> None:
    backbone = stream_backbone(layout=layout(repeats=repeats))
    anatomy = backbone.anatomy
    port = anatomy.port("block.in", stack="blocks", block=1)
    watch = Watch(port, anatomy.layouts["blocks"])
    # Zero prompts in block 1 alone change nothing in front of it, so what the branch sees is known.
    for index, place in enumerate(sets):
        attach(
            backbone,
            lambda a, i=index, p=place: add_prompts(
                a, Tokens(count=i + 1, seed=i), count=i + 1, survives=False, place=p, blocks=(1,)
            ),
            name=f"prompts{index}",
        )
    adapter = attach(backbone, lambda a: a.branch(port, port, watch, mode="apply"), name="watch")
    batch = backbone.example_batch()
    taps = attach(backbone, lambda a: a.tap(port, "plain"), name="tap")

    features = backbone(batch)

    assert watch.seen is not None
    assert_close(watch.seen, features.extras["plain"][:, 1:])
    for attached in (taps, adapter):
        attached.detach()


def test_disabled_and_detached_prompts_are_not_counted() -> None:
    backbone = TinyViT()
    adapter = VPT(num_tokens=2).attach(backbone)
    assert {key: (n.prefix, n.end) for key, n in backbone.contexts.inserted.items()} == {
        ("blocks", block): (2, 0) for block in range(backbone.anatomy.depth["blocks"])
    }
    adapter.enable(on=False)
    assert not backbone.contexts.inserted
    adapter.enable(on=True)
    adapter.detach()
    assert not backbone.contexts.inserted
