"""timm's networks as backbones: vision transformers, Swin, ConvNeXt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from peft_modal.anatomy import Anatomy, Backbone, Context, Features, FeatureSpec, FrozenMode
from peft_modal.errors import ConfigError, DataError, nearest
from peft_modal.extras import require
from peft_modal.ranges import DropRate, NonNegativeInt, PositiveInt
from peft_modal_vision import weights as sources
from peft_modal_vision.anatomy import convnext_anatomy, swin_anatomy, vit_anatomy

NANO: Final[Mapping[str, Any]] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0,
    # At this width timm's usual deviation of 0.02 leaves the blocks so small that training takes long to begin.
    "weight_init": "jax",
}  # fmt: skip
"""timm's arguments of the shipped network, 0.8 M parameters."""
POOLED: Final = "pooled"
"""What the network's own classifier would read: its class token or its average, after the norm that belongs to it."""


class TimmBackbone(Backbone):
    """Base of the three; a subclass says which of timm's classes it takes and lists their anatomy.

    Args:
        model: A name of timm's, with or without the tag of its weights; or the subclass's own small networks.
        weights: `nano` (shipped, of model `nano`), `random`, `pretrained` (what timm has for the model), a tag of
            timm's, `hf-hub:OWNER/NAME`, or a file: timm's, the authors' (`.npz` too), or one that `merge` has written.
        img_size: Side of the pictures in pixels; None for the model's own. Positions are resampled.
        drop_path: Drop-path rate of the last block, growing linearly from 0; active in mode `reference` only.
        levels: Feature maps that a segmentation head reads: as many as said, equally spaced over the depth, or the
            numbers of blocks (of stages, for Swin and ConvNeXt). 0 for none.
        frozen_mode: See `Backbone`.
        init_seed: Seed of random weights.
        sizes: timm's arguments of the network where `model` is one of the small ones.

    Raises:
        ConfigError: timm has no such model, or it is of another family.
        MissingExtraError: timm is not installed.
    """

    modality: ClassVar[str] = "vision"
    explained_input: ClassVar[str | None] = "image"
    classes: ClassVar[tuple[str, ...]]
    """Names of timm's classes."""
    any_size: ClassVar[Mapping[str, Any]] = {}
    """timm's arguments by which the network takes pictures of any size."""
    others: ClassVar[Mapping[str, str]] = {
        "VisionTransformer": "vit", "VisionTransformerDistilled": "vit", "Eva": "vit", "SwinTransformer": "swin",
        "ConvNeXt": "convnext",
    }  # fmt: skip
    """Which backbone takes which of timm's classes."""

    def __init__(
        self,
        *,
        model: str,
        weights: str,
        img_size: PositiveInt | None,
        drop_path: DropRate,
        levels: NonNegativeInt | list[NonNegativeInt],
        frozen_mode: FrozenMode,
        init_seed: int,
        sizes: Mapping[str, Any] | None = None,
    ) -> None:
        require("timm", extra="vision")
        if weights == sources.NANO and model != "nano":
            raise ConfigError(
                f"backbone.weights: 'nano' is of model 'nano', not of '{model}'; set backbone.weights to pretrained, "
                "random or a file"
            )
        self.model = model
        self.weights = weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            network: Any = self._build(model, img_size, drop_path, sizes)
        self._check(model, network)
        super().__init__(network, self.describe(network), frozen_mode=frozen_mode)
        self.levels = self._levels(levels)

    @classmethod
    @abstractmethod
    def describe(cls, network: Any) -> Anatomy:  # noqa: ANN401 — one of timm's classes
        """Sites and ports."""

    def _build(self, model: str, img_size: int | None, drop_path: float, sizes: Mapping[str, Any] | None) -> Any:  # noqa: ANN401
        import timm

        if sizes is not None:
            given = {**sizes} if img_size is None else {**sizes, "img_size": img_size}
            return self._small({**given, "drop_path_rate": drop_path})
        given = {"drop_path_rate": drop_path, "num_classes": 0, **self.any_size}
        if img_size is not None:
            given["img_size"] = img_size
        try:
            return timm.create_model(model, pretrained=False, **given)
        except RuntimeError as error:
            if "Unknown model" not in str(error) and "Invalid" not in str(error):
                raise
            known = timm.list_models()
            raise ConfigError(f"backbone.model: timm has no '{model}'; {nearest(model, known, count=3)}") from error
        except TypeError as error:
            if "img_size" not in str(error):
                raise ConfigError(f"backbone.model: '{model}' takes no drop-path: {error}") from error
            # Convolutional networks take pictures of any size.
            return timm.create_model(model, pretrained=False, drop_path_rate=drop_path, num_classes=0)

    @classmethod
    def _small(cls, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
        raise NotImplementedError

    @classmethod
    def _check(cls, model: str, network: Any) -> None:  # noqa: ANN401
        kind = type(network).__name__
        if kind not in cls.classes:
            fitting = cls.others.get(kind)
            hint = f"use --backbone={fitting}" if fitting else "no backbone here takes it"
            raise ConfigError(f"backbone.model: '{model}' is a {kind}; {hint}")

    def load_weights(self) -> None:
        """Fill the network from what `weights` names; see `peft_modal_vision.weights.load`."""
        sources.load(self.network, self.model, self.weights)

    def architecture(self) -> dict[str, Any]:
        """The model, which merged weights do not tell."""
        return {"model": self.model}

    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """Tokens of `image` (B, 3, H, W), and as extras `pooled` (B, D) and the feature maps of `levels`."""
        network: Any = self.network
        image = batch["image"]
        for key, grid in self._grids(image).items():
            context.put(key, grid)
        extras: dict[str, Tensor] = {}
        if self.levels:
            last, maps = network.forward_intermediates(image, indices=list(self.levels), output_fmt="NCHW")
            extras = {f"level.{i}": level for i, level in enumerate(maps)}
        else:
            last = network.forward_features(image)
        extras[POOLED] = network.forward_head(last, pre_logits=True)
        return Features(self._tokens(last), next(iter(self.anatomy.layouts.values()), None), extras)

    def feature_spec(self) -> FeatureSpec:
        """Tokens, what the network's own classifier would read, and the feature maps."""
        spec = super().feature_spec()
        info: Any = self.network.feature_info
        widths = tuple(int(info[level]["num_chs"]) for level in self.levels)
        own = {POOLED: self.feature_width}
        return replace(spec, own=own, default_pool=(*spec.exports, POOLED), levels=widths)

    @property
    def feature_width(self) -> int:
        """Channels of the last block."""
        return int(self.network.num_features)  # type: ignore[arg-type]

    @property
    def image_size(self) -> int:
        """Side of the pictures that the network is made for, in pixels."""
        embed = getattr(self.network, "patch_embed", None)
        size = getattr(embed, "img_size", None)
        return int(size[0]) if size else 224

    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Random pictures."""
        generator = torch.Generator().manual_seed(0)
        side = min(self.image_size, 64) if not hasattr(self.network, "patch_embed") else self.image_size
        return {"image": torch.randn(batch_size, 3, side, side, generator=generator).to(self.device)}

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Compute blocks again during backward instead of keeping their activations."""
        self.network.set_grad_checkpointing(enabled)  # type: ignore[operator]

    def _levels(self, wanted: int | Sequence[int]) -> tuple[int, ...]:
        info: Any = self.network.feature_info
        count = len(info)
        if isinstance(wanted, int):
            if wanted > count:
                raise ConfigError(f"backbone.levels: {wanted} are asked for, the network has {count}")
            return tuple(round(count * (i + 1) / wanted) - 1 for i in range(wanted))
        if list(wanted) != sorted(set(wanted)) or (wanted and wanted[-1] >= count):
            raise ConfigError(f"backbone.levels: {list(wanted)} are not ascending numbers below {count}")
        return tuple(wanted)

    def _grids(self, image: Tensor) -> dict[str, tuple[int, int]]:
        """How many patches high and wide the picture is: `grid`, or `grid.blocks.3` where that changes with depth."""
        del image
        return {}

    def _tokens(self, last: Tensor) -> Tensor:
        return last


class ViT(TimmBackbone):
    """timm's `VisionTransformer` and `Eva`: ViT, DeiT, DINOv2 and v3, MAE, CLIP's towers (Dosovitskiy et al., 2021).

    Args:
        model: `nano`, or a name of timm's such as `vit_base_patch16_224`.
        weights: See `TimmBackbone`.
        img_size: See `TimmBackbone`.
        drop_path: See `TimmBackbone`.
        levels: See `TimmBackbone`.
        train_cls: Let every method train the class token, as SPT's and SNELL's released code does.
        frozen_mode: See `Backbone`.
        init_seed: Seed of random weights.
        sizes: timm's arguments of a network of your own, with model `custom`.
    """

    classes: ClassVar[tuple[str, ...]] = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
    any_size: ClassVar[Mapping[str, Any]] = {"dynamic_img_size": True}

    def __init__(
        self,
        *,
        model: str = "nano",
        weights: str = "nano",
        img_size: PositiveInt | None = None,
        drop_path: DropRate = 0.0,
        levels: NonNegativeInt | list[NonNegativeInt] = 0,
        train_cls: bool = False,
        frozen_mode: FrozenMode = "eval",
        init_seed: int = 0,
        sizes: dict[str, Any] | None = None,
    ) -> None:
        self.train_cls = train_cls
        super().__init__(
            model=model, weights=weights, img_size=img_size, drop_path=drop_path, levels=levels,
            frozen_mode=frozen_mode, init_seed=init_seed, sizes=_sizes(model, sizes, NANO),
        )  # fmt: skip
        if train_cls:
            self.anatomy = vit_anatomy(self.network, always_trained=("cls_token",))

    @classmethod
    def tiny(cls) -> ViT:
        """The same network at toy size with random weights."""
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
        return cls(model="custom", weights="random", sizes=sizes)

    @classmethod
    def describe(cls, network: Any) -> Anatomy:  # noqa: ANN401 — one of timm's classes
        """See `vit_anatomy`."""
        return vit_anatomy(network)

    def _grids(self, image: Tensor) -> dict[str, tuple[int, int]]:
        network: Any = self.network
        height, width = network.patch_embed.patch_size
        if image.shape[-2] % height or image.shape[-1] % width:
            raise DataError(
                f"pictures of {image.shape[-1]} x {image.shape[-2]} pixels cannot be cut into patches of {width} x "
                f"{height}; set data.resolution to a multiple"
            )
        return {"grid": (image.shape[-2] // height, image.shape[-1] // width)}

    @classmethod
    def _small(cls, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(**{"num_classes": 0, **cls.any_size, **arguments})


class Swin(TimmBackbone):
    """timm's `SwinTransformer` (Liu et al., ICCV 2021, arXiv:2103.14030).

    Args:
        model: A name of timm's.
        weights: See `TimmBackbone`.
        img_size: See `TimmBackbone`.
        drop_path: See `TimmBackbone`.
        levels: See `TimmBackbone`.
        frozen_mode: See `Backbone`.
        init_seed: Seed of random weights.
        sizes: timm's arguments of a network of your own, with model `custom`.
    """

    classes: ClassVar[tuple[str, ...]] = ("SwinTransformer",)

    def __init__(
        self,
        *,
        model: str = "swin_tiny_patch4_window7_224",
        weights: str = "pretrained",
        img_size: PositiveInt | None = None,
        drop_path: DropRate = 0.0,
        levels: NonNegativeInt | list[NonNegativeInt] = 0,
        frozen_mode: FrozenMode = "eval",
        init_seed: int = 0,
        sizes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model=model, weights=weights, img_size=img_size, drop_path=drop_path, levels=levels,
            frozen_mode=frozen_mode, init_seed=init_seed, sizes=_sizes(model, sizes),
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> Swin:
        """The same network at toy size with random weights."""
        sizes = {
            "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4),
        }  # fmt: skip
        return cls(model="custom", weights="random", sizes=sizes)

    @classmethod
    def describe(cls, network: Any) -> Anatomy:  # noqa: ANN401 — timm's class
        """See `swin_anatomy`."""
        return swin_anatomy(network)

    @classmethod
    def _small(cls, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
        from timm.models.swin_transformer import SwinTransformer

        return SwinTransformer(**{"num_classes": 0, **arguments})

    def _grids(self, image: Tensor) -> dict[str, tuple[int, int]]:
        network: Any = self.network
        height, width = (
            side // patch for side, patch in zip(image.shape[-2:], network.patch_embed.patch_size, strict=True)
        )
        grids, index = {}, 0
        for layer in network.layers:
            if type(layer.downsample).__name__ != "Identity":
                height, width = (height + 1) // 2, (width + 1) // 2
            for _ in layer.blocks:
                grids[f"grid.blocks.{index}"] = (height, width)
                index += 1
        return grids

    def _tokens(self, last: Tensor) -> Tensor:
        return last.flatten(1, 2)


class ConvNeXt(TimmBackbone):
    """timm's `ConvNeXt`, both versions (Liu et al., CVPR 2022, arXiv:2201.03545).

    Args:
        model: A name of timm's.
        weights: See `TimmBackbone`.
        drop_path: See `TimmBackbone`.
        levels: See `TimmBackbone`.
        frozen_mode: See `Backbone`.
        init_seed: Seed of random weights.
        sizes: timm's arguments of a network of your own, with model `custom`.
    """

    classes: ClassVar[tuple[str, ...]] = ("ConvNeXt",)

    def __init__(
        self,
        *,
        model: str = "convnext_tiny",
        weights: str = "pretrained",
        drop_path: DropRate = 0.0,
        levels: NonNegativeInt | list[NonNegativeInt] = 0,
        frozen_mode: FrozenMode = "eval",
        init_seed: int = 0,
        sizes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model=model, weights=weights, img_size=None, drop_path=drop_path, levels=levels,
            frozen_mode=frozen_mode, init_seed=init_seed, sizes=_sizes(model, sizes),
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> ConvNeXt:
        """The same network at toy size with random weights."""
        return cls(
            model="custom",
            weights="random",
            sizes={"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "ls_init_value": 1.0},
        )

    @classmethod
    def describe(cls, network: Any) -> Anatomy:  # noqa: ANN401 — timm's class
        """See `convnext_anatomy`."""
        return convnext_anatomy(network)

    @classmethod
    def _small(cls, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
        from timm.models.convnext import ConvNeXt as Network

        return Network(**{"num_classes": 0, **arguments})


def _sizes(model: str, given: dict[str, Any] | None, nano: Mapping[str, Any] | None = None) -> Mapping[str, Any] | None:
    """Timm's arguments where the network is not one that timm names.

    Raises:
        ConfigError: Sizes are given and the model is not `custom`, or the other way round.
    """
    if model == "nano" and nano is not None:
        if given is not None:
            raise ConfigError("backbone.sizes: the nano has its own; set backbone.model to custom")
        return nano
    if (model == "custom") != (given is not None):
        raise ConfigError("backbone.sizes: they belong to backbone.model=custom, and it needs them")
    return given
