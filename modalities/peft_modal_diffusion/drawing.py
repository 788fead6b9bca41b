"""`predict` of this modality: pictures of prompts, each a PNG that says how it was made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from peft_modal._version import __version__
from peft_modal.data.progress import progress
from peft_modal.errors import ConfigError
from peft_modal.tasks.predicting import PredictRequest
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.generation import Sampling, generate
from peft_modal_diffusion.pictures import save_png

_AT_ONCE: Final = 4
_MULTIPLE: Final = 8
"""Sides that every sampler of diffusers takes are multiples of this."""


def check_request(request: PredictRequest) -> None:
    """Refuse what cannot be drawn.

    Raises:
        ConfigError: There is no prompt, or a flag is out of its range.
    """
    flags, problems = request.flags, []
    if request.input is not None:
        problems.append("--input: this adapter draws pictures and reads no files; say with --prompt what to draw")
    elif not flags.get("prompt"):
        problems.append('--prompt is missing: say what to draw, as in --prompt "a photo of a dog"')
    problems += [f"--{name}: {flags[name]} is below 1" for name in ("count", "steps") if flags.get(name, 1) < 1]
    if not 0 <= flags.get("guidance", 1.0) < math.inf:
        problems.append(f"--guidance: {flags['guidance']} is no number from 0 on; 4 to 8 are usual")
    if "size" in flags and _size(flags["size"]) is None:
        problems.append(
            f"--size: '{flags['size']}' is neither WIDTHxHEIGHT nor one number; sides are multiples of {_MULTIPLE}"
        )
    if problems:
        raise ConfigError(*problems)


def draw_request(backbone: StableDiffusion, request: PredictRequest, sampling: Sampling) -> list[dict[str, Any]]:
    """Draw what was asked for into `<prompt number>-<seed>.png`.

    Args:
        backbone: With its weights; adapters act.
        request: Checked; its flags are those of the plugin.
        sampling: How, where flags say nothing.

    Returns:
        A row for each picture: its path and all that its file says of itself.
    """
    flags = request.flags
    sampling = replace(sampling, **_changes(flags))
    origin = {
        "adapters": [{"file": file, "weight": weight} for file, weight in request.adapters],
        "backbone": backbone.weights,
        "peft_modal": __version__,
    }
    seeds = range(request.seed, request.seed + flags.get("count", 1))
    wanted = [(number, prompt, seed) for number, prompt in enumerate(flags["prompt"]) for seed in seeds]
    rows = []
    with progress("pictures", len(wanted)) as advance:
        for start in range(0, len(wanted), _AT_ONCE):
            part = wanted[start : start + _AT_ONCE]
            pictures = generate(backbone, [prompt for _, prompt, _ in part], [seed for *_, seed in part], sampling)
            for picture, (number, prompt, seed) in zip(pictures, part, strict=True):
                height, width = picture.shape[1:]
                settings = {**sampling.settings(prompt, seed), "height": height, "width": width, **origin}
                path = request.out / f"{number:02d}-{seed}.png"
                save_png(picture, path, settings)
                rows.append({"path": str(path), **settings})
            advance(len(part))
    return rows


def _changes(flags: Mapping[str, Any]) -> dict[str, Any]:
    names = {"steps": "steps", "guidance": "guidance", "negative": "negative_prompt"}
    changes = {ours: flags[flag] for flag, ours in names.items() if flag in flags}
    size = _size(flags["size"]) if "size" in flags else None
    return changes if size is None else {**changes, "width": size[0], "height": size[1]}


def _size(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if match is None:
        return None
    width, height = int(match[1]), int(match[2] or match[1])
    return (width, height) if min(width, height) > 0 and width % _MULTIPLE == height % _MULTIPLE == 0 else None
