from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_modal.data.captions import CaptionIndex, scan_captions
from peft_modal.errors import ConfigError, DataError

quick = settings(
    deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def images(folder: Path, *names: str) -> Path:
    """Files that are never opened here."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def table(folder: Path, *rows: object) -> Path:
    path = folder / "metadata.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def shown(index: CaptionIndex, split: str = "train") -> dict[str, tuple[str, ...]]:
    return {image.path.name: image.captions for image in getattr(index, split)}


def test_captions_come_from_the_lines_of_the_table(tmp_path):
    images(tmp_path, "b.jpg", "a.PNG", "deep/c.webp")
    table(
        tmp_path,
        {"file_name": "./a.PNG", "text": "a  red\n house "},
        "",
        {"file_name": "b.jpg", "text": ["two", "captions"], "other": 3},
        {"file_name": "deep/c.webp", "text": "line\u2028separator"},
    )
    expected = {"a.PNG": ("a red house",), "b.jpg": ("two", "captions"), "c.webp": ("line separator",)}
    assert shown(scan_captions(tmp_path)) == expected


def test_the_key_of_the_captions_can_be_named(tmp_path):
    images(tmp_path, "a.png")
    table(tmp_path, {"file_name": "a.png", "prompt": "a house", "text": "other"})
    assert shown(scan_captions(tmp_path, column="prompt")) == {"a.png": ("a house",)}


def test_captions_come_from_files_beside_the_images(tmp_path):
    images(tmp_path, "a.png", "b.v2.png", "c.png")
    (tmp_path / "a.txt").write_text("\ufeffa house,\nin the rain\n", encoding="utf-8")
    (tmp_path / "b.v2.caption").write_text("a tree")
    table(tmp_path, {"file_name": "c.png", "text": "a cloud"})
    assert shown(scan_captions(tmp_path)) == {
        "a.png": ("a house, in the rain",),
        "b.v2.png": ("a tree",),
        "c.png": ("a cloud",),
    }


def test_one_caption_for_all_goes_before_what_stands_beside_them(tmp_path):
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("another")
    assert shown(scan_captions(tmp_path, caption="a photo of sks dog")) == dict.fromkeys(
        ("a.png", "b.png"), ("a photo of sks dog",)
    )


def test_an_empty_caption_for_all_is_meant(tmp_path):
    images(tmp_path, "a.png")
    assert shown(scan_captions(tmp_path, caption="")) == {"a.png": ("",)}


def test_ten_thousand_characters_are_a_caption(tmp_path):
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("x" * 10_000)
    assert shown(scan_captions(tmp_path)) == {"a.png": ("x" * 10_000,)}


@quick
@given(text=st.text(max_size=30))
def test_any_text_comes_back_with_single_spaces(tmp_path, text):
    images(tmp_path, "a.png")
    table(tmp_path, {"file_name": "a.png", "text": text})
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(DataError, match="line 1, 'text'"):
            scan_captions(tmp_path, allow_empty=True)
    else:
        assert shown(scan_captions(tmp_path, allow_empty=True)) == {"a.png": (" ".join(text.split()),)}


@quick
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode(errors="surrogatepass"))))
def test_a_garbled_table_ends_in_a_data_error_that_names_it(tmp_path, content):
    images(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"metadata\.jsonl'"):
        scan_captions(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda v: st.lists(v, max_size=3)
)


@quick
@given(row=st.dictionaries(st.sampled_from(["file_name", "text", "a"]), VALUES), name=st.sampled_from(["a.png", ""]))
def test_any_row_is_taken_or_refused_with_its_line(tmp_path, row, name):
    images(tmp_path, "a.png")
    row = {"file_name": name, **row} if name else row
    table(tmp_path, row)
    try:
        index = scan_captions(tmp_path, allow_empty=True)
    except DataError as error:
        message = str(error)
    else:
        texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
        assert shown(index) == {"a.png": tuple(" ".join(text.split()) for text in texts)}
        return
    assert "line 1" in message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"file_name": "a.png", "text": "x"'], r"line 1 is not valid JSON: Expecting ',' delimiter"),
        ([{"file_name": "a.png", "text": "x"}, "["], r"line 2 is not valid JSON"),
        (["[" * 100_000], r"line 1 is not valid JSON: maximum recursion"),
        (["[1]"], r"line 1 is no JSON object"),
        ([{"image": "a.png", "text": "x"}], r"line 1 has no 'file_name' \(it has: image, text\)"),
        ([{"file_name": 3, "text": "x"}], r"line 1 has no 'file_name'"),
        ([{"file_name": "b.png", "text": "x"}], r"line 1: there is no image 'b.png' below"),
        ([{"file_name": "notes.md", "text": "x"}], r"there is no image 'notes.md'"),
        ([{"file_name": "../a.png", "text": "x"}], r"there is no image '../a.png'"),
        ([{"file_name": "a\0.png", "text": "x"}], r"there is no image 'a"),
        ([{"file_name": "a" * 5000 + ".png", "text": "x"}], r"there is no image 'aaa"),
        ([{"file_name": "a.png", "text": "x"}] * 2, r"line 2: 'a.png' is already named in '.*', line 1"),
        ([{"file_name": "a.png", "label": "x"}], r"line 1 has no 'text' \(it has: file_name, label\).*caption_column"),
        ([{"file_name": "a.png", "text": None}], r"line 1: 'text' is null, expected a text or a list of texts"),
        ([{"file_name": "a.png", "text": 5}], r"'text' is 5, expected"),
        ([{"file_name": "a.png", "text": []}], r"'text' is \[\], expected"),
        ([{"file_name": "a.png", "text": ["x", None]}], r"'text' is \[\"x\", null\], expected"),
        ([{"file_name": "a.png", "text": " "}], r"line 1, 'text': the caption is empty.*data.allow_empty"),
        ([{"file_name": "a.png", "text": ["x", ""]}], r"line 1, 'text': the caption is empty"),
        (['{"file_name": "a.png", "text": "x\\ud800"}'], r"character 2 of the caption is half of a surrogate pair"),
    ],
)
def test_a_line_that_cannot_serve_is_named_with_the_reason(tmp_path, rows, message):
    images(tmp_path / "set", "a.png", "notes.md")
    images(tmp_path, "a.png")
    path = table(tmp_path / "set", *rows)
    with pytest.raises(DataError, match=message) as caught:
        scan_captions(tmp_path / "set")
    assert f"'{path}', line " in str(caught.value)


def test_empty_captions_are_taken_where_that_is_asked_for(tmp_path):
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").touch()
    table(tmp_path, {"file_name": "b.png", "text": ""})
    with pytest.raises(DataError, match="the caption is empty"):
        scan_captions(tmp_path)
    assert shown(scan_captions(tmp_path, allow_empty=True)) == {"a.png": ("",), "b.png": ("",)}


def test_a_missing_caption_names_the_image_and_the_ways_to_give_one(tmp_path):
    images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "b.txt").write_text("a tree")
    with pytest.raises(DataError) as caught:
        scan_captions(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"'{tmp_path / 'a.png'}' has no caption (2 images have none): name it in")
    assert all(part in text for part in (f"'{tmp_path / 'metadata.jsonl'}'", "'a.txt' beside it", "data.caption"))


def test_two_captions_must_be_the_same(tmp_path):
    images(tmp_path, "a.png")
    table(tmp_path, {"file_name": "a.png", "text": "a tree"})
    (tmp_path / "a.txt").write_text("a tree\n")
    assert shown(scan_captions(tmp_path)) == {"a.png": ("a tree",)}
    (tmp_path / "a.txt").write_text("a house")
    with pytest.raises(DataError, match=r"a.png' has different captions in '.*', line 1 and '.*a.txt'"):
        scan_captions(tmp_path)


def test_a_caption_file_of_another_encoding_is_refused(tmp_path):
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("Häuser".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt' is no UTF-8 text \(invalid continuation byte at byte 1\)"):
        scan_captions(tmp_path)


def test_folders_of_splits_are_splits(tmp_path):
    images(tmp_path, "train/a.png", "train/more/b.png", "val/c.png", "test/d.png")
    table(tmp_path, {"file_name": "val/c.png", "text": "c"}, {"file_name": "test/d.png", "text": "d"})
    table(tmp_path / "train", {"file_name": "a.png", "text": "a"}, {"file_name": "more/b.png", "text": "b"})
    index = scan_captions(tmp_path, val_share=0.5)
    assert [shown(index, split) for split in ("train", "val", "test")] == [
        {"a.png": ("a",), "b.png": ("b",)},
        {"c.png": ("c",)},
        {"d.png": ("d",)},
    ]


def test_a_share_of_train_is_held_out_where_there_is_no_val(tmp_path):
    images(tmp_path, *(f"train/{i}.png" for i in range(10)), "test/t.png")
    index = scan_captions(tmp_path, caption="x", val_share=0.3)
    assert (len(index.train), len(index.val), len(index.test)) == (7, 3, 1)


@quick
@given(count=st.integers(1, 40), share=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_every_image_is_in_one_split_and_one_is_left_to_train_on(tmp_path_factory, count, share, seed):
    root = images(tmp_path_factory.mktemp("share"), *(f"{i:02d}.png" for i in range(count)))
    index = scan_captions(root, caption="x", val_share=share, seed=seed)
    assert index == scan_captions(root, caption="x", val_share=share, seed=seed)
    assert len(index.val) == int(share * count + 1e-9) < count
    assert sorted([*shown(index), *shown(index, "val")]) == [f"{i:02d}.png" for i in range(count)]
    assert list(shown(index)) == sorted(shown(index))


def test_the_seed_chooses_what_is_held_out(tmp_path):
    images(tmp_path, *(f"{i:02d}.png" for i in range(40)))
    splits = [shown(scan_captions(tmp_path, caption="x", val_share=0.5, seed=seed), "val") for seed in (0, 1)]
    assert splits[0] != splits[1]


def test_by_default_a_small_set_is_all_for_training(tmp_path):
    images(tmp_path, "a.png")
    assert shown(scan_captions(tmp_path, caption="x")) == {"a.png": ("x",)}
    images(tmp_path, *(f"{i:02d}.png" for i in range(19)))
    assert len(scan_captions(tmp_path, caption="x").val) == 1


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(tmp_path, share):
    with pytest.raises(ConfigError, match="val_share is"):
        scan_captions(images(tmp_path, "a.png"), caption="x", val_share=share)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/a.png", "validation/b.png"), "validation/b.png' lies outside of the splits"),
        (("train/a.png", "b.png"), "b.png' lies outside of the splits"),
        (("notes.md", "x.heic"), r"holds no .*\.png.* files; found \.md \(1\), \.heic \(1\)|\.heic \(1\), \.md \(1\)"),
        ((".hidden/a.png",), "found no files at all"),
    ],
)
def test_a_folder_that_cannot_serve_is_told(tmp_path, names, message):
    images(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        scan_captions(tmp_path, caption="x")


def test_a_missing_folder_and_a_file_are_refused(tmp_path):
    images(tmp_path, "a.png")
    with pytest.raises(DataError, match="nowhere' does not exist"):
        scan_captions(tmp_path / "nowhere", caption="x")
    with pytest.raises(DataError, match="is a file, expected a folder"):
        scan_captions(tmp_path / "a.png", caption="x")


def test_files_of_other_kinds_are_told(tmp_path, caplog):
    images(tmp_path, "a.png", "b.heic", "c.HEIC", "a.txt", "README.md")
    with caplog.at_level(logging.WARNING):
        scan_captions(tmp_path, caption="x")
    assert "passed over: .heic (2)" in caplog.text
    assert ".md" not in caplog.text
