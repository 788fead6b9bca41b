"""Methods on the Audio Spectrogram Transformer: the paper's counts, and what golden cases don't say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from peft_modal.errors import ConfigError
from peft_modal.methods.base import Method
from peft_modal.methods.bitfit import BitFit
from peft_modal.methods.houlsby import Houlsby
from peft_modal.methods.lora import LoRA
from peft_modal.methods.pfeiffer import Pfeiffer
from peft_modal.methods.prefix import Prefix
from peft_modal.methods.vpt import VPT
from peft_modal_audio.backbone import AST
from peft_modal_audio.conformer import Conformer, ConformerBottleneck
from peft_modal_audio.mixture import DenseMixture, MixtureOfAdapters, SoftMixture

PARALLEL: dict[str, Any] = {"form": "parallel", "train_norms": True}
# Table 1 of Cappellazzo et al., MLSP 2024, without head and final norm; the conformer's without the dead LayerNorm that
# the paper counts (18,432 per adapter and block). Of the mixture the count is the formula's.
COUNTS = {
    "pfeiffer": (Pfeiffer(hidden_dim=12, **PARALLEL), 248_976),
    "houlsby": (Houlsby(hidden_dim=12, **PARALLEL), 497_952),
    "conformer": (Conformer(hidden_dim=8, kernel=31), 252_288),
    "conformer_both": (Conformer(hidden_dim=8, kernel=31, places="both"), 504_576),
    "lora": (LoRA(rank=6), 221_184),
    "prefix": (Prefix(num_tokens=12), 221_184),
    "deep_prompts": (VPT(num_tokens=25), 230_400),
    "shallow_prompts": (VPT(num_tokens=300, deep=False), 230_400),
    "bitfit": (BitFit(sites=["bias.attn", "bias.mlp", "norm"]), 102_144),
    "mixture": (MixtureOfAdapters(experts=7, slots=1, hidden_dim=6), 922_104),
}


@pytest.mark.parametrize(("method", "count"), COUNTS.values(), ids=COUNTS)
def test_counts_are_the_papers(method: Method, count: int) -> None:
    with torch.device("meta"):
        backbone = AST(weights="random", model="base", frames=400)
    found = method.attach(backbone).counts()
    assert found["adapter"] + found["backbone"] == count


def test_the_final_norm_is_trained_where_the_protocol_says_so() -> None:
    backbone = AST(weights="random", train_norm=True)
    adapter = LoRA(rank=2).attach(backbone)
    assert sorted(n for n in adapter.named_trained() if n.startswith("backbone.")) == [
        "backbone.norm.bias",
        "backbone.norm.weight",
    ]


def test_the_conformer_sees_the_order_of_tokens_and_the_bottleneck_does_not() -> None:
    from peft_modal.methods.bottleneck import Bottleneck

    x = torch.randn(2, 9, 12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    for module, sees in (
        (ConformerBottleneck(12, hidden_dim=4, kernel=3, init="released").eval(), True),
        (Bottleneck(12, hidden_dim=4, init="normal"), False),
    ):
        with torch.no_grad():
            assert torch.allclose(module(x)[:, order], module(x[:, order]), atol=1e-6) != sees


@pytest.mark.parametrize("kernel", [1, 2, 7, 8, 31])
def test_the_convolution_reaches_as_far_before_as_behind(kernel: int) -> None:
    module = ConformerBottleneck(6, hidden_dim=4, kernel=kernel, init="released").eval()
    x = torch.randn(1, 50, 6).requires_grad_()
    module(x)[0, 25].sum().backward()
    assert x.grad is not None
    reached = x.grad[0].abs().sum(-1).nonzero().flatten()
    assert (int(reached.min()), int(reached.max())) == (25 - (kernel - 1) // 2, 25 + kernel // 2)


def test_every_tensor_of_the_conformer_learns_and_its_statistics_are_part_of_the_adapter() -> None:
    backbone = AST.tiny()
    adapter = Conformer(hidden_dim=4, kernel=3, init="released").attach(backbone)
    backbone.train()
    adapter.train()
    backbone(backbone.example_batch()).extras["pooled"].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.named_trained().values())
    state = adapter.state()
    moved = [name for name in state if name.endswith("running_mean")]
    assert len(moved) == 3
    assert all(bool(state[name].any()) for name in moved)
    again = Conformer(hidden_dim=4, kernel=3).attach(AST.tiny())
    again.load(state)
    batch = backbone.example_batch()
    with torch.no_grad():
        expected = adapter.eval() and backbone(batch).tokens
        assert torch.equal(again.eval() and again.backbone(batch).tokens, expected)


def test_the_released_mixture_adds_what_it_gives_at_attention_a_second_time() -> None:
    block, x = AST.tiny().network.blocks[0], torch.randn(2, 5, 32)  # type: ignore[index]
    found = {}
    for variant in ("corrected", "reference"):
        backbone = AST.tiny()
        adapter = MixtureOfAdapters(variant=variant, init="normal", blocks=[0]).attach(backbone)  # type: ignore[arg-type]
        assert adapter.counts() == MixtureOfAdapters(blocks=[0]).attach(AST.tiny()).counts()
        with torch.no_grad():
            found[variant] = backbone.network.blocks[0](x)  # type: ignore[index, operator]
            mixture = adapter.adapter.get_submodule("blocks.0.attn.branch")
            u = block.norm1(x)
            h = x + block.attn(u) + mixture(u)
            y = h + block.mlp(block.norm2(h))
            expected = y + mixture(u) if variant == "reference" else y
        assert torch.allclose(found[variant], expected, atol=1e-5)
    assert not torch.allclose(found["corrected"], found["reference"], atol=1e-5)


def test_mixtures_with_one_expert_and_one_token_are_that_expert() -> None:
    from peft_modal.methods.bottleneck import Bottleneck

    expert, u = Bottleneck(6, hidden_dim=3, init="normal"), torch.randn(2, 1, 6)
    with torch.no_grad():
        assert torch.allclose(DenseMixture(6, [expert])(u), expert(u), atol=1e-6)
        assert torch.allclose(SoftMixture(6, [expert], slots=2)(u), expert(u), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_variants_normalise_along_other_axes(axis: Any) -> None:
    from peft_modal.methods.bottleneck import Bottleneck

    method = MixtureOfAdapters(normalise=True, variant="corrected" if axis == 0 else "reference", experts=3, slots=2)
    mixture = method._mixture(6)
    assert isinstance(mixture, SoftMixture)
    assert mixture.normalised_axis == axis
    # A Phi that is scaled along the axis that is divided by its norm gives the same.
    other = SoftMixture(6, [Bottleneck(6, hidden_dim=2) for _ in range(3)], slots=2, normalised_axis=axis)
    with torch.no_grad():
        for expert in other.experts:
            torch.nn.init.normal_(expert.up.weight)  # type: ignore[union-attr]
        before = other(u := torch.randn(2, 5, 6))
        shape = [6, 3, 2]
        shape[axis] = 1
        other.slots.mul_(torch.rand(shape) + 0.5)
        assert torch.allclose(other(u), before, atol=1e-5)


def test_a_prefix_is_attention_to_more_keys_and_values() -> None:
    backbone = AST.tiny()
    block: Any = backbone.network.blocks[1]  # type: ignore[index]
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        q, k, v = block.attn.qkv(x).chunk(3, dim=-1)
    adapter = Prefix(num_tokens=4, blocks=[1]).attach(backbone)
    vectors = adapter.adapter.get_submodule("blocks.1.attn.prefix")
    with torch.no_grad():
        k, v = (
            torch.cat([part[:, :1], own.expand(2, -1, -1), part[:, 1:]], dim=1)
            for part, own in ((k, vectors.key), (v, vectors.value))
        )
        heads = [part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (q, k, v)]
        context = torch.softmax(heads[0] @ heads[1].mT / 4, dim=-1) @ heads[2]
        # Not by calling the module, where place holders are taken out.
        expected = functional.linear(context.transpose(1, 2).flatten(2), block.attn.proj.weight, block.attn.proj.bias)
        assert torch.allclose(block.attn(x), expected, atol=1e-5)


def test_heads_average_over_named_tokens_and_refuse_others() -> None:
    from peft_modal_heads.pooling import Pooling

    backbone = AST.tiny()
    VPT(num_tokens=3, export=True).attach(backbone).eval()
    features = backbone(backbone.example_batch())
    spec = backbone.feature_spec()
    every = torch.cat([features.tokens, features.extras["prompts"]], dim=1)
    assert torch.allclose(Pooling(spec, ["mean.all"])(features), every.mean(1), atol=1e-6)
    assert torch.allclose(
        Pooling(spec, ["mean.cls+prompts", "cls"])(features),
        torch.cat([torch.cat([every[:, :1], every[:, -3:]], dim=1).mean(1), every[:, 0]], dim=-1),
        atol=1e-6,
    )
    with pytest.raises(ConfigError, match=r"no tokens 'prompt' in 'mean\.cls\+prompt'; did you mean 'prompts'"):
        Pooling(spec, ["mean.cls+prompt"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pfeiffer(form="input", residual=True), "form 'input' has none"),
        (lambda: MixtureOfAdapters(routing="dense", slots=2), "'dense' has neither"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
