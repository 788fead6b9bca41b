"""The tensors of a backbone that SPT ranks: matrices and vectors of blocks and final norm, fused ones by slice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peft_modal.anatomy import Anatomy, Selector, WeightSite

MATRICES = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.out")


@dataclass(frozen=True)
class Place:
    """A stored tensor, or rows of it."""

    name: str
    site: WeightSite
    """A site that is this tensor; of a slice of a fused bias the whole bias."""
    first: int
    last: int
    """Rows."""
    is_matrix: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows."""
        return self.last - self.first, *self.site.shape[1:]

    @property
    def size(self) -> int:
        """Entries."""
        size = 1
        for side in self.shape:
            size *= side
        return size


def places_of(anatomy: Anatomy, selector: Selector) -> dict[str, Place]:
    """All of them by name, in order of execution, each matrix before its bias.

    Matrices are the selected linears; vectors their biases, and norms' scales and shifts in the stacks of these. Norms
    before the first block belong to the patch embedding and are left out.
    """
    matrices = {site.name: site for site in anatomy.select(selector, needs=("call", "weight")) if site.op == "linear"}
    stacks = {site.stack for site in matrices.values()}
    found: dict[str, Place] = {}
    begun: set[str] = set()
    for site in anatomy.sites:
        if site.block is not None:
            begun.add(site.stack)
        if site.name in matrices:
            for place in _with_bias(anatomy, site):
                found[place.name] = place
        elif site.op == "norm" and site.stack in stacks & begun and "weight" in site.reach:
            found[site.path] = Place(site.path, site, 0, site.shape[0], is_matrix=False)
    return found


def _with_bias(anatomy: Anatomy, site: WeightSite) -> Iterator[Place]:
    first, last = site.rows or (0, site.shape[0])
    whole = site if site.rows is None else next(other for other in anatomy.sites if site.name in other.parts)
    # A slice's own rows count from its first one.
    yield Place(f"{site.name}.weight", site, 0, last - first, is_matrix=True)
    bias = next(
        (
            other
            for other in anatomy.sites
            if site.bias is not None and (other.holder, other.tensor) == (whole.holder, site.bias)
        ),
        None,
    )
    if bias is not None:
        yield Place(f"{site.name}.bias", bias, first, last, is_matrix=False)
