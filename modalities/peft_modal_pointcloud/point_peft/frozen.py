"""The pre-trained network beside an adapter that changes it: the same tensors, none of the adapter's doings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_modal_pointcloud.network import PointMAE


def frozen_view(network: nn.Module) -> nn.Module:
    """A second set of module objects over the registered tensors of `network`, in eval mode for good.

    Parameters and buffers are not copied: each module of the view has the very dictionaries of its original, so it
    follows what is loaded or moved. Hooks, replaced calls and stand-in tensors, which are how adapters act, stay
    behind. What the view is kept in must not register it: its tensors are the network's.

    Args:
        network: Adapters may be attached to it, before or afterwards.
    """
    return _view(network, {})


def _view(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    view = object.__new__(type(module))
    seen[id(module)] = view
    own = vars(module)
    stand_ins = {*own["_parameters"], *own["_buffers"], "forward"}
    state = {name: value for name, value in own.items() if name not in stand_ins}
    state |= {name: value for name, value in vars(nn.Module()).items() if "hook" in name}
    state["_modules"] = {name: None if child is None else _view(child, seen) for name, child in own["_modules"].items()}
    state["training"] = False
    view.__dict__.update(state)
    return view


class FrozenEncoder:
    """The feature of a cloud by the pre-trained network: no mask, no class token, maximum over the final tokens.

    Not a module: its tensors belong to the backbone.

    Args:
        network: Of the backbone.
        num_groups: Patches that it sees; centres are farthest points, so these are the first ones.
    """

    def __init__(self, network: PointMAE, *, num_groups: int) -> None:
        self.network: PointMAE = frozen_view(network)  # type: ignore[assignment]
        self.num_groups = num_groups

    @torch.no_grad()
    def __call__(self, neighbourhood: Tensor, centres: Tensor) -> Tensor:
        """The feature (B, D), float32, of patches (B, G, M, 3) around centres (B, G, 3).

        Outside of autocast: what is retrieved with it must not depend on the precision of the run.
        """
        network = self.network
        dtype = network.norm.weight.dtype
        with torch.autocast(centres.device.type, enabled=False):
            tokens = network.reduce_dim(network.encoder(neighbourhood[:, : self.num_groups].to(dtype)))
            positions = network.pos_embed(centres[:, : self.num_groups].to(dtype))
            stream, _ = network.blocks(tokens, positions)
            encoded: Tensor = network.norm(stream)
        return encoded.max(1).values.float()

    def of_points(self, points: Tensor) -> Tensor:
        """The feature (B, D) of clouds (B, N, 3)."""
        return self(*self.network.group_divider(points))
