"""Cutting a cloud into local patches: farthest point sampling, nearest neighbours, grouping.

Indices are computed in float32 whatever the precision of the run (half precision puts many points at one distance),
carry no gradient, and are the same on every device up to rounding. Coordinates keep their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from peft_modal.errors import ConfigError, DataError

NEAR_ORIGIN = 1e-3
"""Squared norm up to which farthest point sampling never picks a point."""

Operators = Literal["own", "pytorch3d"]

_UNREACHED = 1e10
_NEVER = -1.0


@torch.no_grad()
def farthest_point_sample(points: Tensor, num: int, *, skip_origin: bool = True) -> Tensor:
    """Picks `num` points per cloud, each the farthest from those picked before (Point-MAE, ECCV 2022).

    Follows the PointNet++ kernel that all published point transformers were trained with, to the index: the first
    pick is index 0; a point with |p|^2 <= 1e-3 is skipped, so it is picked only as index 0; among equally far points
    the first one wins. Once every point is used up, picked indices come out again.

    Args:
        points: Coordinates (B, N, 3).
        num: How many to pick; may exceed N, which repeats points.
        skip_origin: Skip points near the origin, as the kernel does; data code in NumPy knows no such rule.

    Returns:
        Indices (B, num), int64.

    Raises:
        ConfigError: `num` is below 1.
        DataError: `points` is not (B, N, 3) with at least one point.
    """
    check_points(points, num=num)
    batch = points.shape[0]
    axes = points.detach().float().permute(2, 0, 1).contiguous()  # (3, B, N)
    norm = axes.square().sum(0)
    running = norm.new_full(norm.shape, _UNREACHED)
    if skip_origin:
        running.masked_fill_(_is_near(norm), _NEVER)
    picked = torch.zeros(num, batch, 1, dtype=torch.long, device=points.device)

    # This loop runs in every training step: each operation writes into memory taken once.
    difference = torch.empty_like(axes)
    squared, squared_y, squared_z = difference
    pick = _numpy_argmax(running) if _is_plain(running) else _torch_argmax(running)
    for step in range(1, num):
        torch.sub(axes, axes.gather(2, picked[step - 1].expand(3, batch, 1)), out=difference)
        difference.mul_(difference)
        squared.add_(squared_y).add_(squared_z)
        torch.minimum(running, squared, out=running)
        pick(picked[step])
    return picked.squeeze(2).T.contiguous()


def is_near_origin(points: Tensor) -> Tensor:
    """Which points (B, N, 3) farthest point sampling skips: (B, N) bool."""
    return _is_near(points.detach().float().permute(2, 0, 1).contiguous().square().sum(0))


def _is_near(norm: Tensor) -> Tensor:
    # The kernel compares its float with a double constant; float32(1e-3) lies just above it.
    return norm.double() <= NEAR_ORIGIN


_Pick = Callable[[Tensor], object]
"""Writes the place of each row's first maximum into (B, 1)."""


def _is_plain(values: Tensor) -> bool:
    """Whether NumPy may look into the memory: no GPU, no graph being traced, no tensor without values."""
    return values.device.type == "cpu" and type(values) is Tensor and not torch.compiler.is_compiling()


def _numpy_argmax(values: Tensor) -> _Pick:
    # NumPy's argmax is vectorised on a CPU, torch's is not: it would take more time than all the rest of a step.
    array = values.numpy()
    return lambda out: array.argmax(1, out=out.squeeze(1).numpy())


def _torch_argmax(values: Tensor) -> _Pick:
    largest = values.new_empty(len(values), 1)
    return lambda out: torch.max(values, 1, keepdim=True, out=(largest, out))


