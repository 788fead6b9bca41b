"""The anatomy of a backbone, block by block, with blocks that are alike told once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft_modal.anatomy import Anatomy, Backbone, Port, TokenLayout, WeightSite
from peft_modal.compose import Composed
from peft_modal.inspection.building import build_backbone
from peft_modal.inspection.ranges import common_name, runs, shown_numbers


@dataclass(frozen=True)
class Section:
    """Neighbouring blocks with the same sites and ports, or what lies outside the blocks of a stack."""

    title: str
    """`blocks 0-11`, or `blocks, outside its blocks`."""
    sites: tuple[tuple[str, WeightSite], ...]
    """Name common to the blocks, and the first block's site."""
    ports: tuple[tuple[str, Port], ...]


@dataclass(frozen=True)
class AnatomyReport:
    """A backbone as methods see it."""

    composed: Composed
    backbone: Backbone

    @property
    def anatomy(self) -> Anatomy:
        """Its anatomy."""
        return self.backbone.anatomy

    @property
    def parameters(self) -> int:
        """Of the whole network."""
        return sum(p.numel() for p in self.backbone.network.parameters())

    def sections(self) -> list[Section]:
        """The anatomy in order of execution, alike blocks together."""
        places: list[WeightSite | Port] = [*self.anatomy.sites, *self.anatomy.ports]
        stacks = dict.fromkeys(place.stack for place in places)
        found = []
        for stack in stacks:
            outside = _Block(None, self.anatomy, stack)
            if outside.sites or outside.ports:
                found.append(_section(f"{stack}, outside its blocks" if self.anatomy.depth.get(stack) else stack,
                                      [outside]))  # fmt: skip
            blocks = [_Block(index, self.anatomy, stack) for index in range(self.anatomy.depth.get(stack, 0))]
            for run in runs(blocks, alike=lambda block: block.looks):
                numbers = [block.index for block in run if block.index is not None]
                found.append(_section(f"{stack} {shown_numbers(numbers)}", run))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`; no blocks are put together."""
        anatomy = self.anatomy
        return {
            "kind": "backbone",
            "backbone": self.composed.nodes["backbone"].to_dict(),
            "modality": self.composed.nodes["backbone"].modality,
            "parameters": self.parameters,
            "feature_width": self.backbone.feature_width,
            "depth": dict(anatomy.depth),
            "sites": [{**asdict(site), "reach": sorted(site.reach), "path": site.path} for site in anatomy.sites],
            "ports": [{**asdict(port), "allows": sorted(port.allows)} for port in anatomy.ports],
            "layouts": {stack: asdict(layout) for stack, layout in anatomy.layouts.items()},
            "always_trained": [site.name for site in anatomy.always_trained],
        }


def inspect_backbone(composed: Composed) -> AnatomyReport:
    """Build a backbone on the meta device; its weights are not looked for.

    Raises:
        ConfigError: It cannot be built without values.
    """
    return AnatomyReport(composed, build_backbone(composed.nodes["backbone"]))


def describe_layout(layout: TokenLayout) -> str:
    """A token layout in a sentence."""
    tokens = " + ".join(
        f"{segment.name} ({'data' if segment.count is None else segment.count})" for segment in layout.segments
    )
    if layout.prompt_index is None:
        prompts = f"no prompts: {layout.reason}"
    else:
        prompts = f"prompts enter at position {layout.prompt_index}"
    repeats = "; positions are added before every block" if layout.repeats_positions else ""
    body = f"a {layout.body}" if layout.body in {"grid", "sequence"} else layout.body
    return f"{tokens}; behind the data tokens lie {body}; {prompts}{repeats}"


class _Block:
    def __init__(self, index: int | None, anatomy: Anatomy, stack: str) -> None:
        self.index = index
        self.sites = [site for site in anatomy.sites if (site.stack, site.block) == (stack, index)]
        self.ports = [port for port in anatomy.ports if (port.stack, port.block) == (stack, index)]

    @property
    def looks(self) -> tuple[object, ...]:
        sites = tuple((s.role, s.op, s.shape, s.rows, s.reach, s.heads, len(s.parts)) for s in self.sites)
        ports = tuple((p.role, p.width, p.channel_dim, p.allows, p.side, p.item) for p in self.ports)
        return sites, ports


def _section(title: str, blocks: Sequence[_Block]) -> Section:
    first = blocks[0]
    sites = ((common_name([b.sites[i].name for b in blocks]), site) for i, site in enumerate(first.sites))
    ports = ((common_name([b.ports[i].name for b in blocks]), port) for i, port in enumerate(first.ports))
    return Section(title, tuple(sites), tuple(ports))
