"""The contracts that every method keeps on every backbone it attaches to; one function for each behaviour.

A plugin's tests call them with its own method and a factory that makes a fresh backbone with equal weights each time:

    check_merge_equals_unmerged(TinyBackbone, MyMethod(rank=4))
    assert set(run_contract(TinyBackbone, MyMethod(rank=4)).values()) == {"ok"}
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final
from unittest import SkipTest

from peft_modal.methods.base import Method
from peft_modal.testing.contract_effect import (
    check_attach_leaves_rng_alone,
    check_copy_and_pickle,
    check_enable_disable,
    check_identity_at_init,
    check_merge_equals_unmerged,
    check_save_load_round_trip,
    check_stacking_with_lora,
)
from peft_modal.testing.contract_training import (
    check_bf16,
    check_compile,
    check_detach_restores_every_bit,
    check_gradient_checkpointing,
    check_gradients_only_in_adapter,
)
from peft_modal.testing.sandbox import BackboneFactory

__all__ = [
    "CONTRACTS",
    "check_attach_leaves_rng_alone",
    "check_bf16",
    "check_compile",
    "check_copy_and_pickle",
    "check_detach_restores_every_bit",
    "check_enable_disable",
    "check_gradient_checkpointing",
    "check_gradients_only_in_adapter",
    "check_identity_at_init",
    "check_merge_equals_unmerged",
    "check_save_load_round_trip",
    "check_stacking_with_lora",
    "run_contract",
]

Contract = Callable[[BackboneFactory, Method], None]

CONTRACTS: Final[Mapping[str, Contract]] = MappingProxyType(
    {
        "identity_at_init": check_identity_at_init,
        "gradients_only_in_adapter": check_gradients_only_in_adapter,
        "detach_restores_every_bit": check_detach_restores_every_bit,
        "save_load_round_trip": check_save_load_round_trip,
        "merge_equals_unmerged": check_merge_equals_unmerged,
        "bf16": check_bf16,
        "gradient_checkpointing": check_gradient_checkpointing,
        "enable_disable": check_enable_disable,
        "copy_and_pickle": check_copy_and_pickle,
        "stacking_with_lora": check_stacking_with_lora,
        "attach_leaves_rng_alone": check_attach_leaves_rng_alone,
        "compile": check_compile,
    }
)
"""Every contract by name. `compile` is the slow one: seconds instead of milliseconds."""


def run_contract(
    backbone_factory: BackboneFactory, method: Method, *, exempt: Collection[str] = (), leave_out: Collection[str] = ()
) -> dict[str, str]:
    """Check every contract and go on after a failure.

    Args:
        backbone_factory: Makes a fresh backbone with the same weights at each call.
        method: The method.
        exempt: See `check_gradients_only_in_adapter`.
        leave_out: Names of contracts not to check.

    Returns:
        By contract: `ok`, `skipped: <why>` or `failed: <why>`.

    Raises:
        KeyError: `leave_out` names no contract.
    """
    unknown = sorted(set(leave_out) - set(CONTRACTS))
    if unknown:
        raise KeyError(f"there is no contract '{unknown[0]}'; there are {', '.join(CONTRACTS)}")
    results = {}
    for name, contract in CONTRACTS.items():
        if name in leave_out:
            continue
        if contract is check_gradients_only_in_adapter:
            contract = partial(check_gradients_only_in_adapter, exempt=exempt)  # noqa: PLW2901 — the same contract
        try:
            contract(backbone_factory, method)
        except SkipTest as reason:
            results[name] = f"skipped: {reason}"
        except AssertionError as fault:
            results[name] = f"failed: {fault}"
        except Exception as error:  # noqa: BLE001 — a method under test may raise anything, which is the finding
            results[name] = f"failed: {type(error).__name__}: {error}"
        else:
            results[name] = "ok"
    return results
