"""The README's generated parts are those of the registry and of the results."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

from peft_modal.comparison.table import Row

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _docs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")


def test_generated_parts_of_the_readme_are_up_to_date():
    module = importlib.import_module("readme")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.filled(text) == text, "run python docs/readme.py"


def row(method, mean, deviation):
    empty = {field.name: None for field in fields(Row) if field.name not in {"further", "balance"}}
    return Row(**{**empty, "method": method, "mean": mean, "deviation": deviation, "problems": ()})


@pytest.mark.parametrize(
    ("means", "deviation", "found"),
    [
        ((0.30, 0.20), 0.01, ("yes", 0.1)),
        ((0.20, 0.30), 0.01, ("no", -0.1)),
        ((0.30, 0.20), 0.08, ("open", 0.1)),
        ((0.30, None), 0.01, ("", 0.0)),
    ],
)
def test_a_claim_holds_where_means_differ_by_more_than_their_spread(means, deviation, found):
    claims = importlib.import_module("claims")
    word, difference = claims.verdict(*(row("a", mean, deviation) for mean in means))
    assert (word, round(difference, 6)) == found


def test_claims_find_methods_whatever_their_arguments_are():
    claims = importlib.import_module("claims")
    table = [row("snella(rank=16)", 0.3, 0.0), row("snell(rank=16, sparsity=0.5)", 0.2, 0.0), row("lora", 0.1, 0.0)]
    assert claims.find(table, "snell") is table[1]
    assert claims.find(table, "snella") is table[0]
    assert claims.find(table, "vpt") is None
    assert claims.find(table, "snell(rank=16)") is table[1]
    assert claims.find(table, "snell(rank=8)") is None
    kinds = [row(name, 0.1, 0.0) for name in ("spt(form=adapter, rank=4)", "spt(rank=4, budget=0.5)", "fact(form=tk)")]
    assert claims.find(kinds, "spt(form=adapter)") is kinds[0]
    assert claims.find(kinds, "spt(form=lora)") is kinds[1], "which is the default"
    assert claims.find(kinds, "fact(form=tt)") is None
    text = claims.claims_table({"pictures": table})
    assert "| snell(rank=16, sparsity=0.5) above lora | 76.7 over 74.9, VTAB-1k | yes, +10.0 |" in text


def test_every_comparison_in_the_readme_names_methods_that_are_registered():
    from peft_modal.comparison.items import parse_methods
    from peft_modal.registry import default_registry

    lists = re.findall(r"--methods '?([^' ]+)'? ", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(lists) >= 4
    known = {entry.name for entry in default_registry().entries("method")}
    assert {item.node["name"] for text in lists for item in parse_methods(text)} <= known
