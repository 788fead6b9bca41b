"""PointGST: graph spectral tuning (Liang et al., TPAMI 2025, arXiv:2410.08114)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from peft_modal.anatomy import Context, Port, Selector, TokenLayout
from peft_modal.attach import Adapter, LifeCycle
from peft_modal.errors import AttachError
from peft_modal.methods.base import Method, beside_mlp, select_blocks
from peft_modal.methods.bottleneck import must_be_channels_last
from peft_modal.ranges import PositiveInt
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.spectral import BasisKind, Transform, spectral_transform
from peft_modal_pointcloud.views import spectral_views


class PointGST(Method):
    """Low-rank tuning in the spectral domain of the patch centres (Liang et al., TPAMI 2025, arXiv:2410.08114).

    Beside the MLP, x2 = x1 + MLP(LN x1) + s U(SiLU(h) + Tg + Tl) with h = D x1. Tg = B^T adapt(B h) over the graph of
    all centres, Tl likewise over sub-graphs along a Morton curve, adapt(z) = z + SiLU(W LN z) with one W for both;
    class token and prompts get SiLU(h) only. Bases depend on the centres alone and are made once per forward.

    The paper transforms with U^T and back with U, the released classification code the other way round; the authors
    keep that for their numbers, so it is the default here.

    Args:
        rank: Width of the bottleneck.
        local: Centres per sub-graph; divides the number of patches.
        scale: s.
        basis: `exact`, or `reference` for distances whose rounding spoils the graph, one unit of length per batch
            and arbitrary signs, as in the released code.
        transform: `reference` or `paper`.
        blocks: Blocks to adapt; see `Selector`; None for all.
    """

    identity_at_init = True

    def __init__(
        self, *, rank: PositiveInt = 36, local: PositiveInt = 32, scale: float = 1.0, basis: BasisKind = "exact",
        transform: Transform = "reference", blocks: str | list[int] | dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.local = local
        self.scale = scale
        self.basis: BasisKind = basis
        self.transform: Transform = transform
        self.where = Selector.parse({"blocks": blocks})

    @classmethod
    def example(cls) -> PointGST:
        """Sub-graphs that divide 24, 32 and 64 patches."""
        return cls(local=8)

    def build(self, adapter: Adapter) -> None:
        """A branch from the residual stream before the MLP's norm to where the MLP's output is added.

        Raises:
            AttachError: The number of patches is no multiple of `local`, or the backbone has none.
        """
        anatomy = adapter.backbone.anatomy
        num_group = getattr(adapter.backbone, "num_group", None)
        if num_group is None:
            raise AttachError("its tokens are no patches of a point cloud, so there are no centres to make a graph of")
        check_local(self.local, num_group)
        for tap in select_blocks(anatomy, self.where, role="mlp.norm.in"):
            must_be_channels_last(tap.channel_dim, tap.name)
            module = SpectralAdapter(
                tap, anatomy.layout(tap), rank=self.rank, local=self.local, scale=self.scale, basis=self.basis,
                transform=self.transform,
            )  # fmt: skip
            adapter.branch(tap, beside_mlp(anatomy, tap), module)
        if isinstance(adapter.backbone, PointMAEBackbone):
            adapter.listen(Graph(adapter.backbone, local=self.local), name="pointgst")


class Graph(LifeCycle):
    """Draws the graph that the branches share."""

    def __init__(self, backbone: PointMAEBackbone, *, local: int) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone  # no submodule: it is not the adapter's
        self.local = local

    @override
    def views(self, sample: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        if "points" not in sample:
            return {}
        points = sample["points"].float()
        backbone: PointMAEBackbone = self.__dict__["backbone"]
        _, centres = backbone.patches(points)
        return spectral_views(points, centres, local=self.local)


def check_local(local: int, count: int) -> None:
    """Refuse sub-graphs that do not divide the patches.

    Raises:
        AttachError: They do not.
    """
    if count % local:
        raise AttachError(
            f"method.local: {count} patches cannot be cut into sub-graphs of {local}; use a divisor of {count}"
        )


class SpectralAdapter(nn.Module):
    """PCSA, the point cloud spectral adapter: (B, P + G, C) to the same shape; zero at first.

    Args:
        tap: Where it reads.
        layout: Which tokens lie there.
        rank: r.
        local: Centres per sub-graph.
        scale: Factor of the output.
        basis: See `PointGST`.
        transform: See `PointGST`.
    """

    uses_context = True

    def __init__(
        self, tap: Port, layout: TokenLayout, *, rank: int, local: int, scale: float, basis: BasisKind,
        transform: Transform,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tap = tap
        self.layout = layout
        self.local = local
        self.scale = scale
        self.basis: BasisKind = basis
        self.transform: Transform = transform
        self.down = nn.Linear(tap.width, rank)
        self.spectral = nn.Linear(rank, rank)
        self.norm_global = nn.LayerNorm(rank, eps=1e-5)
        self.norm_local = nn.LayerNorm(rank, eps=1e-5)
        self.up = nn.Linear(rank, tap.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D Xavier uniform with PyTorch's bias, W and U zero, the norms the identity."""
        self.down.reset_parameters()
        nn.init.xavier_uniform_(self.down.weight)
        for zeroed in (self.spectral, self.up):
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)
        self.norm_global.reset_parameters()
        self.norm_local.reset_parameters()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The branch.

        Raises:
            AttachError: Patches were left out, as in masked pre-training, so centres and tokens do not match.
        """
        centres = context.get("centres")
        patches = context.data_tokens(self.tap, self.layout, x.shape[1])
        if patches.stop - patches.start != centres.shape[1]:
            raise AttachError(
                f"'{self.tap.name}': {patches.stop - patches.start} patch tokens for {centres.shape[1]} centres; "
                "PointGST needs all patches, so it cannot follow masked pre-training"
            )
        check_local(self.local, centres.shape[1])
        key = f"pointgst.{self.basis}.{self.transform}.{self.local}"
        transform = context.once(
            key,
            lambda: spectral_transform(centres, local=self.local, basis=self.basis, transform=self.transform),
        )
        return self.adapt(x, transform, patches)

    def adapt(self, x: Tensor, transform: Tensor, patches: slice) -> Tensor:
        """The branch on tokens (B, N, C) whose `patches` the transform Q (B, 2G, G) is of."""
        hidden = self.down(x)
        reduced = hidden[:, patches]
        transform = transform.to(reduced.dtype)
        z = torch.bmm(transform, reduced)
        over_all, over_parts = z.chunk(2, dim=1)
        normed = torch.cat([self.norm_global(over_all), self.norm_local(over_parts)], dim=1)
        z = z + functional.silu(self.spectral(normed))
        back = torch.bmm(transform.transpose(1, 2), z.to(transform.dtype))
        padded = functional.pad(back, (0, 0, patches.start, x.shape[1] - patches.stop))
        return self.scale * self.up(functional.silu(hidden) + padded)
