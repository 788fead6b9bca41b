"""The adapter as a whole: all or nothing, stacking, switching, weighting, copying, and its file state."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 — what is tested is that a pickle of both together works
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from numeric import assert_close, assert_same_state, draw, projection_loss, randomise, snapshot
from plain_backbone import Built, attach
from tiny_backbones import TinyCLIP, TinyUNet, TinyViT
from torch import Tensor, nn

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter, LifeCycle, LowRankUpdate
from peft_modal.errors import AttachError, FileFormatError, SelectionError
from peft_modal.methods import Method
from peft_modal.methods.adaptformer import AdaptFormer
from peft_modal.methods.bitfit import BitFit
from peft_modal.methods.compose import Compose
from peft_modal.methods.full import Full
from peft_modal.methods.houlsby import Houlsby
from peft_modal.methods.linear_probe import LinearProbe
from peft_modal.methods.lora import LoRA
from peft_modal.methods.norm_tuning import NormTuning
from peft_modal.methods.pfeiffer import Pfeiffer
from peft_modal.methods.ssf import SSF
from peft_modal.methods.vpt import VPT

METHODS: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(sites=["attn", "mlp"], rank=2),
    "ssf": SSF,
    "bitfit": BitFit,
    "adaptformer": lambda: AdaptFormer(hidden_dim=4),
    "houlsby": lambda: Houlsby(hidden_dim=4),
    "vpt": lambda: VPT(num_tokens=2),
}
BACKBONES: dict[str, Callable[[], Backbone]] = {"vit": TinyViT, "clip": TinyCLIP, "unet": TinyUNet}


def traces(backbone: Backbone) -> dict[str, object]:
    """Everything that attaching could leave behind."""
    modules = dict(backbone.network.named_modules())
    return {
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in modules.items()},
        "always_called": {k: len(m._forward_hooks_always_called) for k, m in modules.items()},
        "attributes": {k: sorted(m.__dict__) for k, m in modules.items()},
        "classes": {k: type(m) for k, m in modules.items()},
        "parameters": [name for name, _ in backbone.network.named_parameters()],
        "adapters": list(backbone.adapters),
        "exports": dict(backbone.exports),
        "shared": sorted(str(key) for key in backbone.shared if key != "order"),
    }


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_attach_leaves_the_state_dict_alone_and_detach_restores_every_bit(name: str, kind: str) -> None:
    backbone = BACKBONES[kind]()
    state, before, batch = snapshot(backbone.network), traces(backbone), backbone.example_batch()
    plain = backbone(batch).tokens
    if name == "vpt" and kind == "unet":
        with pytest.raises(AttachError, match="this network has no token sequence; use lora, ssf or an adapter"):
            METHODS[name]().attach(backbone)
        assert traces(backbone) == before
        return
    adapter = METHODS[name]().attach(backbone)
    randomise(adapter)
    assert_same_state(backbone.network, state)
    assert not any(p.requires_grad for p in backbone.network.parameters())
    projection_loss(backbone(batch).tokens).backward()
    assert_same_state(backbone.network, state)
    assert all(p.grad is None for p in backbone.network.parameters())
    adapter.detach()
    assert traces(backbone) == before
    assert_same_state(backbone.network, state)
    assert torch.equal(backbone(batch).tokens, plain)


class FailsError(Exception):
    """Raised in the middle of a build."""


def do_everything_then_fail(adapter: Adapter) -> None:
    anatomy = adapter.backbone.anatomy
    linear, port = anatomy.site("blocks.0.mlp.fc1"), anatomy.port("mlp.out", stack="blocks", block=0)
    adapter.low_rank(linear, LowRankUpdate(linear.shape, rank=2))
    adapter.sparse(anatomy.site("blocks.0.mlp.fc2"), torch.tensor([1, 2]))
    adapter.branch(port, port, nn.Linear(32, 32), mode="apply")
    adapter.tap(port, "tapped")
    adapter.own(anatomy.site("cls_token"))
    adapter.own(anatomy.site("blocks.1.attn.q"))
    with adapter.scope("vpt"):
        VPT(num_tokens=2, deep=False).build(adapter)
    raise FailsError


def test_a_build_that_fails_midway_leaves_nothing() -> None:
    backbone = TinyViT()
    state, before, batch = snapshot(backbone.network), traces(backbone), backbone.example_batch()
    plain = backbone(batch).tokens
    with pytest.raises(FailsError):
        attach(backbone, do_everything_then_fail)
    assert traces(backbone) == before
    assert_same_state(backbone.network, state)
    assert torch.equal(backbone(batch).tokens, plain)


def test_a_failing_second_adapter_leaves_the_first_at_work() -> None:
    backbone = TinyViT()
    adapter = LoRA(sites="mlp", rank=2).attach(backbone, name="first")
    randomise(adapter)
    batch, before = backbone.example_batch(), traces(backbone)
    with_first = backbone(batch).tokens
    with pytest.raises(FailsError):
        attach(backbone, do_everything_then_fail, name="second")
    assert traces(backbone) == before
    assert torch.equal(backbone(batch).tokens, with_first)


def test_a_refusal_names_the_method_and_keeps_its_class() -> None:
    with pytest.raises(SelectionError, match=r"method 'lora' cannot be attached: no sites match"):
        LoRA(sites="cross").attach(TinyViT())
    with pytest.raises(AttachError, match=r"method 'lora' cannot be attached: 'norm' takes no low-rank update"):
        LoRA(sites={"roles": "norm.scale", "path": "^norm$"}).attach(TinyViT())


def test_a_name_is_used_once() -> None:
    backbone = TinyViT()
    LinearProbe().attach(backbone)
    with pytest.raises(AttachError, match="an adapter named 'default' is attached already; choose another name, or"):
        LoRA().attach(backbone)
    assert list(backbone.adapters) == ["default"]


def test_a_compiled_backbone_is_refused_with_a_hint() -> None:
    compiled = torch.compile(TinyViT(), backend="eager")
    with pytest.raises(AttachError, match=r"attaches to a Backbone, not to OptimizedModule \(attach before torch"):
        LoRA().attach(compiled)  # type: ignore[arg-type]
    with pytest.raises(AttachError, match=r"attaches to a Backbone, not to Linear$"):
        LoRA().attach(nn.Linear(2, 2))  # type: ignore[arg-type]


ORDERS = [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (2, 0, 4, 1, 5, 3), (3, 5, 1, 4, 0, 2)]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(map(str, order)))
def test_six_stacked_adapters_come_off_in_any_order(order: tuple[int, ...]) -> None:
    backbone = TinyViT()
    before, batch, names = traces(backbone), backbone.example_batch(), list(METHODS)
    plain = backbone(batch).tokens
    adapters = [METHODS[name]().attach(backbone, name=name) for name in names]
    for seed, adapter in enumerate(adapters):
        randomise(adapter, seed=seed, std=0.1)
    remaining = list(range(6))
    for gone in order:
        adapters[gone].detach()
        remaining.remove(gone)
        fresh = TinyViT()
        for k in remaining:
            twin = METHODS[names[k]]().attach(fresh, name=names[k])
            twin.load(adapters[k].state())
        assert torch.equal(backbone(batch).tokens, fresh(batch).tokens), names[gone]
    assert traces(backbone) == before
    assert torch.equal(backbone(batch).tokens, plain)


@pytest.mark.parametrize("order", list(permutations(["lora", "ssf", "bitfit"])), ids="-".join)
def test_mechanisms_give_the_same_result_whatever_was_attached_first(order: tuple[str, ...]) -> None:
    # Leaf, then low-rank update, then output: where two act on one operation their mechanism decides.
    reference, backbone = TinyViT(), TinyViT()
    for target, names in ((reference, ["lora", "ssf", "bitfit"]), (backbone, order)):
        for name in names:
            randomise(METHODS[name]().attach(target, name=name), seed=len(name), std=0.1)
    batch = backbone.example_batch()
    assert torch.equal(backbone(batch).tokens, reference(batch).tokens)


@pytest.mark.parametrize("name", METHODS)
def test_switching_off_is_the_plain_backbone_and_on_is_the_adapter(name: str) -> None:
    backbone = TinyViT()
    before, batch = traces(backbone), backbone.example_batch()
    plain = backbone(batch).tokens
    adapter = METHODS[name]().attach(backbone)
    randomise(adapter, std=0.1)
    adapted = backbone(batch).tokens
    assert not torch.equal(adapted, plain)
    adapter.enable(on=False)
    adapter.enable(on=False)
    assert torch.equal(backbone(batch).tokens, plain)
    assert {k: v for k, v in traces(backbone).items() if k != "adapters"} == {
        k: v for k, v in before.items() if k != "adapters"
    }
    adapter.enable()
    assert torch.equal(backbone(batch).tokens, adapted)


class Shift(nn.Module):
    """gain * W + 1: two of them do not commute."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * weight + 1.0


