from __future__ import annotations

import logging
import resource

import pytest
import torch

from peft_modal.data.sample_cache import SampleCache
from peft_modal.errors import WriteError

TENSORS = {"mean": torch.arange(6.0).reshape(2, 3), "std": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tensors_come_back_bit_for_bit_in_another_object_of_the_same_key():
    SampleCache("a", {"network": "x", "sizes": (1, 2)}).put("s", TENSORS)
    found = SampleCache("a", {"sizes": (1, 2), "network": "x"}).get("s")
    assert found is not None
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_another_sample_key_or_name_is_not_found():
    SampleCache("a", {"network": "x"}).put("s", TENSORS)
    assert SampleCache("a", {"network": "x"}).get("t") is None
    assert SampleCache("a", {"network": "y"}).get("s") is None
    assert SampleCache("b", {"network": "x"}).get("s") is None


def test_a_file_under_a_wrong_name_is_not_taken():
    cache = SampleCache("a", {})
    cache.put("s", TENSORS)
    (path,) = cache.folder.iterdir()
    path.rename(path.with_name("t.safetensors"))
    assert cache.get("t") is None


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "garbage"])
def test_a_damaged_file_is_reported_and_can_be_made_again(caplog, damage):
    cache = SampleCache("a", {})
    cache.put("s", TENSORS)
    (path,) = cache.folder.iterdir()
    whole = path.read_bytes()
    contents = {"empty": b"", "cut": whole[:-2], "flipped": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]}
    path.write_bytes(contents.get(damage, b"garbage"))
    with caplog.at_level(logging.WARNING):
        assert cache.get("s") is None
    assert str(path) in caplog.text
    assert "made again" in caplog.text
    cache.put("s", TENSORS)
    assert cache.get("s") is not None


def test_a_full_disk_ends_in_a_sentence_and_leaves_what_was_there(folder):
    cache = SampleCache("a", {})
    cache.put("s", TENSORS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"t\.safetensors' cannot be written: .*; make room") as caught:
            cache.put("t", {"mean": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in cache.folder.iterdir()] == ["s.safetensors"]
    assert cache.get("s") is not None
