"""Checking an anatomy against the network it describes; what the author of a backbone runs first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from peft_modal.anatomy import Backbone, Port, WeightSite
from peft_modal.anatomy.registered import has_parameter_slot
from peft_modal.testing.anatomy_forward import check_forward
from peft_modal.testing.anatomy_reach import check_reach
from peft_modal.testing.dry_run import no_attention_fast_path


def assert_anatomy(backbone: Backbone) -> None:
    """Raise if the anatomy does not describe the network.

    Raises:
        AssertionError: One line for each problem of `check_anatomy`.
    """
    problems = check_anatomy(backbone)
    if problems:
        raise AssertionError(f"the anatomy of {type(backbone).__name__} is wrong:\n- " + "\n- ".join(problems))


def check_anatomy(backbone: Backbone) -> list[str]:
    """Compare what an anatomy states with what the network does, by a few forward passes on the example batch.

    Paths, shapes, row slices, channel axes, call counts, the order of ports, the residual stream, token counts,
    features, gradient checkpointing, and whether what stands in for a weight is read. A stand-in counts as read when a
    gradient reaches it: a change of the output is no criterion, an attention key's bias cancels in the softmax.

    Args:
        backbone: A backbone with nothing attached; its weights do not matter, and it is left as it was.

    Returns:
        Problems as sentences; empty if there are none.
    """
    if backbone.adapters:
        return [f"adapters are attached ({', '.join(backbone.adapters)}); check the bare backbone"]
    mode = backbone.training
    before = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    backbone.eval()
    try:
        with no_attention_fast_path():
            problems = [*_check_places(backbone), *_check_slices(backbone), *_check_links(backbone)]
            problems += _guarded(check_forward, backbone)
            problems += _guarded(check_reach, backbone)
    finally:
        backbone.train(mode)
    after = backbone.network.state_dict()
    problems += [
        f"a forward pass in eval mode changes '{name}'"
        for name, value in before.items()
        if not torch.equal(value, after[name])
    ]
    return problems


def _check_places(backbone: Backbone) -> Iterator[str]:
    network, depth = backbone.network, backbone.anatomy.depth
    paths = {path for path, _ in network.named_modules(remove_duplicate=False)}
    for port in backbone.anatomy.ports:
        if port.module not in paths:
            yield f"port '{port.name}': the network has no module '{port.module}'"
    for site in backbone.anatomy.sites:
        for what, path in (("holder", site.holder), ("owner", site.owner)):
            if path not in paths:
                yield f"site '{site.name}': the network has no module '{path}' ({what})"
        if site.holder in paths:
            yield from _check_tensor(backbone, site)
    places: list[Port | WeightSite] = [*backbone.anatomy.ports, *backbone.anatomy.sites]
    for place in places:
        blocks = depth.get(place.stack, 0)
        if place.block is not None and not 0 <= place.block < blocks:
            yield f"'{place.name}' lies in block {place.block}, but stack '{place.stack}' has {blocks} blocks"
    if any(parameter.requires_grad for parameter in network.parameters()):
        yield "a parameter of the network requires a gradient; the frozen network never does"
    own, prefixed = list(backbone.state_dict()), [f"network.{name}" for name in network.state_dict()]
    if own != prefixed:
        extra = sorted(set(own) ^ set(prefixed))
        yield f"the backbone registers tensors beside its network ({', '.join(extra[:3])}); nobody would save them"


def _check_tensor(backbone: Backbone, site: WeightSite) -> Iterator[str]:
    try:
        stored = backbone.tensor(site.path)
    except KeyError:
        yield f"site '{site.name}': '{site.holder}' has no tensor '{site.tensor}'"
        return
    holder = backbone.network.get_submodule(site.holder)
    if site.bias is not None and not has_parameter_slot(holder, site.bias):
        yield f"site '{site.name}': '{site.holder}' has no bias slot '{site.bias}'"
    if not stored.is_floating_point():
        return  # packed: its stored shape is not the logical one
    expected = tuple(stored.shape)
    if site.rows is not None:
        expected = (site.rows[1] - site.rows[0], *expected[1:])
    if site.shape != expected:
        yield f"site '{site.name}': the anatomy says shape {site.shape}, the network has {expected}"
    if site.heads is not None and (site.shape[0] // max(1, len(site.parts))) % site.heads:
        yield f"site '{site.name}': {site.shape[0]} rows cannot be split into {site.heads} heads"


def _check_slices(backbone: Backbone) -> Iterator[str]:
    sites = backbone.anatomy.sites
    slices: dict[str, list[WeightSite]] = {}
    for site in sites:
        if site.rows is not None:
            slices.setdefault(site.path, []).append(site)
    for whole in (site for site in sites if site.parts):
        parts = slices.pop(whole.path, [])
        if tuple(part.name for part in parts) != whole.parts:
            names = ", ".join(part.name for part in parts) or "missing"
            yield f"site '{whole.name}': its parts are {', '.join(whole.parts)}, but its slices are {names}"
        edge = 0
        for part in parts:
            assert part.rows is not None
            if part.rows[0] != edge:
                fault = "overlap the slice before" if part.rows[0] < edge else "leave a gap before them"
                yield f"site '{part.name}': rows {part.rows[0]}..{part.rows[1]} {fault} ('{whole.path}', {edge})"
            edge = part.rows[1]
        if edge != whole.shape[0]:
            yield f"site '{whole.name}': its slices end at row {edge}, the tensor has {whole.shape[0]}"
    for path, parts in slices.items():
        yield f"'{path}' has slices ({', '.join(part.name for part in parts)}) but no site for the whole tensor"


def _check_links(backbone: Backbone) -> Iterator[str]:
    anatomy = backbone.anatomy
    names = {site.name for site in anatomy.sites}
    operations = {(site.holder, site.bias): site for site in anatomy.sites if site.bias and site.rows is None}
    for site in anatomy.sites:
        for other in sorted(set(site.coupled) - names):
            yield f"site '{site.name}': it is coupled to '{other}', which does not exist"
        operation = operations.get((site.holder, site.tensor))
        if operation is not None and operation.out_dim != site.out_dim:
            yield f"site '{site.name}': out_dim is {site.out_dim}, that of its operation is {operation.out_dim}"
    for site in anatomy.always_trained:
        if "leaf" not in site.reach:
            yield f"site '{site.name}' is always trained, so its reach must have 'leaf'"
    for stack, layout in anatomy.layouts.items():
        roles = {(port.role, port.block) for port in anatomy.ports if port.stack == stack and "tokens" in port.allows}
        for block in range(anatomy.depth.get(stack, 0)) if layout.prompt_index is not None else ():
            for role in ("block.in", "block.out"):
                if (role, block) not in roles:
                    yield f"stack '{stack}' takes prompts, but block {block} has no '{role}' port that allows 'tokens'"
        if layout.prompt_index is None and not layout.reason:
            yield f"stack '{stack}' takes no prompts and gives no reason"


def _guarded(check: Callable[[Backbone], list[str]], backbone: Backbone) -> list[str]:
    try:
        return check(backbone)
    except Exception as error:  # noqa: BLE001 — whatever the author's own code raises is a finding
        return [f"a forward pass on the example batch fails with {type(error).__name__}: {error}"]
