"""Fills the generated parts of the README: the matrix from the registry, tables of results from their files.

python docs/readme.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from claims import POINT_CLOUDS, VISION, claims_table

from peft_modal.comparison.manifest import read_manifest
from peft_modal.comparison.table import markdown, rows
from peft_modal.files import write_text
from peft_modal.registry import default_registry
from peft_modal.testing.matrix import matrix_table, method_matrix

ROOT = Path(__file__).parent.parent
_STARTS = {"nano": "nano", "random_card": "random, normal(0, 0.02)", "random_torch": "random, PyTorch's default"}
_METHODS = {"linear_probe": "linear probe", "idpt": "IDPT"}


def transfer_table(results: dict[str, float]) -> str:
    """Mean and sample deviation over seeds, in percent."""
    lines = ["| start | " + " | ".join(_METHODS.values()) + " |", "|---|---|---|"]
    for start, title in _STARTS.items():
        cells = []
        for method in _METHODS:
            found = [100 * value for key, value in results.items() if key.startswith(f"{method}/{start}/")]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            cells.append(f"{statistics.mean(found):.1f} ± {spread:.1f} ({len(found)})" if found else "")
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def nano_table(figures: dict[str, float]) -> str:
    """What the nano Stable Diffusion can do."""

    def percent(*names: str) -> str:
        return " / ".join(f"{100 * figures[name]:.0f} %" for name in names)

    kinds = ("scenes", "style", "open_ended", "subject")
    decibels = " / ".join(f"{figures[f'psnr/{kind}']:.1f}" for kind in kinds)
    rows = (
        ("pictures it has not seen, through the autoencoder: scenes / style / open-ended / subject", f"{decibels} dB"),
        ("one object: the colour / the shape", percent("single/colour", "single/shape")),
        (
            "pairs of colour and shape that no training picture shows",
            percent("single/colour_held_out", "single/shape_held_out"),
        ),
        ("two objects: both colours / both where they belong", percent("two/colours", "two/colours_in_order")),
    )
    return "\n".join(["| asked for | shown |", "|---|---|", *(f"| {what} | {found} |" for what, found in rows)])


def memory_table(results: dict[str, Any]) -> str:
    """Peaks of sparse methods' steps, and bytes of a one-bit adapter."""
    rows = results["rows"]
    masked = rows["masked gradients"]["step_mb"]
    lines = [
        "| method | trained | step, MB | over full | over masked gradients | calibration, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        calibration = f"{row['calibration_mb']:,.0f}" if "calibration_mb" in row else ""
        lines.append(
            f"| {name} | {row['trained']:,.0f} | {row['step_mb']:,.0f} | {row['ratio']:.2f} | "
            f"{row['step_mb'] / masked:.2f} | {calibration} |"
        )
    stored = ", ".join(f"{of['tensors']:,} bytes {name}" for name, of in results["bytes"].items())
    return "\n".join([*lines, "", f"The tensors of a Bi-AdaptFormer-32 with one bit on the same network: {stored}."])


def mask_table(results: dict[str, Any]) -> str:
    """Steps of mask tuning over LoRA's."""
    lines = ["| masks | step over LoRA's | quartiles |", "|---|---:|---|"]
    names = {"amt": "AMT, one gradient", "r_amt": "R-AMT, two gradients and the untouched model"}
    for name, row in results["rows"].items():
        lines.append(f"| {names[name]} | {row['ratio']:.2f} | {row['ratio_low']:.2f} to {row['ratio_high']:.2f} |")
    return "\n".join(lines)


def audio_table(results: dict[str, Any]) -> str:
    """Milliseconds of a clip's reading and of its step, and the share of reading."""
    titles = {"none": "no cache", "waveforms": "`cache: waveforms`", "spectrograms": "`cache: spectrograms`"}
    lines = ["| network | step, ms | " + " | ".join(titles.values()) + " |", "|---|---:|" + "---:|" * len(titles)]
    for model, row in results["rows"].items():
        cells = [f"{row[name]:.1f} ms, {row[name] / (row[name] + row['step']):.1%}" for name in titles]
        lines.append(f"| {model} | {row['step']:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


COMPARISONS = {
    "comparison": "pointcloud_comparison",
    "comparison_parts": "parts_comparison",
    "comparison_style": "diffusion_style_comparison",
    "comparison_subject": "diffusion_subject_comparison",
    "comparison_patterns": "vision_comparison",
    "comparison_digits": "digits_comparison",
    "comparison_scenes": "segmentation_comparison",
}
"""Parts of the README, and the folders that they are made of."""


CLAIMED = {
    "claims": (
        VISION,
        {"pictures": "comparison_patterns", "digits": "comparison_digits", "scenes": "comparison_scenes"},
    ),
    "claims_point_clouds": (POINT_CLOUDS, {"solids": "comparison"}),
}
"""Parts that hold papers' claims against comparisons, which are given by the heads of their columns."""


def comparison_parts() -> dict[str, str]:
    """Of each comparison that is there, its command and its table as `compare` writes it; beside them the claims."""
    folders = {name: ROOT / "benchmarks/results" / made for name, made in COMPARISONS.items()}
    found = {name: read_manifest(folder) for name, folder in folders.items() if (folder / "manifest.json").is_file()}
    parts = {
        name: f"```bash\n{made.command}\n```\n\n{markdown(made.plan, made.progress)}" for name, made in found.items()
    }
    for part, (claims, columns) in CLAIMED.items():
        made = {title: found[name] for title, name in columns.items() if name in found}
        parts[part] = claims_table({title: rows(of.plan, of.progress) for title, of in made.items()}, claims)
    return parts


def cost_table(results: dict[str, Any]) -> str:
    """Step time and peak memory over full fine-tuning's, for each device and backbone that was measured."""
    measured = [
        (f"{backbone}, {device} ({of['machines'][backbone]['optimizer']})", rows)
        for device, of in results.items()
        for backbone, rows in of["backbones"].items()
    ]
    head = "| method | " + " | ".join(f"{name}: time | memory" for name, _ in measured) + " |"
    lines = [head, "|---|" + "---|---|" * len(measured)]
    for method in dict.fromkeys(method for _, found in measured for method in found):
        cells = [cell for _, found in measured for cell in _cost_cells(found.get(method, {}))]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost_cells(row: dict[str, Any]) -> tuple[str, str]:
    if "ratio" not in row:
        return "–", "–"  # noqa: RUF001 — an en dash is meant
    time = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    return time, f"{row['peak_ratio']:.2f}" if "peak_ratio" in row else ""


def filled(text: str) -> str:
    """The README with its generated parts made anew."""
    results = json.loads((ROOT / "benchmarks/results/pointcloud_transfer.json").read_text(encoding="utf-8"))
    parts = {"matrix": matrix_table(method_matrix(default_registry())), "transfer": transfer_table(results)}
    cost = ROOT / "benchmarks/results/step_cost.json"
    if cost.is_file():
        parts["cost"] = cost_table(json.loads(cost.read_text(encoding="utf-8")))
    memory = ROOT / "benchmarks/results/sparse_memory.json"
    parts["sparse_memory"] = memory_table(json.loads(memory.read_text(encoding="utf-8")))
    audio = ROOT / "benchmarks/results/audio_features.json"
    parts["audio_features"] = audio_table(json.loads(audio.read_text(encoding="utf-8")))
    nano = ROOT / "benchmarks/results/nano_diffusion.json"
    parts["nano_diffusion"] = nano_table(json.loads(nano.read_text(encoding="utf-8")))
    masks = ROOT / "benchmarks/results/mask_cost.json"
    parts["mask_cost"] = mask_table(json.loads(masks.read_text(encoding="utf-8")))
    parts.update(comparison_parts())
    for name, part in parts.items():
        text = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, p=part: f"{m[1]}{p}\n{m[2]}", text, flags=re.S
        )
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    write_text(readme, filled(readme.read_text(encoding="utf-8")))
