"""Pickles give arrays and plain values, and nothing they say is done."""

from __future__ import annotations

import collections
import os
import pickle  # noqa: TID251 — written here
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_modal.data.pickles import read_pickle
from peft_modal.errors import ConfigError, DataError

quick = settings(
    deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ARRAYS = st.one_of(
    hnp.arrays(np.dtype(kind), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    for kind in ("f4", ">f8", "i8", "<i4", "u1", "?", "f2")
)
PLAIN = st.recursive(
    st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def opened(path: Path, content: bytes) -> Any:
    path.write_bytes(content)
    return read_pickle(path, allowed=True)


@quick
@given(values=PLAIN, array=ARRAYS, protocol=st.integers(0, 5))
def test_arrays_and_plain_values_come_back_in_every_protocol(tmp_path, values, array, protocol):
    found = opened(tmp_path / "a", pickle.dumps({"plain": values, "arrays": [array, (array.T, array)]}, protocol))

    assert found["plain"] == values
    first, (turned, again) = found["arrays"]
    for got, expected in ((first, array), (turned, array.T), (again, array)):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_of_numpy_become_numbers_of_python(tmp_path, protocol):
    found = opened(tmp_path / "a", pickle.dumps([np.float32(0.5), np.int64(7), np.bool_(True)], protocol))

    assert found == [0.5, 7, True]
    assert [type(value) for value in found] == [float, int, bool]


def test_what_python_2_and_numpy_1_wrote_is_read(tmp_path):
    old = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\n"
        b"I1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb."
    )
    assert opened(tmp_path / "a", old).tolist() == [1.0, 2.0]


class Runs:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch ran",), r"(posix|nt)\.system"),
        (eval, ("open('ran', 'w')",), r"(builtins|__builtin__)\.eval"),
        (np.load, ("x.npy",), r"numpy\.load"),
        (getattr, (np, "load"), r"getattr"),
    ],
    ids=["system", "eval", "load", "getattr"],
)
def test_a_call_of_anything_else_is_refused_by_name_and_not_made(tmp_path, monkeypatch, function, args, name, protocol):
    monkeypatch.chdir(tmp_path)
    if function is getattr:
        args = ("text", "upper")
    with pytest.raises(DataError, match=rf"an object of \S*{name}, which is not opened"):
        opened(tmp_path / "a", pickle.dumps([1, Runs(function, *args)], protocol))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (collections.OrderedDict(a=1), r"collections\.OrderedDict"),
        (Path("a"), r"pathlib\S*Path"),
        (np.array([{}], dtype=object), "array of type 'O8'"),
        (np.array(["text"]), "array of type 'U4'"),
        (np.zeros(1, [("a", "f4")]), "array of type 'V4'"),
        (None, "a value of type nonetype"),
        ([b"bytes"], "a value of type bytes"),
        ({1, 2}, "a value of type set"),
        ({(1, 2): 3}, "keys are neither"),
        (1j, r"complex"),
        (slice(1), r"slice"),
    ],
    ids=["ordered", "path", "objects", "texts", "records", "none", "bytes", "set", "keys", "complex", "slice"],
)
def test_other_values_are_refused_by_name(tmp_path, value, name):
    with pytest.raises(DataError, match=name):
        opened(tmp_path / "a", pickle.dumps(value, 4))


def test_a_list_in_itself_and_a_very_deep_one_are_refused(tmp_path):
    itself: list[Any] = []
    itself.append(itself)
    for value in (pickle.dumps(itself), b"]" * 5000 + b"a" * 4999 + b"."):
        with pytest.raises(DataError, match="deeper than"):
            opened(tmp_path / "a", value)


def test_lists_that_share_lists_are_not_spelt_out(tmp_path):
    value: list[Any] = [1]
    for _ in range(30):  # 2^30 items when written out
        value = [value, value]
    found = opened(tmp_path / "a", pickle.dumps(value))
    assert found[0] is found[1]


@pytest.mark.parametrize("code", [b"\x8d", b"\x95"], ids=["text", "frame"])
def test_a_length_in_the_file_takes_no_memory(tmp_path, code):
    with pytest.raises(DataError, match="ends too early"):
        opened(tmp_path / "a", b"\x80\x04" + code + (1 << 40).to_bytes(8, "little") + b"x.")


def test_the_number_of_a_memory_cell_takes_no_memory(tmp_path):
    assert opened(tmp_path / "a", b"\x80\x04]r\xff\xff\xff\x7f.") == []


@pytest.mark.parametrize(
    "state", ["{'a': 1}", "(None, {'_make': 1})"], ids=["dictionary", "slots"]
)  # fmt: skip
def test_a_name_of_the_file_cannot_be_given_a_state(tmp_path, state):
    writes = {"{'a': 1}": b"(S'a'\nI1\nd", "(None, {'_make': 1})": b"(N(S'_make'\nI1\ndt"}[state]
    with pytest.raises(DataError, match="changes what it has only named"):
        opened(tmp_path / "a", b"cnumpy\ndtype\n" + writes + b"b.")
    assert opened(tmp_path / "a", pickle.dumps(np.ones(2))).tolist() == [1.0, 1.0]


@settings(quick, max_examples=250)
@given(data=st.data(), protocol=st.integers(0, 5))
def test_damage_ends_in_a_data_error_or_in_plain_values(tmp_path, data, protocol):
    sample = [[np.arange(6.0, dtype=np.float32).reshape(2, 3)], [np.array([3], np.int32)], {"name": ("a", 1, 0.5)}]
    content = bytearray(pickle.dumps(sample, protocol))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    harmless(tmp_path, bytes(content[: data.draw(st.integers(0, len(content)))]))


CODES = [code.code.encode("latin-1") for code in pickletools.opcodes]
NAMES = [
    b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cnumpy.core.multiarray\nscalar\n", b"cnumpy._core.numeric\n_frombuffer\n", b"cos\nsystem\n",
]  # fmt: skip
USUAL = [b"S'f4'\n", b"I1\n", b"(", b"t", b"R", b"b"]
PIECES = st.sampled_from(CODES) | st.binary(max_size=4) | st.sampled_from(NAMES) | st.sampled_from(USUAL)


@settings(quick, max_examples=250)
@given(pieces=st.lists(PIECES, max_size=25))
def test_random_programs_end_in_a_data_error_or_in_plain_values(tmp_path, pieces):
    harmless(tmp_path, b"".join(pieces) + b".")


def harmless(folder: Path, content: bytes) -> None:
    try:
        found = opened(folder / "a", content)
    except DataError as error:
        message = str(error)
    else:
        check_plain(found)
        return
    assert str(folder / "a") in message


def check_plain(value: Any) -> None:
    assert type(value) in {int, float, bool, str, list, tuple, dict, np.ndarray}
    if isinstance(value, np.ndarray):
        assert value.dtype.kind in "fiub"
        value.sum(dtype=np.float64)
    elif isinstance(value, list | tuple):
        for item in value:
            check_plain(item)
    elif isinstance(value, dict):
        for item in value.values():
            check_plain(item)


def test_a_pickle_is_opened_only_when_that_was_asked_for(tmp_path):
    (tmp_path / "a.dat").write_bytes(pickle.dumps([1]))
    with pytest.raises(ConfigError, match=r"^data\.allow_pickle: '.*a\.dat' is a pickle, .*; set it to true .*\.$"):
        read_pickle(tmp_path / "a.dat", allowed=False)
    with pytest.raises(DataError, match="does not exist"):
        read_pickle(tmp_path / "b.dat", allowed=True)
