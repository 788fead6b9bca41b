"""Pages of the documentation that the registry writes."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

from peft_modal.compose.describe import parameters_of
from peft_modal.registry import Listed, default_registry
from peft_modal.testing.matrix import MatrixRow, load_entry

ROOT = Path(__file__).parent.parent
SUPPLIED = {"backbone", "adapter", "head", "spec", "class_names", "num_outputs", "data"}
"""What the program gives, so that no configuration does."""


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("pages")


def entries() -> list[Listed]:
    return [listed for listed in default_registry().entries() if listed.state == "ok"]


@pytest.mark.parametrize("listed", entries(), ids=lambda listed: f"{listed.noun}-{listed.modality}-{listed.name}")
def test_every_argument_of_a_configuration_is_told(listed: Listed, pages: ModuleType) -> None:
    cls = load_entry(default_registry(), listed)
    given = {
        name for name, parameter in parameters_of(cls).items()
        if parameter.kind not in {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    }  # fmt: skip
    assert given - SUPPLIED - set(pages.told_arguments(cls)) == set()


def test_a_page_has_arguments_places_and_costs(pages: ModuleType) -> None:
    listed = next(entry for entry in entries() if entry.name == "lora")
    rows = [MatrixRow("lora", "a.net", True, ""), MatrixRow("lora", "b.net", False, "it has no linears")]
    text = pages.page(listed, load_entry(default_registry(), listed), rows)
    assert text.startswith("# lora\n")
    assert "| `rank` | int of at least 1 | `8` |" in text
    assert "Works on `a.net`." in text
    assert "- Not on `b.net`: it has no linears." in text
    assert "| vit\\_s" in text or "| vit_s, cpu |" in text


def test_formulas_survive_markdown(pages: ModuleType) -> None:
    assert pages.escape("|a| * x_i < [b] `c_d*` #1") == "\\|a\\| \\* x\\_i \\< \\[b\\] `c_d*` \\#1"
    assert pages.cell("one `a|b` of |c|") == "one `a\\|b` of \\|c\\|"


def test_pages_link_to_each_other(tmp_path: Path, pages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "method_matrix", lambda registry: [])
    pages.write_pages(tmp_path, default_registry())
    for noun in pages.NOUNS:
        text = (tmp_path / f"{noun}.md").read_text(encoding="utf-8")
        links = [line.split("](")[1].split(")")[0] for line in text.splitlines() if line.startswith("| [")]
        assert links
        assert all((tmp_path / link).is_file() for link in links)
