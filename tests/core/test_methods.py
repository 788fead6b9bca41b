"""The modality-agnostic methods: counts, formulas, declarations, and mistakes in their configuration."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from numeric import assert_close, draw, projection_loss, randomise
from tiny_backbones import TinyCLIP, TinyUNet, TinyViT
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import AttachError, ConfigError, SelectionError
from peft_modal.methods import Method
from peft_modal.methods.adaptformer import AdaptFormer
from peft_modal.methods.bitfit import BitFit
from peft_modal.methods.bottleneck import Bottleneck
from peft_modal.methods.compose import Compose
from peft_modal.methods.full import Full
from peft_modal.methods.houlsby import Houlsby
from peft_modal.methods.linear_probe import LinearProbe
from peft_modal.methods.lora import LoRA
from peft_modal.methods.norm_tuning import NormTuning
from peft_modal.methods.pfeiffer import Pfeiffer
from peft_modal.methods.ssf import SSF
from peft_modal.methods.vpt import VPT

ALL_SIX = ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.out"]
Count = Callable[[int, int, int], int]
"""From width C, depth L and the MLP's hidden width H."""

# name: method, count, and the published count for ViT-B/16 (C = 768, L = 12, H = 3072).
COUNTS: dict[str, tuple[Method, Count, int]] = {
    "linear probe": (LinearProbe(), lambda _c, _l, _h: 0, 0),
    "bitfit": (BitFit(), lambda c, n, h: n * (7 * c + h) + 2 * c, 102_912),
    "layer norm": (NormTuning(), lambda c, n, _h: n * 4 * c + 2 * c, 38_400),
    "vpt shallow": (VPT(num_tokens=16, deep=False), lambda c, _n, _h: 16 * c, 12_288),
    "vpt deep": (VPT(num_tokens=10), lambda c, n, _h: n * 10 * c, 92_160),
    "pfeiffer": (Pfeiffer(hidden_dim=8), lambda c, n, _h: n * (2 * c * 8 + 8 + c), 156_768),
    "houlsby": (Houlsby(hidden_dim=8), lambda c, n, _h: 2 * n * (2 * c * 8 + 8 + c), 313_536),
    "adaptformer": (AdaptFormer(), lambda c, n, _h: n * (2 * c * 64 + 64 + c), 1_189_632),
    "adaptformer with norm": (
        AdaptFormer(hidden_dim=8, scale=1.0, norm="in"), lambda c, n, _h: n * (2 * c * 8 + 8 + 3 * c), 175_200,
    ),
    "lora": (LoRA(), lambda c, n, _h: 4 * n * c * 8, 294_912),
    "lora on all six": (LoRA(sites=ALL_SIX), lambda c, n, h: n * 8 * (10 * c + 2 * h), 1_327_104),
    "ssf": (SSF(), lambda c, n, h: 2 * (n * (7 * c + h) + 2 * c), 205_824),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_method_trains_as_many_parameters_as_published(name: str) -> None:
    method, formula, published = COUNTS[name]
    assert formula(768, 12, 3072) == published
    backbone = TinyViT()
    counts = method.attach(backbone).counts()
    assert sum(counts.values()) == formula(32, 3, 64)
    own = isinstance(method, BitFit | NormTuning)
    assert counts["adapter" if own else "backbone"] == 0


def test_full_fine_tuning_trains_everything() -> None:
    backbone = TinyViT()
    counts = Full().attach(backbone).counts()
    size = sum(p.numel() for p in backbone.network.parameters())
    assert counts == {"adapter": 0, "backbone": size, "training_only": 0}


def test_a_learned_scale_is_one_parameter_per_block() -> None:
    fixed = AdaptFormer(hidden_dim=8).attach(TinyViT()).counts()["adapter"]
    learned = AdaptFormer(hidden_dim=8, scale="learned").attach(TinyViT()).counts()["adapter"]
    assert learned - fixed == 3


ALIVE: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(sites=["attn", "mlp"], rank=2),
    "ssf": SSF,
    "bitfit": BitFit,
    "norm": NormTuning,
    "full": Full,
    "adaptformer": lambda: AdaptFormer(hidden_dim=8, scale="learned", norm="in"),
    "houlsby": lambda: Houlsby(hidden_dim=8),
    "pfeiffer": lambda: Pfeiffer(hidden_dim=8),
    "vpt deep": lambda: VPT(num_tokens=2),
    "vpt shallow": lambda: VPT(num_tokens=2, deep=False),
}
BACKBONES: dict[str, Callable[[], Backbone]] = {"vit": TinyViT, "clip": TinyCLIP, "unet": TinyUNet}
# Prompts need a token sequence.
PAIRS = [(name, kind) for name in ALIVE for kind in BACKBONES if not (name.startswith("vpt") and kind == "unet")]


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=[f"{name}-{kind}" for name, kind in PAIRS])
def test_after_one_step_no_branch_is_dead(name: str, kind: str) -> None:
    backbone = BACKBONES[kind]()
    adapter = ALIVE[name]().attach(backbone)
    adapter.train()
    batch = backbone.example_batch(4)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        projection_loss(backbone(batch).tokens).backward()
        gradients = {n: p.grad for n, p in adapter.named_trained().items()}
        optimizer.step()
    unused = {"backbone.logit_scale"}  # CLIP's temperature belongs to its loss
    dead = [n for n, g in gradients.items() if n not in unused and (g is None or not g.abs().max() > 0)]
    assert dead == []


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=[f"{name}-{kind}" for name, kind in PAIRS])
def test_the_identity_is_declared_as_it_is(name: str, kind: str) -> None:
    backbone = BACKBONES[kind]()
    batch = backbone.example_batch()
    method = ALIVE[name]()
    with torch.enable_grad():
        plain = backbone(batch).tokens
        method.attach(backbone)
        adapted = backbone(batch).tokens
    if method.identity_at_init:
        # Attention's fast path, which a leaf that requires a gradient switches off, is off by 6e-7.
        assert_close(adapted, plain, tolerance=0.0 if kind != "clip" else 1e-5)
    else:
        assert float((adapted - plain).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("norm", ["none", "in", "out"])
@pytest.mark.parametrize("scale", [0.3, "learned"])
def test_the_bottleneck_is_its_formula(norm: str, scale: float | str) -> None:
    module = Bottleneck(6, hidden_dim=3, activation="gelu", scale=scale, norm=norm).double()
    randomise(module)
    x = draw(2, 5, 6)
    factor = module.scale.value
    y = x
    if norm == "in":
        y = functional.layer_norm(y, (6,), module.before.weight, module.before.bias, 1e-5)
    y = functional.gelu(y @ module.down.weight.T + module.down.bias) @ module.up.weight.T + module.up.bias
    y = y * factor
    if norm == "out":
        y = functional.layer_norm(y, (6,), module.after.weight, module.after.bias, 1e-5)
    assert_close(module(x), y, tolerance=1e-12)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [("relu", lambda x: x.clamp(min=0)), ("silu", lambda x: x * x.sigmoid()), ("gelu", lambda x: x * normal_cdf(x))],
)
def test_the_activation_is_the_named_one(activation: str, formula: Callable[[Tensor], Tensor]) -> None:
    module = Bottleneck(2, hidden_dim=2, activation=activation).double()
    with torch.no_grad():
        for linear in (module.down, module.up):
            linear.weight.copy_(torch.eye(2))
    x = draw(4, 2)
    assert_close(module(x), formula(x), tolerance=1e-12)


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def test_dropout_lies_between_the_two_linears() -> None:
    module = Bottleneck(4, hidden_dim=6, activation="relu", dropout=0.5).double()
    randomise(module)
    x = draw(3, 4)
    torch.manual_seed(2)
    actual = module(x)
    torch.manual_seed(2)
    hidden = functional.dropout(functional.relu(module.down(x)), 0.5)
    assert_close(actual, module.up(hidden), tolerance=1e-12)