def leaf(adapter: Adapter) -> None:
    adapter.own_tensor("norm.weight")


def computed(adapter: Adapter) -> None:
    adapter.reparametrise(adapter.backbone.anatomy.site("norm"), Shift(2.0 if adapter.name == "first" else 3.0))


def applied(adapter: Adapter) -> None:
    Houlsby(hidden_dim=4).build(adapter)


@pytest.mark.parametrize("build", [leaf, computed, applied])
def test_switching_one_of_two_keeps_the_order_at_shared_places(build: Callable[[Adapter], None]) -> None:
    backbone = TinyViT()
    first, second = (attach(backbone, build, name=name) for name in ("first", "second"))
    if build is not computed:
        randomise(first, seed=1)
        randomise(second, seed=2)
    batch = backbone.example_batch()
    expected = backbone(batch).tokens
    first.enable(on=False)
    first.enable()
    assert torch.equal(backbone(batch).tokens, expected)


def test_a_disabled_adapter_can_be_detached() -> None:
    backbone = TinyViT()
    before = traces(backbone)
    adapter = LoRA().attach(backbone)
    adapter.enable(on=False)
    adapter.detach()
    assert traces(backbone) == before


@pytest.mark.parametrize("name", ["lora", "ssf", "adaptformer", "houlsby"])
def test_weight_zero_is_the_plain_backbone_and_one_is_exactly_the_adapter(name: str) -> None:
    backbone = TinyViT()
    batch = backbone.example_batch()
    plain = backbone(batch).tokens
    adapter = METHODS[name]().attach(backbone)
    randomise(adapter, std=0.1)
    full = backbone(batch).tokens
    adapter.weight = 0.0
    assert_close(backbone(batch).tokens, plain, tolerance=1e-6)
    adapter.weight = 0.5
    half = backbone(batch).tokens
    assert not torch.equal(half, plain)
    assert not torch.equal(half, full)
    adapter.weight = 1.0
    assert torch.equal(backbone(batch).tokens, full)