@torch.no_grad()
def knn(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """The `k` points nearest to every centre, nearest first; a centre that is itself a point is its own first.

    Args:
        points: Coordinates (B, N, 3).
        centres: Coordinates (B, G, 3).
        k: Neighbours per centre, at most N.

    Returns:
        Indices into the points (B, G, k), int64.

    Raises:
        ConfigError: `k` is below 1 or above N.
        DataError: `points` or `centres` is not (B, N, 3), or their batch sizes differ.
    """
    check_centres(points, centres, k)
    if _is_plain(points.detach()) and _is_plain(centres.detach()):
        return nearest_on_cpu(points.detach().float(), centres.detach().float(), k)
    with torch.autocast(points.device.type, enabled=False):
        # The matrix-product form of the distance loses the small distances that decide a neighbourhood.
        distances = torch.cdist(
            centres.detach().float(), points.detach().float(), compute_mode="donot_use_mm_for_euclid_dist"
        )
    return distances.topk(k, dim=-1, largest=False, sorted=True).indices


def nearest_on_cpu(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """`knn` cloud by cloud, so that distances stay in the processor's cache, and sorting what can be near only.

    The points are dealt into k hands, by their place. The nearest of each hand are k different points, so the k nearest
    of all are no farther than the farthest of these: a tenth of the points or so has to be sorted.

    Args:
        points: float32 (B, N, 3).
        centres: float32 (B, G, 3).
        k: Neighbours per centre, at most N.
    """
    batch, num_points, _ = points.shape
    num_centres = centres.shape[1]
    axes = points.transpose(1, 2).contiguous()
    centre_axes = centres.transpose(1, 2).contiguous()[..., None]
    found = torch.empty(batch, num_centres, k, dtype=torch.long)
    squared, difference = torch.empty(2, num_centres, num_points)
    distances = squared.numpy()
    per_hand = num_points // k
    for cloud in range(batch):
        torch.sub(centre_axes[cloud, 0], axes[cloud, 0], out=squared).square_()
        for axis in (1, 2):
            torch.sub(centre_axes[cloud, axis], axes[cloud, axis], out=difference).square_()
            squared.add_(difference)
        hands = squared[:, : per_hand * k].view(num_centres, per_hand, k)
        is_candidate = ~(distances > hands.amin(1).amax(1, keepdim=True).numpy())  # NaN counts
        counts = is_candidate.sum(1)
        places = np.flatnonzero(is_candidate)
        is_filled = np.arange(counts.max(initial=0)) < counts[:, None]
        candidates = np.full(is_filled.shape, np.inf, dtype=np.float32)
        candidates[is_filled] = distances.ravel()[places]
        names = np.zeros(is_filled.shape, dtype=np.int64)
        names[is_filled] = places % num_points
        order = torch.from_numpy(candidates).topk(k, largest=False, sorted=True).indices
        torch.gather(torch.from_numpy(names), 1, order, out=found[cloud])
    return found


def gather_points(points: Tensor, indices: Tensor) -> Tensor:
    """Coordinates (B, ..., 3) of the points (B, N, 3) that `indices` (B, ...) names; gradient flows to the points."""
    flat = indices.flatten(1)[..., None].expand(-1, -1, points.shape[-1])
    return points.gather(1, flat).reshape(*indices.shape, points.shape[-1])


def group(points: Tensor, *, num_group: int, group_size: int, operators: Operators = "own") -> tuple[Tensor, Tensor]:
    """Cuts every cloud into overlapping patches around spread-out centres.

    Args:
        points: Coordinates (B, N, 3).
        num_group: Patches G per cloud.
        group_size: Points M per patch, at most N.
        operators: Whose searches: those of this module, or `pytorch3d`'s, which find the same.

    Returns:
        The patches (B, G, M, 3), relative to their centre and not rescaled, nearest point first; and the centres
        (B, G, 3).

    Raises:
        ConfigError: `num_group` is below 1, or `group_size` is not in 1..N.
        DataError: `points` is not (B, N, 3) with at least one point.
        MissingExtraError: PyTorch3D is not installed.
    """
    sample: Callable[[Tensor, int], Tensor] = farthest_point_sample
    near: Callable[[Tensor, Tensor, int], Tensor] = knn
    if operators == "pytorch3d":
        from peft_modal_pointcloud import sampling_pytorch3d

        sample, near = sampling_pytorch3d.farthest_point_sample, sampling_pytorch3d.knn
    centres = gather_points(points, sample(points, num_group))
    neighbourhood = gather_points(points, near(points, centres, group_size))
    return neighbourhood - centres[:, :, None], centres


class Grouping(nn.Module):
    """`group` as a module without parameters, so that others can read patches and centres at its output."""

    def __init__(self, *, num_group: int, group_size: int, operators: Operators = "own") -> None:
        super().__init__()
        self.num_group = num_group
        self.group_size = group_size
        self.operators: Operators = operators

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, G, M, 3) and centres (B, G, 3) of `points` (B, N, 3)."""
        return group(points, num_group=self.num_group, group_size=self.group_size, operators=self.operators)

    def extra_repr(self) -> str:
        """The two sizes, for `print(model)`."""
        return f"num_group={self.num_group}, group_size={self.group_size}"


def select_patches(values: Tensor, chosen: Tensor) -> Tensor:
    """Keeps the chosen patches of every cloud, in patch order.

    Args:
        values: One entry per patch (B, G, ...).
        chosen: Boolean (B, G), the same number K of ones in each row.

    Returns:
        The entries (B, K, ...).

    Raises:
        ConfigError: `chosen` is not a boolean (B, G), or its rows choose different numbers of patches.
    """
    if chosen.dtype != torch.bool or chosen.shape != values.shape[:2]:
        raise ConfigError(
            f"patch mask: expected a boolean tensor {tuple(values.shape[:2])}, got {chosen.dtype} "
            f"{tuple(chosen.shape)}."
        )
    counts = chosen.sum(1)
    if bool((counts != counts[0]).any()):
        raise ConfigError(
            f"patch mask: it takes {int(counts.min())} to {int(counts.max())} patches per cloud; every cloud of a "
            "batch needs the same number."
        )
    return values[chosen].reshape(values.shape[0], -1, *values.shape[2:])


def check_points(points: Tensor, *, num: int = 1) -> None:
    """Refuse what no points can be picked of.

    Raises:
        ConfigError: `num` is below 1.
        DataError: `points` is not (B, N, 3) with at least one point.
    """
    if num < 1:
        raise ConfigError(f"farthest point sampling: num is {num}; ask for at least 1 point.")
    if points.ndim != 3 or points.shape[2] != 3 or points.shape[1] < 1:
        raise DataError(
            f"point clouds: expected coordinates of shape (clouds, points, 3), got {tuple(points.shape)}; "
            "drop further channels such as normals or colours, and stack clouds of one length."
        )


def check_centres(points: Tensor, centres: Tensor, k: int) -> None:
    """Refuse what no `k` neighbours can be found of.

    Raises:
        ConfigError: `k` is below 1 or above N.
        DataError: `points` or `centres` is not (B, N, 3), or their batch sizes differ.
    """
    check_points(points)
    check_points(centres)
    num_points = points.shape[1]
    if centres.shape[0] != points.shape[0]:
        raise DataError(f"nearest neighbours: {points.shape[0]} clouds but centres of {centres.shape[0]}.")
    if not 1 <= k <= num_points:
        raise ConfigError(
            f"nearest neighbours: k is {k}, but every cloud has {num_points} points; use a patch size (group_size) "
            f"from 1 to {num_points}, or clouds with more points."
        )
