"""What papers say of two methods, and whether a comparison here says the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from peft_modal.comparison.items import parse_methods
from peft_modal.comparison.table import Row
from peft_modal.compose.describe import parameters_of
from peft_modal.registry import default_registry

Verdict = Literal["yes", "no", "open", ""]


@dataclass(frozen=True)
class Claim:
    """One method above another."""

    better: str
    """A method as `compare` takes it, with the arguments that matter; others may have any value."""
    worse: str
    figures: str
    """The paper's, of both, and what they are of."""


_VTAB: Final = "VTAB-1k"
VISION: Final = (
    Claim("full", "linear_probe", f"69.0 over 57.6, {_VTAB}"),
    Claim("lora", "full", f"74.6 over 69.0, {_VTAB}"),
    Claim("vpt", "full", f"72.0 over 69.0, {_VTAB}"),
    Claim("adaptformer", "vpt", f"74.8 over 72.0, {_VTAB}"),
    Claim("ssf", "lora", f"75.7 over 74.6, {_VTAB}"),
    Claim("convpass", "lora", f"76.6 over 74.6, {_VTAB}"),
    Claim("repadapter", "adaptformer", f"76.1 over 74.8, {_VTAB}"),
    Claim("fact(form=tt)", "lora", f"75.6 over 74.6, {_VTAB}"),
    Claim("spt(form=lora)", "lora", f"76.4 over 74.9, {_VTAB}"),
    Claim("spt(form=adapter)", "adaptformer", f"76.4 over 74.8, {_VTAB}"),
    Claim("snell", "lora", f"76.7 over 74.9, {_VTAB}"),
    Claim("snella", "spt(form=lora)", "91.9 over 90.1, FGVC"),
    Claim("bi_adaptformer", "vpt", f"77.0 over 72.0, {_VTAB}"),
    Claim("mosa", "adaptformer", "89.9 over 88.5, FGVC"),
)
"""Of a ViT-B/16 pre-trained on ImageNet-21k; means of VTAB-1k are those over its three groups."""
_SCANS: Final = "ScanObjectNN OBJ-BG"
POINT_CLOUDS: Final = (
    Claim("idpt", "full", f"91.2 over 90.0, {_SCANS}"),
    Claim("point_peft", "full", "89.1 over 88.1, ScanObjectNN PB-T50-RS"),
    Claim("pointgst", "full", f"91.7 over 90.0, {_SCANS}"),
    Claim("pointgst", "idpt", f"91.7 over 91.2, {_SCANS}"),
    Claim("pointgst", "point_peft", f"91.7 over 89.7, {_SCANS}"),
)
"""Of Point-MAE's published weights; the second by its own authors, the last one's worse figure by PointGST's."""


def find(table: Sequence[Row], method: str) -> Row | None:
    """The first row whose method has the name and the arguments of `method`, given or by default."""
    wanted = _node(method)
    return next((row for row in table if _is_meant(_node(row.method), wanted)), None)


def _node(text: str) -> dict[str, Any]:
    (item,) = parse_methods(text)
    return item.node


def _is_meant(node: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    if node["name"] != wanted["name"]:
        return False
    registry = default_registry()
    parameters = parameters_of(registry.load(registry.resolve("method", node["name"], modality=None)))
    return all(node.get(key, parameters[key].default) == value for key, value in wanted.items() if key != "name")


def verdict(better: Row | None, worse: Row | None) -> tuple[Verdict, float]:
    """Whether the difference of two means has the claimed sign, and the difference.

    It is `open` within one standard deviation of a difference of single runs; empty where a row has no figure yet.
    """
    if better is None or worse is None or better.mean is None or worse.mean is None:
        return "", 0.0
    difference = better.mean - worse.mean
    spread = math.hypot(better.deviation or 0.0, worse.deviation or 0.0)
    if abs(difference) <= spread:
        return "open", difference
    return ("yes" if difference > 0 else "no"), difference


def claims_table(tables: Mapping[str, Sequence[Row]], claims: Sequence[Claim] = VISION) -> str:
    """A line per claim, a column per comparison: the difference in points, and whether the claim holds."""
    lines = [
        "| the papers: a method above another | their figures | " + " | ".join(tables) + " |",
        "|---|---|" + "---|" * len(tables),
    ]
    for claim in claims:
        cells, names = [], [claim.better, claim.worse]
        for table in tables.values():
            pair = [find(table, method) for method in (claim.better, claim.worse)]
            names = [row.method if row else name for row, name in zip(pair, names, strict=True)]
            found, difference = verdict(*pair)
            cells.append(f"{found}, {100 * difference:+.1f}" if found else "")
        lines.append(f"| {names[0]} above {names[1]} | {claim.figures} | {' | '.join(cells)} |")
    return "\n".join(lines)
