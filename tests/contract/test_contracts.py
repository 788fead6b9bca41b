"""Every method, in several configurations, keeps every contract on every backbone; or is refused at attach."""

from __future__ import annotations

import os

import pytest
import torch
from contract.cases import (
    BACKBONES,
    BF16_TOLERANCE,
    CONFIGURATIONS,
    EXEMPT,
    REFUSED,
    backbone_factory,
    combinations,
    make_method,
    registry,
)

from peft_modal.anatomy import Backbone
from peft_modal.errors import AttachError, SelectionError
from peft_modal.testing import CONTRACTS, check_bf16, check_gradients_only_in_adapter

# `compile` takes seconds each: test_compile.py has one representative of every primitive.
QUICK = [name for name in CONTRACTS if name != "compile"]
EVERYTHING = bool(os.environ.get("PEFT_MODAL_NIGHTLY"))
"""Set at night: further configurations of a method meet every backbone, too."""
WORKING = [pair for pair in combinations(everything=EVERYTHING) if pair not in REFUSED]
ON_ONE = {"enable_disable", "copy_and_pickle", "stacking_with_lora", "attach_leaves_rng_alone"}
"""Contracts that say more of a method than of the backbone: by day on one of ours, and on those of other authors."""
THE_ONE = "vit"
OURS = {*BACKBONES, *(e.name for e in registry().entries("backbone") if e.distribution == "peft-modal")}


def _id(pair: tuple[str, str]) -> str:
    return "-".join(pair)


def _is_tried(pair: tuple[str, str], contract: str) -> bool:
    if EVERYTHING or contract not in ON_ONE:
        return True
    configuration, backbone = pair
    return backbone == THE_ONE or backbone not in OURS or (configuration, THE_ONE) not in WORKING


TRIED = [(pair, contract) for pair in WORKING for contract in QUICK if _is_tried(pair, contract)]


@pytest.mark.parametrize(("pair", "contract"), TRIED, ids=[f"{_id(pair)}-{contract}" for pair, contract in TRIED])
def test_contract_holds(pair: tuple[str, str], contract: str) -> None:
    configuration, backbone = pair
    if contract == "gradients_only_in_adapter":
        check_gradients_only_in_adapter(
            backbone_factory(backbone), make_method(configuration), exempt=EXEMPT.get(pair, ())
        )
    elif contract == "bf16" and pair in BF16_TOLERANCE:
        check_bf16(backbone_factory(backbone), make_method(configuration), tolerance=BF16_TOLERANCE[pair])
    else:
        CONTRACTS[contract](backbone_factory(backbone), make_method(configuration))


@pytest.mark.parametrize("pair", REFUSED, ids=_id)
def test_what_cannot_work_is_refused_at_attach_with_a_sentence(pair: tuple[str, str]) -> None:
    configuration, name = pair
    backbone = backbone_factory(name)()
    before = {key: value.clone() for key, value in backbone.network.state_dict().items()}
    own_hooks = _hooks(backbone)

    with pytest.raises((AttachError, SelectionError), match=REFUSED[pair]):
        make_method(configuration).attach(backbone)

    after = backbone.network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not backbone.adapters
    assert not [key for key in backbone.shared if key != "order"]
    assert _hooks(backbone) == own_hooks


def _hooks(backbone: Backbone) -> list[tuple[int, int]]:
    """How many hooks each module has; a backbone may have some of its own."""
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in backbone.network.modules()]


def test_every_registered_core_method_has_a_configuration() -> None:
    registered = {entry.name for entry in registry().entries("method", modality="")}
    assert registered == {configuration.name for configuration in CONFIGURATIONS.values()}


def test_every_expected_refusal_and_exemption_names_a_combination_that_is_tried() -> None:
    assert {*REFUSED, *EXEMPT, *BF16_TOLERANCE} <= set(combinations(everything=True))
