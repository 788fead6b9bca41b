"""What one forward pass must show of an anatomy: calls, order, channels, tokens, the residual stream, the features."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from peft_modal.anatomy import Backbone, Features, Port, WeightSite
from peft_modal.testing.dry_run import DryRun, dry_run

RESIDUAL_TOLERANCE = 1e-5
"""Relative to the largest entry of the stream: float32 rounding of one sum of three tensors."""


def check_forward(backbone: Backbone) -> list[str]:
    """Problems that two forward passes on the example batch show, as sentences."""
    paths = {path for path, _ in backbone.network.named_modules(remove_duplicate=False)}
    ports = [port for port in backbone.anatomy.ports if port.module in paths]
    called = [site for site in backbone.anatomy.sites if "call" in site.reach and site.owner in paths]
    features, run = dry_run(backbone, ports, sorted({site.owner for site in called}))
    problems = list(run.faults)
    with torch.no_grad():
        if not torch.equal(features.tokens, backbone(backbone.example_batch()).tokens):
            problems.append("two forward passes on the example batch in eval mode give different tokens")
    problems += _check_calls(ports, called, run)
    problems += _check_order(ports, run)
    problems += _check_widths(ports, called, run)
    problems += _check_tokens(backbone, ports, run)
    problems += _check_stream(ports, run)
    problems += _check_features(backbone, features)
    return problems


def _check_calls(ports: list[Port], called: list[WeightSite], run: DryRun) -> Iterator[str]:
    watched = [(f"port '{port.name}'", port.module) for port in ports]
    watched += [(f"site '{site.name}' has reach 'call', and", site.owner) for site in called]
    for what, path in watched:
        if run.calls[path] != 1:
            times = "never called" if not run.calls[path] else f"called {run.calls[path]} times"
            yield f"{what}: '{path}' is {times} in one forward pass; it must be called exactly once"


def _check_order(ports: list[Port], run: DryRun) -> Iterator[str]:
    events = [(run.first[port.module, port.side], port) for port in ports if (port.module, port.side) in run.first]
    for (time, port), (next_time, following) in pairwise(events):
        if next_time < time:
            yield f"port '{following.name}' is listed after '{port.name}' but fires before it"
    for earlier, later in (("attn.out", "attn.branch"), ("mlp.out", "mlp.branch"), ("block.in", "block.out")):
        for time, port in events:
            if port.role == later:
                partner = _in_block(events, earlier, port)
                if partner is not None and partner[0] > time:
                    yield f"port '{partner[1].name}' fires after '{port.name}'; '{earlier}' lies before '{later}'"


def _in_block(events: list[tuple[int, Port]], role: str, port: Port) -> tuple[int, Port] | None:
    here = (role, port.stack, port.block)
    return next((event for event in events if (event[1].role, event[1].stack, event[1].block) == here), None)


def _check_widths(ports: list[Port], called: list[WeightSite], run: DryRun) -> Iterator[str]:
    for port in ports:
        if port.name in run.seen:
            yield from _width(f"port '{port.name}'", run.seen[port.name], port.channel_dim, port.width)
    for site in called:
        if site.rows is None and site.owner in run.outputs and site.op in {"linear", "conv", "norm"}:
            yield from _width(f"site '{site.name}'", run.outputs[site.owner], site.out_dim, site.shape[0])


def _width(what: str, tensor: Tensor, axis: int, width: int) -> Iterator[str]:
    if not -tensor.dim() <= axis < tensor.dim():
        yield f"{what}: there is no axis {axis} in a tensor of shape {tuple(tensor.shape)}"
    elif tensor.shape[axis] != width:
        yield f"{what}: the anatomy says {width} channels on axis {axis} of a tensor of shape {tuple(tensor.shape)}"


def _check_tokens(backbone: Backbone, ports: list[Port], run: DryRun) -> Iterator[str]:
    counts: dict[tuple[str, int | None], dict[int, str]] = {}
    for port in ports:
        layout = backbone.anatomy.layouts.get(port.stack)
        if "tokens" not in port.allows or port.name not in run.seen:
            continue
        if layout is None:
            yield f"port '{port.name}' allows 'tokens', but stack '{port.stack}' has no token layout"
            continue
        shape = tuple(run.seen[port.name].shape)
        fixed = sum(segment.count or 0 for segment in layout.segments)
        if len(shape) != 3 or shape[layout.token_dim] <= fixed:
            yield f"port '{port.name}': {shape} is no sequence of {fixed} fixed tokens and at least one data token"
            continue
        if layout.prompt_index is not None and not 0 <= layout.prompt_index <= shape[layout.token_dim]:
            yield f"stack '{port.stack}': prompt_index {layout.prompt_index} lies outside a sequence of shape {shape}"
        counts.setdefault((port.stack, port.block), {}).setdefault(shape[layout.token_dim], port.name)
    for (stack, block), seen in counts.items():
        if len(seen) > 1:
            text = ", ".join(f"{count} at '{name}'" for count, name in seen.items())
            yield f"block {block} of '{stack}' changes the number of tokens ({text}), so prompts cannot be stripped"


def _check_stream(ports: list[Port], run: DryRun) -> Iterator[str]:
    blocks: dict[tuple[str, int], dict[str, Tensor]] = {}
    for port in ports:
        if port.block is not None and port.name in run.seen:
            blocks.setdefault((port.stack, port.block), {})[port.role] = run.seen[port.name]
    for (stack, block), seen in blocks.items():
        if not {"block.in", "block.out", "attn.branch", "mlp.branch"} <= set(seen):
            continue
        out = seen["block.out"]
        listed = [seen["block.in"], *(tensor for role, tensor in seen.items() if role.endswith(".branch"))]
        # A sub-layer may take a picture's rows as one sequence.
        parts = [
            part.reshape(out.shape) if part.shape[0] == out.shape[0] and part.shape[-1] == out.shape[-1] else part
            for part in listed
            if part.numel() == out.numel()
        ]
        if len(parts) < len(listed) or any(part.shape != out.shape for part in parts):
            yield f"block {block} of '{stack}': 'block.in', 'block.out' and the branches differ in shape"
            continue
        error = float((torch.stack(parts).sum(0) - out).abs().max() / out.abs().max().clamp_min(1e-12))
        if not error <= RESIDUAL_TOLERANCE:
            yield (
                f"block {block} of '{stack}': 'block.out' is not 'block.in' plus the branches (off by {error:.1e} of "
                "its largest entry): a port does not lie on the residual stream, or the block adds something inside"
            )


def _check_features(backbone: Backbone, features: Features) -> Iterator[str]:
    spec = backbone.feature_spec()
    tokens = features.tokens
    axis = 1 if tokens.dim() == 4 else -1
    for what, width in (("feature_width", backbone.feature_width), ("feature_spec().width", spec.width)):
        if tokens.shape[axis] != width:
            yield f"{what} is {width}, but the tokens have shape {tuple(tokens.shape)}"
    if spec.layout != features.layout:
        yield "feature_spec().layout is not the layout that a forward pass returns"
    elif features.layout is not None:
        fixed = sum(segment.count or 0 for segment in features.layout.segments)
        if tokens.dim() != 3 or tokens.shape[features.layout.token_dim] <= fixed:
            yield f"the returned tokens of shape {tuple(tokens.shape)} do not fit their layout"
    if spec.exports:
        yield f"feature_spec() lists exports ({', '.join(spec.exports)}) though nothing is attached"
    with torch.no_grad():
        size = backbone(backbone.example_batch(3)).tokens.shape[0]
    if size != 3:
        yield f"example_batch(3) gives features of {size} samples"
