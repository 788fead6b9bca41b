"""Reading a report's page back, and one with everything in it that can go wrong."""

from __future__ import annotations

from html.parser import HTMLParser

import torch

from peft_modal.report import (
    Code,
    Column,
    Fact,
    Facts,
    Report,
    Row,
    Section,
    Table,
    Text,
    line_chart,
)
from peft_modal.tasks.classification_report import ClassificationCollector

UGLY = (
    "<script>alert('x')</script>",
    "nuts & bolts",
    "a_very_long_class_name_that_goes_on_and_on_and_on_$x^2$_to_its_end",
    "UnbrokenLongClassNameWithoutAnySeparatorsAtAllWhichGoesOnAndOn",
    'quoted "name"',
    "日本語",
    '#0b6cb0 id="x"',
)
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and the text of every element of a kind."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.texts = {}
        self._open = []
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append((tag, []))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        opened, parts = self._open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"
        self.texts.setdefault(tag, []).append(" ".join("".join(parts).split()))

    def handle_data(self, data):
        for _, parts in self._open:
            parts.append(data)


def normal(text):
    return " ".join(text.split())


def predictions_of(names):
    def predictions(output):
        return [
            {"class": names[int(row.argmax())], "probabilities": dict(zip(names, row.tolist(), strict=True))}
            for row in output.softmax(-1)
        ]

    return predictions


def classified(names, *, batch_size=50, count=400):
    """What classification says about `count` random samples of `names`."""
    collector = ClassificationCollector(names, predictions_of(names), seed=0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, len(names), (count,), generator=generator)
    logits = torch.randn(count, len(names), generator=generator)
    logits[torch.arange(count), labels] += 2.5
    points = torch.randn(count, 40, 3, generator=generator)
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        collector.add({"points": points[part], "label": labels[part]}, logits[part])
    return collector


def full_report(names=UGLY):
    """Every kind of content."""
    table = Table((Column("Name"), Column("Share", "share")), (("<b>&", 0.5), ("none", None)), "Table")
    curves = {"training": [(1.0, 0.5), (2.0, 0.25)], "validation": [(2.0, 0.125)]}
    own = Section(
        "own",
        "Own & more",
        (
            Facts((Fact("Time", 90.0, "seconds", "median"), Fact("Size", 1_290_000, "bytes"))),
            Row((line_chart("Loss", curves, x_label="Epoch"), table)),
            Text("A <paragraph>."),
            Code("key: <value>\n", "Folded & closed", folded=True),
        ),
        "What it is <about>.",
    )
    return Report(
        kind="test",
        title="a_backbone tuned with <i>method</i> on data",
        lead="Task & head.",
        facts=(Fact("Test accuracy", 0.5291, "share", "mean 52.9 %"), Fact("Trained", 0.00034, "share")),
        sections=(*classified(names).sections(), own),
        metrics={"test/accuracy": 0.5291},
    )
