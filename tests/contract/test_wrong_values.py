"""No number in any argument of any registered class ends in anything but success or one of our sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from tiny_runs import ARGUMENTS, write_clouds

from peft_modal.api import build
from peft_modal.compose import compose
from peft_modal.compose.composed import node_args, runtime_args
from peft_modal.compose.describe import describe_type, type_hints
from peft_modal.errors import PeftModalError
from peft_modal.registry import NOUNS, default_registry
from peft_modal.running.faults import in_sentences
from peft_modal_clip.backbone import TINY

BASE = [argument.removeprefix("--") for argument in ARGUMENTS]
CLIP = [
    "backbone=open_clip", *(f"backbone.{name}={value}" for name, value in TINY.items()), "method=bitfit",
    "head=identity", "data=drawn_pairs",
]  # fmt: skip
AUTOENCODER = ["backbone=autoencoder", "method=bitfit", "head=identity", "data=drawn"]
DIFFUSION = ["backbone=stable_diffusion", "backbone.weights=random", "backbone.architecture=toy", *AUTOENCODER[1:]]
VISION = ["method=bitfit", "head=linear", "data=patterns"]
SWIN = '{"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}'
CONVNEXT = '{"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}'
AUDIO = ["method=bitfit", "head=linear", "data=sounds"]
TRACKING = ["backbone=lorat", "backbone.weights=random", "method=bitfit", "head=tracking_mlp"]
RECORDINGS = ["backbone=ast", "backbone.weights=random", *AUDIO[:-1], "data.root=good"]
NEEDS = {
    "audio.ast": ["backbone.weights=random", *AUDIO],
    "audio.sounds": ["backbone=ast", "backbone.weights=random", *AUDIO[:-1]],
    "audio.conformer": ["backbone=ast", "backbone.weights=random", *AUDIO[1:]],
    "audio.mixture_of_adapters": ["backbone=ast", "backbone.weights=random", *AUDIO[1:]],
    **{
        f"audio.{name}": RECORDINGS
        for name in ("folder", "tagged", "esc50", "urbansound8k", "speech_commands", "fluent_speech_commands")
    },
    "tracking.lorat": [*TRACKING[1:], "task=tracking", "data=moving_objects"],
    "tracking.tracking": [*TRACKING, "data=moving_objects"],
    "tracking.moving_objects": [*TRACKING, "task=tracking"],
    **{
        f"tracking.{name}": [*TRACKING, "task=tracking", "data.root=good"]
        for name in ("folder", "got10k", "lasot", "otb", "trackingnet")
    },
    "clip.open_clip": [*CLIP[1:], "task=contrastive"],
    "clip.contrastive": CLIP,
    "diffusion.autoencoder": [*AUTOENCODER[1:], "task=autoencoding"],
    "diffusion.autoencoding": AUTOENCODER,
    "diffusion.drawn": [*AUTOENCODER[:-1], "task=autoencoding"],
    "diffusion.stable_diffusion": [*DIFFUSION[1:], "task=text_to_image"],
    "diffusion.text_to_image": DIFFUSION,
    "vision.vit": ["backbone.weights=random", *VISION],
    "vision.swin": ["backbone.weights=random", "backbone.model=custom", f"backbone.sizes={SWIN}", *VISION],
    "vision.convnext": ["backbone.weights=random", "backbone.model=custom", f"backbone.sizes={CONVNEXT}", *VISION],
    "vision.patterns": ["backbone=vit", "backbone.weights=random", *VISION[:-1]],
    "vision.folder": ["backbone=vit", "backbone.weights=random", *VISION[:-1], "data.root=good"],
    "vision.vtab": ["data.root=good", "data.task=dtd"],
    "vision.fgvc": ["data.root=good", "data.dataset=nabirds"],
    "vision.fewshot": ["data.root=good", "data.dataset=food101"],
    "pointcloud.folder": ["data.root=good"],
    "pointcloud.scanobjectnn": ["data.root=good"],
    "pointcloud.modelnet40": ["data.root=good"],
    "pointcloud.modelnet_fewshot": ["data.root=good"],
    "pointcloud.masked_autoencoding": ["head=masked_decoder", "head.num_heads=3", "head.group_size=4"],
    "pointcloud.masked_decoder": ["head.num_heads=3", "head.group_size=4"],
    "pointcloud.idpt": ["method.k=4"],
    "pointcloud.idpt_parts": ["method.blocks=[1]"],
    "pointcloud.shapenet_part": ["data.root=good"],
    "pointcloud.part_segmentation": ["backbone.levels=2", "head=pointcloud_parts", "data=part_solids"],
    "pointcloud_parts": ["backbone.levels=2", "task=part_segmentation", "data=part_solids"],
    "pointcloud.pointgst": ["method.local=4"],
    "pointcloud.point_peft": ["method.top_k=2"],
    "pointcloud.point_mae": [item for item in BASE if item.startswith("backbone.")],
}
HUGE = 10**12
COUNTS_THINGS = re.compile(
    r"depth|votes|shots|per_class|per_family|num_workers|seed|patience|batch_size|points|group|fold|way|outputs"
)
"""Arguments for which a huge number is right, or takes its time and memory as it should."""


def cases() -> Iterator[object]:
    registry = default_registry()
    for noun in NOUNS:
        for entry in registry.entries(noun):
            full = f"{entry.modality}.{entry.name}" if entry.modality else entry.name
            cls = registry.load(registry.resolve(noun, full, modality=None))
            for name, hint in type_hints(cls).items():
                if name in runtime_args(cls) or name in node_args(cls):
                    continue
                if re.search(r"\b(int|float)\b", describe_type(hint)):
                    yield pytest.param(noun, full, name, id=f"{noun}-{full}-{name}")


def values(noun: str, name: str) -> list[str]:
    huge = noun in {"method", "head", "task"} and not COUNTS_THINGS.search(name)
    return ["-1", "0", "abc", "null", ".inf", *([str(HUGE)] if huge else [])]


@pytest.fixture(scope="module")
def clouds(tmp_path_factory):
    root = tmp_path_factory.mktemp("clouds")
    write_clouds(root / "good", {"a": 4, "b": 4})
    return root


@pytest.mark.parametrize(("noun", "full", "name"), cases())
def test_a_number_out_of_place_ends_in_a_sentence(clouds, monkeypatch, noun, full, name):
    monkeypatch.chdir(clouds)
    base = [item for item in BASE if not item.startswith(f"{noun}.")]
    for value in values(noun, name):
        overrides = [*base, f"{noun}={full}", *NEEDS.get(full, []), f"{noun}.{name}={value}"]
        sentence = outcome(overrides, noun)
        assert sentence is None or {name, noun, "method", "memory"} & set(re.split(r"\W+", sentence)), sentence


def outcome(overrides: list[str], noun: str) -> str | None:
    """None where everything is built, else the sentence of the error."""
    try:
        composed = compose(overrides=overrides)
        with in_sentences():
            if noun != "data":
                build(composed, ("a", "b")).task()
    except PeftModalError as error:
        return str(error)
    return None
