"""The network as a backbone: its anatomy, and where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_modal.anatomy import (
    Access,
    Anatomy,
    AnatomyBuilder,
    Backbone,
    Context,
    Features,
    FrozenMode,
    Segment,
    TokenLayout,
)
from peft_modal.weights import load_network
from peft_modal_timeseries.network import PatchTransformer

STREAM: tuple[Access, ...] = ("read", "add", "replace", "tokens")


class PatchTransformerBackbone(Backbone):
    """A transformer over patches of all channels of a series (patches as tokens: Nie et al., ICLR 2023).

    The default sizes are those of the shipped weights.

    Args:
        weights: `nano` (shipped, 0.12 M parameters), `random`, or the path of a file that `merge` has written.
        frozen_mode: `eval` keeps the frozen network still; `reference` leaves its dropout active in training.
        dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        patch_len: Steps per patch.
        max_patches: Largest number of patches per channel.
        max_channels: Largest number of channels.
        mlp_ratio: Hidden width of a block's MLP over `dim`.
        dropout: Share of each branch's entries that is zeroed; active in mode `reference` only.
        init_seed: Seed of random weights.
    """

    modality: ClassVar[str] = "timeseries"

    def __init__(
        self,
        *,
        weights: str = "nano",
        frozen_mode: FrozenMode = "eval",
        dim: int = 48,
        depth: int = 4,
        num_heads: int = 4,
        patch_len: int = 16,
        max_patches: int = 32,
        max_channels: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        init_seed: int = 0,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            network = PatchTransformer(
                dim=dim,
                depth=depth,
                num_heads=num_heads,
                patch_len=patch_len,
                max_patches=max_patches,
                max_channels=max_channels,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
            )
        self.weights = weights
        self.patch_len = patch_len
        super().__init__(network, patch_transformer_anatomy(network, num_heads=num_heads), frozen_mode=frozen_mode)

    @classmethod
    def tiny(cls) -> PatchTransformerBackbone:
        """The same network at toy size with random weights; contract tests and `list --matrix` use it."""
        return cls(
            weights="random", dim=24, depth=3, num_heads=3, patch_len=4, max_patches=8, max_channels=2, dropout=0.0
        )

    def load_weights(self) -> None:
        """Fill the network from what `weights` names.

        Raises:
            WeightsError: The file is missing or of another architecture; the network is then as it was.
        """
        if self.weights == "random":
            return
        if self.weights == "nano":
            with resources.as_file(resources.files("peft_modal_timeseries") / "nano.safetensors") as path:
                load_network(self.network, path)
        else:
            load_network(self.network, self.weights)

    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """Tokens of `series` (B, C, T)."""
        series: Tensor = batch["series"]
        context.put("num_channels", series.shape[1])  # for methods that must tell one channel's patches from another's
        return Features(self.network(series), self.anatomy.layouts["blocks"])

    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Random series with two channels."""
        series = torch.randn(batch_size, 2, 4 * self.patch_len, generator=torch.Generator().manual_seed(0))
        return {"series": series.to(self.device)}

    @property
    def feature_width(self) -> int:
        """Width of the tokens."""
        return int(self.network.dim)  # type: ignore[arg-type]

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Compute blocks again during backward instead of keeping their activations."""
        self.network.grad_checkpointing = enabled  # type: ignore[assignment]


def patch_transformer_anatomy(network: PatchTransformer, *, num_heads: int) -> Anatomy:
    """Sites and ports in order of execution; `peft_modal.testing.assert_anatomy` compares them with the network."""
    width = network.dim
    b = AnatomyBuilder(network)
    b.op("embed", "patch_embed")
    b.raw("cls", "cls_token", decay=False)
    b.raw("pos.time", "time_pos", decay=False)
    b.raw("pos.channel", "channel_pos", decay=False)
    b.port("embed.out", "assemble", "out", width=width)
    for i in range(len(network.blocks)):
        path = f"blocks.{i}"
        b.enter("blocks", i)
        b.port("block.in", path, "in", width=width, allows=STREAM)
        b.op("norm", f"{path}.norm1")
        b.port("attn.norm.out", f"{path}.norm1", "out", width=width)
        parts = {role: f"{path}.{role}" for role in ("attn.q", "attn.k", "attn.v")}
        b.fused("attn.qkv", f"{path}.attn.qkv", parts, heads=num_heads)
        b.op("attn.out", f"{path}.attn.proj")
        b.port("attn.out", f"{path}.attn", "out", width=width)
        b.port("attn.branch", f"{path}.drop1", "out", width=width)
        b.port("mlp.norm.in", f"{path}.norm2", "in", width=width)
        b.op("norm", f"{path}.norm2")
        b.port("mlp.norm.out", f"{path}.norm2", "out", width=width)
        b.op("mlp.in", f"{path}.mlp.fc1")
        b.op("mlp.out", f"{path}.mlp.fc2")
        b.port("mlp.out", f"{path}.mlp", "out", width=width)
        b.port("mlp.branch", f"{path}.drop2", "out", width=width)
        b.port("block.out", path, "out", width=width, allows=STREAM)
    b.enter("blocks")
    b.port("final.norm.in", "norm", "in", width=width, allows=STREAM)
    b.op("norm", "norm")
    b.port("final.norm.out", "norm", "out", width=width, allows=STREAM)
    layout = TokenLayout(segments=(Segment("cls", 1), Segment("patches", None)), body="sequence", prompt_index=1)
    return b.build(layouts={"blocks": layout})
