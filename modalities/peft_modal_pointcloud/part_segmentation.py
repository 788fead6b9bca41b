"""Part segmentation: a part of its object for every point."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError, DataError
from peft_modal.files import write_text
from peft_modal.report import Collector
from peft_modal.tasks.base import Stage, Task
from peft_modal_heads.parts import PartOutput, PartTable
from peft_modal_pointcloud.part_metrics import GroupMean, shape_ious
from peft_modal_pointcloud.part_report import PartCollector
from peft_modal_pointcloud.readers import read_cloud

# `train` is taken on modules.
_KEYS = {"val_metrics": "val", "test_metrics": "test"}


class PartSegmentation(Task):
    """Negative log-likelihood of every point's part, and mean intersections over union (Yi et al., ShapeNetPart, 2016).

    All parts compete in the loss. In the figures a point is given the likeliest part of its cloud's category.
    `instance_miou` is the mean over clouds, `class_miou` the mean over categories of their clouds' mean; a part that is
    neither there nor found counts 1. The best validation is the one of the highest instance mIoU.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program.
        head: Supplied by the program; `pointcloud_parts`.
        class_names: Names `category/part` in label order; supplied by the program.
        double_step: Let the optimiser step twice for each batch, first by the unclipped gradient and then by the same
            one clipped, as the released code of Point-MAE and IDPT does by mistake; their numbers were made so.
        options: Arguments of `Task`.

    Raises:
        DataError: There are fewer than two parts.
    """

    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/instance_miou", "max")
    share_metrics: ClassVar[frozenset[str]] = frozenset(
        {"instance_miou", "class_miou", "point_accuracy", "mean_part_accuracy"}
    )
    compared: ClassVar[tuple[str, ...]] = ("test/class_miou",)

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        double_step: bool = False,
        **options: Any,  # noqa: ANN401 — typed by `Task`
    ) -> None:
        super().__init__(backbone, adapter, head, **options)
        if len(class_names) < 2:
            raise DataError(f"task 'part_segmentation' needs two parts or more, the data has {len(class_names)}")
        self.class_names = class_names
        self.double_step = double_step
        self.table = PartTable(class_names)
        self.metrics = nn.ModuleDict({stage: self._figures() for stage in _KEYS})

    def _figures(self) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "instance_miou": GroupMean(),
                "class_miou": GroupMean(self.table.num_categories),
                "point_accuracy": GroupMean(),
                "mean_part_accuracy": GroupMean(len(self.class_names)),
            }
        )

    def losses(self, batch: Mapping[str, Any], output: PartOutput) -> dict[str, Tensor]:
        """Mean over all points of -log p(part), parts (B, N).

        Raises:
            ConfigError: The head gives no parts.
        """
        if not isinstance(output, PartOutput):
            raise ConfigError("head.name: part segmentation needs a head that gives parts of points: pointcloud_parts")
        return {"loss": functional.nll_loss(output.log_probs.float().flatten(0, 1), batch["parts"].flatten())}

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: PartOutput) -> None:
        """Figures of the stage; of training data only the loss is kept."""
        if stage == "train":
            return
        parts, category = batch["parts"], output.category
        found = self.table.found(output)
        ious, right = shape_ious(found, parts, category, self.table), (found == parts).flatten()
        figures: Any = self.metrics[f"{stage}_metrics"]
        figures["instance_miou"].update(ious)
        figures["class_miou"].update(ious, category)
        figures["point_accuracy"].update(right)
        figures["mean_part_accuracy"].update(right, parts.flatten())
        for name, figure in figures.items():
            self.log(f"{stage}/{name}", figure, on_step=False, on_epoch=True, batch_size=len(parts))

    def configure_gradient_clipping(
        self,
        optimizer: Any,  # noqa: ANN401 — Lightning's signature
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """With `double_step`, step by the gradient as it is; then clip it for the step that follows."""
        if self.double_step:
            optimizer.step()
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        """Refuse a second step where it would not be the same step.

        Raises:
            ConfigError: Gradients are scaled, or a method changes them before a step or acts behind it.
        """
        if self.double_step:
            if str(self.trainer.precision) == "16-mixed":
                raise ConfigError("task.double_step: it does not go with trainer.precision=16-mixed; use bf16-mixed")
            for event in ("before_step", "after_step", "compute_gradients"):
                if self.adapter.events.wants(event):
                    raise ConfigError(
                        f"task.double_step: the method acts at '{event}' of one step, not of two; set it false"
                    )
        super().on_fit_start()

    def predictions(self, output: PartOutput) -> list[dict[str, Any]]:
        """For each cloud the share of points of every part that was found."""
        found = self.table.found(output)
        return [
            {
                "shares": {
                    self.class_names[part]: round(float((row == part).float().mean()), 6)
                    for part in row.unique().tolist()
                }
            }
            for row in found
        ]

    def write_predictions(
        self, output: PartOutput, files: Sequence[Path], names: Sequence[str], out: Path
    ) -> list[dict[str, Any]]:
        """For each file a table `parts/NAME.csv` of its points in its own coordinates, with the part of each.

        Args:
            output: Of all points of the files.
            files: The files.
            names: Each once.
            out: The folder.

        Returns:
            For each file its category and the path of the table.
        """
        rows = []
        for i, (file, name) in enumerate(zip(files, names, strict=True)):
            one = PartOutput(output.log_probs[i : i + 1], output.category[i : i + 1])
            found = self.table.found(one)[0].tolist()
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(("x", "y", "z", "label", "part"))
            points = read_cloud(file).tolist()
            writer.writerows(
                (*(f"{value:.7g}" for value in point), part, self.class_names[part])
                for point, part in zip(points, found, strict=True)
            )
            path = Path("parts") / f"{name}.csv"
            write_text(out / path, text.getvalue())
            rows.append({"category": self.table.categories[int(output.category[i])], "parts": path.as_posix()})
        return rows

    def make_collector(self, *, seed: int) -> Collector:
        """Figures of each category and part, and chosen clouds with their parts."""
        return PartCollector(self.table, seed=seed)
