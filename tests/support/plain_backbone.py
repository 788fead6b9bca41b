"""A backbone around any module, a method around any build function, a network that adds positions in every block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numeric import draw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from peft_modal.anatomy import AnatomyBuilder, Backbone, Context, Features, FrozenMode, TokenLayout
from peft_modal.attach import Adapter
from peft_modal.methods import Method


class PlainBackbone(Backbone):
    """Calls a network with `batch["x"]`.

    Args:
        network: Any module from one tensor to one tensor.
        describe: Tells the anatomy.
        example: The shape of an input.
        layouts: See `Anatomy`.
        always_trained: See `Anatomy`.
        frozen_mode: See `Backbone`.
    """

    modality = "plain"

    def __init__(
        self,
        network: nn.Module,
        describe: Callable[[AnatomyBuilder], None],
        *,
        example: tuple[int, ...] = (),
        layouts: Mapping[str, TokenLayout] | None = None,
        always_trained: Sequence[str] = (),
        frozen_mode: FrozenMode = "eval",
    ) -> None:
        builder = AnatomyBuilder(network)
        describe(builder)
        anatomy = builder.build(layouts=layouts or {}, always_trained=always_trained)
        super().__init__(network, anatomy, frozen_mode=frozen_mode)
        self.example = example

    @property
    @override
    def feature_width(self) -> int:
        return self.example[-1]

    @override
    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        return Features(self.network(batch["x"]), next(iter(self.anatomy.layouts.values()), None))

    @override
    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        dtype = next(self.network.parameters()).dtype
        return {"x": draw(batch_size, *self.example, seed=1, dtype=dtype)}

    @override
    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        self.network.checkpointing = enabled


class Built(Method):
    """A method whose `build` is given."""

    identity_at_init = True

    def __init__(self, build: Callable[[Adapter], object], *, propagates: bool = True) -> None:
        self._build = build
        self.needs_backward_through_backbone = propagates  # type: ignore[misc]

    @override
    def build(self, adapter: Adapter) -> None:
        self._build(adapter)


def attach(
    backbone: Backbone, build: Callable[[Adapter], object], *, name: str = "default", propagates: bool = True
) -> Adapter:
    """Attach what `build` does."""
    return Built(build, propagates=propagates).attach(backbone, name=name)


class AttentionBlock(nn.Module):
    """x + Attn(LN x), then x + MLP(LN x), with one head and no fused kernels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """X (B, N, D) to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        x = x + self.proj(scores.softmax(-1) @ v)
        return x + self.mlp(self.norm2(x))


class Stream(nn.Module):
    """Blocks with a final norm; with `repeats`, positions of a fixed length are added before every block."""

    def __init__(self, *, depth: int = 3, width: int = 8, length: int = 5, repeats: bool = True) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(1, length, width))
        self.blocks = nn.ModuleList(AttentionBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.repeats = repeats
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """X (B, N, D) to the same shape."""
        if not self.repeats:
            x = x + self.pos
        for block in self.blocks:
            entering = x + self.pos if self.repeats else x
            x = checkpoint(block, entering, use_reentrant=False) if self.checkpointing else block(entering)
        return self.norm(x)


def stream_backbone(
    *,
    layout: TokenLayout,
    depth: int = 3,
    width: int = 8,
    length: int = 5,
    frozen_mode: FrozenMode = "eval",
) -> PlainBackbone:
    """A `Stream` with random weights in float64, and all its ports."""
    net = Stream(depth=depth, width=width, length=length, repeats=layout.repeats_positions).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)

    def describe(b: AnatomyBuilder) -> None:
        stream = ("read", "add", "replace", "tokens")
        for i in range(depth):
            path = f"blocks.{i}"
            b.enter("blocks", i)
            b.port("block.in", path, "in", width=width, allows=stream)
            b.op("norm", f"{path}.norm1")
            parts = {f"attn.{part}": f"{path}.attn.{part}" for part in "qkv"}
            b.fused("attn.qkv", f"{path}.qkv", parts, name=f"{path}.attn.qkv")
            b.op("attn.out", f"{path}.proj")
            b.port("attn.branch", f"{path}.proj", "out", width=width)
            b.port("mlp.norm.in", f"{path}.norm2", "in", width=width)
            b.op("norm", f"{path}.norm2")
            b.op("mlp.in", f"{path}.mlp.0")
            b.op("mlp.out", f"{path}.mlp.2")
            b.port("mlp.out", f"{path}.mlp", "out", width=width)
            b.port("block.out", path, "out", width=width, allows=stream)
        b.enter("blocks")
        b.port("final.norm.in", "norm", "in", width=width, allows=stream)
        b.op("norm", "norm")
        b.port("final.norm.out", "norm", "out", width=width, allows=stream)

    return PlainBackbone(net, describe, example=(length, width), layouts={"blocks": layout}, frozen_mode=frozen_mode)
