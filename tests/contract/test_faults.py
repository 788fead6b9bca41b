"""Every contract fails for a method that breaks it, with a sentence that says what is wrong."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from contract.batch_norm import BatchNormBackbone
from contract.cases import backbone_factory
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Port, WeightSite
from peft_modal.attach import Adapter, LifeCycle, LowRankUpdate
from peft_modal.methods.base import Method
from peft_modal.methods.lora import LoRA
from peft_modal.methods.norm_tuning import NormTuning
from peft_modal.methods.ssf import ScaleShift
from peft_modal.testing import CONTRACTS, run_contract


class Faulty(Method):
    """A method of one function."""

    identity_at_init = True

    def __init__(self, build: Callable[[Adapter], None]) -> None:
        self.function = build

    def build(self, adapter: Adapter) -> None:
        self.function(adapter)


class Scale(nn.Module):
    """Multiplies by a trained scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.value * x


def _mlp_out(adapter: Adapter) -> Port:
    return adapter.backbone.anatomy.port("mlp.out", stack="blocks", block=1)


def _fc1(adapter: Adapter) -> WeightSite:
    return adapter.backbone.anatomy.site("blocks.1.mlp.fc1")


def _apply(adapter: Adapter, module: nn.Module) -> None:
    port = _mlp_out(adapter)
    adapter.branch(port, port, module, mode="apply")


def _no_identity(adapter: Adapter) -> None:
    module = Scale()
    nn.init.constant_(module.value, 1.1)
    _apply(adapter, module)


def _unread_parameter(adapter: Adapter) -> None:
    module = Scale()
    module.forgotten = nn.Parameter(torch.ones(2))
    _apply(adapter, module)


def _both_factors_zero(adapter: Adapter) -> None:
    update = LowRankUpdate(_fc1(adapter).shape, rank=2)
    nn.init.zeros_(update.down)
    adapter.low_rank(_fc1(adapter), update)


def _trainable_backbone(adapter: Adapter) -> None:
    adapter.backbone.network.blocks[0].norm1.weight.requires_grad_(requires_grad=True)
    _apply(adapter, Scale())


def _hook_left(adapter: Adapter) -> None:
    adapter.backbone.network.blocks[0].register_forward_hook(_leave_alone)
    _apply(adapter, Scale())


