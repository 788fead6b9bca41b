"""Adapter files: what is written is read, and what is damaged is refused in one sentence."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_modal import files
from peft_modal.errors import FileFormatError, WriteError
from peft_modal.files import (
    Header,
    fingerprint,
    load_adapter,
    read_tensors,
    remove_leftovers,
    save_adapter,
    write_tensors,
    write_text,
)

TENSORS = {"adapter.a": torch.arange(6.0).view(2, 3), "head.weight": torch.ones(2, dtype=torch.float16)}
HEADER = Header(config={"seed": 0, "method": {"name": "lora"}}, fingerprint="0" * 64, class_names=("bär", "box"))


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tmp_path / "adapter.safetensors", TENSORS, HEADER)
    return tmp_path / "adapter.safetensors"


def test_what_is_written_is_read(adapter):
    tensors, header = load_adapter(adapter)

    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_shared_and_transposed_tensors_are_written_apart(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    write_tensors(tmp_path / "x.safetensors", {"a": base, "b": base, "c": base.T}, {})
    tensors, _ = read_tensors(tmp_path / "x.safetensors")

    assert torch.equal(tensors["c"], base.T)


@pytest.mark.parametrize("write", ["tensors", "text"])
def test_a_failure_while_writing_leaves_the_old_file_and_no_rest(adapter, monkeypatch, write):
    before = adapter.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    monkeypatch.setattr(Path, "replace", fail)
    writing = {"tensors": lambda: save_adapter(adapter, TENSORS, HEADER), "text": lambda: write_text(adapter, "text")}
    with pytest.raises(OSError, match="disk full"):
        writing[write]()

    assert adapter.read_bytes() == before
    assert list(adapter.parent.iterdir()) == [adapter]


def test_a_newer_format_names_the_version_that_reads_it(tmp_path):
    document = {
        "kind": "adapter",
        "config": {},
        "fingerprint": "",
        "format_version": 99,
        "versions": {"peft_modal": "7.1"},
    }
    write_tensors(tmp_path / "x.safetensors", TENSORS, document)

    with pytest.raises(FileFormatError, match=r"format version 99.*peft-modal>=7\.1"):
        load_adapter(tmp_path / "x.safetensors")


def test_backbone_weights_are_no_adapter(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"kind": "backbone"})
    with pytest.raises(FileFormatError, match="holds backbone weights"):
        load_adapter(tmp_path / "x.safetensors")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match="not one that peft_modal wrote"):
        load_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("document", ["[1]", "{", '{"kind": "adapter", "format_version": 1}',
                                      json.dumps({"kind": "adapter", "format_version": 1, "config": {},
                                                  "fingerprint": "", "extra": 1}), "[" * 100_000])  # fmt: skip
def test_a_damaged_header_is_refused(tmp_path, document):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"peft_modal": document})
    with pytest.raises(FileFormatError):
        load_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"config": None}, "config cannot be read"),
        ({"config": [1]}, "config cannot be read"),
        ({"fingerprint": 3}, "fingerprint cannot be read"),
        ({"class_names": 5}, "class_names cannot be read"),
        ({"class_names": "ab"}, "class_names cannot be read"),
        ({"class_names": [1]}, "class_names cannot be read"),
        ({"metrics": 3, "versions": []}, "metrics, versions cannot be read"),
        ({"format_version": "1"}, "format version is '1'"),
        ({"format_version": True}, "format version is True"),
        ({"format_version": 0}, "format version is 0"),
        ({"format_version": 9, "versions": [1]}, "install a newer peft-modal"),
    ],
    ids=str,
)
def test_a_header_field_of_another_type_is_refused(tmp_path, changed, sentence):
    document = {"kind": "adapter", "config": {}, "fingerprint": "", "format_version": 1, **changed}
    write_tensors(tmp_path / "x.safetensors", TENSORS, document)
    with pytest.raises(FileFormatError, match=sentence):
        load_adapter(tmp_path / "x.safetensors")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_is_read_or_refused_and_nothing_else(adapter, data):
    content = bytearray(adapter.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    broken = adapter.with_name("broken.safetensors")
    broken.write_bytes(content)

    with contextlib.suppress(FileFormatError):
        tensors, _ = load_adapter(broken)
        assert len(tensors) == len(TENSORS)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_or_random_file_ends_in_one_sentence(adapter, data):
    whole = adapter.read_bytes()
    content = data.draw(st.one_of(st.binary(max_size=200), st.integers(0, len(whole) - 1).map(lambda n: whole[:n])))
    broken = adapter.with_name("broken.safetensors")
    broken.write_bytes(content)

    with pytest.raises(FileFormatError):
        load_adapter(broken)


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.full((2, 3), 1e-30)},
    ],
    ids=["name", "shape", "dtype", "value"],
)
def test_a_fingerprint_tells_tensors_apart(other):
    assert fingerprint(other) != fingerprint({"a": torch.zeros(2, 3)})


def test_a_fingerprint_does_not_depend_on_order_or_strides():
    a, b = torch.rand(3, 2), torch.rand(2)
    assert fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a.T.contiguous().T})


def test_a_file_of_format_version_one_still_loads():
    tensors, header = load_adapter(Path(__file__).parent / "data/adapter_v1.safetensors")

    assert header.format_version == 1
    assert (header.class_names, header.config["method"]) == (("b\u00e4r", "box"), {"name": "lora"})
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_what_version_one_gave_is_written_as_the_current_version(tmp_path):
    tensors, header = load_adapter(Path(__file__).parent / "data/adapter_v1.safetensors")
    save_adapter(tmp_path / "new.safetensors", tensors, header)

    assert load_adapter(tmp_path / "new.safetensors")[1].format_version == files.FORMAT_VERSION


def test_every_flipped_bit_that_changes_what_is_read_is_noticed(adapter):
    whole = adapter.read_bytes()
    for position in range(8, len(whole)):
        adapter.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
        with contextlib.suppress(FileFormatError):
            # Such as a hexadecimal digit of an escape in the other case.
            tensors, header = load_adapter(adapter)
            assert header == HEADER
            assert fingerprint(tensors) == fingerprint(TENSORS)


def test_a_header_that_claims_absurd_sizes_is_refused_without_allocating(tmp_path):
    path = tmp_path / "absurd.safetensors"
    for size in (2**60, 2**40, 2**64 - 1):
        path.write_bytes(size.to_bytes(8, "little") + b"{}")
        with pytest.raises(FileFormatError, match="no readable safetensors file"):
            load_adapter(path)


def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("text")

    with pytest.raises(WriteError, match=r"file/x.json' cannot be written: (File exists|Not a directory)"):
        write_text(tmp_path / "file/x.json", "{}")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in (".adapter.safetensors.abc.tmp", ".hidden", "adapter.safetensors", "notes.tmp"):
        (tmp_path / name).write_text("")

    remove_leftovers(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {".hidden", "adapter.safetensors", "notes.tmp"}
