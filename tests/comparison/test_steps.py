"""Steps of two trainings in turns."""

from __future__ import annotations

import time
from typing import Any

import pytest

from peft_modal.comparison import steps


def test_the_second_training_is_not_built_beside_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def train(composed: Any, count: int, *, callback: Any) -> None:
        events.append(f"{composed} begins")
        time.sleep(0.1)
        callback.turns_s.extend([1.0] * 3 if composed == "reference" else [2.0] * 3)
        events.append(f"{composed} ends")

    monkeypatch.setattr(steps, "train", train)
    figures = steps.pair("reference", "other", 2)  # type: ignore[arg-type]
    assert events == ["reference begins", "reference ends", "other begins", "other ends"]
    assert figures["ratio"] == 2.0
