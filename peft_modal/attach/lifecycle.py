"""The events of one training run, in order, and the services that a listener gets.

Order within one optimiser step: `step_begin` (first micro-batch), forward, `penalty`, `compute_gradients`,
`after_backward` (each micro-batch), unscaling and clipping, `before_step`, the optimiser, `after_step` (gradients are
still set; whoever changes a shape sets `.grad = None`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

StatePolicy = Literal["keep", "drop", "reset"]
Batch: TypeAlias = Any  # whatever the data module yields
Output: TypeAlias = Any  # whatever the task makes of it
Losses = Callable[[Batch], Mapping[str, Tensor]]


class LifeCycle(nn.Module):
    """Base of what a method does during a run beside its forward pass; every event does nothing by default.

    Its parameters and buffers are saved with the adapter.
    """

    calibration_batches: int = 16
    """How many batches `prepare` is shown by `fit`, at most."""
    calibrates_on_plain_samples: bool = False
    """Whether they hold the training samples as they are, each once and in a fixed order, instead of training batches;
    what else the same adapter calibrates is then shown these, too."""

    def prepare(self, batches: Iterable[Batch], loss: Losses) -> None:
        """Calibrate before the optimiser exists; may still change sites, indices and shapes."""

    def on_fit_start(self, run: Run) -> None:
        """The optimiser exists."""

    def on_epoch_start(self, epoch: int) -> None:
        """A training epoch begins."""

    def step_begin(self, step: int) -> None:
        """An optimiser step begins, before its first forward."""

    def penalty(self, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Terms added to the task's losses, each logged by its name."""
        del batch, output
        return {}

    def compute_gradients(
        self, losses: Mapping[str, Tensor], closure: Callable[[], Mapping[str, Tensor]],
        backward: Callable[[Tensor], None],
    ) -> None:  # fmt: skip
        """Fill `.grad` of the trained parameters; by default back-propagates the sum of the losses."""
        del closure
        backward(total(losses))

    def after_backward(self, micro_batch: int) -> None:
        """Gradients of one micro-batch have been added."""

    def before_step(self, step: int) -> None:
        """Gradients are complete, unscaled and clipped."""

    def after_step(self, step: int) -> None:
        """The optimiser has stepped; gradients are still set."""

    def finalise(self) -> None:
        """Training is over: fold, pack, drop what only training needed."""

    # No events: the life cycle is asked.

    def figures(self) -> Mapping[str, float]:
        """Numbers about the step that was taken, each logged by its name."""
        return {}

    def site_entries(self) -> Mapping[str, int]:
        """Entries of each site that the method chose to tune, by the site's name; empty where it does not choose."""
        return {}

    def views(self, sample: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """What the method makes of a sample, for reports; see `Backbone.views`."""
        del sample
        return {}

    def facts(self) -> Mapping[str, Any]:
        """What the adapter file's header shall say beside the configuration: JSON values; see `Adapter.facts`."""
        return {}

    def rebuild(self, facts: Mapping[str, Any]) -> None:
        """Make again what calibration made, from the `facts` of a file whose tensors are loaded afterwards.

        Raises:
            FileFormatError: They do not fit this network.
        """

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Act on the `facts` of a file, after its tensors were loaded.

        Raises:
            BackboneMismatchError: It was made on other weights.
            FileFormatError: It is of another format.
        """


EVENTS = (
    "prepare", "on_fit_start", "on_epoch_start", "step_begin", "penalty", "compute_gradients", "after_backward",
    "before_step", "after_step", "finalise",
)  # fmt: skip


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """Sum of named losses."""
    return torch.stack([loss.reshape(()) for loss in losses.values()]).sum()


@dataclass
class Run:
    """What a listener may know of, and do to, the run it is part of."""

    total_steps: int
    optimizers: Sequence[torch.optim.Optimizer]
    generator: torch.Generator
    named_parameters: Mapping[str, nn.Parameter]
    world_size: int = 1
    total_epochs: int | None = None
    """None where the run counts steps alone."""
    forward: Callable[[Batch], Output] | None = None
    """The whole model: a batch to what the losses are taken of; None where there is no model around the backbone."""
    gives_logits: bool = False
    """Whether that is class logits (B, C, ...)."""
    learning_rates: Callable[[nn.Parameter], float] | None = None
    """Sum over the run's steps of a parameter's learning rate; None where no schedule is known."""
    parameters: ParameterService = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = ParameterService(self.optimizers, self.named_parameters)


class ParameterService:
    """Changes what is trained while the optimiser runs, and lets its state follow."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], named: Mapping[str, nn.Parameter]) -> None:
        self._optimizers = optimizers
        self._named = dict(named)

    def groups(self) -> list[dict[str, Any]]:
        """The optimisers' parameter groups."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Optimiser state of a parameter; empty before its first step."""
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        return {}

    def set_trainable(self, names: Iterable[str], state: StatePolicy = "keep") -> None:
        """Train exactly the named parameters from the next step on.

        A parameter that is switched off loses its gradient, so neither momentum nor weight decay moves it.

        Args:
            names: Names as in the run's `named_parameters`.
            state: What happens to the optimiser state of what is switched off (`drop`) or on (`reset`); `keep` keeps
                it.

        Raises:
            KeyError: A name is unknown.
        """
        wanted = set(names)
        unknown = wanted - set(self._named)
        if unknown:
            raise KeyError(f"no trained parameter is called '{sorted(unknown)[0]}'")
        for name, parameter in self._named.items():
            on = name in wanted
            changed = parameter.requires_grad != on
            parameter.requires_grad_(on)
            if not on:
                parameter.grad = None
            if changed and ((state == "drop" and not on) or (state == "reset" and on)):
                for optimizer in self._optimizers:
                    optimizer.state.pop(parameter, None)

    def replace(self, old: nn.Parameter, new: nn.Parameter, entries: Tensor | None = None) -> None:
        """Put `new` in the place of `old`; state of the kept `entries` (flat positions in `old`) follows.

        Args:
            old: A parameter of one of the optimisers.
            new: Its successor; with `entries`, its flat size is theirs.
            entries: Positions in `old` that live on, in the order of `new`; None starts with an empty state.

        Raises:
            KeyError: No optimiser holds `old`.
        """
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for position, parameter in enumerate(group["params"]):
                    if parameter is old:
                        group["params"][position] = new
                        kept = optimizer.state.pop(old, {})
                        if entries is not None and kept:
                            optimizer.state[new] = {
                                key: value.flatten()[entries].view_as(new).clone()
                                if isinstance(value, Tensor) and value.shape == old.shape
                                else value
                                for key, value in kept.items()
                            }
                        old.grad = None
                        self._rename(old, new)
                        return
        raise KeyError("no optimiser holds the parameter to be replaced")

    def add(self, name: str, parameter: nn.Parameter, **options: object) -> None:
        """Train one more parameter, in a group of its own with the given optimiser options.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._named:
            raise ValueError(f"a trained parameter is already called '{name}'")
        self._optimizers[0].add_param_group({"params": [parameter], **options})
        self._named[name] = parameter

    def _rename(self, old: nn.Parameter, new: nn.Parameter) -> None:
        for name, parameter in self._named.items():
            if parameter is old:
                self._named[name] = new
                return
