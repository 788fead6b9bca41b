"""The geometry-aware adapter: pool token neighbourhoods in space, spread the result back, end in a bottleneck."""

from __future__ import annotations

from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Context, Port, TokenLayout
from peft_modal.attach.prompts import still_statistics
from peft_modal.errors import DataError
from peft_modal_pointcloud.network import DropPath
from peft_modal_pointcloud.point_peft.bottleneck import QuickBottleneck
from peft_modal_pointcloud.point_peft.grouping import Grouping

CENTRE_SCALE: Final = 0.3
"""Of the sub-centre's own token beside what is pooled around it."""
SPREAD_SCALE: Final = 0.3
"""Of what is spread back. Both are constants: the released code for Point-MAE ignores its command line's factors."""


class NeighbourhoodAttention(nn.Module):
    """Attention among the k members of each neighbourhood, narrow and behind a norm; all blocks share one.

    Norm and projection act on single tokens, so they run before tokens are gathered into neighbourhoods, which hold
    each several times.

    Args:
        width: C.
        inner_dim: Channels of all heads together; scores are scaled by its root, not that of a head's.
        num_heads: Heads.
    """

    def __init__(self, width: int, *, inner_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = inner_dim**-0.5
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner_dim, bias=False)
        self.proj = nn.Linear(inner_dim, width)

    def forward(self, rows: Tensor, members: Tensor) -> Tensor:
        """The attention branch (n, k, C) of rows (R, C) in neighbourhoods (n, k)."""
        # An embedding look-up is the gather with the fastest backward, as in IDPT's graph layers.
        gathered = functional.embedding(members, self.qkv(self.norm(rows)))  # (n, k, 3 * inner)
        qkv = gathered.view(*members.shape, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (3, n, H, k, inner/H)
        attended = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], scale=self.scale)
        return self.proj(attended.transpose(1, 2).flatten(2))


class GeometryAdapter(nn.Module):
    """The geometry-aware adapter at the end of one block.

    v = GELU(BN(max over k of N + A(norm N))) + 0.3 Q, with N the neighbours' and Q the sub-centres' tokens; tokens
    x + 0.3 W v; then z + bott(z) for every token, class token and prompts too.

    Args:
        attention: A, of all blocks.
        grouping: Where to pool.
        port: The block's end.
        layout: Of its sequence.
        hidden_dim: Width of the bottleneck.
        dropout: Probability of zeroing a hidden channel.
        drop_path: Probability of leaving A out of a neighbourhood.
    """

    uses_context: ClassVar[bool] = True

    def __init__(
        self, attention: NeighbourhoodAttention, grouping: Grouping, *, port: Port, layout: TokenLayout,
        hidden_dim: int, dropout: float, drop_path: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = attention
        self.grouping = grouping
        self.port, self.layout = port, layout
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.bn = nn.BatchNorm1d(port.width)
        self.bottleneck = QuickBottleneck(port.width, hidden_dim=hidden_dim, dropout=dropout)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Z (B, 1 + P + G, C) to the same shape.

        Raises:
            DataError: Part of the patches is masked.
        """
        tokens = context.data_tokens(self.port, self.layout, z.shape[1])
        num_tokens, num_centres = tokens.stop - tokens.start, context.get("centres").shape[1]
        if num_tokens != num_centres:
            raise DataError(
                f"point_peft's geometry needs all {num_centres} patches of a cloud, this pass has {num_tokens}; "
                "it takes no masked clouds"
            )
        geometry = self.grouping(context)
        # Own prompts are next to the tokens; those of an adapter attached later stand before them.
        rows = z[:, tokens.start - self.grouping.num_prompts : tokens.stop].flatten(0, 1)
        pooled = self._pool(rows, geometry.centres, geometry.members).view(len(z), -1, z.shape[2])  # (B, S, C)
        spread = z[:, tokens] + SPREAD_SCALE * (geometry.weights.to(pooled.dtype) @ pooled)
        z = torch.cat([z[:, : tokens.start], spread, z[:, tokens.stop :]], dim=1)
        return z + self.bottleneck(z)

    def _pool(self, rows: Tensor, centres: Tensor, members: Tensor) -> Tensor:
        near = functional.embedding(members, rows)  # (B * S, k, C)
        near = near + self.drop_path(self.attention(rows, members))
        with still_statistics(self.bn):
            normed = self.bn(near.max(1).values)
        return functional.gelu(normed) + CENTRE_SCALE * functional.embedding(centres, rows)
