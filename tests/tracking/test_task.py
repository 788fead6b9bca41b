"""The task: what it logs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule

from peft_modal.errors import ConfigError, DataError
from peft_modal.methods.lora import LoRA
from peft_modal.tasks.base import Task
from peft_modal_heads.dense_linear import DenseLinear
from peft_modal_heads.tracking_mlp import TrackingMLP
from peft_modal_tracking.backbone import LoRAT
from peft_modal_tracking.boxes import cells_of
from peft_modal_tracking.data import PlainPairs, collate_videos
from peft_modal_tracking.sequences import StoredFrames, Video
from peft_modal_tracking.steps import CropSettings
from peft_modal_tracking.tracker import Track
from peft_modal_tracking.tracking import Tracking
from peft_modal_vision.backbone import ViT

SETTINGS = CropSettings((8, 8), (12, 16))


def task(head: Any = TrackingMLP) -> Tracking:
    backbone = LoRAT.tiny()
    adapter = LoRA(sites=["attn", "mlp"], rank=2, init="trunc_normal").attach(backbone)
    made = Tracking(backbone, adapter, head(backbone.feature_spec(), 3), ())
    made.settings = SETTINGS
    return made


def video(frames: int = 4, boxes: torch.Tensor | None = None) -> Video:
    found = torch.tensor([[10.0, 8, 9, 7]] * frames) if boxes is None else boxes
    return Video("v", StoredFrames(torch.randint(0, 256, (frames, 3, 30, 40), dtype=torch.uint8)), found)


def pair_batch() -> dict[str, Any]:
    pair = PlainPairs([video()], SETTINGS)[0]
    return {name: value[None] for name, value in pair.items()}


def test_the_template_box_becomes_the_mask_of_the_network() -> None:
    made, batch = task(), pair_batch()
    mask = cells_of(batch["template_box"], (8, 8), (2, 2))
    given = made({**batch, "template_mask": mask})
    assert torch.equal(made(batch).scores, given.scores)
    other = made({**batch, "template_mask": 1 - mask})
    assert not torch.equal(other.scores, given.scores) or bool(mask.all())


def test_everything_that_trains_gets_a_gradient() -> None:
    made, batch = task(), pair_batch()
    sum(made.losses(batch, made(batch)).values()).backward()  # type: ignore[union-attr]
    missing = [name for name, parameter in made.named_trained().items() if parameter.grad is None]
    assert not missing
    assert {name for name in made.named_trained() if name.startswith("backbone.")} == {"backbone.token_type_embed"}


def test_the_type_embedding_does_not_decay() -> None:
    made = task()
    assert made.adapter.decay["backbone.token_type_embed"] is False


def test_figures_of_a_perfect_track() -> None:
    made = task()
    logged: dict[str, Any] = {}
    made.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign]
    one, two = video(), video(7)
    tracks = [Track(each.boxes, torch.ones(len(each)), torch.ones(len(each))) for each in (one, two)]
    batch = collate_videos([{"index": torch.tensor(i), "video": each} for i, each in enumerate((one, two))])
    made.update_metrics("test", batch, tracks)
    found = {name: float(figure.compute()) for name, figure in logged.items()}
    assert found == pytest.approx(
        {
            "test/success_auc": 20 / 21, "test/precision": 1, "test/normalised_precision": 1, "test/ao": 1,
            "test/sr50": 1, "test/sr75": 1,
        },
        abs=1e-6,
    )  # fmt: skip


def test_ao_pools_frames_and_success_averages_sequences() -> None:
    made = task()
    logged: dict[str, Any] = {}
    made.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign]
    short, long = video(3), video(9)
    wrong = short.boxes + torch.tensor([100.0, 0, 0, 0])
    wrong[0] = short.boxes[0]
    tracks = [Track(boxes, torch.ones(len(boxes)), torch.ones(len(boxes))) for boxes in (wrong, long.boxes)]
    made.update_metrics("val", {"video": [short, long]}, tracks)
    found = {name: float(figure.compute()) for name, figure in logged.items()}
    assert found["val/ao"] == pytest.approx(8 / 10)
    assert found["val/success_auc"] == pytest.approx((20 / 21 / 3 + 20 / 21) / 2)


def test_a_whole_video_is_evaluated() -> None:
    made = task().eval()
    batch = {"index": torch.tensor([0]), "video": [video()]}
    (track,) = made.evaluate("test", batch)
    assert track.boxes.shape == (4, 4)
    assert made.evaluation_losses(batch, [track]) == {}


def test_other_parts_are_refused() -> None:
    vit = ViT.tiny()
    with pytest.raises(ConfigError, match=r"backbone\.name: task 'tracking' needs a tracker: lorat"):
        Tracking(vit, LoRA().attach(vit), TrackingMLP(LoRAT.tiny().feature_spec()), ())
    made = task(DenseLinear)
    with pytest.raises(ConfigError, match=r"head\.name: tracking needs a head .* tracking_mlp"):
        made.losses(pair_batch(), made(pair_batch()))
    with pytest.raises(ConfigError, match="needs data of tracking"):
        made.before_fit(LightningDataModule())
    made.settings = None
    with pytest.raises(ConfigError, match="takes its crops from data of tracking"):
        made.tracker()
    assert issubclass(Tracking, Task)


def test_boxes_outside_of_all_frames_are_named() -> None:
    with pytest.raises(DataError, match="sequence 'v': its boxes lie outside of its frames"):
        PlainPairs([video(boxes=torch.tensor([[100.0, 100, 9, 9]] * 4))], SETTINGS)[0]
