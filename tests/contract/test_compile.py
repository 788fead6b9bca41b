"""One representative of every primitive gives the same outputs and gradients in compiled blocks."""

from __future__ import annotations

import pytest
import torch
from contract.cases import backbone_factory, make_method

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method
from peft_modal.testing import check_compile


class SparseRows(Method):
    """The first four entries of every MLP weight."""

    identity_at_init = True

    def build(self, adapter: Adapter) -> None:
        for site in adapter.backbone.anatomy.select(Selector(roles=("mlp",)), needs="weight"):
            adapter.sparse(site, torch.arange(4))


class TapEveryBlock(Method):
    """The outputs of all blocks beside a trained norm."""

    identity_at_init = True

    def build(self, adapter: Adapter) -> None:
        anatomy = adapter.backbone.anatomy
        for port in anatomy.select_ports(Selector(roles=("block.out",)), needs="read"):
            adapter.tap(port, f"block{port.block}")
        for site in anatomy.select(Selector(roles=("norm",), blocks=(0,)), needs="leaf"):
            adapter.own(site)


@pytest.mark.parametrize(
    ("configuration", "backbone"),
    [
        ("lora", "vit"),  # one fused call with two pairs
        ("lora_fused", "vit"),  # one pair: as many arguments as torch.compile must not mistake for a missing context
        pytest.param("lora", "stable_diffusion", marks=pytest.mark.nightly),  # called linears without a bias
        ("adaptformer", "mmdit"),  # a branch to one item of what a block returns
        pytest.param("lora", "open_clip", marks=pytest.mark.nightly),  # a low-rank update computed in the weight
        ("ssf_linears", "open_clip"),  # a computed weight and bias, and modules applied at ports
        ("adaptformer", "vit"),  # a branch from port to port
        ("vpt_deep", "vit"),  # fresh prompts
        pytest.param("vpt_shallow", "vit", marks=pytest.mark.nightly),  # prompts that survive
        ("bitfit", "vit"),  # trained leaves
        ("compose", "vit"),  # three at once
    ],
)  # fmt: skip
def test_compiled_blocks_give_the_same_outputs_and_gradients(configuration: str, backbone: str) -> None:
    check_compile(backbone_factory(backbone), make_method(configuration))


@pytest.mark.parametrize("method", [SparseRows(), TapEveryBlock()], ids=["sparse", "tap"])
def test_compiled_blocks_give_the_same_outputs_and_gradients_for_a_primitive_alone(method: Method) -> None:
    check_compile(backbone_factory("vit"), method)


def test_detaching_from_compiled_blocks_takes_effect() -> None:
    # Compiled code does not look whether a hook is still there; detach makes it trace again.
    backbone = backbone_factory("vit")()
    with torch.no_grad():
        bare = backbone(backbone.example_batch()).tokens
        adapter = make_method("ssf").attach(backbone)
        for block in backbone.network.blocks:
            block.compile(backend="aot_eager")
        with_adapter = backbone(backbone.example_batch()).tokens
        adapter.detach()
        without = backbone(backbone.example_batch()).tokens
    torch.compiler.reset()

    assert not torch.allclose(with_adapter, bare, atol=1e-3)
    torch.testing.assert_close(without, bare, rtol=0, atol=1e-5)
