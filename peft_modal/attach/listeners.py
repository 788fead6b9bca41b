"""Tells an adapter's listeners of the events of a run, and knows which events never came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from peft_modal.attach.attachment import Attachment
from peft_modal.attach.lifecycle import EVENTS, Batch, LifeCycle, Losses, Output, Run, total
from peft_modal.errors import AttachError


class Listeners:
    """The life cycles that the methods of one adapter take part with, addressed as one.

    Args:
        attachments: The adapter's list of attachments, which let go of tensors kept between hooks after each backward.
    """

    def __init__(self, attachments: list[Attachment]) -> None:
        self._attachments = attachments
        self._members: list[LifeCycle] = []
        self._names: list[str] = []
        self._came: set[str] = set()

    def add(self, listener: LifeCycle, *, name: str = "life_cycle") -> None:
        """One more.

        Args:
            listener: Who is told.
            name: Under which its facts stand in a file.

        Raises:
            AttachError: Two compute gradients in their own way.
        """
        if _overrides(listener, "compute_gradients") and self.wants("compute_gradients"):
            raise AttachError("two stacked methods compute gradients in their own way; only one can")
        self._members.append(listener)
        self._names.append(name)

    def wants(self, event: str) -> bool:
        """Whether a listener does something at this event, or answers a question of that name."""
        return any(_overrides(member, event) for member in self._members)

    def unheard(self) -> tuple[str, ...]:
        """Events that a listener waits for and that never came: a method must not degrade in silence."""
        return tuple(event for event in EVENTS if self.wants(event) and event not in self._came)

    def prepare(self, batches: Iterable[Batch], loss: Losses) -> None:
        """See `LifeCycle.prepare`; batches are read only where a listener calibrates."""
        calibrating = sum(_overrides(member, "prepare") for member in self._members)
        # One reads them as they come: a bank of features sees the whole training set, which need not fit into memory.
        self._tell("prepare", list(batches) if calibrating > 1 else batches if calibrating else (), loss)

    @property
    def calibration_batches(self) -> int:
        """See `LifeCycle.calibration_batches`; 0 where nobody calibrates."""
        return max((m.calibration_batches for m in self._members if _overrides(m, "prepare")), default=0)

    @property
    def calibrates_on_plain_samples(self) -> bool:
        """See `LifeCycle.calibrates_on_plain_samples`; whether anybody does."""
        return any(m.calibrates_on_plain_samples for m in self._members)

    def on_fit_start(self, run: Run) -> None:
        """See `LifeCycle.on_fit_start`."""
        self._tell("on_fit_start", run)

    def on_epoch_start(self, epoch: int) -> None:
        """See `LifeCycle.on_epoch_start`."""
        self._tell("on_epoch_start", epoch)

    def step_begin(self, step: int) -> None:
        """See `LifeCycle.step_begin`."""
        self._tell("step_begin", step)

    def penalty(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        """See `LifeCycle.penalty`; terms of one name add up."""
        self._came.add("penalty")
        terms: dict[str, Tensor] = {}
        for member in self._members:
            for name, value in member.penalty(batch, output).items():
                terms[name] = terms[name] + value if name in terms else value
        return terms

    def compute_gradients(
        self,
        losses: Mapping[str, Tensor],
        closure: Callable[[], Mapping[str, Tensor]],
        backward: Callable[[Tensor], None],
    ) -> None:
        """See `LifeCycle.compute_gradients`."""
        self._came.add("compute_gradients")
        for member in self._members:
            if _overrides(member, "compute_gradients"):
                member.compute_gradients(losses, closure, backward)
                return
        backward(total(losses))

    def after_backward(self, micro_batch: int) -> None:
        """See `LifeCycle.after_backward`."""
        for attachment in self._attachments:
            attachment.clear()
        self._tell("after_backward", micro_batch)

    def before_step(self, step: int) -> None:
        """See `LifeCycle.before_step`."""
        self._tell("before_step", step)

    def after_step(self, step: int) -> None:
        """See `LifeCycle.after_step`."""
        self._tell("after_step", step)

    def finalise(self) -> None:
        """See `LifeCycle.finalise`."""
        self._tell("finalise")

    def figures(self) -> dict[str, float]:
        """See `LifeCycle.figures`."""
        return {name: value for member in self._members for name, value in member.figures().items()}

    def site_entries(self) -> dict[str, int]:
        """See `LifeCycle.site_entries`; entries of one site add up."""
        found: dict[str, int] = {}
        for member in self._members:
            for site, count in member.site_entries().items():
                found[site] = found.get(site, 0) + count
        return found

    def views(self, sample: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """See `LifeCycle.views`."""
        return {title: view for member in self._members for title, view in member.views(sample).items()}

    def facts(self) -> dict[str, dict[str, Any]]:
        """See `LifeCycle.facts`; by name, of those who have some."""
        said = {name: dict(member.facts()) for name, member in zip(self._names, self._members, strict=True)}
        return {name: own for name, own in said.items() if own}

    def rebuild(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """See `LifeCycle.rebuild`; each gets its own."""
        for name, member in zip(self._names, self._members, strict=True):
            member.rebuild(facts.get(name, {}))

    def adopt(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """See `LifeCycle.adopt`; each gets its own."""
        for name, member in zip(self._names, self._members, strict=True):
            member.adopt(facts.get(name, {}))

    def _tell(self, event: str, *arguments: object) -> None:
        self._came.add(event)
        for member in self._members:
            getattr(member, event)(*arguments)


def _overrides(listener: LifeCycle, event: str) -> bool:
    return getattr(type(listener), event) is not getattr(LifeCycle, event)
