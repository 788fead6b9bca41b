"""Optimiser and schedule of a task: parameter groups without weight decay where it does not belong, cosine, warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn


def parameter_groups(
    named: Mapping[str, nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    decay: Mapping[str, bool] = MappingProxyType({}),
    own_lr: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Groups by decay and rate: tensors of two and more axes decay, vectors and biases do not, unless told otherwise.

    Args:
        named: Trained parameters by name.
        lr: Learning rate.
        weight_decay: Decay of what decays.
        decay: Whether a name decays, whatever its shape.
        own_lr: Learning rate of a name that has its own.
    """
    parts: dict[tuple[float, bool], list[nn.Parameter]] = {(lr, True): [], (lr, False): []}
    for name, parameter in named.items():
        key = own_lr.get(name, lr), decay.get(name, parameter.dim() >= 2)
        parts.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        for (rate, decays), parameters in parts.items()
        if parameters
    ]


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_share: float, min_share: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a share of the run, then a cosine down to a share of the learning rate, stepped per step."""
    warmup = max(1, round(total_steps * warmup_share)) if warmup_share > 0 else 0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total_steps - warmup)
        return min_share + (1.0 - min_share) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def summed_learning_rates(
    optimizer: torch.optim.Optimizer, schedule: object, parameter: nn.Parameter, total_steps: int
) -> float:
    """What a parameter's learning rates of all steps add up to; without a schedule of factors the rate stays."""
    index, group = next(
        (index, group) for index, group in enumerate(optimizer.param_groups)
        if any(parameter is each for each in group["params"])
    )  # fmt: skip
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return float(group["lr"]) * total_steps
    factor = schedule.lr_lambdas[index]
    return float(schedule.base_lrs[index]) * sum(factor(step) for step in range(total_steps))
