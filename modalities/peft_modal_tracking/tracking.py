"""Single-object tracking: pairs while training, whole videos in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError
from peft_modal.ranges import Share
from peft_modal.report import Collector
from peft_modal.tasks.base import Stage, Task
from peft_modal.tasks.predicting import PredictRequest
from peft_modal_heads.tracking_mlp import TrackingOutput
from peft_modal_tracking.backbone import LoRAT
from peft_modal_tracking.boxes import cells_of
from peft_modal_tracking.losses import tracking_losses
from peft_modal_tracking.metrics import Result, got10k, one_pass
from peft_modal_tracking.predicting import check_request, predict_request
from peft_modal_tracking.report import TrackingCollector
from peft_modal_tracking.sequences import Video
from peft_modal_tracking.steps import CropSettings
from peft_modal_tracking.tracker import PENALTY, Track, Tracker

# `train` is taken on modules.
_KEYS = {"val_metrics": "val", "test_metrics": "test"}
_ONE_PASS = ("success_auc", "precision", "normalised_precision")
_GOT10K = ("ao", "sr50", "sr75")


class Tracking(Task):
    """LoRAT's losses on pairs (Lin et al., ECCV 2024); evaluation follows each target through its video.

    `success_auc`, `precision` (20 pixels) and `normalised_precision` (0.2) are means over sequences of the one-pass
    evaluation that trackers are compared by; `ao`, `sr50` and `sr75` pool the frames of all sequences as GOT-10k does.
    Trackingnet's and LaSOT's own variants are in `peft_modal_tracking.metrics`.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program.
        head: Supplied by the program; `tracking_mlp`.
        class_names: Not used; supplied by the program.
        window_penalty: Weight of the window that prefers the middle of the search picture.
        options: Arguments of `Task`.

    Raises:
        ConfigError: The backbone is no tracker.
    """

    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/success_auc", "max")
    share_metrics: ClassVar[frozenset[str]] = frozenset({*_ONE_PASS, *_GOT10K})
    compared: ClassVar[tuple[str, ...]] = ("test/precision", "test/normalised_precision", "test/ao")

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        window_penalty: Share = PENALTY,
        **options: Any,  # noqa: ANN401 — typed by `Task`
    ) -> None:
        del class_names
        if not isinstance(backbone, LoRAT):
            raise ConfigError("backbone.name: task 'tracking' needs a tracker: lorat")
        super().__init__(backbone, adapter, head, **options)
        self.tracked = backbone
        self.window_penalty = window_penalty
        self.settings: CropSettings | None = None
        self.metrics = nn.ModuleDict(
            {stage: nn.ModuleDict({name: MeanMetric() for name in (*_ONE_PASS, *_GOT10K)}) for stage in _KEYS}
        )
        self._clock = [0, 0.0]

    def before_fit(self, data: LightningDataModule) -> None:
        """Take over how pictures are cut out."""
        self.settings = _settings_of(data)

    def before_test(self, data: LightningDataModule) -> None:
        """Take over how pictures are cut out."""
        self.settings = _settings_of(data)

    def forward(self, batch: Mapping[str, Any]) -> TrackingOutput:
        """Scores and boxes of every cell of the search pictures."""
        if "template_mask" not in batch:
            marked = cells_of(batch["template_box"], self.tracked.template_size, self.tracked.grids["template"])
            batch = {**batch, "template_mask": marked}
        return super().forward(batch)

    def losses(self, batch: Mapping[str, Any], output: TrackingOutput) -> dict[str, Tensor]:
        """Cross-entropy of the scores and 1 - GIoU of the boxes; see `tracking_losses`.

        Raises:
            ConfigError: The head gives no boxes.
        """
        if not isinstance(output, TrackingOutput):
            raise ConfigError("head.name: tracking needs a head that gives scores and boxes: tracking_mlp")
        return tracking_losses(output, batch["target"], self.tracked.search_size)

    def evaluation_losses(self, batch: Mapping[str, Any], output: list[Track]) -> dict[str, Tensor]:
        """None: videos are followed, not compared cell by cell."""
        del batch, output
        return {}

    def evaluate(self, stage: Stage, batch: Mapping[str, Any]) -> list[Track]:
        """Where the targets of whole videos were found."""
        videos: list[Video] = batch["video"]
        tracks = self.tracker().track_all(videos, at_once=len(videos))
        if stage == "test":
            self._clock[0] += sum(len(track.seconds) - 1 for track in tracks)
            self._clock[1] += sum(float(track.seconds[1:].sum()) for track in tracks)
        return tracks

    def tracker(self) -> Tracker:
        """The inference loop around the network as it is.

        Raises:
            ConfigError: Nothing has told how pictures are cut out.
        """
        if self.settings is None:
            raise ConfigError("task 'tracking' takes its crops from data of tracking, and was given none")
        return Tracker(self.tracked, self.head, self.settings, window_penalty=self.window_penalty)

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: list[Track]) -> None:
        """Figures of the videos; of training data only the losses are kept."""
        if stage == "train":
            return
        figures: Any = self.metrics[f"{stage}_metrics"]
        for video, track in zip(batch["video"], output, strict=True):
            result = result_of(video, track)
            for name, value in one_pass(result, video.rules).figures.items():
                if name in _ONE_PASS:
                    figures[name].update(value)
            frames = int(result.visible[1:].sum())
            if frames:
                for name, value in got10k([result])[0].items():
                    figures[name].update(value, weight=frames)
        for name, figure in figures.items():
            self.log(f"{stage}/{name}", figure, on_step=False, on_epoch=True, batch_size=len(output))

    def final_figures(self, data: LightningDataModule) -> dict[str, float]:
        """Frames per second over the test videos, reading them included."""
        del data
        frames, seconds = self._clock
        return {"time/frames_per_second": frames / seconds} if seconds else {}

    def make_collector(self, *, seed: int) -> Collector:
        """Curves, figures of every sequence, and chosen frames with both boxes."""
        return TrackingCollector(seed=seed)

    @classmethod
    def check_request(cls, request: PredictRequest) -> None:
        """See `peft_modal_tracking.predicting.check_request`."""
        check_request(request)

    def predict_with(self, request: PredictRequest) -> list[dict[str, Any]]:
        """Follow the targets that were asked for; writes boxes and videos."""
        return predict_request(request, self.tracked, self.head, self.window_penalty)


def result_of(video: Video, track: Track) -> Result:
    """Both sides of a comparison, on the CPU."""
    return Result(track.boxes, video.boxes, video.visible, video.frames.size(0))


def _settings_of(data: LightningDataModule) -> CropSettings:
    found = getattr(data, "settings", None)
    if not isinstance(found, CropSettings):
        raise ConfigError(f"data: task 'tracking' needs data of tracking, '{type(data).__name__}' is none")
    return found
