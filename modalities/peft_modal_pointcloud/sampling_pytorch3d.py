"""The two searches of `sampling` by PyTorch3D's operators, which have kernels of their own on a GPU.

Its farthest point sampling knows no rule about the origin (Point-MAE's kernel never picks a point with |p|^2 <= 1e-3
but index 0). Such points are moved behind the length that it is told, so that both pick the same.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from peft_modal.errors import MissingExtraError
from peft_modal.extras import missing_packages
from peft_modal_pointcloud.sampling import check_centres, check_points, is_near_origin


def operators() -> ModuleType:
    """`pytorch3d.ops`.

    Raises:
        MissingExtraError: It is not installed.
    """
    if missing_packages(["pytorch3d"]):
        raise MissingExtraError(
            "backbone.grouping: 'pytorch3d' is not installed; its INSTALL.md says which build fits this PyTorch, or "
            "set it to 'own'."
        )
    from pytorch3d import ops

    return ops


@torch.no_grad()
def farthest_point_sample(points: Tensor, num: int) -> Tensor:
    """See `sampling.farthest_point_sample`."""
    check_points(points, num=num)
    count = points.shape[1]
    cloud = points.detach().float()
    is_left_out = is_near_origin(cloud)
    is_first_near = is_left_out[:, 0].clone()
    is_left_out[:, 0] = False
    order = is_left_out.byte().argsort(dim=1, stable=True)
    lengths = count - is_left_out.sum(1)
    chosen = operators().sample_farthest_points(
        cloud.gather(1, order[..., None].expand(-1, -1, 3)), lengths=lengths, K=num, random_start_point=False
    )[1]
    # Past the length it gives -1; the kernel gives the first point that it may pick. So it does where all are used up.
    fallback = torch.where(is_first_near & (lengths > 1), 1, 0)[:, None]
    later = torch.where((chosen < 0) | ((chosen == 0) & is_first_near[:, None]), fallback, chosen)
    later[:, 0] = 0
    return order.gather(1, later)


@torch.no_grad()
def knn(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """See `sampling.knn`."""
    check_centres(points, centres, k)
    return operators().knn_points(centres.detach().float(), points.detach().float(), K=k, return_sorted=True).idx
