"""Masked pre-training of the point transformer: masks, decoder, Chamfer distance (Point-MAE, ECCV 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_modal.errors import ConfigError
from peft_modal_pointcloud.network import INIT_STD, build_blocks, position_mlp, reset_layers
from peft_modal_pointcloud.sampling import select_patches


def random_mask(
    batch: int,
    num_group: int,
    ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Hides int(ratio * G) patches of every cloud, chosen uniformly and independently per cloud.

    Args:
        batch: Clouds B.
        num_group: Patches G per cloud.
        ratio: Share of hidden patches; 0.6 in the paper.
        generator: Draws on its own device; torch's global one when not given.
        device: Where the result lies.

    Returns:
        Boolean (B, G), true for hidden patches.

    Raises:
        ConfigError: The ratio hides no patch, or all of them.
    """
    num_masked = _num_masked(num_group, ratio)
    draw = torch.rand(batch, num_group, generator=generator, device=generator.device if generator else device)
    return _mask_of(draw.argsort(1)[:, :num_masked].to(device), num_group)


def block_mask(centres: Tensor, ratio: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Hides the int(ratio * G) patches nearest to one random centre of every cloud.

    Args:
        centres: Patch centres (B, G, 3).
        ratio: Share of hidden patches.
        generator: Draws on its own device; torch's global one when not given.

    Returns:
        Boolean (B, G), true for hidden patches.

    Raises:
        ConfigError: The ratio hides no patch, or all of them.
    """
    batch, num_group, _ = centres.shape
    num_masked = _num_masked(num_group, ratio)
    draw_on = generator.device if generator else centres.device
    seed = torch.randint(num_group, (batch, 1, 1), generator=generator, device=draw_on).to(centres.device)
    distance = (centres.detach().float() - centres.detach().float().gather(1, seed.expand(-1, -1, 3))).square().sum(2)
    return _mask_of(distance.argsort(dim=1, stable=True)[:, :num_masked], num_group)


def masked_patches(neighbourhood: Tensor, mask: Tensor) -> Tensor:
    """The hidden patches (B, K, M, 3) in patch order, which the decoder has to rebuild."""
    return select_patches(neighbourhood, mask)


def chamfer_l2(rebuilt: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance to the nearest point of the other set, summed over both directions.

    Args:
        rebuilt: Points (..., M, 3).
        target: Points (..., M', 3), the same leading axes.

    Returns:
        A scalar; the mean runs over all points of all sets.
    """
    forth, back = _nearest_differences(rebuilt, target)
    return forth.square().sum(-1).mean() + back.square().sum(-1).mean()


def chamfer_l1(rebuilt: Tensor, target: Tensor) -> Tensor:
    """Mean distance to the nearest point of the other set, averaged over both directions.

    Points that coincide get gradient 0, where a square root of the squared distance would give NaN.

    Args:
        rebuilt: Points (..., M, 3).
        target: Points (..., M', 3), the same leading axes.

    Returns:
        A scalar; the mean runs over all points of all sets.
    """
    forth, back = _nearest_differences(rebuilt, target)
    return (torch.linalg.vector_norm(forth, dim=-1).mean() + torch.linalg.vector_norm(back, dim=-1).mean()) / 2


class TransformerDecoder(nn.Module):
    """Blocks with positions added in front of each, then a norm over the hidden patches only."""

    def __init__(self, blocks: nn.ModuleList, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm = norm

    def forward(self, x: Tensor, positions: Tensor, num_masked: int) -> Tensor:
        """The last `num_masked` K of the tokens (B, N, D), decoded and normalised (B, K, D)."""
        for block in self.blocks:
            x = block(x + positions)
        return self.norm(x[:, -num_masked:])


class MaskedDecoder(nn.Module):
    """Rebuilds hidden patches from encoded visible ones; used in pre-training only, parameters named as released.

    Args:
        dim: Width D of the encoder's tokens.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        group_size: Points M per patch.
        mlp_ratio: Hidden width of a block's MLP over D.
        drop_path: Drop-path rate of the last block; it grows linearly from 0 in the first.
        device: Where the parameters are created.
        dtype: Their type.

    Raises:
        ConfigError: A size is not usable.
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 4,
        num_heads: int = 6,
        group_size: int = 32,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.group_size = group_size
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.decoder_pos_embed = position_mlp(dim, **factory)
        self.MAE_decoder = TransformerDecoder(
            build_blocks(dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path, **factory),
            nn.LayerNorm(dim, **factory),
        )
        self.increase_dim = nn.Sequential(nn.Conv1d(dim, 3 * group_size, 1, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform linears in the blocks, normal(0, 0.02) for everything else, biases 0."""
        reset_layers(self, "card")
        for layer in self.MAE_decoder.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.mask_token, std=INIT_STD)

    def forward(self, encoded_visible: Tensor, centres: Tensor, mask: Tensor) -> Tensor:
        """Points of the hidden patches relative to their centre.

        Args:
            encoded_visible: Encoder output for the visible patches (B, G-K, D), in patch order.
            centres: All patch centres (B, G, 3).
            mask: Boolean (B, G), true for the K hidden patches.

        Returns:
            Rebuilt points (B, K, M, 3), hidden patches in patch order.

        Raises:
            ConfigError: The mask is not a boolean (B, G) with one count per cloud, or hides another number of
                patches than the encoder left out.
        """
        embedded = self.decoder_pos_embed(centres.to(encoded_visible.dtype))
        visible, hidden = select_patches(embedded, ~mask), select_patches(embedded, mask)
        if visible.shape[1] != encoded_visible.shape[1]:
            raise ConfigError(
                f"masked decoder: the mask leaves {visible.shape[1]} patches visible, but {encoded_visible.shape[1]} "
                "were encoded; give encoder and decoder the same mask."
            )
        batch, num_masked, _ = hidden.shape
        x = torch.cat([encoded_visible, self.mask_token.expand(batch, num_masked, -1)], dim=1)
        decoded = self.MAE_decoder(x, torch.cat([visible, hidden], dim=1), num_masked)  # (B, K, D)
        return self.increase_dim(decoded.transpose(1, 2)).transpose(1, 2).unflatten(2, (self.group_size, 3))


def _num_masked(num_group: int, ratio: float) -> int:
    num_masked = int(ratio * num_group)
    if not 0 < num_masked < num_group:
        raise ConfigError(
            f"patch mask: a ratio of {ratio} hides {num_masked} of {num_group} patches; at least one must be hidden "
            "and one visible."
        )
    return num_masked


def _mask_of(hidden: Tensor, num_group: int) -> Tensor:
    mask = torch.zeros(hidden.shape[0], num_group, dtype=torch.bool, device=hidden.device)
    return mask.scatter_(1, hidden, value=True)


def _nearest_differences(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """For every point of either set, the vector to its nearest point of the other, in float32."""
    first, second = first.float(), second.float()
    with torch.no_grad():
        # The minimum passes its gradient to the nearest pair only, so the pairs are found without a graph.
        distances = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
        nearest_second, nearest_first = distances.argmin(-1), distances.argmin(-2)
    forth = first - second.gather(-2, nearest_second[..., None].expand_as(first))
    back = second - first.gather(-2, nearest_first[..., None].expand_as(second))
    return forth, back
