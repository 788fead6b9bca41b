"""Pictures as files and as a chart of a report: prompts down, epochs across, the untouched model first."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from peft_modal.files import replacing
from peft_modal.report import Chart, Section

UNTOUCHED: Final = "untouched"
MOST_COLUMNS: Final = 7
_SIDE: Final = 110


def save_png(picture: Tensor, path: Path, settings: Mapping[str, Any]) -> None:
    """Write one picture (3, H, W) in 0..1 with its settings as JSON in the text chunk `parameters`.

    Raises:
        WriteError: It cannot be written.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", json.dumps(dict(settings), ensure_ascii=False))
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", pnginfo=text)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_png` wrote."""
    with Image.open(path) as image:
        found: dict[str, Any] = json.loads(image.text["parameters"])  # type: ignore[attr-defined]
        return found


class SampleFolder:
    """The pictures that a run draws while it trains: `samples/<column>/<prompt number>.png`.

    Args:
        root: The run's folder.
        prompts: What is drawn, each with a seed of its own.
    """

    def __init__(self, root: Path, prompts: Sequence[str]) -> None:
        self.root = root / "samples"
        self.prompts = tuple(prompts)

    def has(self, column: str) -> bool:
        """Whether the pictures of a column are there."""
        return all(self._path(column, i).is_file() for i in range(len(self.prompts)))

    def write(self, column: str, pictures: Tensor, settings: Sequence[Mapping[str, Any]]) -> None:
        """Write a column's pictures (B, 3, H, W) in 0..1."""
        for i, picture in enumerate(pictures):
            save_png(picture, self._path(column, i), settings[i])

    def columns(self) -> tuple[str, ...]:
        """What is there, the untouched model first, at most `MOST_COLUMNS`, evenly chosen, the last included."""
        found = sorted(path.name for path in self.root.glob("epoch-*") if self.has(path.name))
        if len(found) > MOST_COLUMNS - 1:
            chosen = np.linspace(0, len(found) - 1, MOST_COLUMNS - 1).round().astype(int)
            found = [found[i] for i in chosen]
        return (*((UNTOUCHED,) if self.has(UNTOUCHED) else ()), *found)

    def section(self) -> Section | None:
        """The grid as a section of a report; None where nothing was drawn."""
        columns = self.columns()
        if not columns:
            return None
        names = [column if column == UNTOUCHED else f"epoch {int(column.removeprefix('epoch-'))}" for column in columns]
        images = [[_pixels(self._path(column, i)) for column in columns] for i in range(len(self.prompts))]

        def draw(figure: Any) -> None:  # noqa: ANN401 — matplotlib's figure
            axes = figure.subplots(len(self.prompts), len(columns), squeeze=False)
            for row, prompt in enumerate(self.prompts):
                for column, name in enumerate(names):
                    place = axes[row][column]
                    place.imshow(images[row][column], interpolation="nearest")
                    place.set_xticks([])
                    place.set_yticks([])
                    if row == 0:
                        place.set_title(name, fontsize=9)
                    if column == 0:
                        place.set_ylabel(_wrapped(prompt), fontsize=8, rotation=0, ha="right", va="center")

        chart = Chart(
            data={"prompts": list(self.prompts), "columns": names},
            draw=draw,
            width=170 + _SIDE * len(columns),
            height=30 + _SIDE * len(self.prompts),
            label="Generated pictures: one row for each prompt, from the untouched model to the last epoch",
            shrinks=False,
        )
        lead = "The same prompts and seeds over time, beside the untouched model's."
        return Section("samples", "Generated pictures", (chart,), lead)

    def _path(self, column: str, index: int) -> Path:
        return self.root / column / f"{index:02d}.png"


def _pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _wrapped(text: str, width: int = 22) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:4])
