"""Point-MAE as a backbone: the network, its anatomy, and where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_modal.anatomy import (
    Anatomy,
    AnatomyBuilder,
    Backbone,
    Context,
    Contexts,
    Features,
    FeatureSpec,
    FrozenMode,
    Segment,
    TokenLayout,
    adopt_biases,
)
from peft_modal.anatomy.sites import Access
from peft_modal.errors import ConfigError, WeightsError
from peft_modal.files import read_tensors
from peft_modal.ranges import DropRate, NonNegativeInt, PositiveFloat, PositiveInt
from peft_modal_pointcloud.foreign import match_backbone, read_point_checkpoint
from peft_modal_pointcloud.network import Init, PointMAE
from peft_modal_pointcloud.sampling import Operators
from peft_modal_pointcloud.sampling_pytorch3d import operators
from peft_modal_pointcloud.views import patch_views

STREAM: tuple[Access, ...] = ("read", "add", "replace", "tokens")
NANO: dict[str, Any] = {
    "dim": 128, "depth": 4, "num_heads": 4, "num_group": 32, "group_size": 16, "pointnet_dims": [32, 64, 128],
}  # fmt: skip
PUBLISHED: dict[str, Any] = {
    "dim": 384, "depth": 12, "num_heads": 6, "num_group": 64, "group_size": 32, "pointnet_dims": [128, 256, 512],
}  # fmt: skip


class PointMAEBackbone(Backbone):
    """The transformer of Point-MAE, Point-BERT, ACT and ReCon fine-tuning (Pang et al., ECCV 2022, arXiv:2203.06604).

    Sizes left at None are those of the weights: the nano's with `nano`, else the published ones (22.1 M with head).

    Args:
        weights: `nano` (shipped, 0.84 M parameters), `random`, or the path of a checkpoint in the authors' layout.
        frozen_mode: `eval` keeps the frozen network still; `reference` follows the authors' code: drop-path is active
            and the mini-PointNet's BatchNorm statistics drift, and are saved with the adapter.
        dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        num_group: Patches per cloud.
        group_size: Points per patch.
        mlp_ratio: Hidden width of a block's MLP over `dim`.
        drop_path: Drop-path rate of the last block, growing linearly from 0; active in mode `reference` only.
        encoder_dim: Width of the mini-PointNet's token where it differs (256 for Point-BERT).
        pointnet_dims: Inner widths of the mini-PointNet.
        has_cls: Put a class token in front of the patches; part segmentation has none.
        train_cls: Let every method train the class token and its position, as all released code does; Point-MAE's
            pre-trained file does not hold them. Without a class token there is nothing to train.
        levels: Blocks whose patch tokens heads for segmentation read: their indices, or a number of them spread evenly
            over the depth up to the last (3 of 12: blocks 3, 7 and 11). All pass the final norm.
        init: How random weights are drawn: `card` as the authors do (normal, 0.02) or `torch` for PyTorch's defaults.
        init_seed: Seed of everything the weights do not hold.
        grouping: Who cuts clouds into patches: `own` operators, or those of `pytorch3d` where it is installed; the
            patches are the same.

    Raises:
        ConfigError: A size is not usable, or there are no such levels.
    """

    modality: ClassVar[str] = "pointcloud"

    def __init__(
        self,
        *,
        weights: str = "nano",
        frozen_mode: FrozenMode = "eval",
        dim: PositiveInt | None = None,
        depth: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
        num_group: PositiveInt | None = None,
        group_size: PositiveInt | None = None,
        mlp_ratio: PositiveFloat = 4.0,
        drop_path: DropRate = 0.1,
        encoder_dim: PositiveInt | None = None,
        pointnet_dims: list[PositiveInt] | None = None,
        has_cls: bool = True,
        train_cls: bool = True,
        levels: NonNegativeInt | list[NonNegativeInt] = 0,
        init: Init = "card",
        init_seed: int = 0,
        grouping: Operators = "own",
    ) -> None:
        given: dict[str, Any] = {
            "dim": dim, "depth": depth, "num_heads": num_heads, "num_group": num_group, "group_size": group_size,
            "pointnet_dims": pointnet_dims,
        }  # fmt: skip
        preset = NANO if weights == "nano" else PUBLISHED
        sizes = {key: preset[key] if value is None else value for key, value in given.items()}
        self.levels = spread_levels(levels, sizes["depth"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            network = PointMAE(
                **sizes, mlp_ratio=mlp_ratio, drop_path=drop_path, encoder_dim=encoder_dim, has_cls=has_cls,
                levels=self.levels, init=init,
            )  # fmt: skip
        self.weights = weights
        self._sizes = sizes
        self.group_size: int = sizes["group_size"]
        self.num_group: int = sizes["num_group"]
        anatomy = point_transformer_anatomy(network, num_heads=sizes["num_heads"], train_cls=train_cls)
        super().__init__(network, anatomy, frozen_mode=frozen_mode)
        if grouping == "pytorch3d":
            operators()
        network.group_divider.operators = grouping
        network.group_divider.register_forward_hook(_Publish(self.contexts, "neighbourhood", "centres"))
        network.pos_embed.register_forward_hook(_Publish(self.contexts, "positions"))

    @classmethod
    def tiny(cls) -> PointMAEBackbone:
        """The same network at toy size with random weights."""
        return cls(
            weights="random", dim=24, depth=3, num_heads=3, num_group=24, group_size=8, pointnet_dims=[8, 16, 16],
            drop_path=0.0, init="torch",
        )  # fmt: skip

    def load_weights(self) -> None:
        """Fill the network from what `weights` names.

        Raises:
            WeightsError: The file is missing, unreadable, or of another architecture.
        """
        if self.weights == "random":
            return
        if self.weights == "nano":
            source = resources.files("peft_modal_pointcloud") / "nano.safetensors"
            with resources.as_file(source) as path:
                if not path.is_file():
                    raise WeightsError("the nano weights are missing from this installation; install peft-modal again")
                state = read_tensors(path)[0]
        else:
            path = Path(self.weights).expanduser()
            if not path.is_file():
                raise WeightsError(
                    f"backbone.weights: '{self.weights}' is neither 'nano' nor 'random' nor an existing file"
                )
            state = read_point_checkpoint(path)
        adopt_biases(self.network, state)
        matched = match_backbone(state, self.network.state_dict(), where=f"'{self.weights}'")
        self.network.load_state_dict({**self.network.state_dict(), **matched.filled})

    def architecture(self) -> dict[str, Any]:
        """The sizes, which the constructor otherwise takes from `weights`."""
        return dict(self._sizes)

    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """Features of `points` (B, N, 3); with `mask` (B, G) only of the visible patches, for masked pre-training.

        With `levels`, extras are the patch tokens `level.0`, `level.1`, ... (B, G, D), the places `queries` (B, Q, 3)
        of the batch that a head classifies, by default its points, and the `category` (B,) of each cloud where the
        batch has it.
        """
        del context  # filled by the forward hooks on grouping and position embedding
        points = batch["points"]
        encoded = self.network(points, mask=batch.get("mask"))
        extras = {"centres": encoded.centres, "neighbourhood": encoded.neighbourhood}
        if self.levels:
            extras |= {f"level.{i}": tokens for i, tokens in enumerate(encoded.levels)}
            extras["queries"] = batch.get("queries", points)
            extras |= {"category": batch["category"]} if "category" in batch else {}
        layout = None if "mask" in batch else self.anatomy.layouts["blocks"]
        return Features(encoded.tokens, layout, extras)

    @torch.no_grad()
    def patches(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (G, S, 3), relative to their centres, and centres (G, 3) of one cloud (P, 3), on the CPU."""
        # Not a pass of the network: the hooks that fill its context stay out.
        neighbourhood, centres = self.network.group_divider.forward(points[None].to(self.device))  # type: ignore[union-attr]
        return neighbourhood[0].cpu(), centres[0].cpu()

    def views(self, sample: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Where the patches of a cloud lie; nothing of a sample without `points` (P, 3)."""
        if "points" not in sample:
            return {}
        points = sample["points"].float()
        neighbourhood, centres = self.patches(points)
        return patch_views(points, centres, neighbourhood)

    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Random points in the unit cube."""
        generator = torch.Generator().manual_seed(0)
        num_points = max(4 * self.group_size, 2 * self.num_group)
        batch = {"points": torch.rand(batch_size, num_points, 3, generator=generator) * 2 - 1}
        if self.levels:
            batch["category"] = torch.zeros(batch_size, dtype=torch.int64)
        return {name: value.to(self.device) for name, value in batch.items()}

    def feature_spec(self) -> FeatureSpec:
        """Tokens, what methods export, and the levels."""
        return replace(super().feature_spec(), levels=(self.feature_width,) * len(self.levels))

    @property
    def feature_width(self) -> int:
        """Width of the tokens."""
        return int(self.network.dim)  # type: ignore[arg-type]

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Compute blocks again during backward instead of keeping their activations."""
        self.network.set_grad_checkpointing(enabled)  # type: ignore[operator]


def spread_levels(wanted: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """The blocks that a number stands for, evenly spread up to the last, or those that are named.

    Raises:
        ConfigError: There are not as many, or they are not ascending.
    """
    if isinstance(wanted, int):
        if wanted > depth:
            raise ConfigError(f"backbone.levels: {wanted} are asked for, the network has {depth} blocks")
        return tuple(round(depth * (i + 1) / wanted) - 1 for i in range(wanted))
    if list(wanted) != sorted(set(wanted)) or (wanted and wanted[-1] >= depth):
        raise ConfigError(f"backbone.levels: {list(wanted)} are not ascending block numbers below {depth}")
    return tuple(wanted)


class _Publish:
    """Forward hook that puts a module's outputs into the context of the running pass."""

    def __init__(self, contexts: Contexts, *keys: str) -> None:
        self.contexts = contexts
        self.keys = keys

    def __call__(self, _module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        context = self.contexts.current()
        for key, value in zip(self.keys, (output,) if isinstance(output, Tensor) else output, strict=True):
            context.put(key, value)


def point_transformer_anatomy(network: PointMAE, *, num_heads: int, train_cls: bool) -> Anatomy:
    """Sites and ports of the point transformer, in order of execution."""
    width = network.dim
    b = AnatomyBuilder(network)
    b.op("embed", "encoder.first_conv.0")
    b.op("norm", "encoder.first_conv.1")
    b.op("embed", "encoder.first_conv.3")
    b.op("embed", "encoder.second_conv.0")
    b.op("norm", "encoder.second_conv.1")
    b.op("embed", "encoder.second_conv.3")
    if isinstance(network.reduce_dim, torch.nn.Linear):
        b.op("embed", "reduce_dim")
    b.op("pos", "pos_embed.0")
    b.op("pos", "pos_embed.2")
    if has_cls := network.cls_token is not None:
        b.raw("cls", "cls_token", decay=False)
        b.raw("cls.pos", "cls_pos")
    b.port("embed.out", "embed", "out", width=width, allows=("read", "add", "replace"))
    for i in range(len(network.blocks.blocks)):
        path = f"blocks.blocks.{i}"
        b.enter("blocks", i)
        b.port("block.in", path, "in", width=width, allows=STREAM)
        b.op("norm", f"{path}.norm1")
        b.port("attn.norm.out", f"{path}.norm1", "out", width=width)
        parts = {role: f"{path}.{role}" for role in ("attn.q", "attn.k", "attn.v")}
        b.fused("attn.qkv", f"{path}.attn.qkv", parts, heads=num_heads)
        b.op("attn.out", f"{path}.attn.proj")
        b.port("attn.out", f"{path}.attn", "out", width=width)
        b.port("attn.branch", f"{path}.drop_path1", "out", width=width)
        b.port("mlp.norm.in", f"{path}.norm2", "in", width=width)
        b.op("norm", f"{path}.norm2")
        b.port("mlp.norm.out", f"{path}.norm2", "out", width=width)
        b.op("mlp.in", f"{path}.mlp.fc1")
        b.op("mlp.out", f"{path}.mlp.fc2")
        b.port("mlp.out", f"{path}.mlp", "out", width=width)
        b.port("mlp.branch", f"{path}.drop_path2", "out", width=width)
        b.port("block.out", path, "out", width=width, allows=STREAM)
    b.enter("blocks")
    b.port("final.norm.in", "norm", "in", width=width, allows=STREAM)
    b.op("norm", "norm")
    b.port("final.norm.out", "norm", "out", width=width, allows=STREAM)
    prefix = (Segment("cls", 1),) if has_cls else ()
    layout = TokenLayout(
        segments=(*prefix, Segment("patches", None)), body="points", prompt_index=len(prefix), repeats_positions=True
    )
    always_trained = ("cls_token", "cls_pos") if train_cls and has_cls else ()
    return b.build(layouts={"blocks": layout}, always_trained=always_trained)
