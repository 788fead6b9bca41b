"""The Audio Spectrogram Transformer as a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from peft_modal.anatomy import Anatomy, Backbone, Context, Features, FeatureSpec, FrozenMode, Segment
from peft_modal.errors import ConfigError, DataError
from peft_modal.extras import require
from peft_modal.ranges import PositiveInt
from peft_modal_audio import weights as sources
from peft_modal_audio.sizes import MODELS, given_sizes
from peft_modal_vision.anatomy import vit_anatomy

POOLED: Final = "pooled"
"""What AST's own classifier reads: the mean of the class and the distillation token."""
Positions = Literal["adapted", "zeros"]


class AST(Backbone):
    """A ViT over overlapping patches of a log-mel spectrogram (Gong et al., AST, Interspeech 2021, arXiv:2104.01778).

    Spectrograms of any length are taken: positions are cut out of the middle of the network's own, or interpolated
    where there are more patches; with `mels`, of any number of mel bins, too. There is no mask of padding, as in the
    published networks.

    Args:
        weights: `nano` (shipped), `random`, a name of the hub (`MIT/ast-finetuned-audioset-10-10-0.4593`), a folder as
            transformers writes it, a file of the authors' (`.pth`; its name tells its strides), timm's
            `deit_base_distilled_patch16_384` as AST's own training begins with, or one that `merge` has written.
        model: `nano` or `base` where the weights do not bring their sizes; `custom` with `sizes`.
        frames: Length of spectrograms that the network's own positions are for; None for that of the weights. It
            matters where something trains them, for random weights, and for those of pictures.
        mels: Mel bins that the network's own positions are for, and that spectrograms have; None for those of the
            weights. Those of the weights are adapted when they are loaded.
        positions: `adapted`, or `zeros`: what transformers silently makes of them where the length is not that of the
            checkpoint. PETL-AST's published numbers were made so, every patch of unknown place.
        distillation_token: False leaves the second token out of the sequence, as PETL-AST's prompt tuning does.
        train_norm: Let every method train the norm behind the last block, as PETL-AST does.
        frozen_mode: See `Backbone`; this network has neither BatchNorm nor drop-path.
        init_seed: Seed of random weights.
        sizes: Of a network of your own, see `AstSizes`, with model `custom`.

    Raises:
        ConfigError: Sizes do not fit each other, or model and weights are of different ones.
        WeightsError: The sizes of the weights cannot be read or fetched.
        MissingExtraError: timm is not installed.
    """

    modality: ClassVar[str] = "audio"

    def __init__(
        self,
        *,
        weights: str = "nano",
        model: str | None = None,
        frames: PositiveInt | None = None,
        mels: PositiveInt | None = None,
        positions: Positions = "adapted",
        distillation_token: bool = True,
        train_norm: bool = False,
        frozen_mode: FrozenMode = "eval",
        init_seed: int = 0,
        sizes: dict[str, Any] | None = None,
    ) -> None:
        require("timm", extra="audio")
        from peft_modal_audio.network import SpectrogramTransformer

        if (model == "custom") != (sizes is not None):
            raise ConfigError("backbone.sizes: they belong to backbone.model=custom, and it needs them")
        self.described = sources.describe(weights, model) if sizes is None else given_sizes(sizes)
        self.sizes = replace(self.described, frames=frames or self.described.frames, mels=mels or self.described.mels)
        self.sizes.grid()
        self.weights = weights
        self.positions: Positions = positions
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            network = SpectrogramTransformer(self.sizes, has_distillation=distillation_token)
        always_trained = ("norm", "norm.shift") if train_norm else ()
        anatomy = _anatomy(network, always_trained, has_distillation=distillation_token)
        super().__init__(network, anatomy, frozen_mode=frozen_mode)

    @classmethod
    def tiny(cls) -> AST:
        """The same network at toy size with random weights."""
        sizes = {
            "width": 32, "depth": 3, "heads": 2, "mlp_width": 64, "patch": 8, "stride_frequency": 6, "stride_time": 5,
            "mels": 20, "frames": 33,
        }  # fmt: skip
        return cls(model="custom", weights="random", sizes=sizes)

    def load_weights(self) -> None:
        """Fill the network from what `weights` names; see `peft_modal_audio.weights.load`."""
        sources.load(self.network, self.sizes, self.described, self.weights)
        if self.positions == "zeros":
            with torch.no_grad():
                self.network.pos_embed.zero_()  # type: ignore[operator]

    def architecture(self) -> dict[str, Any]:
        """The sizes, which merged weights do not tell."""
        named = next((name for name, sizes in MODELS.items() if sizes == self.sizes), None)
        own = {"model": "custom", "sizes": asdict(self.sizes)} if named is None else {"model": named, "sizes": None}
        return {**own, "frames": None, "mels": None}

    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """Tokens of `spectrogram` (B, T, M), time first, and as extra `pooled` (B, D).

        Raises:
            DataError: The spectrogram is shorter than a patch, or has other mel bins than the network.
        """
        network: Any = self.network
        spectrogram = batch["spectrogram"]
        if spectrogram.shape[2] != self.sizes.mels:
            raise DataError(
                f"spectrograms have {spectrogram.shape[2]} mel bins, the network is for {self.sizes.mels}; set "
                f"data.mels to {self.sizes.mels}, or backbone.mels to {spectrogram.shape[2]} to adapt its positions"
            )
        try:
            context.put("grid", self.sizes.grid(spectrogram.shape[2], spectrogram.shape[1]))
        except ConfigError as error:
            raise DataError(str(error)) from error
        tokens = network.forward_features(spectrogram.transpose(1, 2)[:, None])
        prefix = sum(segment.count or 0 for segment in self.anatomy.layouts["blocks"].segments)
        return Features(tokens, self.anatomy.layouts["blocks"], {POOLED: tokens[:, :prefix].mean(1)})

    def feature_spec(self) -> FeatureSpec:
        """Tokens, and what the network's own classifier would read."""
        spec = super().feature_spec()
        return replace(spec, own={POOLED: self.feature_width}, default_pool=(*spec.exports, POOLED))

    @property
    def feature_width(self) -> int:
        """Channels of the last block."""
        return self.sizes.width

    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Random spectrograms."""
        generator = torch.Generator().manual_seed(0)
        spectrogram = torch.randn(batch_size, self.sizes.frames, self.sizes.mels, generator=generator)
        return {"spectrogram": spectrogram.to(self.device)}

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Compute blocks again during backward instead of keeping their activations."""
        self.network.set_grad_checkpointing(enabled)  # type: ignore[operator]


def _anatomy(network: Any, always_trained: tuple[str, ...], *, has_distillation: bool) -> Anatomy:  # noqa: ANN401 — timm's class
    """That of a ViT, without a token that takes no part."""
    found = vit_anatomy(network, always_trained=always_trained)
    if has_distillation:
        return found
    layout = found.layouts["blocks"]
    segments = tuple(segment for segment in layout.segments if segment != Segment("dist", 1))
    return Anatomy(
        sites=[site for site in found.sites if site.path != "dist_token"],
        ports=found.ports,
        layouts={"blocks": replace(layout, segments=segments)},
        depth=found.depth,
        always_trained=always_trained,
    )