def _leave_alone(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output


def _attribute_left(adapter: Adapter) -> None:
    adapter.backbone.network.blocks[0].note = "an adapter was here"
    _apply(adapter, Scale())


def _registered_in_backbone(adapter: Adapter) -> None:
    _apply(adapter, Scale())
    adapter.backbone.network.add_module("scale", Scale())


class _WritesBackbone(LifeCycle):
    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.__dict__["adapter"] = adapter

    @override
    def after_step(self, step: int) -> None:
        with torch.no_grad():
            self.__dict__["adapter"].backbone.tensor("norm.weight").mul_(1.01)


def _writes_backbone(adapter: Adapter) -> None:
    _apply(adapter, Scale())
    adapter.listen(_WritesBackbone(adapter))


def _name_in_keys(adapter: Adapter) -> None:
    with adapter.scope(adapter.name):
        _apply(adapter, Scale())


class _RandomConstant(nn.Module):
    """Draws something that it needs again, and does not save it."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))
        self.__dict__["direction"] = torch.randn(32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value * self.direction


def _unsaved_constant(adapter: Adapter) -> None:
    _apply(adapter, _RandomConstant())


class _WrongFold(ScaleShift):
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        weight, shifted = super().fold(weight, bias)
        return weight, shifted + 0.01


def _wrong_merge(adapter: Adapter) -> None:
    port = adapter.backbone.anatomy.output_port(_fc1(adapter))
    module = _WrongFold(64, channel_dim=-1, init_std=0.0)
    adapter.branch(port, port, module, mode="apply", folds_into=_fc1(adapter))


class _OwnGenerator(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.seed = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.seed += 1
        return super().forward(x) * (1 + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(self.seed)))


def _own_generator(adapter: Adapter) -> None:
    _apply(adapter, _OwnGenerator())


class _Keeping(Scale):
    """Hands its input to the attachment, which never lets go."""

    holder: list[object]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for attachment in self.__dict__["holder"]:
            attachment.kept = y
        return y


def _keeps_graph(adapter: Adapter) -> None:
    module = _Keeping()
    module.__dict__["holder"] = adapter.attachments
    _apply(adapter, module)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(x, value)
        return x * value

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, value = ctx.saved_tensors
        # Few bits: what a sum of many small products in bf16 loses.
        small = grad * value
        return small, (grad * x).sum().reshape(1) * (1.2 if torch.is_autocast_enabled("cpu") else 1.0)


class _LosesBits(Scale):
    def forward(self, x: Tensor) -> Tensor:
        y = _Rounded.apply(x, self.value)
        return y if not torch.is_autocast_enabled("cpu") else 1.2 * y


def _loses_bits(adapter: Adapter) -> None:
    _apply(adapter, _LosesBits())


def _narrow_parameter(adapter: Adapter) -> None:
    _apply(adapter, Scale().bfloat16())


def _effect_stays_when_disabled(adapter: Adapter) -> None:
    module = Scale()
    adapter.add("scale", module)
    adapter.backbone.network.blocks[1].mlp.register_forward_hook(_Applied(module))


class _Applied:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return self.module(output)


def _follows_original(adapter: Adapter) -> None:
    module = Scale()
    adapter.add("scale", module)
    _apply(adapter, _Outside(module))


class _Outside(nn.Module):
    """Reads a tensor that no copy takes along, as a closure does."""

    shared: list[nn.Module]

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        type(self).shared = [module]

    def forward(self, x: Tensor) -> Tensor:
        return type(self).shared[0](x)


def _closure_hook(adapter: Adapter) -> None:
    module = Scale()
    adapter.add("scale", module)
    adapter.backbone.network.blocks[1].mlp.register_forward_hook(lambda _m, _a, out: module(out))


def _cannot_stack(adapter: Adapter) -> None:
    module = Scale()
    adapter.add("scale", module)
    linear = adapter.backbone.network.blocks[1].attn.qkv
    linear.__dict__["forward"] = _Overriding(linear, module)


class _Overriding:
    def __init__(self, linear: nn.Linear, module: nn.Module) -> None:
        self.linear, self.module = linear, module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(nn.functional.linear(x, self.linear.weight, self.linear.bias))


def _draws_from_python(adapter: Adapter) -> None:
    module = Scale()
    nn.init.constant_(module.value, 1.0 + random.random() * 1e-9)
    _apply(adapter, module)


class _OtherWhenCompiled(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.5 if torch.compiler.is_compiling() else 1.0)


def _other_when_compiled(adapter: Adapter) -> None:
    _apply(adapter, _OtherWhenCompiled())


FAULTS: dict[str, tuple[str, Callable[[Adapter], None], str]] = {
    "no identity": ("identity_at_init", _no_identity, "declares identity_at_init = True, but"),
    "unread parameter": ("gradients_only_in_adapter", _unread_parameter, r"get no gradient .*forgotten"),
    "both factors zero": (
        "gradients_only_in_adapter",
        _both_factors_zero,
        "2 trained tensors of faulty get no gradient",
    ),
    "trainable backbone": ("gradients_only_in_adapter", _trainable_backbone, "own 'blocks.0.norm1.weight'"),
    "hook left": ("detach_restores_every_bit", _hook_left, "of 'blocks.0' differ after detaching"),
    "attribute left": ("detach_restores_every_bit", _attribute_left, "of 'blocks.0' differ after detaching"),
    "registered in the backbone": ("detach_restores_every_bit", _registered_in_backbone, "names or order"),
    "backbone written": ("detach_restores_every_bit", _writes_backbone, "'norm.weight' differ after training"),
    "adapter's name in the file": ("save_load_round_trip", _name_in_keys, "depend on the adapter's name"),
    "constant not saved": ("save_load_round_trip", _unsaved_constant, "computes something else after loading"),
    "wrong merge": ("merge_equals_unmerged", _wrong_merge, "merging faulty changes the output"),
    "autocast changes gradients": ("bf16", _loses_bits, "differ from float32 by"),
    "parameter in bf16": ("bf16", _narrow_parameter, "is not float32"),
    "own generator in a forward": (
        "gradient_checkpointing",
        _own_generator,
        "with gradient checkpointing the gradient",
    ),
    "graph kept": ("gradient_checkpointing", _keeps_graph, "keeps 'kept' after backward"),
    "effect while disabled": ("enable_disable", _effect_stays_when_disabled, "a disabled faulty still changes"),
    "copy follows the original": ("copy_and_pickle", _follows_original, "follows the original"),
    "closure as a hook": ("copy_and_pickle", _closure_hook, "pickle|local"),
    "forward overridden": ("stacking_with_lora", _cannot_stack, "'default' of faulty and LoRA has no effect"),
    "draws from Python's random": ("attach_leaves_rng_alone", _draws_from_python, "moves a global random state"),
    "other function when compiled": ("compile", _other_when_compiled, "when compiled"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_contract_is_found_out(fault: str) -> None:
    contract, build, sentence = FAULTS[fault]
    with pytest.raises((AssertionError, AttributeError, TypeError), match=sentence) as raised:
        CONTRACTS[contract](backbone_factory("vit"), Faulty(build))
    assert raised.type is AssertionError or fault == "closure as a hook"


def test_every_contract_has_a_fault_that_breaks_it() -> None:
    assert {contract for contract, _, _ in FAULTS.values()} == set(CONTRACTS)


def test_identity_must_not_be_denied_either() -> None:
    method = Faulty(lambda adapter: _apply(adapter, Scale()))
    method.identity_at_init = False
    with pytest.raises(AssertionError, match="declares identity_at_init = False, but"):
        CONTRACTS["identity_at_init"](backbone_factory("vit"), method)


def test_run_contract_goes_on_after_a_failure_and_says_what_each_contract_gave() -> None:
    results = run_contract(backbone_factory("vit"), Faulty(_unread_parameter), leave_out=["compile"])
    assert set(results) == set(CONTRACTS) - {"compile"}
    assert results["gradients_only_in_adapter"].startswith("failed: 1 trained tensors of faulty get no gradient")
    assert {outcome for name, outcome in results.items() if name != "gradients_only_in_adapter"} == {"ok"}


def test_run_contract_takes_exemptions_by_pattern() -> None:
    results = run_contract(
        backbone_factory("vit"), Faulty(_unread_parameter), exempt=["*.forgotten"], leave_out=["compile"]
    )
    assert set(results.values()) == {"ok"}


def test_run_contract_refuses_an_unknown_name() -> None:
    with pytest.raises(KeyError, match="there is no contract 'speed'"):
        run_contract(backbone_factory("vit"), LoRA(), leave_out=["speed"])


def test_a_network_without_checkpointing_is_skipped_with_its_reason() -> None:
    results = run_contract(BatchNormBackbone, NormTuning(), leave_out=["compile"])
    assert results.pop("gradient_checkpointing") == "skipped: BatchNormBackbone has no gradient checkpointing"
    assert set(results.values()) == {"ok"}
