"""Writing a report: one page that needs nothing else, and its JSON twin."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from peft_modal.files import write_text
from peft_modal.report.blocks import Chart, Column, Gallery, Report, galleries
from peft_modal.report.numbers import TEXTUAL, show
from peft_modal.report.pictures import Pictures, Renderer, draw_gallery
from peft_modal.report.style import svg

PAGE: Final = "report.html"
TWIN: Final = "report.json"


def write_report(report: Report, folder: Path, *, renderer: Callable[[], Renderer | None] = lambda: None) -> None:
    """Write `report.html` and `report.json` into a folder, each atomically.

    Args:
        report: What is said.
        folder: Where.
        renderer: Gives what draws the samples of galleries, or None; called only where there is a gallery. A renderer
            that cannot be loaded or fails leaves a sentence in the place of its pictures.
    """
    pictures = {
        id(gallery): draw_gallery(gallery, renderer)
        for section in report.sections
        for gallery in galleries(section.blocks)
    }
    problems = [drawn.problem for drawn in pictures.values() if drawn.problem]
    twin = _finite({**report.to_dict(), "problems": problems})
    page = _page(report, pictures)
    write_text(folder / TWIN, json.dumps(twin, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / PAGE, page)


def _page(report: Report, pictures: dict[int, Pictures]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=PackageLoader("peft_modal.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = 0

    def chart(block: Chart) -> Markup:
        nonlocal drawn
        drawn += 1
        text = svg(block.draw, width=block.width, height=block.height, name=f"chart{drawn}", label=block.label)
        return Markup(text)  # noqa: S704 — made by matplotlib, which escapes texts

    def breakable(text: str) -> Markup:
        return Markup(str(escape(text)).replace("_", "_<wbr>"))  # noqa: S704 — escaped just here

    def side(column: Column) -> str:
        return "text" if column.kind in TEXTUAL else "bar" if column.kind == "bar" else "number"

    def drawn_tiles(block: Gallery) -> Pictures:
        return pictures[id(block)]

    environment.globals.update(show=show, chart=chart, side=side, breakable=breakable, pictures=drawn_tiles)
    return environment.get_template("report.html").render(report=report)


def _finite(value: Any) -> Any:  # noqa: ANN401 — a JSON document
    """The document with null for what JSON cannot say: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