def test_half_a_lora_is_a_lora_of_half_the_scale() -> None:
    backbone, reference = TinyViT(), TinyViT()
    adapter = LoRA(sites=["attn", "mlp"], rank=2, alpha=2).attach(backbone)
    twin = LoRA(sites=["attn", "mlp"], rank=2, alpha=1).attach(reference)
    randomise(adapter)
    randomise(twin)
    adapter.weight = 0.5
    batch = backbone.example_batch()
    assert_close(backbone(batch).tokens, reference(batch).tokens, tolerance=1e-6)


def test_half_a_packed_lora_is_half_its_change() -> None:
    backbone, reference = TinyCLIP(), TinyCLIP()
    adapter = LoRA(rank=2, alpha=2).attach(backbone)
    twin = LoRA(rank=2, alpha=1).attach(reference)
    randomise(adapter)
    randomise(twin)
    adapter.weight = 0.5
    batch = backbone.example_batch()
    assert_close(backbone(batch).tokens, reference(batch).tokens, tolerance=1e-5)


@pytest.mark.parametrize(
    ("method", "reason"),
    [(BitFit(), "a trained 'patch_embed.proj.bias'"), (VPT(num_tokens=2), "prompts in 3 blocks")],
    ids=["leaf", "prompts"],
)
def test_what_has_no_scaling_refuses_a_weight(method: Method, reason: str) -> None:
    backbone = TinyViT()
    adapter = method.attach(backbone)
    with pytest.raises(AttachError, match=f"{reason} cannot be weighted; switch the adapter with enable"):
        adapter.weight = 0.5
    assert adapter.weight == 1.0
    adapter.weight = 1.0


def test_a_refused_weight_changes_nothing() -> None:
    backbone = TinyViT()
    method = Compose(methods=[Houlsby(hidden_dim=4), SSF(), BitFit()])
    adapter = method.attach(backbone)
    randomise(adapter, std=0.1)
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    with pytest.raises(AttachError, match="cannot be weighted"):
        adapter.weight = 0.5
    assert torch.equal(backbone(batch).tokens, before)


def test_a_weight_set_while_disabled_holds_when_enabled() -> None:
    backbone = TinyViT()
    batch = backbone.example_batch()
    plain = backbone(batch).tokens
    adapter = LoRA(sites="mlp", rank=2).attach(backbone)
    randomise(adapter)
    adapter.enable(on=False)
    adapter.weight = 0.0
    assert torch.equal(backbone(batch).tokens, plain)
    adapter.enable()
    assert_close(backbone(batch).tokens, plain, tolerance=1e-6)


def by_deepcopy(pair: tuple[Backbone, Adapter]) -> tuple[Backbone, Adapter]:
    return copy.deepcopy(pair)


