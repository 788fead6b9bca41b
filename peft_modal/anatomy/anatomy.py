"""The anatomy of one network: its sites, ports and token layouts, and how methods select among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from peft_modal.anatomy.layout import TokenLayout
from peft_modal.anatomy.selector import Selector
from peft_modal.anatomy.sites import Port, WeightSite
from peft_modal.errors import SelectionError, nearest

_PlaceT = TypeVar("_PlaceT", WeightSite, Port)


class Anatomy:
    """What a backbone's author says once about a network, so that every method works there.

    Args:
        sites: Weight sites in order of execution.
        ports: Ports in order of execution.
        layouts: Token layout of each stack that carries a token sequence.
        depth: Number of blocks of each stack.
        always_trained: Names of sites that every method trains besides its own parameters: tensors that the
            pre-trained file does not hold, or that the authors' protocol always trains (Point-MAE's class token).
    """

    def __init__(
        self,
        *,
        sites: Sequence[WeightSite],
        ports: Sequence[Port],
        layouts: Mapping[str, TokenLayout],
        depth: Mapping[str, int],
        always_trained: Sequence[str] = (),
    ) -> None:
        self.sites = tuple(sites)
        self.ports = tuple(ports)
        self.layouts = dict(layouts)
        self.depth = dict(depth)
        self._sites = _unique(self.sites, "site")
        self._ports = _unique(self.ports, "port")
        self.always_trained = tuple(self.site(name) for name in always_trained)

    def site(self, name: str) -> WeightSite:
        """The site of that name.

        Raises:
            SelectionError: There is none.
        """
        if name not in self._sites:
            raise SelectionError(f"this network has no site '{name}'; {nearest(name, self._sites)}")
        return self._sites[name]

    def select(
        self, selector: Selector, *, needs: str | tuple[str, ...], fused: bool = False, optional: bool = False
    ) -> tuple[WeightSite, ...]:
        """Sites that `selector` names, in order of execution.

        Args:
            selector: What to choose.
            needs: Member of `reach` that each site must have, or several of which one suffices.
            fused: Prefer a whole fused tensor to its row slices; otherwise it is chosen by its exact role only.
            optional: Leave out sites that cannot be reached instead of refusing the selection.

        Raises:
            SelectionError: Nothing matches, or a matching site cannot be reached.
        """
        needs = (needs,) if isinstance(needs, str) else needs
        found = [site for site in self.sites if self._matches(selector, site, fused=fused)]
        if fused:
            covered = {part for site in found for part in site.parts}
            found = [site for site in found if site.name not in covered]
        refused = [site for site in found if not site.reach.intersection(needs)]
        if refused and not optional:
            names = ", ".join(site.name for site in refused[:3])
            raise SelectionError(
                f"{len(refused)} of {len(found)} selected sites cannot be acted on by {' or '.join(needs)} ({names}); "
                f"they allow {', '.join(sorted(set().union(*(s.reach for s in refused)))) or 'nothing'}"
            )
        found = [site for site in found if site.reach.intersection(needs)]
        if not found:
            raise SelectionError(self._nothing("sites", selector, self.sites))
        return tuple(found)

    def select_ports(self, selector: Selector, *, needs: str) -> tuple[Port, ...]:
        """Ports that `selector` names, in order of execution.

        Raises:
            SelectionError: Nothing matches, or a matching port does not allow `needs`.
        """
        found = [port for port in self.ports if self._matches(selector, port)]
        if not found:
            raise SelectionError(self._nothing("ports", selector, self.ports))
        refused = [port for port in found if needs not in port.allows]
        if refused:
            raise SelectionError(
                f"port '{refused[0].name}' allows {', '.join(sorted(refused[0].allows)) or 'nothing'}, not '{needs}'"
            )
        return tuple(found)

    def port(self, role: str, *, stack: str, block: int | None) -> Port:
        """The one port with that role in that block: the partner of a selected port.

        Raises:
            SelectionError: The block has no such port.
        """
        for port in self.ports:
            if (port.role, port.stack, port.block) == (role, stack, block):
                return port
        here = sorted({p.role for p in self.ports if (p.stack, p.block) == (stack, block)})
        where = f"block {block} of '{stack}'" if block is not None else f"'{stack}' outside its blocks"
        raise SelectionError(f"{where} has no port '{role}'; it has {', '.join(here) or 'none'}")

    def output_port(self, site: WeightSite) -> Port:
        """The output of the operation that a called site belongs to.

        Raises:
            SelectionError: The operation is not a module that is called.
        """
        if "call" not in site.reach:
            raise SelectionError(f"'{site.name}' is read inside a function, so its output is no port")
        return Port(
            name=f"{site.name}.out", role=f"{site.role}.out", stack=site.stack, block=site.block, module=site.owner,
            side="out", width=site.shape[0], channel_dim=site.out_dim, allows=frozenset({"read", "add", "replace"}),
        )  # fmt: skip

    def input_port(self, site: WeightSite, *, width: int) -> Port:
        """The input of the operation that a called site belongs to; see `output_port`."""
        out = self.output_port(site)
        return replace(out, name=f"{site.name}.in", role=f"{site.role}.in", side="in", width=width)

    def layout(self, port: Port) -> TokenLayout:
        """Token layout of a sequence port.

        Raises:
            SelectionError: The port's stack carries no token sequence.
        """
        if port.stack not in self.layouts:
            raise SelectionError(f"'{port.name}' carries no token sequence")
        return self.layouts[port.stack]

    def _matches(self, selector: Selector, place: WeightSite | Port, *, fused: bool = False) -> bool:
        whole = isinstance(place, WeightSite) and bool(place.parts) and not fused
        if not selector.matches_role(place.role, exact=whole) or not selector.matches_stack(place.stack):
            return False
        if not selector.matches_name(place.name):
            return False
        blocks = selector.block_indices(self.depth.get(place.stack, 0), place.stack)
        return blocks is None or place.block in blocks

    @staticmethod
    def _nothing(what: str, selector: Selector, places: Iterable[WeightSite | Port]) -> str:
        places = list(places)
        roles = sorted({place.role for place in places})
        hint = ""
        if selector.roles is not None:
            unknown = [r for r in selector.roles if not any(x == r or x.startswith(r + ".") for x in roles)]
            hint = f" ({nearest(unknown[0], roles)})" if unknown else ""
        stacks = sorted({place.stack for place in places})
        return (
            f"no {what} match {selector.describe()}{hint}; roles here: {', '.join(roles)}; stacks: {', '.join(stacks)}"
        )


def _unique(places: Sequence[_PlaceT], what: str) -> dict[str, _PlaceT]:
    by_name: dict[str, _PlaceT] = {}
    for place in places:
        if place.name in by_name:
            raise ValueError(f"two {what}s are called '{place.name}'")
        by_name[place.name] = place
    return by_name
