"""Masked autoencoding: the pre-training of Point-MAE (Pang et al., ECCV 2022, arXiv:2203.06604)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peft_modal.anatomy import Backbone, Features, FeatureSpec
from peft_modal.attach import Adapter
from peft_modal.data.seeding import seeded
from peft_modal.ranges import DropRate, NonNegativeFloat, PositiveFloat, PositiveInt, Share
from peft_modal.tasks.base import Output, Stage, Task
from peft_modal_pointcloud.masked import (
    MaskedDecoder,
    block_mask,
    chamfer_l1,
    chamfer_l2,
    masked_patches,
    random_mask,
)
from peft_modal_pointcloud.sampling import group


class MaskedDecoderHead(nn.Module):
    """The decoder as a head: features of visible patches in, points of the hidden ones out.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Ignored: it predicts points; supplied by the program.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        group_size: Points per patch of the backbone.
        drop_path: Drop-path rate of the last block.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(
        self,
        spec: FeatureSpec,
        num_outputs: int,
        *,
        depth: PositiveInt = 4,
        num_heads: PositiveInt = 6,
        group_size: PositiveInt = 32,
        drop_path: DropRate = 0.1,
    ) -> None:
        del num_outputs
        super().__init__()
        self.decoder = MaskedDecoder(
            dim=spec.width, depth=depth, num_heads=num_heads, group_size=group_size, drop_path=drop_path
        )

    def forward(self, features: Features) -> Tensor:
        """Rebuilt points (B, K, M, 3) relative to their centres; the features carry the mask."""
        return self.decoder(features.tokens, features.extras["centres"], features.extras["mask"])


class MaskedAutoencoding(Task):
    """Hide patches, encode the rest, rebuild the hidden ones; the loss is a Chamfer distance.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program; method `full` trains the whole backbone.
        head: Supplied by the program.
        class_names: Not used; supplied by the program.
        lr: Learning rate of AdamW.
        warmup_share: Share of the run's steps with a linearly growing learning rate.
        min_lr_share: Share of the learning rate that the cosine ends at.
        clip_norm: Largest gradient norm, or None as published.
        mask_ratio: Share of the patches that is hidden.
        mask: `random` patches, or a `block`: those nearest to a random centre.
        loss: `cdl2`, or `cdl1` with square roots, halved.
        loss_scale: Factor of the loss; usually logged times 1000.
        options: Other arguments of `Task`.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        lr: NonNegativeFloat = 1e-3,
        warmup_share: Share = 0.03,
        min_lr_share: Share = 0.001,
        clip_norm: PositiveFloat | None = None,
        mask_ratio: Share = 0.6,
        mask: Literal["random", "block"] = "random",
        loss: Literal["cdl2", "cdl1"] = "cdl2",
        loss_scale: PositiveFloat = 1.0,
        **options: Any,  # noqa: ANN401 — typed by `Task`
    ) -> None:
        del class_names
        super().__init__(
            backbone,
            adapter,
            head,
            lr=lr,
            warmup_share=warmup_share,
            min_lr_share=min_lr_share,
            clip_norm=clip_norm,
            **options,
        )
        self.mask_ratio = mask_ratio
        self.mask: Literal["random", "block"] = mask
        self.distance = chamfer_l2 if loss == "cdl2" else chamfer_l1
        self.loss_scale = loss_scale

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Rebuilt and true points (B, K, M, 3) of the hidden patches."""
        mask = self._draw(batch["points"])
        features = self.backbone({**batch, "mask": mask})
        rebuilt = self.head(features.with_extras({"mask": mask}))
        return rebuilt, masked_patches(features.extras["neighbourhood"], mask)

    def losses(self, batch: Mapping[str, Any], output: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The Chamfer distance."""
        del batch
        return {"loss": self.loss_scale * self.distance(*output)}

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: Output) -> None:
        """The loss is the metric."""

    def _draw(self, points: Tensor) -> Tensor:
        if self.training:
            generator = seeded("mask", self.current_epoch, self.global_step)
        else:
            generator = seeded("mask", "evaluation")
        if self.mask == "block":
            # The function and not the network's module: its hook publishes into a pass that has not begun.
            num_group, group_size = int(self.backbone.num_group), int(self.backbone.group_size)  # type: ignore[arg-type]
            _, centres = group(points, num_group=num_group, group_size=group_size)
            return block_mask(centres, self.mask_ratio, generator=generator)
        num_group = int(self.backbone.num_group)  # type: ignore[arg-type]
        return random_mask(len(points), num_group, self.mask_ratio, generator=generator, device=points.device)