def by_pickle(pair: tuple[Backbone, Adapter]) -> tuple[Backbone, Adapter]:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle])
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_backbone_and_adapter_is_alive_and_independent(
    name: str, duplicate: Callable[[tuple[Backbone, Adapter]], tuple[Backbone, Adapter]]
) -> None:
    backbone = TinyViT()
    adapter = METHODS[name]().attach(backbone)
    randomise(adapter, std=0.1)
    batch = backbone.example_batch()
    expected = backbone(batch).tokens
    other, twin = duplicate((backbone, adapter))
    assert twin.backbone is other
    assert other.adapters["default"] is twin
    assert torch.equal(other(batch).tokens, expected)

    randomise(twin, seed=77, std=0.1)
    assert not torch.equal(other(batch).tokens, expected)
    assert torch.equal(backbone(batch).tokens, expected)
    projection_loss(other(batch).tokens).backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in adapter.parameters())
    twin.detach()
    assert torch.equal(other(batch).tokens, TinyViT()(batch).tokens)
    assert torch.equal(backbone(batch).tokens, expected)


@pytest.mark.parametrize("kind", ["clip", "unet"])
def test_a_copy_of_packed_attention_and_convolutions_is_alive(kind: str) -> None:
    backbone = BACKBONES[kind]()
    adapter = Compose(methods=[LoRA(sites=["attn", "mlp"], rank=2), SSF()]).attach(backbone)
    randomise(adapter, std=0.1)
    other, twin = copy.deepcopy((backbone, adapter))
    batch = backbone.example_batch()
    expected = backbone(batch).tokens
    assert torch.equal(other(batch).tokens, expected)
    randomise(twin, seed=77, std=0.1)
    assert torch.equal(backbone(batch).tokens, expected)
    assert not torch.equal(other(batch).tokens, expected)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("name", ["lora", "ssf", "bitfit", "adaptformer", "full"])
def test_a_saved_state_makes_a_fresh_adapter_the_same(name: str, kind: str) -> None:
    make = METHODS.get(name, Full)
    backbone, fresh = BACKBONES[kind](), BACKBONES[kind]()
    adapter = make().attach(backbone)
    randomise(adapter, std=0.1)
    twin = make().attach(fresh, name="another", generator=torch.Generator().manual_seed(5))
    twin.load({key: value.clone() for key, value in adapter.state().items()})
    batch = backbone.example_batch()
    assert torch.equal(fresh(batch).tokens, backbone(batch).tokens)


@pytest.mark.parametrize("name", METHODS)
def test_names_in_the_state_know_nothing_of_the_adapters_own_name(name: str) -> None:
    states = [METHODS[name]().attach(TinyViT(), name=own).state() for own in ("default", "quite_another")]
    assert list(states[0]) == list(states[1])
    assert not any("quite_another" in key or "default" in key for key in states[1])
    for key in states[0]:
        assert key.startswith(("adapter.", "backbone."))
        assert torch.equal(states[0][key], states[1][key]), "names change no initial value either"


def test_names_in_the_state_are_the_sites_own() -> None:
    adapter = LoRA(sites="attn.q", rank=2).attach(TinyViT())
    assert list(adapter.state())[:2] == ["adapter.blocks.0.attn.q.down", "adapter.blocks.0.attn.q.up"]
    assert list(adapter.named_trained()) == list(adapter.state())


def test_a_state_holds_what_does_not_require_a_gradient_at_the_moment() -> None:
    adapter = LoRA(rank=2).attach(TinyViT())
    names = list(adapter.state())
    adapter.requires_grad_(requires_grad=False)
    assert list(adapter.state()) == names
    assert list(adapter.named_trained()) == names


def lora_state() -> tuple[Adapter, dict[str, Tensor]]:
    adapter = LoRA(sites="attn.q", rank=2).attach(TinyViT())
    return adapter, {key: value.clone() for key, value in adapter.state().items()}


def test_a_missing_tensor_is_named() -> None:
    adapter, state = lora_state()
    del state["adapter.blocks.1.attn.q.up"]
    with pytest.raises(FileFormatError, match=r"1 tensors are missing \(first: 'adapter\.blocks\.1\.attn\.q\.up'\)$"):
        adapter.load(state)


def test_a_left_over_tensor_is_named_beside_a_missing_one() -> None:
    adapter, state = lora_state()
    state["adapter.blocks.9.attn.q.up"] = state.pop("adapter.blocks.1.attn.q.up")
    with pytest.raises(FileFormatError) as caught:
        adapter.load(state)
    assert str(caught.value) == (
        "the adapter's tensors do not fit this method: 1 tensors are missing (first: 'adapter.blocks.1.attn.q.up'), "
        "1 tensors are unknown (first: 'adapter.blocks.9.attn.q.up')"
    )


