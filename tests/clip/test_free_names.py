"""Predictions among names of classes that were never trained, typed at the command line."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_tasks import make, pictures
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from peft_modal.__main__ import main
from peft_modal.errors import ConfigError
from peft_modal_clip.classification import parse_names
from peft_modal_vision.transforms import evaluation_view

NAME = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(bool)


@given(st.lists(NAME, min_size=2, max_size=6, unique=True))
def test_any_names_come_back_from_a_line_of_csv(names: list[str]) -> None:
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL).writerow(names)
    assert list(parse_names(line.getvalue())) == names


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dog", r"'dog' is one class, and every picture would be of it"),
        ("", r"'' is one class"),
        ("a, b, a", r"'a' stands there 2 times"),
        ("a,,b", r"one of the names in 'a,,b' is empty"),
        ('"a, b', r"is no list of names: unexpected end of data"),
        ('"a" b, c', r"is no list of names"),
    ],
)
def test_names_that_cannot_serve_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_names(text)


def test_other_names_give_the_logits_of_a_task_that_has_them() -> None:
    task, other = make(), make(names=('5" disk', "🐶", "red circle"))
    task.class_embeddings()
    task.take_flags({"classes": '"5"" disk", 🐶, red circle'})
    with torch.no_grad():
        logits = task({"image": pictures()})
        torch.testing.assert_close(logits, other({"image": pictures()}))
    row = task.predictions(logits)[0]
    assert set(row["probabilities"]) == {'5" disk', "🐶", "red circle"}
    assert row["similarity"] == pytest.approx(float(logits[0].max() / task.backbone.similarity_scale), abs=1e-4)


def test_names_that_are_one_text_to_the_network_are_said(caplog: pytest.LogCaptureFixture) -> None:
    task = make()
    task.take_flags({"classes": ", ".join([" ".join(["dog"] * 500), " ".join(["dog"] * 501), "cat"])})
    with caplog.at_level(logging.WARNING), torch.no_grad():
        task.class_embeddings()
    assert "are one text of 20 tokens to the network" in caplog.text
    assert len(caplog.text) < 600


def test_a_picture_is_scaled_to_its_shorter_side_and_cut_in_the_middle() -> None:
    pixels = np.zeros((64, 160, 3), dtype=np.uint8)
    pixels[:, 48:112] = 255
    assert evaluation_view(Image.fromarray(pixels), 64, "fit").min() > 0.99
    assert evaluation_view(Image.fromarray(pixels), 32, "fit")[:, 4:28, 4:28].min() > 0.99


@pytest.fixture
def _adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{index}.png")
    assert main(["fit", "--config", "clip_mask_tuning.yaml", "--trainer.fast_dev_run=true", "--out", "run"]) == 0


@pytest.mark.usefixtures("_adapter")
def test_predict_takes_free_names(capsys: pytest.CaptureFixture[str]) -> None:
    def predict(*more: str) -> int:
        return main(["predict", "--adapter", "run/adapter.safetensors", "--input", "pictures", "--out", "out", *more])

    def rows() -> list[dict[str, Any]]:
        return json.loads(Path("out/predictions.json").read_text(encoding="utf-8"))

    assert predict() == 0
    assert len(rows()[0]["probabilities"]) == 48
    assert predict("--classes", 'blue square, "red circle, small"') == 0
    assert [set(row["probabilities"]) for row in rows()] == [{"blue square", "red circle, small"}] * 3
    capsys.readouterr()
    assert predict("--classes", "one") == 2
    assert "is one class" in capsys.readouterr().err
