"""The parameter service and the listeners of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import pytest
import torch
from numeric import draw, projection_loss, randomise
from plain_backbone import attach
from tiny_backbones import TinyViT
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.attach import LifeCycle, ParameterService, Run
from peft_modal.attach.attachment import Attachment
from peft_modal.attach.lifecycle import EVENTS
from peft_modal.attach.listeners import Listeners
from peft_modal.errors import AttachError
from peft_modal.methods.lora import LoRA

OPTIMISERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.5),
}


def service(
    *, optimiser: str = "adamw", shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[ParameterService, dict[str, nn.Parameter], torch.optim.Optimizer]:
    shapes = shapes or {"a": (3,), "b": (2, 4), "c": (5,)}
    named = {name: nn.Parameter(draw(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
    made = OPTIMISERS[optimiser](list(named.values()))
    return ParameterService([made], named), named, made


def step(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, seed: int = 0) -> None:
    optimizer.zero_grad()
    trained = [p for p in named.values() if p.requires_grad]
    torch.stack([projection_loss(p.sin(), seed=seed + i) for i, p in enumerate(trained)]).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_what_is_switched_off_stays_equal_to_the_bit_in_spite_of_decay_and_momentum(optimiser: str) -> None:
    parameters, named, optimizer = service(optimiser=optimiser)
    step(named, optimizer)
    before = {name: p.detach().clone() for name, p in named.items()}
    parameters.set_trainable(["b"])
    for seed in range(3):
        step(named, optimizer, seed=seed)
    assert torch.equal(named["a"], before["a"])
    assert torch.equal(named["c"], before["c"])
    assert not torch.equal(named["b"], before["b"])
    assert named["a"].grad is None


def test_a_gradient_that_is_there_when_a_parameter_is_switched_off_is_dropped() -> None:
    parameters, named, optimizer = service()
    named["a"].grad = torch.ones(3, dtype=torch.float64)
    before = named["a"].detach().clone()
    parameters.set_trainable(["b", "c"])
    optimizer.step()
    assert torch.equal(named["a"], before)


@pytest.mark.parametrize(
    ("policy", "kept_while_off", "kept_when_on"),
    [("keep", True, True), ("drop", False, False), ("reset", True, False)],
)
def test_the_optimisers_state_follows_the_policy(policy: str, kept_while_off: bool, kept_when_on: bool) -> None:
    parameters, named, optimizer = service()
    step(named, optimizer)
    moments = parameters.state(named["a"])["exp_avg"].clone()
    untouched = parameters.state(named["b"])["exp_avg"].clone()
    parameters.set_trainable(["b", "c"], state=policy)
    assert ("exp_avg" in parameters.state(named["a"])) == kept_while_off
    parameters.set_trainable(["a", "b", "c"], state=policy)
    assert ("exp_avg" in parameters.state(named["a"])) == kept_when_on
    if kept_when_on:
        assert torch.equal(parameters.state(named["a"])["exp_avg"], moments)
    assert torch.equal(parameters.state(named["b"])["exp_avg"], untouched)


def test_an_unknown_name_is_refused_before_anything_is_switched() -> None:
    parameters, named, _ = service()
    with pytest.raises(KeyError, match="no trained parameter is called 'd'"):
        parameters.set_trainable(["a", "d"])
    assert all(p.requires_grad for p in named.values())


def test_replacing_keeps_the_moments_of_the_kept_entries() -> None:
    parameters, named, optimizer = service(shapes={"a": (6,), "b": (2,)})
    step(named, optimizer)
    step(named, optimizer, seed=4)
    old = named["a"]
    old_state = {k: v.clone() for k, v in parameters.state(old).items()}
    entries = torch.tensor([4, 0, 3])
    new = nn.Parameter(old.detach()[entries].clone())
    parameters.replace(old, new, entries=entries)
    state = parameters.state(new)
    assert torch.equal(state["exp_avg"], old_state["exp_avg"][entries])
    assert torch.equal(state["exp_avg_sq"], old_state["exp_avg_sq"][entries])
    assert torch.equal(state["step"], old_state["step"])
    assert parameters.state(old) == {}
    assert old.grad is None
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(3,), (2,)]
    assert optimizer.param_groups[0]["params"][0] is new


def test_a_kept_entry_moves_as_if_nothing_had_been_replaced() -> None:
    straight_service, straight, straight_optimizer = service(shapes={"a": (6,)})
    parameters, named, optimizer = service(shapes={"a": (6,)})
    weights = draw(6, seed=21)

    def train(parameter: nn.Parameter, made: torch.optim.Optimizer, kept: Tensor | None = None) -> None:
        made.zero_grad()
        ((weights if kept is None else weights[kept]) * parameter.sin()).sum().backward()
        made.step()

    del straight_service
    entries = torch.tensor([5, 1])
    train(straight["a"], straight_optimizer)
    train(named["a"], optimizer)
    new = nn.Parameter(named["a"].detach()[entries].clone())
    parameters.replace(named["a"], new, entries=entries)
    train(straight["a"], straight_optimizer)
    train(new, optimizer, entries)
    assert torch.equal(new, straight["a"][entries])


def test_replacing_without_entries_starts_with_an_empty_state() -> None:
    parameters, named, optimizer = service()
    step(named, optimizer)
    new = nn.Parameter(draw(7))
    parameters.replace(named["a"], new)
    assert parameters.state(new) == {}


def test_a_replaced_parameter_answers_to_its_name() -> None:
    parameters, named, _ = service()
    new = nn.Parameter(draw(7))
    parameters.replace(named["a"], new)
    parameters.set_trainable(["b"])
    assert not new.requires_grad


def test_replacing_what_no_optimiser_holds_is_refused() -> None:
    parameters, _, _ = service()
    with pytest.raises(KeyError, match="no optimiser holds the parameter to be replaced"):
        parameters.replace(nn.Parameter(draw(2)), nn.Parameter(draw(2)))


def test_an_added_parameter_trains_with_its_own_options() -> None:
    parameters, named, optimizer = service()
    new = nn.Parameter(draw(4))
    parameters.add("d", new, lr=0.5)
    assert [group["lr"] for group in parameters.groups()] == [0.1, 0.5]
    before = new.detach().clone()
    step({**named, "d": new}, optimizer)
    assert not torch.equal(new, before)
    parameters.set_trainable(["a"])
    assert not new.requires_grad
    with pytest.raises(ValueError, match="a trained parameter is already called 'd'"):
        parameters.add("d", nn.Parameter(draw(4)))


def test_a_run_offers_the_service_over_all_optimisers() -> None:
    a, b = nn.Parameter(draw(2)), nn.Parameter(draw(3))
    optimisers = [torch.optim.SGD([a], lr=0.1, momentum=0.9), torch.optim.AdamW([b], lr=0.2)]
    run = Run(total_steps=3, optimizers=optimisers, generator=torch.Generator(), named_parameters={"a": a, "b": b})
    assert [group["lr"] for group in run.parameters.groups()] == [0.1, 0.2]
    b.grad = torch.ones(3, dtype=torch.float64)
    optimisers[1].step()
    assert "exp_avg" in run.parameters.state(b)
    assert run.parameters.state(a) == {}


def test_layer_wise_training_leaves_the_other_blocks_of_an_adapter_equal() -> None:
    backbone = TinyViT()
    adapter = LoRA(sites=["attn", "mlp"], rank=2).attach(backbone)
    randomise(adapter)
    named = adapter.named_trained()
    optimizer = torch.optim.AdamW(named.values(), lr=0.01, weight_decay=0.1)
    parameters = ParameterService([optimizer], named)
    for block in (0, 2, 1):
        before = {name: p.detach().clone() for name, p in named.items()}
        parameters.set_trainable([name for name in named if name.startswith(f"adapter.blocks.{block}.")])
        optimizer.zero_grad()
        projection_loss(backbone(backbone.example_batch()).tokens).backward()
        optimizer.step()
        moved = {name.split(".")[2] for name, p in named.items() if not torch.equal(p, before[name])}
        assert moved == {str(block)}


class Recorder(LifeCycle):
    """Writes down every event."""

    def __init__(self, log: list[tuple[object, ...]]) -> None:
        super().__init__()
        self.log = log

    @override
    def prepare(self, batches: object, loss: object) -> None:
        self.log.append(("prepare", list(batches)))

    @override
    def step_begin(self, step: int) -> None:
        self.log.append(("step_begin", step))

    @override
    def penalty(self, batch: object, output: Tensor) -> Mapping[str, Tensor]:
        return {"norm": output.sum()}

    @override
    def before_step(self, step: int) -> None:
        self.log.append(("before_step", step))

    @override
    def finalise(self) -> None:
        self.log.append(("finalise",))


class OwnGradients(LifeCycle):
    """Back-propagates half of the sum."""

    @override
    def compute_gradients(
        self,
        losses: Mapping[str, Tensor],
        closure: Callable[[], Mapping[str, Tensor]],
        backward: Callable[[Tensor], None],
    ) -> None:
        backward(sum(losses.values()) / 2)


def listeners(*members: LifeCycle) -> Listeners:
    made = Listeners([])
    for member in members:
        made.add(member)
    return made


def no_losses(_batch: object) -> Mapping[str, Tensor]:
    return {}


def no_closure() -> Mapping[str, Tensor]:
    return {}


def test_every_event_reaches_every_listener_in_order() -> None:
    first: list[tuple[object, ...]] = []
    events = listeners(Recorder(first), Recorder(first))
    events.prepare([1, 2], no_losses)
    events.step_begin(0)
    events.after_backward(0)
    events.before_step(0)
    events.finalise()
    names = [("prepare", [1, 2]), ("step_begin", 0), ("before_step", 0), ("finalise",)]
    assert first == [name for name in names for _ in range(2)]


def test_batches_for_calibration_are_read_only_where_someone_calibrates() -> None:
    def unreadable() -> object:
        yield pytest.fail("a batch was read")

    listeners(OwnGradients()).prepare(unreadable(), no_losses)


def test_a_listener_that_calibrates_alone_reads_batches_as_they_come_and_two_get_all() -> None:
    class ReadsOne(LifeCycle):
        @override
        def prepare(self, batches: Iterable[object], loss: object) -> None:
            next(iter(batches))

    def endless(limit: int) -> Iterator[int]:
        for number in range(limit + 1):
            assert number < limit, "a batch was read that nobody asked for"
            yield number

    listeners(ReadsOne(), OwnGradients()).prepare(endless(1), no_losses)
    seen: list[tuple[object, ...]] = []
    listeners(ReadsOne(), Recorder(seen)).prepare(iter([1, 2]), no_losses)
    assert seen == [("prepare", [1, 2])]


def test_plain_samples_are_asked_for_where_one_listener_wants_them() -> None:
    class Plain(LifeCycle):
        calibrates_on_plain_samples = True

    assert listeners(LifeCycle(), Plain()).calibrates_on_plain_samples
    assert not listeners(LifeCycle()).calibrates_on_plain_samples


def test_what_a_listener_waits_for_and_never_came_is_reported() -> None:
    events = listeners(Recorder([]), OwnGradients())
    assert events.unheard() == ("prepare", "step_begin", "penalty", "compute_gradients", "before_step", "finalise")
    events.prepare([], no_losses)
    events.step_begin(0)
    events.penalty(None, draw(2))
    events.on_epoch_start(0)
    assert events.unheard() == ("compute_gradients", "before_step", "finalise")
    events.compute_gradients({"loss": draw(1).requires_grad_()}, no_closure, lambda loss: loss.backward())
    events.before_step(0)
    events.finalise()
    assert events.unheard() == ()


def test_a_listener_that_does_nothing_misses_nothing() -> None:
    assert listeners(LifeCycle()).unheard() == ()
    assert listeners().unheard() == ()


def test_every_event_of_the_protocol_is_forwarded() -> None:
    for event in EVENTS:
        assert callable(getattr(LifeCycle, event))
        assert callable(getattr(Listeners, event))


def test_gradients_are_those_of_the_sum_unless_a_listener_computes_them() -> None:
    x = draw(3).requires_grad_()
    for members, factor in (((), 1.0), ((LifeCycle(),), 1.0), ((LifeCycle(), OwnGradients()), 0.5)):
        x.grad = None
        losses = {"task": (x * 2).sum(), "penalty": (x * 3).sum()}
        listeners(*members).compute_gradients(losses, no_closure, lambda loss: loss.backward())
        assert torch.equal(x.grad, torch.full_like(x, 5 * factor))


def test_penalties_of_all_listeners_are_named() -> None:
    events = listeners(Recorder([]), LifeCycle())
    assert torch.equal(events.penalty(None, torch.ones(2))["norm"], torch.tensor(2.0))
    assert list(events.penalty(None, torch.ones(2))) == ["norm"]


def test_two_listeners_that_compute_gradients_are_refused() -> None:
    events = listeners(OwnGradients(), Recorder([]))
    with pytest.raises(AttachError, match="two stacked methods compute gradients in their own way; only one can"):
        events.add(OwnGradients())


def test_two_penalties_of_one_name_add_up() -> None:
    events = listeners(Recorder([]), Recorder([]))
    assert torch.equal(events.penalty(None, torch.ones(2))["norm"], torch.tensor(4.0))


def test_tensors_kept_between_hooks_are_let_go_after_backward() -> None:
    class Keeps(Attachment):
        kept: Tensor | None = torch.ones(1)

        @override
        def hang(self, backbone: object) -> None:
            """Nothing."""

        @override
        def unhang(self, backbone: object) -> None:
            """Nothing."""

        @override
        def describe(self) -> str:
            return "keeps"

        @override
        def clear(self) -> None:
            self.kept = None

    attachment = Keeps(0)
    Listeners([attachment]).after_backward(0)
    assert attachment.kept is None


def test_an_adapters_listener_hears_through_the_adapter() -> None:
    log: list[tuple[object, ...]] = []
    adapter = attach(TinyViT(), lambda a: a.listen(Recorder(log)))
    adapter.events.step_begin(3)
    assert log == [("step_begin", 3)]
