"""What every contract does with a fresh backbone: attach, look at outputs and gradients, shift, train a little."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter, Run
from peft_modal.testing.dry_run import no_attention_fast_path, random_projection

BackboneFactory = Callable[[], Backbone]
"""Makes a new backbone with the same weights at every call."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the global random state, and attention on its slow path, inside."""
    with torch.random.fork_rng(devices=[]), no_attention_fast_path():
        torch.manual_seed(0)
        yield


@torch.no_grad()
def outputs(backbone: Backbone) -> dict[str, Tensor]:
    """Tokens and extras of the example batch."""
    features = backbone(backbone.example_batch())
    return {"tokens": features.tokens, **features.extras}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference of what both have, relative to the largest entry; infinite for other shapes or NaN."""
    worst = 0.0
    for key in one.keys() & other.keys():
        if one[key].shape != other[key].shape:
            return math.inf
        worst = max(worst, _error(one[key], other[key]) / max(1.0, float(other[key].abs().max())))
    return worst


def _error(one: Tensor, other: Tensor) -> float:
    error = float((one - other).abs().max())
    return error if math.isfinite(error) else math.inf  # NaN would compare as no difference


@torch.no_grad()
def shift(adapter: Adapter, *, seed: int = 7, std: float = 0.05) -> None:
    """Move every trained tensor by a random amount: zero-initialised factors hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.named_trained().values():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=std)


def gradients(backbone: Backbone, adapter: Adapter) -> dict[str, Tensor]:
    """Gradients of a random projection of the output for every trained tensor that it reaches, as copies."""
    named = adapter.named_trained()
    for parameter in named.values():
        parameter.grad = None
    loss = random_projection(backbone(backbone.example_batch()))
    if loss.requires_grad:
        torch.autograd.backward(loss)
    adapter.events.after_backward(0)
    return {name: parameter.grad.clone() for name, parameter in named.items() if parameter.grad is not None}


def gradient_distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest difference of two sets of gradients, relative to the largest entry of all, and the name it occurs at."""
    largest = max((float(gradient.abs().max()) for gradient in other.values() if gradient.numel()), default=1.0)
    errors = {
        name: _error(one[name], other[name]) / max(largest, 1e-12)
        for name in one.keys() & other.keys()
        if one[name].numel()
    }
    worst = max(errors, key=lambda name: errors[name], default="")
    return errors.get(worst, 0.0), worst


def train(backbone: Backbone, adapter: Adapter, *, steps: int = 2, lr: float = 0.01) -> set[str]:
    """Take optimiser steps with every event of a run.

    Returns:
        Names of the trained tensors that got a non-zero gradient in at least one of the steps.
    """
    adapter.events.prepare([backbone.example_batch()], lambda batch: {"loss": random_projection(backbone(batch))})
    named = adapter.named_trained()
    # Steps of bounded size: the first gradient behind a LayerNorm of zeros is some 1e4 times the others.
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(named.values(), lr=lr)] if named else []
    run = Run(
        total_steps=steps,
        optimizers=optimizers,
        generator=torch.Generator().manual_seed(0),
        named_parameters=named,
        total_epochs=1,
    )
    adapter.events.on_fit_start(run)
    adapter.events.on_epoch_start(0)
    reached: set[str] = set()
    for step in range(steps):
        adapter.events.step_begin(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        _backward(backbone, adapter)
        adapter.events.before_step(step)
        reached |= {
            name for name, p in adapter.named_trained().items() if p.grad is not None and bool(p.grad.abs().sum() > 0)
        }
        for optimizer in optimizers:
            optimizer.step()
        adapter.events.after_step(step)
    return reached


def _backward(backbone: Backbone, adapter: Adapter) -> None:
    batch = backbone.example_batch()

    def losses() -> dict[str, Tensor]:
        output = backbone(batch)
        return {"loss": random_projection(output), **adapter.events.penalty(batch, output)}

    def backward(loss: Tensor) -> None:
        if loss.requires_grad:
            torch.autograd.backward(loss)

    adapter.events.compute_gradients(losses(), losses, backward)
    adapter.events.after_backward(0)
