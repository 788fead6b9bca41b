"""An exponential moving average of what is trained, used for validation and for the saved adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """Averages trained parameters over steps: a <- d a + (1 - d) p with d = min(decay, (1 + s) / (10 + s)).

    s counts the steps before this one, so that the average follows quickly at first; the first step's parameters are
    taken as they are (as in diffusers' `EMAModel`).

    Args:
        decay: Largest d.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}

    @property
    def is_in_place(self) -> bool:
        """Whether the parameters hold the averages at the moment."""
        return bool(self._trained)

    @torch.no_grad()
    def update(self, named: Mapping[str, nn.Parameter]) -> None:
        """Take in the parameters after a step; one that is new or has another shape starts from its value."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        self.steps += 1
        for name, parameter in named.items():
            mean = self.values.get(name)
            if mean is None or mean.shape != parameter.shape:
                self.values[name] = parameter.detach().clone()
            else:
                mean.lerp_(parameter.detach().to(mean), 1 - decay)

    @torch.no_grad()
    def put_in_place(self, named: Mapping[str, nn.Parameter]) -> None:
        """Let the parameters hold their averages until `take_out`; before the first step nothing changes."""
        if self.is_in_place or not self.steps:
            return
        for name, mean in self.values.items():
            if name in named:
                self._trained[name] = named[name].detach().clone()
                named[name].copy_(mean)

    @torch.no_grad()
    def take_out(self, named: Mapping[str, nn.Parameter]) -> None:
        """Give the parameters back what training made of them."""
        for name, value in self._trained.items():
            named[name].copy_(value)
        self._trained = {}

    def keep(self) -> None:
        """Let the averages stay for good."""
        self._trained = {}

    def trained_values(self) -> dict[str, Tensor]:
        """What training made of the parameters that hold averages now; empty if they do not."""
        return dict(self._trained)

    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"steps": self.steps, "values": dict(self.values)}

    def load(self, state: Mapping[str, object]) -> None:
        """See `state`."""
        steps, values = state["steps"], state["values"]
        assert isinstance(steps, int)
        assert isinstance(values, dict)
        self.steps, self.values = steps, {name: value.clone() for name, value in values.items()}
