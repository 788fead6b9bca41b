"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.data.images import image_size
from peft_modal.errors import ConfigError, DataError
from peft_modal.files import write_bytes
from peft_modal.ranges import NonNegativeFloat, PositiveInt, Share
from peft_modal.report import Collector
from peft_modal.tasks.base import Stage, Task
from peft_modal_heads.dense import DenseOutput
from peft_modal_vision.palette import IGNORED, palette
from peft_modal_vision.segmentation_report import SegmentationCollector

_SIDES = 32
_KEYS = {"train_metrics": "train", "val_metrics": "val", "test_metrics": "test"}


class Segmentation(Task):
    """Cross-entropy of every pixel, mean intersection over union, mean class accuracy and pixel accuracy.

    Logits are brought to the resolution of the mask. A picture larger than `window` is evaluated in windows that
    overlap, whose logits are averaged.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program.
        head: Supplied by the program; one that gives maps, as `dense_linear`, `setr_pup` and `upernet` do.
        class_names: Names of the classes in label order; supplied by the program.
        auxiliary_weight: Factor of the losses of auxiliary heads.
        window: Side of the windows in pixels; None for whole pictures.
        stride: Their distance; None for two thirds of a window.
        label_smoothing: Share of each target that is spread over all classes.
        class_weights: Factor of each pixel's training loss by its class: `none`, or one number per class in label
            order. Classes of few pixels, which plain cross-entropy learns last, need a larger one. A batch's loss
            divides by its pixels, not by the sum of the weights; losses on validation and test data are unweighted.
        options: Arguments of `Task`.

    Raises:
        ConfigError: The stride is larger than the window, or there are not as many class weights as classes.
        DataError: There are fewer than two classes.
    """

    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/miou", "max")
    loss_weights: Tensor | None
    share_metrics: ClassVar[frozenset[str]] = frozenset({"miou", "mean_class_accuracy", "pixel_accuracy"})

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        auxiliary_weight: NonNegativeFloat = 0.4,
        window: PositiveInt | None = None,
        stride: PositiveInt | None = None,
        label_smoothing: Share = 0.0,
        class_weights: Literal["none"] | list[NonNegativeFloat] = "none",
        **options: Any,  # noqa: ANN401 — typed by `Task`
    ) -> None:
        super().__init__(backbone, adapter, head, **options)
        if len(class_names) < 2:
            raise DataError(f"task 'segmentation' needs two classes or more, the data has {len(class_names)}")
        if window is not None and stride is not None and stride > window:
            raise ConfigError(f"task.stride: {stride} is above task.window, {window}, so pixels would be left out")
        self.class_names = class_names
        self.auxiliary_weight = auxiliary_weight
        self.window = window
        self.stride = stride or (None if window is None else max(1, round(window * 2 / 3)))
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        count = len(class_names)
        weights = None
        if not isinstance(class_weights, str):
            if len(class_weights) != count or not any(class_weights):
                raise ConfigError(
                    f"task.class_weights: expected one number for each of the {count} classes "
                    f"({', '.join(class_names)}), not all 0, got {class_weights}"
                )
            weights = torch.tensor(class_weights)
        self.register_buffer("loss_weights", weights, persistent=False)
        metrics = MetricCollection(
            {
                "miou": MulticlassJaccardIndex(count, ignore_index=IGNORED),
                "mean_class_accuracy": MulticlassAccuracy(count, average="macro", ignore_index=IGNORED),
                "pixel_accuracy": MulticlassAccuracy(count, average="micro", ignore_index=IGNORED),
            },
            compute_groups=False,
        )
        # `train` is taken on modules.
        self.metrics = nn.ModuleDict({stage: metrics.clone(prefix=f"{_KEYS[stage]}/") for stage in _KEYS})

    def losses(self, batch: Mapping[str, Any], output: DenseOutput) -> dict[str, Tensor]:
        """Cross-entropy of logits and masks (B, H, W), and that of the auxiliary heads.

        Raises:
            ConfigError: The head gives no maps.
        """
        output = _dense(output)
        found = {"loss": self._cross_entropy(output.logits, batch["mask"], self.loss_weights)}
        if output.auxiliary and self.auxiliary_weight:
            parts = [self._cross_entropy(logits, batch["mask"], self.loss_weights) for logits in output.auxiliary]
            found["auxiliary"] = self.auxiliary_weight * torch.stack(parts).sum()
        return found

    def evaluation_losses(self, batch: Mapping[str, Any], output: DenseOutput) -> dict[str, Tensor]:
        """The main loss alone, unweighted.

        Raises:
            ConfigError: The head gives no maps.
        """
        return {"loss": self._cross_entropy(_dense(output).logits, batch["mask"], None)}

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: DenseOutput) -> None:
        """Figures of the stage; of training data only the loss is kept."""
        if stage == "train":
            return
        metrics = self.metrics[f"{stage}_metrics"]
        metrics.update(_labels(batch, output), batch["mask"])  # type: ignore[operator]
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(batch["mask"]))  # type: ignore[arg-type]

    def evaluate(self, stage: Stage, batch: Mapping[str, Any]) -> DenseOutput:
        """Logits at the resolution of the masks, where there are any; of larger pictures the mean over windows."""
        del stage
        output = self._in_windows(batch)
        if "mask" not in batch or not isinstance(output, DenseOutput):
            return output
        # Once for loss, figures and report.
        return DenseOutput(at(output.logits, batch["mask"]))

    def _in_windows(self, batch: Mapping[str, Any]) -> DenseOutput:
        image = batch["image"]
        window, stride = self.window, self.stride
        if window is None or stride is None or max(image.shape[-2:]) <= window:
            return self._whole(batch)
        total: Tensor | None = None
        count = image.new_zeros(1, 1, *image.shape[-2:])
        for rows, columns in windows(image.shape[-2], image.shape[-1], window, stride):
            part = image[..., rows, columns]
            logits = at(self({**batch, "image": part}).logits, part).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *image.shape[-2:])
            total[..., rows, columns] += logits
            count[..., rows, columns] += 1
        assert total is not None
        return DenseOutput(total / count)

    def predict_batch(self, batch: Mapping[str, Any]) -> DenseOutput:
        """As in evaluation."""
        with torch.no_grad():
            return self.evaluate("test", batch)

    def _whole(self, batch: Mapping[str, Any]) -> DenseOutput:
        """A picture at once, its sides filled up to what every network can halve five times."""
        image = batch["image"]
        height, width = image.shape[-2:]
        missing = [-side % _SIDES for side in (height, width)]
        if not any(missing):
            output: DenseOutput = self(batch)
            return output
        padded = functional.pad(image, (0, missing[1], 0, missing[0]))
        logits = at(self({**batch, "image": padded}).logits, padded)
        return DenseOutput(logits[..., :height, :width])

    def predictions(self, output: DenseOutput) -> list[dict[str, Any]]:
        """For each picture the share of every class that was found."""
        found = output.logits.argmax(1).flatten(1)
        return [
            {
                "shares": {
                    name: round(float((row == label).float().mean()), 6)
                    for label, name in enumerate(self.class_names)
                    if bool((row == label).any())
                }
            }
            for row in found
        ]

    def write_predictions(
        self, output: DenseOutput, files: Sequence[Path], names: Sequence[str], out: Path
    ) -> list[dict[str, Any]]:
        """A mask for each picture, of its own size: `masks/NAME.png` with class numbers and a colour for each.

        Args:
            output: Of the pictures.
            files: The pictures.
            names: Each once.
            out: The folder.

        Returns:
            For each its path in the folder.
        """
        rows = []
        for i, (file, name) in enumerate(zip(files, names, strict=True)):
            logits = functional.interpolate(output.logits[i : i + 1].float(), image_size(file), mode="bilinear")
            image = Image.fromarray(logits.argmax(1)[0].to(torch.uint8).cpu().numpy(), mode="P")
            image.putpalette(palette(len(self.class_names)).tobytes())
            content = io.BytesIO()
            image.save(content, format="PNG")
            path = Path("masks") / f"{name}.png"
            write_bytes(out / path, content.getvalue())
            rows.append({"mask": path.as_posix()})
        return rows

    def make_collector(self, *, seed: int) -> Collector:
        """Figures of each class, and chosen pictures with their masks."""
        return SegmentationCollector(self.class_names, _labels, ignored=IGNORED, seed=seed)

    def _cross_entropy(self, logits: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
        logits = at(logits, mask).float()
        if weights is None:
            return functional.cross_entropy(logits, mask, ignore_index=IGNORED, label_smoothing=self.label_smoothing)
        # Not the `weight` of `cross_entropy`: see `Classification`.
        each = functional.cross_entropy(
            logits, mask, ignore_index=IGNORED, label_smoothing=self.label_smoothing, reduction="none"
        )
        counted = mask != IGNORED
        return (weights[mask.where(counted, 0)] * each).sum() / counted.sum()


def _dense(output: Any) -> DenseOutput:  # noqa: ANN401 — whatever a head gives
    if not isinstance(output, DenseOutput):
        raise ConfigError(
            "head.name: segmentation needs a head that gives a map, such as dense_linear, setr_pup or upernet"
        )
    return output


def _labels(batch: Mapping[str, Any], output: DenseOutput) -> Tensor:
    """The likeliest class of every pixel of the masks."""
    return at(output.logits.detach(), batch["mask"]).argmax(1)


def at(logits: Tensor, like: Tensor) -> Tensor:
    """Logits at the resolution of a mask or picture, bilinearly."""
    if logits.shape[-2:] == like.shape[-2:]:
        return logits
    return functional.interpolate(logits, size=like.shape[-2:], mode="bilinear", align_corners=False)


def windows(height: int, width: int, window: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Overlapping windows that cover a picture; the last of each row and column ends at its border.

    Yields:
        Rows and columns.
    """
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            yield slice(top, min(top + window, height)), slice(left, min(left + window, width))


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(0, side - window)
    return sorted({*range(0, last, stride), last})
