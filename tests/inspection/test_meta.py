"""Everything that is registered builds on the meta device and counts there as it does with values."""

from __future__ import annotations

import pytest
import torch
from contract.cases import (
    BACKBONES,
    READS_VALUES,
    REFUSED,
    backbone_factory,
    combinations,
    make_method,
    registry,
)
from plain_backbone import Built
from torch import nn

from peft_modal.anatomy import Backbone
from peft_modal.errors import ConfigError
from peft_modal.inspection.building import MetaModel, on_meta
from peft_modal.inspection.estimate import Estimate, Unknown, estimate, measure_step
from peft_modal.methods.base import Method
from peft_modal.testing.dry_run import no_attention_fast_path
from peft_modal.testing.matrix import load_entry

WORKING = [pair for pair in combinations() if pair not in REFUSED and pair[0] not in READS_VALUES]
MEASURED = ["full", "lora_linears", "lora_dropout", "vpt_shallow", "ssf", "adaptformer_norm_in", "compose", "idpt"]


def on_the_meta_device(configuration: str, backbone: str) -> MetaModel:
    with on_meta():
        made = _make(backbone)
        return MetaModel(made, make_method(configuration).attach(made), None, None)


def _make(name: str) -> Backbone:
    if name in BACKBONES:
        return BACKBONES[name]()
    entry = next(e for e in registry().entries("backbone") if e.name == name)
    return load_entry(registry(), entry).tiny()


@pytest.mark.parametrize("pair", WORKING, ids="-".join)
def test_counts_without_values_are_those_with_values(pair: tuple[str, str]) -> None:
    configuration, name = pair
    backbone = backbone_factory(name)()
    adapter = make_method(configuration).attach(backbone)

    model = on_the_meta_device(configuration, name)

    assert {p.device.type for module in model.modules for p in module.parameters()} <= {"meta"}
    assert model.adapter.counts() == adapter.counts()
    assert {k: v.shape for k, v in model.adapter.state().items()} == {k: v.shape for k, v in adapter.state().items()}


@pytest.mark.parametrize("pair", [p for p in WORKING if p[0] in MEASURED and p[1] != "vit_reference"], ids="-".join)
def test_the_estimate_is_what_a_real_step_does(pair: tuple[str, str]) -> None:
    configuration, name = pair
    backbone = backbone_factory(name)()
    adapter = make_method(configuration).attach(backbone)
    batch = backbone.example_batch(3)

    def train() -> None:
        backbone.train()
        adapter.train()

    with no_attention_fast_path():
        real = measure_step(
            lambda: backbone(batch), [backbone.network, adapter], adapter.named_trained().values(), train=train
        )
        found = estimate(on_the_meta_device(configuration, name), batch)

    assert found == real
    assert found.flops > 0


def test_gradient_and_optimizer_bytes_are_those_of_adamw() -> None:
    backbone = backbone_factory("vit")()
    adapter = make_method("full").attach(backbone)
    found = estimate(on_the_meta_device("full", "vit"), backbone.example_batch())
    assert isinstance(found, Estimate)

    optimizer = torch.optim.AdamW(adapter.named_trained().values())
    torch.autograd.backward(backbone(backbone.example_batch()).tokens.sum())
    optimizer.step()

    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    state = [t for values in optimizer.state.values() for t in values.values()]
    assert found.gradients == sum(g.numel() * g.element_size() for g in gradients)
    assert found.optimizer == sum(t.numel() * t.element_size() for t in state)
    held = [*backbone.network.parameters(), *backbone.network.buffers(), *adapter.parameters()]
    assert found.parameters == sum(t.numel() * t.element_size() for t in held)


def test_flops_of_lora_are_those_of_its_formula() -> None:
    from plain_backbone import PlainBackbone

    from peft_modal.methods.lora import LoRA

    def build() -> MetaModel:
        with on_meta():
            net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
            backbone = PlainBackbone(net, lambda b: [b.op("op", "0"), b.op("op", "1")], example=(16,))  # type: ignore[func-returns-value]
            return MetaModel(backbone, LoRA(sites="op", rank=3).attach(backbone), None, None)

    found = estimate(build(), {"x": torch.empty(5, 16)})

    assert isinstance(found, Estimate)
    # The upper products carry the biases as one more rank.
    forward = 5 * (16 * 24 + 24 * 8) + 5 * 3 * (16 + 24) + 5 * (3 + 1) * (24 + 8)
    # The input of the first needs no gradient; each of the factors does, and what the upper one hands down.
    backward = 5 * 24 * 8 + 5 * 3 * (24 + 24 + 16) + 5 * 3 * (8 + 8 + 24 + 24)
    assert found.flops == 2 * (forward + backward)


def test_a_method_may_draw_from_a_generator_of_its_own() -> None:
    def build(adapter: object) -> None:
        generator = torch.Generator().manual_seed(3)
        linear = nn.Linear(4, 4)
        nn.init.normal_(linear.weight, generator=generator)
        linear.bias.data = torch.randn(4, generator=generator)
        linear.bias.data.uniform_(generator=generator)
        adapter.add("extra", linear)  # type: ignore[attr-defined]

    with on_meta():
        adapter = Built(build).attach(_make("vit"))
    assert adapter.counts()["adapter"] == 20
    assert all(p.is_meta for p in adapter.parameters())


def test_what_reads_values_while_it_is_built_is_refused_in_a_sentence() -> None:
    from peft_modal.compose import compose
    from peft_modal.inspection.building import build_model

    class Magnitudes(Method):
        identity_at_init = True

        def build(self, adapter) -> None:
            largest = float(adapter.backbone.tensor("cls_token").abs().max())
            adapter.add("scale", nn.Linear(1, 1 + int(largest)))

    composed = compose({"backbone": "point_mae", "method": "lora"}, required=())
    with pytest.raises(ConfigError, match=r"method 'magnitudes' cannot be inspected: it reads values of weights"):
        build_model(composed, ("a",), method=Magnitudes())


@pytest.mark.parametrize("configuration", sorted(READS_VALUES))
def test_what_chooses_by_the_weights_is_refused_in_a_sentence(configuration: str) -> None:
    from peft_modal.compose import compose
    from peft_modal.inspection.building import build_model

    composed = compose({"backbone": "point_mae", "method": "lora"}, required=())
    with pytest.raises(ConfigError, match="cannot be inspected: it reads values of weights"):
        build_model(composed, ("a",), method=make_method(configuration))


def test_a_step_that_depends_on_values_gives_a_reason_and_no_number() -> None:
    from plain_backbone import PlainBackbone

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x[x[:, 0] > 0])

    with on_meta():
        backbone = PlainBackbone(Sparse(), lambda b: b.op("op", "linear"), example=(4,))
        model = MetaModel(backbone, make_method("full").attach(backbone), None, None)
    found = estimate(model, {"x": torch.empty(2, 4)})
    assert isinstance(found, Unknown)
    assert "depends on values of its inputs" in found.reason