def by_hand(x: Tensor, change: Callable[[int, nn.Module, Tensor], Tensor]) -> Tensor:
    """timm's blocks, with `change(i, block, x)` in the place of each; nothing is attached to this network."""
    net = TinyViT().double().network
    h = net._pos_embed(net.patch_embed(x))
    for i, block in enumerate(net.blocks):
        h = change(i, block, h)
    return net.norm(h)


def adapted(method: Method) -> tuple[Adapter, Tensor, Tensor]:
    backbone = TinyViT().double()
    adapter = method.attach(backbone).double()
    adapter.eval()
    randomise(adapter, std=0.2)
    x = backbone.example_batch()["image"].double()
    return adapter, x, backbone({"image": x}).tokens


def test_houlsby_acts_on_both_sub_layers_before_their_residual() -> None:
    adapter, x, actual = adapted(Houlsby(hidden_dim=4))

    def change(i: int, block: nn.Module, h: Tensor) -> Tensor:
        part = adapter.adapter.get_submodule(f"blocks.{i}")
        a = block.attn(block.norm1(h))
        h = h + a + part.attn.out(a)
        m = block.mlp(block.norm2(h))
        return h + m + part.mlp.out(m)

    assert_close(actual, by_hand(x, change), tolerance=1e-11)


def test_pfeiffer_acts_on_the_mlp_before_its_residual() -> None:
    adapter, x, actual = adapted(Pfeiffer(hidden_dim=4, blocks="last: 2"))

    def change(i: int, block: nn.Module, h: Tensor) -> Tensor:
        h = h + block.attn(block.norm1(h))
        m = block.mlp(block.norm2(h))
        return h + m if i == 0 else h + m + adapter.adapter.get_submodule(f"blocks.{i}.mlp.out")(m)

    assert_close(actual, by_hand(x, change), tolerance=1e-11)


