"""Skips the bridge's tests where peft is not installed, with the reason."""

from __future__ import annotations

import importlib.util
import warnings

import pytest


@pytest.fixture(autouse=True)
def _needs_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        pytest.skip('peft is not installed; pip install "peft-modal[hf]"')


@pytest.fixture(autouse=True)
def _quiet_peft() -> object:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield
