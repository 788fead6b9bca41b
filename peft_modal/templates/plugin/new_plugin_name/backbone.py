"""A network, and its anatomy: the list of places where any method of peft_modal can act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
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
from peft_modal.errors import DataError
from peft_modal.weights import load_network
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

STREAM: tuple[Access, ...] = ("read", "add", "replace", "tokens")


class Block(nn.Module):
    """A pre-norm transformer block with one fused projection for query, key and value."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) to the same shape."""
        qkv = self.qkv(self.norm1(x)).unflatten(
            2, (3, self.num_heads, -1)
        )  # (B, N, 3, H, D/H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D/H) each
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """Vectors of a sequence as tokens, through transformer blocks."""

    def __init__(
        self, *, num_features: int, dim: int, depth: int, num_heads: int, max_steps: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(num_features, dim)
        self.pos = nn.Parameter(0.02 * torch.randn(max_steps, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads=num_heads) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) of sequences (B, T, F).

        Raises:
            DataError: The sequences do not fit the network.
        """
        most, width = len(self.pos), self.embed.in_features
        if x.dim() != 3 or x.shape[1] > most or x.shape[2] != width:
            raise DataError(
                f"expected sequences of shape (B, up to {most}, {width}), got {tuple(x.shape)}"
            )
        x = self.embed(x) + self.pos[: x.shape[1]]
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)


class Encoder(Backbone):
    """A small transformer over a sequence of vectors.

    Args:
        weights: `random`, or the path of a file that `python -m peft_modal merge` has written.
        frozen_mode: `eval` keeps the frozen network still; `reference` lets it follow the training mode.
        num_features: Length of the vectors.
        dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        max_steps: Longest sequence.
        init_seed: Seed of random weights.
    """

    modality: ClassVar[str] = "new_plugin_name"

    def __init__(
        self,
        *,
        weights: str = "random",
        frozen_mode: FrozenMode = "eval",
        num_features: int = 2,
        dim: int = 32,
        depth: int = 2,
        num_heads: int = 4,
        max_steps: int = 64,
        init_seed: int = 0,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            network = Network(
                num_features=num_features,
                dim=dim,
                depth=depth,
                num_heads=num_heads,
                max_steps=max_steps,
            )
        self.weights = weights
        self.num_features = num_features
        self.dim = dim
        anatomy = encoder_anatomy(network, dim=dim, num_heads=num_heads)
        super().__init__(network, anatomy, frozen_mode=frozen_mode)

    @classmethod
    def tiny(cls) -> Encoder:
        """Toy size with random weights, for tests and for `list --matrix`."""
        return cls(weights="random", dim=16, num_heads=2)

    def load_weights(self) -> None:
        """Fill the network from what `weights` names."""
        if self.weights != "random":
            load_network(self.network, self.weights)

    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """Tokens of `sequence` (B, T, F)."""
        del context  # `context.put(...)` publishes what all layers of one pass share
        return Features(self.network(batch["sequence"]), self.anatomy.layouts["blocks"])

    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Random sequences."""
        generator = torch.Generator().manual_seed(0)
        sequence = torch.randn(batch_size, 10, self.num_features, generator=generator)
        return {"sequence": sequence.to(self.device)}

    @property
    def feature_width(self) -> int:
        """Width of the tokens."""
        return self.dim

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Compute blocks again during backward instead of keeping their activations."""
        self.network.grad_checkpointing = enabled  # type: ignore[assignment]


def encoder_anatomy(network: Network, *, dim: int, num_heads: int) -> Anatomy:
    """Weight sites and ports, in order of execution."""
    b = AnatomyBuilder(network)
    b.op("embed", "embed")
    b.raw("pos", "pos", decay=False)
    for i in range(len(network.blocks)):
        path = f"blocks.{i}"
        b.enter("blocks", i)
        b.port("block.in", path, "in", width=dim, allows=STREAM)
        b.op("norm", f"{path}.norm1")
        b.port("attn.norm.out", f"{path}.norm1", "out", width=dim)
        parts = {role: f"{path}.{role}" for role in ("attn.q", "attn.k", "attn.v")}
        b.fused("attn.qkv", f"{path}.qkv", parts, heads=num_heads)
        b.op("attn.out", f"{path}.proj")
        b.port("attn.out", f"{path}.proj", "out", width=dim)
        b.port("attn.branch", f"{path}.proj", "out", width=dim)
        b.port("mlp.norm.in", f"{path}.norm2", "in", width=dim)
        b.op("norm", f"{path}.norm2")
        b.port("mlp.norm.out", f"{path}.norm2", "out", width=dim)
        b.op("mlp.in", f"{path}.mlp.0")
        b.op("mlp.out", f"{path}.mlp.2")
        b.port("mlp.out", f"{path}.mlp", "out", width=dim)
        b.port("mlp.branch", f"{path}.mlp", "out", width=dim)
        b.port("block.out", path, "out", width=dim, allows=STREAM)
    b.enter("blocks")
    b.port("final.norm.in", "norm", "in", width=dim, allows=STREAM)
    b.op("norm", "norm")
    b.port("final.norm.out", "norm", "out", width=dim, allows=STREAM)
    layout = TokenLayout(
        segments=(Segment("steps", None),), body="sequence", prompt_index=0
    )
    return b.build(layouts={"blocks": layout})
