"""How good the shipped nano Stable Diffusion is: its autoencoder on pictures it has not seen, and what it draws.

Colours are counted in pixels and shapes named by a classifier of its own (`peft_modal.data.drawn.judge`), which has
seen true pictures only; neither had a part in training. Single objects are all 48 pairs of colour and shape, eight of
which (`held out`) no training picture shows; pairs of objects are told by both colours being there, and by their order.

    python benchmarks/nano_diffusion.py --picture docs/diffusion.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_modal.data.drawn import (
    COLOURS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    draw_open_ended,
    draw_scenes,
    draw_style,
    draw_subject,
    object_name,
)
from peft_modal.data.drawn.judge import NEAR, colour_of, judge_accuracy, train_shape_judge
from peft_modal.data.seeding import seeded
from peft_modal.files import write_text
from peft_modal_diffusion.autoencoder import psnr
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.generation import Sampling, generate
from peft_modal_diffusion.pictures import save_png

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks/results/nano_diffusion.json"
PICTURES: dict[str, Callable[..., Tensor]] = {
    "scenes": lambda generator: draw_scenes(256, generator).images,
    "open_ended": lambda generator: draw_open_ended(256, generator),
    "subject": lambda generator: draw_subject(48, generator).images,
    "style": lambda generator: draw_style(48, generator).images,
}
PAIRS = [(colour, shape) for shape in range(len(SHAPES)) for colour in range(len(COLOURS))]
_NAMES = list(COLOURS)


@torch.no_grad()
def autoencoder_figures(backbone: StableDiffusion) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB, mean over pictures, of each kind of picture."""
    autoencoder = backbone.surroundings["vae"]
    figures = {}
    for name, draw in PICTURES.items():
        pixels = draw(seeded("held-out pictures", name)) * 2 - 1
        rebuilt = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        figures[f"psnr/{name}"] = float(psnr(rebuilt, pixels).mean())
    return figures


def single_objects(backbone: StableDiffusion, sampling: Sampling, seeds: int) -> tuple[dict[str, float], Tensor]:
    """Shares with the named colour and shape, and the pictures (seeds * 48, 3, S, S) of all pairs."""
    judge = train_shape_judge()
    prompts = [object_name(colour, shape) for colour, shape in PAIRS]
    found = [
        generate(backbone, prompts, [1000 * seed + i for i in range(len(prompts))], sampling) for seed in range(seeds)
    ]
    pictures = torch.cat(found)
    colours, shapes = (torch.tensor([pair[i] for pair in PAIRS]).repeat(seeds) for i in (0, 1))
    right_colour = (colour_of(pictures) == colours).float()
    with torch.no_grad():
        right_shape = (judge(pictures).argmax(1) == shapes).float()
    is_held_out = torch.tensor([(_NAMES[colour], SHAPES[shape]) in HELD_OUT for colour, shape in PAIRS]).repeat(seeds)
    figures = {"judge/shape_on_true_pictures": judge_accuracy(judge), "pictures": float(len(pictures))}
    for name, right in (("colour", right_colour), ("shape", right_shape)):
        figures[f"single/{name}"] = float(right.mean())
        figures[f"single/{name}_held_out"] = float(right[is_held_out].mean())
    for shape, name in enumerate(SHAPES):
        figures[f"single/shape_{name}"] = float(right_shape[shapes == shape].mean())
    return figures, pictures


def two_objects(backbone: StableDiffusion, sampling: Sampling, count: int = 64) -> tuple[dict[str, float], Tensor]:
    """Shares with both colours, and with both where they belong."""
    generator = seeded("two objects")
    prompts, wanted = [], []
    for _ in range(count):
        first, second = torch.randperm(len(COLOURS), generator=generator)[:2].tolist()
        shapes = torch.randint(len(SHAPES), (2,), generator=generator).tolist()
        relation = int(torch.randint(len(RELATIONS), (1,), generator=generator))
        names = object_name(first, shapes[0]), object_name(second, shapes[1])
        prompts.append(f"{names[0]} {RELATIONS[relation]} {names[1]}")
        wanted.append((first, second, relation))
    pictures = generate(backbone, prompts, range(count), sampling)
    both, ordered = 0, 0
    for picture, (first, second, relation) in zip(pictures, wanted, strict=True):
        masks = [_near(picture, index) for index in (first, second)]
        if min(int(mask.sum()) for mask in masks) < 6:
            continue
        both += 1
        axis = 1 if RELATIONS[relation] in {"left of", "right of"} else 0
        places = [float(mask.nonzero()[:, axis].float().mean()) for mask in masks]
        comes_first = RELATIONS[relation] in {"left of", "above"}
        ordered += (places[0] < places[1]) == comes_first
    return {"two/colours": both / count, "two/colours_in_order": ordered / count}, pictures


def _near(picture: Tensor, colour: int) -> Tensor:
    rgb = torch.tensor(list(COLOURS.values())[colour])[:, None, None]
    return (picture - rgb).norm(dim=0) < NEAR


def main() -> None:
    """Measure, and draw where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    backbone = StableDiffusion(weights=arguments.weights)
    backbone.load_weights()
    sampling = Sampling(steps=arguments.steps, guidance=arguments.guidance)
    figures: dict[str, Any] = {"steps": arguments.steps, "guidance": arguments.guidance}
    figures |= autoencoder_figures(backbone)
    singles, objects = single_objects(backbone, sampling, arguments.seeds)
    doubles, pairs = two_objects(backbone, sampling)
    figures |= singles | doubles
    write_text(arguments.out, json.dumps({k: round(v, 4) for k, v in figures.items()}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    if arguments.picture is not None:
        from torchvision.utils import make_grid

        grid = make_grid(torch.cat([objects[: len(PAIRS)], pairs[:16]]), nrow=8, padding=1, pad_value=1.0)
        large = torch.nn.functional.interpolate(grid[None], scale_factor=3.0)[0]
        save_png(large, arguments.picture, {"steps": arguments.steps, "guidance": arguments.guidance})


if __name__ == "__main__":
    main()