def test_adaptformer_reads_the_stream_before_the_norm_and_adds_at_the_blocks_end() -> None:
    adapter, x, actual = adapted(AdaptFormer(hidden_dim=4))

    def change(i: int, block: nn.Module, h: Tensor) -> Tensor:
        h = h + block.attn(block.norm1(h))
        branch = adapter.adapter.get_submodule(f"blocks.{i}.mlp.branch")
        parallel = 0.1 * branch.up(functional.relu(branch.down(h)))
        return h + block.mlp(block.norm2(h)) + parallel

    assert_close(actual, by_hand(x, change), tolerance=1e-11)


@pytest.mark.parametrize(
    ("method", "dropped"),
    [(AdaptFormer(hidden_dim=4, blocks=[2]), False), (Pfeiffer(hidden_dim=4, blocks=[2]), True)],
    ids=["adaptformer", "pfeiffer"],
)
def test_adaptformer_lies_outside_drop_path_and_pfeiffer_inside(method: Method, dropped: bool) -> None:
    backbone = TinyViT(drop_path=0.999, frozen_mode="reference")  # the last block drops nearly always
    adapter = method.attach(backbone)
    randomise(adapter)
    adapter.eval()
    backbone.train()
    outputs = []
    for on in (True, False):
        adapter.enable(on=on)
        torch.manual_seed(0)
        outputs.append(backbone(backbone.example_batch()).tokens)
    assert torch.equal(*outputs) == dropped


def test_ssf_scales_and_shifts_behind_every_operation() -> None:
    adapter, x, actual = adapted(SSF())
    net = TinyViT().double().network

    def affine(path: str, y: Tensor, dim: int = -1) -> Tensor:
        part = adapter.adapter.get_submodule(path)
        shape = [1] * y.dim()
        shape[dim] = -1
        return y * part.scale.view(shape) + part.shift.view(shape)

    patches = affine("patch_embed.proj", net.patch_embed.proj(x), 1)
    h = net._pos_embed(patches.permute(0, 2, 3, 1))
    for i, block in enumerate(net.blocks):
        path = f"blocks.{i}"
        q, k, v = affine(f"{path}.attn.qkv", block.attn.qkv(affine(f"{path}.norm1", block.norm1(h)))).chunk(3, -1)
        heads = [t.reshape(2, 17, 2, 16).transpose(1, 2) for t in (q, k, v)]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 17, 32)
        h = h + affine(f"{path}.attn.proj", block.attn.proj(mixed))
        hidden = functional.gelu(affine(f"{path}.mlp.fc1", block.mlp.fc1(affine(f"{path}.norm2", block.norm2(h)))))
        h = h + affine(f"{path}.mlp.fc2", block.mlp.fc2(hidden))
    assert_close(actual, affine("norm", net.norm(h)), tolerance=1e-11)


