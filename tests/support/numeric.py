"""Comparing tensors and gradients with formulas written out in a test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def projection_loss(output: Tensor, *, seed: int = 99) -> Tensor:
    """A fixed random projection; the sum of squares would hide wrong gradients behind a LayerNorm."""
    return (output * draw(*output.shape, seed=seed, dtype=output.dtype)).sum()


def randomise(module: nn.Module, *, seed: int = 5, std: float = 0.3) -> None:
    """Give every parameter random values, so that a zero initialisation hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((noise * std).to(parameter.dtype))


def gradients(loss: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Gradients that must all exist."""
    return list(torch.autograd.grad(loss, list(parameters)))


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-10) -> None:
    """Equal up to `tolerance` relative to the largest expected entry; dtype and shape must be equal."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    actual, expected = actual.detach(), expected.detach()
    scale = max(1e-12, float(expected.abs().max())) if expected.numel() else 1.0
    off = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert off <= tolerance * scale, f"off by {off:.3g}, the largest entry is {scale:.3g}"


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in a module's state dict."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def assert_same_state(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Same keys in the same order, and the same bits."""
    after = module.state_dict()
    assert list(after) == list(before)
    for key, value in after.items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key]), key
