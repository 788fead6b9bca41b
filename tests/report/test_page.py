"""The page and its JSON twin."""

import json
import re

import pytest
from report_pages import UGLY, Page, full_report, normal

from peft_modal.report import Column, Fact, Gallery, Report, Section, Table, Tile, show, write_report
from peft_modal.report.style import CYCLE, GRID, INK, MUTED


def dot(axes, sample, prediction):
    axes.plot(*sample["points"][:, :2].T, ".")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(full_report(), folder, renderer=lambda: dot)
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def twin(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def blocks_of(twin, kind):
    def walk(blocks):
        for block in blocks:
            if block["type"] == kind:
                yield block
            yield from walk(block.get("blocks", ()))

    return [block for section in twin["sections"].values() for block in walk(section["blocks"])]


def write(report, folder, **options):
    write_report(report, folder, **options)
    return (folder / "report.html").read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text())


def small(*blocks):
    sections = (Section("only", "Only", blocks),) if blocks else ()
    return Report(kind="fit", title="title", lead="lead", facts=(), sections=sections)


def test_every_table_of_the_page_has_the_numbers_of_the_twin(page, twin):
    shown = [
        normal(show(cell, column["kind"]))
        for table in blocks_of(twin, "table")
        for row in table["rows"]
        for cell, column in zip(row, table["columns"], strict=True)
    ]
    assert page.texts["td"] == shown
    assert page.texts["th"] == [column["name"] for table in blocks_of(twin, "table") for column in table["columns"]]


def test_facts_of_the_page_are_those_of_the_twin(page, twin):
    facts = [*twin["facts"], *(fact for block in blocks_of(twin, "facts") for fact in block["items"])]

    assert page.texts["dt"] == [fact["label"] for fact in facts]
    shown = " ".join(page.texts["dd"])
    for fact in facts:
        assert normal(show(fact["value"], fact["kind"])) in shown
        assert fact["note"] in shown


def test_tiles_of_the_page_are_those_of_the_twin(page, twin):
    tiles = [tile for block in blocks_of(twin, "gallery") for tile in block["tiles"]]

    assert len(page.texts["li"]) == len(tiles) > 6
    for text, tile in zip(page.texts["li"], tiles, strict=True):
        assert text.startswith(normal(tile["title"]))
        for fact in tile["facts"]:
            assert normal(f"{fact['label']} {show(fact['value'], fact['kind'])}") in text


def test_a_matrix_shows_the_counts_of_the_twin(page, twin):
    (matrix,) = (block["data"] for block in blocks_of(twin, "chart") if "counts" in block["data"])
    counts = [str(count) for row in matrix["counts"] for count in row if count]

    assert [text for text in page.texts["text"] if text.isdigit()][: len(counts)] == counts


def test_curves_name_their_last_values(page):
    assert "training 0.25" in page.texts["text"]
    assert "validation 0.125" in page.texts["text"]


def test_the_page_needs_no_network_and_runs_no_script(text, page):
    for tag, attributes in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in {"src", "href", "xlink:href", "srcset", "data", "poster", "action"}:
                assert value.startswith(("#", "data:image/png;base64,", "data:,")), f"<{tag} {name}={value[:60]}>"
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")
    assert "@import" not in text


def test_names_are_text_whatever_they_contain(page):
    cells = page.texts["td"]
    for name in UGLY:
        assert normal(name) in cells
    assert page.texts["title"] == ["a_backbone tuned with <i>method</i> on data"]
    assert "key: <value>" in page.texts["code"]


def test_identifiers_are_unique_and_references_lead_somewhere(text, page):
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]

    assert len(identifiers) == len(set(identifiers))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert target in identifiers


def test_colours_of_drawings_follow_the_page(text):
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        tags = "".join(re.findall(r"<[^>]*>", drawing))
        bare = re.sub(r"var\(--[a-z0-9]+, #[0-9a-f]{6}\)", "", tags)
        assert not re.search("|".join((INK, MUTED, GRID, *CYCLE)), bare)
    for role in set(re.findall(r"var\(--([a-z0-9]+),", text)):
        assert re.search(rf"--{role}: #", text)


