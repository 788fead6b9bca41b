"""From a LoRA folder of peft's to a method of ours and the tensors that fill it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_modal.anatomy import Anatomy, Backbone, Selector, WeightSite
from peft_modal.errors import FileFormatError, nearest
from peft_modal.hf.files import LoraFolder
from peft_modal.hf.layers import module_path
from peft_modal.hf.pairs import Pair


@dataclass(frozen=True)
class Imported:
    """What a LoRA folder comes to on one backbone."""

    method: Mapping[str, Any]
    """A method node: `lora` where one rank and scale hold for all sites, else `hf` with patterns."""
    tensors: Mapping[str, Tensor]
    """The adapter's tensors, and the head's where the folder has them."""


def import_lora(folder: LoraFolder, backbone: Backbone) -> Imported:
    """Map a LoRA folder onto the sites of a backbone.

    Raises:
        FileFormatError: A module of the folder is no site of the network, or a shape does not fit.
    """
    found: dict[str, tuple[WeightSite, Pair]] = {}
    for pair in folder.pairs:
        site = _site(pair, backbone)
        down, up = (pair.rank, *site.shape[1:]), (site.shape[0], pair.rank, *(1 for _ in site.shape[2:]))
        if (tuple(pair.down.shape), tuple(pair.up.shape)) != (down, up):
            raise FileFormatError(
                f"the pair of '{pair.holder}' has shapes {tuple(pair.down.shape)} and {tuple(pair.up.shape)}; "
                f"'{site.name}' of this network needs {down} and {up}"
            )
        found[site.name] = (site, pair)
    sites = [site for site, _ in found.values()]
    selection = _selection(backbone.anatomy, sites)
    pairs = [pair for _, pair in found.values()]
    plain = all(pair.magnitude is None for pair in pairs) and len({(pair.rank, pair.scale) for pair in pairs}) == 1
    tensors = dict(folder.rest)
    for name, (_, pair) in found.items():
        tensors |= _ours(name, pair) if plain else _tuner(name, pair)
    if plain:
        alpha = pairs[0].scale * pairs[0].rank
        return Imported({"name": "lora", "sites": selection, "rank": pairs[0].rank, "alpha": alpha}, tensors)
    return Imported(_hf_node(selection, found, dora=pairs[0].magnitude is not None), tensors)


def _site(pair: Pair, backbone: Backbone) -> WeightSite:
    whole = [s for s in backbone.anatomy.sites if s.rows is None and s.op in {"linear", "conv"}]
    for site in whole:
        if site.holder == pair.holder and site.tensor in {"weight", "in_proj_weight"}:
            return site
    known = {site.holder for site in whole}
    raise FileFormatError(
        f"the folder adapts '{pair.holder}', which is no site of this network; {nearest(pair.holder, known)}"
    )


def _selection(anatomy: Anatomy, sites: list[WeightSite]) -> dict[str, Any]:
    """Selects exactly these sites: by roles where that suffices, else by their names too."""
    roles = sorted({site.role for site in sites})
    chosen = anatomy.select(Selector(roles=tuple(roles)), needs=("call", "weight"), optional=True)
    if {site.name for site in chosen} == {site.name for site in sites}:
        return {"roles": roles}
    names = "|".join(re.escape(site.name) for site in sites)
    return {"roles": roles, "path": f"^(?:{names})$"}


def _ours(name: str, pair: Pair) -> dict[str, Tensor]:
    return {f"adapter.{name}.down": pair.down, f"adapter.{name}.up": pair.up}


def _tuner(name: str, pair: Pair) -> dict[str, Tensor]:
    base = f"adapter.{name}.tuner"
    tensors = {f"{base}.lora_A.default.weight": pair.down, f"{base}.lora_B.default.weight": pair.up}
    if pair.magnitude is not None:
        tensors[f"{base}.lora_magnitude_vector.default.weight"] = pair.magnitude
    return tensors


def _hf_node(
    selection: Mapping[str, Any], found: Mapping[str, tuple[WeightSite, Pair]], *, dora: bool
) -> dict[str, Any]:
    ranks, alphas = {}, {}
    for site, pair in sorted(found.values(), key=lambda entry: -len(module_path(entry[0]))):
        path = re.escape(module_path(site))
        ranks[path], alphas[path] = pair.rank, pair.scale * pair.rank
    config: dict[str, Any] = {"r": max(ranks.values()), "rank_pattern": ranks, "alpha_pattern": alphas}
    return {"name": "hf", "tuner": "dora" if dora else "lora", "sites": dict(selection), "config": config}
