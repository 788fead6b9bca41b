import logging

import pytest
import torch

from peft_modal.data.cache import cached_tensors
from peft_modal.data.cache_folder import cache_folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"x": torch.arange(4.0), "n": torch.tensor([self.calls])}


def test_the_folder_is_the_variable_then_the_users_cache(tmp_path, folder, monkeypatch):
    assert cache_folder() == folder
    monkeypatch.delenv("PEFT_MODAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "peft_modal"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "peft_modal"


def test_the_same_key_is_made_once_and_another_key_again(folder):
    make = Maker()
    first = cached_tensors("a", {"seed": 0}, make)
    again = cached_tensors("a", {"seed": 0}, make)
    assert make.calls == 1
    assert torch.equal(first["x"], again["x"])
    assert int(cached_tensors("a", {"seed": 1}, make)["n"]) == 2
    assert len(list(folder.iterdir())) == 2


def test_no_temporary_file_stays_behind(folder):
    cached_tensors("a", {}, Maker())
    assert [p.suffix for p in folder.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "cut-off"])
def test_a_damaged_file_is_reported_and_made_again(folder, content, caplog):
    make = Maker()
    cached_tensors("a", {}, make)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-3] if content is None else content)
    with caplog.at_level(logging.WARNING):
        cached_tensors("a", {}, make)
    assert make.calls == 2
    assert str(path) in caplog.text
    cached_tensors("a", {}, make)
    assert make.calls == 2


def test_a_folder_that_cannot_be_written_costs_only_time(folder, caplog):
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached_tensors("a", {}, Maker())["x"], torch.arange(4.0))
    assert "cannot be written" in caplog.text