def test_the_spread_of_prompts_is_as_released() -> None:
    backbone = TinyViT(width=64)
    prompts = torch.cat([p.detach() for p in VPT(num_tokens=50).attach(backbone).parameters()])
    bound = math.sqrt(6 / (3 * 16 * 16 + 64))
    assert 0.98 * bound < float(prompts.abs().max()) <= bound
    normal = torch.cat([p.detach() for p in VPT(num_tokens=50, init="normal").attach(TinyViT(width=64)).parameters()])
    assert float(normal.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 8.0}, 2.0),
        ({"rank": 4, "alpha": 8.0, "rank_stabilised": True}, 4.0),
        ({"rank": 4, "rank_stabilised": True}, 1.0),
    ],
)
def test_the_scale_of_lora(options: dict[str, object], scale: float) -> None:
    assert LoRA(**options).scale == scale


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "lora rank": (lambda: LoRA(rank=0), r"method\.rank: expected a number of at least 1, got 0$"),
    "lora dropout": (lambda: LoRA(dropout=1.0), r"method\.dropout: expected a number from 0 to below 1, got 1\.0"),
    "adaptformer width": (
        lambda: AdaptFormer(hidden_dim=0),
        "hidden_dim: expected a number of at least 1, got 0",
    ),
    "houlsby dropout": (
        lambda: Houlsby(dropout=-0.1),
        "expected a number from 0 to below 1, got -0.1",
    ),
    "pfeiffer width": (lambda: Pfeiffer(hidden_dim=-3), r"method\.hidden_dim: expected a number of at least 1, got -3"),
    "vpt tokens": (lambda: VPT(num_tokens=0), r"method\.num_tokens: expected a number of at least 1, got 0"),
    "vpt dropout": (lambda: VPT(dropout=2.0), "expected a number from 0 to below 1, got 2.0"),
    "ssf spread": (lambda: SSF(init_std=-1.0), r"method\.init_std: expected a number of at least 0, got -1\.0"),
    "compose nothing": (lambda: Compose(methods=[]), r"method\.methods: compose needs at least one method"),
    "compose text": (lambda: Compose(methods=["lora"]), r"method\.methods\[0\]: expected a mapping with 'name', got"),
    "compose nameless": (lambda: Compose(methods=[LoRA(), {"rank": 2}]), r"method\.methods\[1\]: expected a mapping"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_configuration_names_its_key_and_value(name: str) -> None:
    make, sentence = MISTAKES[name]
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_a_selection_that_finds_nothing_names_the_method() -> None:
    with pytest.raises(SelectionError, match=r"method 'adaptformer' cannot be attached: blocks: 7 is outside 0\.\.2"):
        AdaptFormer(blocks=[7]).attach(TinyViT())
    with pytest.raises(AttachError, match="none of the 12 selected sites is a bias"):
        BitFit(sites="mlp").attach(TinyViT(depth=6))
    with pytest.raises(AttachError, match="'text' takes no prompts: the causal mask has a fixed length"):
        VPT(stacks="text").attach(TinyCLIP())


def test_prompts_act_on_the_stacks_that_take_them() -> None:
    adapter = VPT(num_tokens=2).attach(TinyCLIP())
    assert {name.split(".")[1] for name in adapter.named_trained()} == {"visual"}


def test_composed_methods_act_together_and_are_saved_in_one_state() -> None:
    backbone, apart = TinyViT(), TinyViT()
    composed = Compose(methods=[LoRA(sites="mlp", rank=2), VPT(num_tokens=2)]).attach(backbone)
    randomise(composed, std=0.1)
    for index, method in enumerate((LoRA(sites="mlp", rank=2), VPT(num_tokens=2))):
        prefix = f"adapter.{index}_{method.describe()}."
        alone = method.attach(apart, name=str(index))
        part = {f"adapter.{k.removeprefix(prefix)}": v for k, v in composed.state().items() if k.startswith(prefix)}
        alone.load(part)
    batch = backbone.example_batch()
    assert torch.equal(backbone(batch).tokens, apart(batch).tokens)


def test_a_composition_declares_what_its_parts_declare() -> None:
    assert Compose(methods=[LoRA(), BitFit()]).identity_at_init
    assert not Compose(methods=[LoRA(), SSF()]).identity_at_init
    assert Compose(methods=[LoRA()]).needs_backward_through_backbone
