"""Every method, in several configurations, keeps every contract on every backbone; or is refused at attach."""

from __future__ import annotations

import pytest
import torch
from contract.cases import (
    BF16_TOLERANCE,
    CONFIGURATIONS,
    EXEMPT,
    REFUSED,
    backbone_factory,
    combinations,
    make_method,
    registry,
)

from peft_modal.errors import AttachError, SelectionError
from peft_modal.testing import CONTRACTS, check_bf16, check_gradients_only_in_adapter

# `compile` takes seconds each: test_compile.py has one representative of every primitive.
QUICK = [name for name in CONTRACTS if name != "compile"]
WORKING = [pair for pair in combinations() if pair not in REFUSED]


def _id(pair: tuple[str, str]) -> str:
    return "-".join(pair)


@pytest.mark.parametrize("contract", QUICK)
@pytest.mark.parametrize("pair", WORKING, ids=_id)
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

    with pytest.raises((AttachError, SelectionError), match=REFUSED[pair]):
        make_method(configuration).attach(backbone)

    after = backbone.network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not backbone.adapters
    assert not [key for key in backbone.shared if key != "order"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.network.modules())


def test_every_registered_core_method_has_a_configuration() -> None:
    registered = {entry.name for entry in registry().entries("method", modality="")}
    assert registered == {configuration.name for configuration in CONFIGURATIONS.values()}


def test_every_expected_refusal_and_exemption_names_a_combination_that_is_tried() -> None:
    assert {*REFUSED, *EXEMPT, *BF16_TOLERANCE} <= set(combinations())