def test_another_shape_is_named_and_nothing_is_half_loaded() -> None:
    adapter, state = lora_state()
    before = {key: value.clone() for key, value in adapter.state().items()}
    state = {key: value + 1 for key, value in state.items()}
    state["adapter.blocks.2.attn.q.up"] = torch.zeros(32, 3)
    with pytest.raises(FileFormatError, match=r"attn\.q\.up' has shape \(32, 3\), this method has \(32, 2\)"):
        adapter.load(state)
    for key, value in adapter.state().items():
        assert torch.equal(value, before[key])


def test_loading_keeps_parameters_their_dtype_and_their_place_in_an_optimiser() -> None:
    adapter, state = lora_state()
    identities = [id(p) for p in adapter.parameters()]
    adapter.load({key: value.to(torch.float16) for key, value in state.items()})
    assert [id(p) for p in adapter.parameters()] == identities
    assert all(p.dtype == torch.float32 and p.requires_grad for p in adapter.parameters())


def test_attaching_leaves_the_global_random_numbers_alone() -> None:
    for make in METHODS.values():
        backbone = TinyViT()
        before = torch.get_rng_state()
        make().attach(backbone)
        assert torch.equal(torch.get_rng_state(), before)


def test_initial_values_depend_on_the_generator_and_on_nothing_else() -> None:
    def first(seed: int | None, *, disturb: int = 0) -> Tensor:
        torch.manual_seed(disturb)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return next(LoRA().attach(TinyViT(), generator=generator).parameters()).detach()

    assert torch.equal(first(3), first(3, disturb=9))
    assert torch.equal(first(None), first(0))
    assert not torch.equal(first(3), first(4))


def test_a_failed_attach_leaves_the_global_random_numbers_alone() -> None:
    backbone = TinyViT()
    before = torch.get_rng_state()
    with pytest.raises(FailsError):
        attach(backbone, do_everything_then_fail)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_adapter_is_no_part_of_the_backbone_and_the_backbone_none_of_it() -> None:
    backbone = TinyViT()
    adapter = LoRA().attach(backbone)
    assert not set(map(id, adapter.parameters())) & set(map(id, backbone.parameters()))
    assert not any(module is backbone for module in adapter.modules())
    backbone.eval()
    assert adapter.train().training


def test_a_method_is_a_configuration_and_serves_many_backbones() -> None:
    method = LoRA(sites="attn.q", rank=2)
    one, other = method.attach(TinyViT()), method.attach(TinyViT())
    assert not set(map(id, one.parameters())) & set(map(id, other.parameters()))
    with torch.no_grad():
        next(one.parameters()).add_(1.0)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_two_modules_of_one_name_in_different_scopes_are_two() -> None:
    adapter = Compose(methods=[LoRA(sites="attn.q", rank=2), LoRA(sites="attn.q", rank=3)]).attach(TinyViT())
    ranks = {adapter.state()[f"adapter.{i}_lora.blocks.0.attn.q.down"].shape[0] for i in range(2)}
    assert ranks == {2, 3}


class Remembers(LifeCycle):
    """Owns a buffer and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", draw(3))
        self.gate = nn.Parameter(torch.zeros(2))


def test_what_a_listener_owns_is_saved_with_the_adapter() -> None:
    adapter = attach(TinyViT(), lambda a: a.listen(Remembers()))
    assert list(adapter.state()) == ["adapter.life_cycle.gate", "adapter.life_cycle.memory"]


def test_a_compiled_forward_sees_what_is_attached_later() -> None:
    backbone = TinyViT(depth=1)
    compiled = torch.compile(backbone.network, backend="eager")
    batch = backbone.example_batch()
    with torch.no_grad():
        plain = compiled(batch["image"])
        adapter = attach(backbone, lambda a: [a.own(backbone.anatomy.site("blocks.0.mlp.fc1.bias"))])
        with torch.no_grad():
            next(adapter.parameters()).add_(1.0)
        adapted = compiled(batch["image"])
        assert not torch.equal(adapted, plain)
        assert torch.equal(adapted, backbone.network(batch["image"]))
        adapter.detach()
        assert torch.equal(compiled(batch["image"]), plain)


def test_every_method_describes_itself() -> None:
    assert LoRA().describe() == "lora"
    assert NormTuning().describe() == "norm_tuning"
    assert Compose(methods=[LoRA(), Pfeiffer()]).describe() == "compose(lora, pfeiffer)"
    assert Built(lambda _: None).describe() == "built"
