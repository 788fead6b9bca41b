"""What an adapter and a head train, place by place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from torch import nn

from peft_modal.anatomy import Anatomy, Port, WeightSite
from peft_modal.attach import Adapter
from peft_modal.attach.weights import LeafAttachment

Group = Literal["adapter", "backbone", "head", "training_only"]

_GROUP_OF: Final[dict[str, Group]] = {"adapter": "adapter", "backbone": "backbone", "training_only": "training_only"}
"""By the first part of a trained tensor's name."""


@dataclass(frozen=True)
class TrainedTensor:
    """One trained tensor."""

    name: str
    """As in an adapter file: `adapter.blocks.0.attn.q.down`."""
    shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class TrainedPlace:
    """The trained tensors that act at one place of the network."""

    group: Group
    stack: str
    """"" for the head, and for what the anatomy does not name."""
    blocks: tuple[int, ...]
    """Several where one tensor acts in all of them; none outside the blocks."""
    role: str
    """Of the site, or of the ports in order: `attn.q`, `mlp.norm.in > block.out`; of a head, its module."""
    sites: tuple[str, ...]
    """Names of the sites and ports in the anatomy."""
    tensors: tuple[TrainedTensor, ...]

    @property
    def parameters(self) -> int:
        """Of all its tensors."""
        return sum(tensor.parameters for tensor in self.tensors)


def trained_places(adapter: Adapter, head: nn.Module | None) -> list[TrainedPlace]:
    """Everything that is trained, by group and in order of execution; each tensor once.

    A tensor that acts at several places (a module shared by layers) stands at the first and names them all.
    """
    anatomy = adapter.backbone.anatomy
    where = _acting(adapter, anatomy)
    found: dict[tuple[Group, tuple[str, ...], str], list[TrainedTensor]] = {}
    for name, parameter in adapter.named_trained().items():
        group = _GROUP_OF[name.partition(".")[0]]
        sites = where.get(id(parameter), ())
        # Without a place of its own, the module that holds it stands for it.
        key = (group, tuple(site.name for site in sites), "" if sites else name.rpartition(".")[0])
        found.setdefault(key, []).append(_tensor(name, parameter))
    known: list[WeightSite | Port] = [*anatomy.sites, *anatomy.ports]
    by_name = {place.name: place for place in known}
    by_name |= {site.name: site for sites in where.values() for site in sites}  # outputs of operations are made ports
    places = [_place(group, [by_name[n] for n in names], holder, tensors) for (group, names, holder), tensors in
              found.items()]  # fmt: skip
    if head is not None:
        for holder, own in _by_holder(head).items():
            places.append(TrainedPlace("head", "", (), holder, (), tuple(own)))
    order = {name: index for index, name in enumerate(by_name)}
    rank: dict[Group, int] = {"adapter": 0, "backbone": 1, "head": 2, "training_only": 3}
    blocked = {stack: index for index, stack in enumerate(dict.fromkeys(s.stack for s in anatomy.sites))}

    def key_of(place: TrainedPlace) -> tuple[int, ...]:
        at = min((order[name] for name in place.sites), default=len(order))
        return (rank[place.group], blocked.get(place.stack, len(blocked)), min(place.blocks, default=-1), at)

    return sorted(places, key=key_of)


def _acting(adapter: Adapter, anatomy: Anatomy) -> dict[int, tuple[WeightSite | Port, ...]]:
    """By identity of a parameter: the sites and ports where it acts."""
    by_path = {site.path: site for site in anatomy.sites if site.rows is None}
    where: dict[int, list[WeightSite | Port]] = {}
    for attachment in adapter.attachments:
        sites: Iterable[WeightSite | Port] = attachment.where()
        if isinstance(attachment, LeafAttachment):
            sites = [by_path[attachment.path]] if attachment.path in by_path else []
        for parameter in attachment.parameters():
            known = where.setdefault(id(parameter), [])
            known.extend(site for site in sites if site not in known)
    return {key: tuple(sites) for key, sites in where.items()}


def _place(group: Group, sites: list[WeightSite | Port], holder: str, tensors: list[TrainedTensor]) -> TrainedPlace:
    if not sites:
        return TrainedPlace(group, "", (), holder.partition(".")[2], (), tuple(tensors))
    blocks = tuple(dict.fromkeys(site.block for site in sites if site.block is not None))
    role = " > ".join(dict.fromkeys(site.role for site in sites))
    return TrainedPlace(group, sites[0].stack, blocks, role, tuple(site.name for site in sites), tuple(tensors))


def _by_holder(head: nn.Module) -> dict[str, list[TrainedTensor]]:
    found: dict[str, list[TrainedTensor]] = {}
    for name, parameter in head.named_parameters():
        found.setdefault(name.rpartition(".")[0], []).append(_tensor(f"head.{name}", parameter))
    return found


def _tensor(name: str, parameter: nn.Parameter) -> TrainedTensor:
    return TrainedTensor(name, tuple(parameter.shape), parameter.numel())
