"""FacT, RepAdapter, Convpass and Consolidator: counts of the papers' tables, folding, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_backbones import TinyCLIP, TinyUNet, TinyViT

from peft_modal.attach.merge import merge_
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.base import Method
from peft_modal.methods.consolidator import Consolidator, GroupedLinears
from peft_modal.methods.convpass import Convpass
from peft_modal.methods.fact import FacT
from peft_modal.methods.repadapter import RepAdapter
from peft_modal_vision.backbone import ViT


def vit_b() -> ViT:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    with torch.device("meta"):
        return ViT(model="custom", weights="random", sizes=sizes)


COUNTS: dict[str, tuple[Method, int]] = {
    "fact-tt 16": (FacT(rank=16), 61_440),
    "fact-tt 8": (FacT(rank=8), 21_504),
    "fact-tk 32": (FacT(form="tk", rank=32), 86_528),
    "fact-tk 16": (FacT(form="tk", rank=16), 30_976),
    "repadapter": (RepAdapter(hidden_dim=8, groups=2), 239_808),
    "convpass": (Convpass(hidden_dim=8), 327_552),
    "convpass, attention": (Convpass(hidden_dim=8, places="attention"), 163_776),
    "consolidator": (Consolidator(groups=[384]), 304_128),
}


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_are_trained_on_a_vit_b_as_the_tables_say(name: str) -> None:
    method, count = COUNTS[name]
    adapter = method.attach(vit_b())
    assert sum(parameter.numel() for parameter in adapter.named_trained().values()) == count


def randomised(method: Method, backbone: Any) -> Any:
    adapter = method.attach(backbone)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.named_trained().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter.eval()


@pytest.mark.parametrize(
    "method",
    [
        FacT(rank=3),
        FacT(form="tk", rank=2, scale=0.5),
        RepAdapter(hidden_dim=6, groups=2, scale=0.7),
        Consolidator(groups=[2, 4], shuffle=True),
    ],
    ids=["fact_tt", "fact_tk", "repadapter", "consolidator"],
)
def test_what_merges_leaves_plain_weights(method: Method) -> None:
    backbone = TinyViT(qkv_bias=False)
    randomised(method, backbone)
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    merge_(backbone)
    assert not backbone.adapters
    torch.testing.assert_close(backbone(batch).tokens, before, rtol=1e-4, atol=1e-4)


def test_shuffled_groups_see_some_of_all_channels() -> None:
    plain, shuffled = (GroupedLinears(4, 6, [2], shuffle=s, drop_path=0.0, bound=1.0) for s in (False, True))
    eye, zero = torch.eye(6), torch.zeros(4, 6)
    seen = [module.call(eye, zero, None) != module.call(torch.zeros(1, 6), zero, None) for module in (plain, shuffled)]
    # Rows are input channels, columns outputs; the first two outputs are the first group's.
    assert seen[0][:, 0].tolist() == [True, True, True, False, False, False]
    # Dealt out in turn, channels lie in the order 0 3 1 4 2 5, of which the first group takes three.
    assert seen[1][:, 0].tolist() == [True, True, False, True, False, False]
    assert torch.allclose(
        shuffled.call(eye, zero, None), (eye @ shuffled.fold_weight(zero).T) + shuffled.fold_bias(zero, None)
    )


def test_the_class_token_meets_no_patch_in_the_convolution() -> None:
    backbone = TinyViT(depth=1)
    adapter = randomised(Convpass(hidden_dim=4, places="attention", dropout=0.0), backbone)
    module = adapter.adapter.get_submodule("blocks.0.attn.branch")
    context = backbone.contexts.begin({})
    context.put("grid", (2, 8))
    tokens = torch.randn(1, 17, 32)
    first = module(tokens, context)
    tokens[:, 1:] += 1.0
    assert torch.equal(module(tokens, context)[:, 0], first[:, 0])
    tokens[:, 0] += 1.0
    assert not torch.equal(module(tokens, context)[:, 0], first[:, 0])
    # Patches of one row touch those of the next: 8 apart, not 4 as in a square of the same number.
    base = module(tokens, context)
    tokens[:, 1 + 3] += 1.0
    changed = (module(tokens, context) != base).any(-1)[0, 1:].nonzero().flatten().tolist()
    assert changed == [2, 3, 4, 10, 11, 12]


def test_patches_that_are_no_square_and_have_no_grid_are_refused() -> None:
    backbone = TinyViT(depth=1)
    adapter = Convpass(hidden_dim=4).attach(backbone)
    module = adapter.adapter.get_submodule("blocks.0.attn.branch")
    with pytest.raises(AttachError, match="12 patches are no square"):
        module(torch.randn(1, 13, 32), backbone.contexts.begin({}))


def test_prompts_of_another_adapter_are_no_patches() -> None:
    from peft_modal.methods.vpt import VPT

    backbone = TinyViT(depth=2)
    VPT(num_tokens=3).attach(backbone, name="prompts")
    Convpass(hidden_dim=4).attach(backbone, name="bypass")
    assert backbone(backbone.example_batch()).tokens.shape == (2, 17, 32)


def test_q_k_and_v_of_their_own_share_a_bottleneck() -> None:
    adapter = RepAdapter(sites=["attn.q", "attn.k", "attn.v"], hidden_dim=4).attach(TinyUNet())
    names = [name for name in adapter.named_trained() if ".attn1." in name and name.endswith("down.weight")]
    assert len(names) == len({name.partition(".attn1.")[0] for name in names}) > 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FacT(dropout=1.0), "method.dropout: expected a number from 0 to below 1, got 1.0"),
        (lambda: RepAdapter(hidden_dim=6, groups=4), "4 does not divide method.hidden_dim, 6"),
        (lambda: RepAdapter(dropout=-0.1), "method.dropout: expected a number from 0 to below 1, got -0.1"),
        (lambda: Convpass(drop_path=1.0), "method.drop_path: expected a number from 0 to below 1, got 1.0"),
        (lambda: Consolidator(groups=[]), "method.groups: the list is empty"),
        (lambda: Consolidator(drop_path=1), "method.drop_path: expected a number from 0 to below 1, got 1$"),
    ],
)
def test_wrong_numbers_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("method", "backbone", "sentence"),
    [
        (Consolidator(groups=[5]), TinyViT, "5 does not divide both sides of 'blocks.0.attn.qkv', 96 and 32"),
        (RepAdapter(groups=8, hidden_dim=8, sites=["attn.out"]), lambda: TinyViT(width=36), "8 does not divide 36"),
        (RepAdapter(sites=["attn.qkv"]), TinyCLIP, "read inside a function"),
        (FacT(sites=["embed"]), TinyViT, "'patch_embed.proj' of shape"),
    ],
)
def test_what_cannot_work_is_refused(method: Method, backbone: Any, sentence: str) -> None:
    with pytest.raises(AttachError, match=sentence):
        method.attach(backbone())


def test_the_norm_penalty_is_the_sum_of_norms() -> None:
    adapter = randomised(RepAdapter(sites=["mlp.in"], hidden_dim=4, norm_penalty=0.5), TinyViT(depth=2))
    ups = [value for name, value in adapter.named_trained().items() if ".up." in name]
    assert len(ups) == 4
    found = adapter.events.penalty({}, None)
    assert float(found["norm_penalty"]) == pytest.approx(0.5 * sum(float(up.detach().norm()) for up in ups), rel=1e-6)
