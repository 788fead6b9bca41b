"""Reports: one self-contained page and its JSON twin, made of content that knows no task and no modality.

A task adds sections through a `Collector`, a modality draws its samples through a `Renderer` that its plugin names.
"""

from __future__ import annotations

from peft_modal.report.blocks import (
    Block,
    Chart,
    Code,
    Column,
    Fact,
    Facts,
    Gallery,
    Report,
    Row,
    Section,
    Table,
    Text,
    Tile,
)
from peft_modal.report.charts import heat_chart, line_chart, matrix_chart
from peft_modal.report.collector import Best, Collector, Kept, batch_size, draw, element
from peft_modal.report.numbers import Kind, show
from peft_modal.report.pictures import Renderer
from peft_modal.report.write import PAGE, TWIN, write_report

__all__ = [
    "PAGE",
    "TWIN",
    "Best",
    "Block",
    "Chart",
    "Code",
    "Collector",
    "Column",
    "Fact",
    "Facts",
    "Gallery",
    "Kept",
    "Kind",
    "Renderer",
    "Report",
    "Row",
    "Section",
    "Table",
    "Text",
    "Tile",
    "batch_size",
    "draw",
    "element",
    "heat_chart",
    "line_chart",
    "matrix_chart",
    "show",
    "write_report",
]