def test_the_same_report_is_the_same_file(folder, tmp_path):
    write_report(full_report(), tmp_path, renderer=lambda: dot)

    for name in ("report.html", "report.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_not_there_leaves_no_hole(tmp_path):
    text, twin = write(small(), tmp_path)
    page = Page(text)

    assert twin["sections"] == {}
    assert not {"nav", "section", "dl", "table", "figure"} & {tag for tag, _ in page.elements}


def test_values_that_json_cannot_say_are_null(tmp_path):
    _, twin = write(small(Table((Column("Loss", "number"),), ((float("nan"),), (float("inf"),)))), tmp_path)

    assert twin["sections"]["only"]["blocks"][0]["rows"] == [[None], [None]]


def test_two_sections_of_one_name_are_refused(tmp_path):
    report = Report("fit", "title", "lead", (), (Section("a", "A", ()), Section("a", "B", ())))

    with pytest.raises(ValueError, match="called a"):
        write_report(report, tmp_path)


# Renderers.

GALLERY = Gallery(tuple(Tile(f"tile {i}", {"index": i}) for i in range(3)))


def fails_on_one(axes, sample, prediction):
    if sample["index"] == 1:
        raise RuntimeError("no <colours> left")


def cannot_be_loaded():
    raise ImportError("no module named 'paint'")


def test_a_renderer_that_fails_costs_its_own_picture_only(tmp_path):
    text, twin = write(small(GALLERY), tmp_path, renderer=lambda: fails_on_one)
    page = Page(text)

    assert len([tag for tag, _ in page.elements if tag == "img"]) == 2
    (problem,) = twin["problems"]
    assert "fails_on_one failed: RuntimeError: no <colours> left" in problem
    assert problem in page.texts["p"]
    assert len(page.texts["li"]) == 3


def sounds_on_one(axes, sample, prediction):
    return b"RIFF" if sample["index"] == 1 else None


def test_what_a_renderer_returns_can_be_heard(tmp_path):
    text, _ = write(small(GALLERY), tmp_path, renderer=lambda: sounds_on_one)

    (player,) = [attributes for tag, attributes in Page(text).elements if tag == "audio"]
    assert player["src"] == "data:audio/wav;base64,UklGRg=="
    assert player["aria-label"] == "tile 1"
    assert text.count("<img") == 3


def test_a_renderer_that_cannot_be_loaded_is_told(tmp_path):
    text, twin = write(small(GALLERY), tmp_path, renderer=cannot_be_loaded)

    assert twin["problems"] == ["Without pictures: ImportError: no module named 'paint'"]
    assert twin["problems"][0] in Page(text).texts["p"]


def test_a_modality_without_renderer_has_samples_without_pictures(tmp_path):
    text, twin = write(small(GALLERY), tmp_path)

    assert twin["problems"] == []
    assert "<img" not in text


def test_a_renderer_is_not_loaded_without_samples(tmp_path):
    _, twin = write(small(Table((Column("A"),), (("a",),))), tmp_path, renderer=cannot_be_loaded)

    assert twin["problems"] == []


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (None, "count", "\N{EN DASH}"),
        ("text", "share", "text"),
        (1161612, "count", "1,161,612"),
        (2.19447, "number", "2.194"),
        (0.52916, "share", "52.9 %"),
        (0.000224, "share", "0.022 %"),
        (0.0, "bar", "0.0 %"),
        (1.0, "bar", "100.0 %"),
        (812, "bytes", "812 bytes"),
        (1_285_288, "bytes", "1.29 MB"),
        (123_456_789, "bytes", "123 MB"),
        (1003.4, "megabytes", "1,003 MB"),
        (14.27, "milliseconds", "14.3 ms"),
        (1321.0, "milliseconds", "1.32 s"),
        (18.06, "seconds", "18.1 s"),
        (171.2, "seconds", "2 min 51 s"),
        (59.97, "seconds", "1 min 0 s"),
        (7384.0, "seconds", "2 h 3 min"),
    ],
)
def test_values_have_units_and_few_digits(value, kind, expected):
    assert normal(show(value, kind)) == expected


def test_a_fact_without_a_value_is_a_dash(tmp_path):
    text, _ = write(Report("fit", "t", "l", (Fact("Accuracy", None, "share"),), ()), tmp_path)

    assert Page(text).texts["dd"] == ["\N{EN DASH}"]
