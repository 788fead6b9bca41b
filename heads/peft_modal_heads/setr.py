"""SETR's progressive upsampling head (Zheng et al., CVPR 2021, arXiv:2012.15840)."""

from __future__ import annotations

from typing import ClassVar, Final

from torch import Tensor, nn

from peft_modal.anatomy import Features, FeatureSpec
from peft_modal.errors import ConfigError
from peft_modal.ranges import DropRate, PositiveInt
from peft_modal_heads.dense import DenseOutput, conv_norm_relu, level, level_widths

MOST_STAGES: Final = 8


class SETRPUP(nn.Module):
    """Convolutions that double the resolution in turn, on the last map; smaller ones on the others while training.

    LayerNorm (eps 1e-6) over channels, then `stages` times a 3x3 convolution, BatchNorm, ReLU and a bilinear doubling,
    dropout, and a 1x1 classifier (Zheng et al., CVPR 2021, arXiv:2012.15840). Auxiliary heads have two stages.

    Args:
        spec: What the features hold; supplied by the program.
        num_outputs: Number of classes; supplied by the program.
        width: Channels of the convolutions.
        stages: Doublings; 4 bring a map of patches of 16 back to the picture's resolution.
        auxiliary_width: Channels of the auxiliary heads.
        dropout: Probability of zeroing a channel before the classifier.

    Raises:
        ConfigError: There are more than eight stages, or no feature map.
    """

    runtime_args: ClassVar[frozenset[str]] = frozenset({"spec", "num_outputs"})

    def __init__(
        self,
        spec: FeatureSpec,
        num_outputs: int,
        *,
        width: PositiveInt = 256,
        stages: PositiveInt = 4,
        auxiliary_width: PositiveInt = 256,
        dropout: DropRate = 0.1,
    ) -> None:
        super().__init__()
        if stages > MOST_STAGES:
            raise ConfigError(f"head.stages: {stages} doublings are more than {MOST_STAGES}")
        *others, last = level_widths(spec, least=1, head="setr_pup")
        self.main = Upsampler(last, width, num_outputs, stages=stages, dropout=dropout)
        self.auxiliary = nn.ModuleList(
            [Upsampler(other, auxiliary_width, num_outputs, stages=2, dropout=dropout) for other in others]
        )

    def forward(self, features: Features) -> DenseOutput:
        """Logits at `2 ** stages` times the resolution of the last map."""
        logits = self.main(level(features, len(self.auxiliary)))
        if not self.training:
            return DenseOutput(logits)
        return DenseOutput(logits, tuple(head(level(features, i)) for i, head in enumerate(self.auxiliary)))


class Upsampler(nn.Module):
    """One branch of the head.

    Args:
        inputs: Channels of the map.
        width: Channels of the convolutions.
        num_outputs: Number of classes.
        stages: Doublings.
        dropout: Probability of zeroing a channel before the classifier.
    """

    def __init__(self, inputs: int, width: int, num_outputs: int, *, stages: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs, eps=1e-6)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    conv_norm_relu(width if i else inputs, width, 3),
                    nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                )
                for i in range(stages)
            )
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_outputs, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Logits of a map (B, C, h, w)."""
        normed = self.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classifier(self.dropout(self.stages(normed)))
