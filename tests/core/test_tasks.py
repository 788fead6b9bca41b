"""The task base: the order of events within a step, what trains, and what a checkpoint holds."""

import lightning.pytorch as pl
import pytest
import torch
from tiny_backbones import TinyViT
from torch.utils.data import DataLoader

from peft_modal.attach import LifeCycle
from peft_modal.counting import count_parameters
from peft_modal.errors import ConfigError, TrainingError
from peft_modal.methods.full import Full
from peft_modal.methods.lora import LoRA
from peft_modal.running.selection import Selection
from peft_modal.tasks.classification import Classification
from peft_modal.tasks.optim import cosine_with_warmup, parameter_groups
from peft_modal_heads.linear import LinearHead


class Recorder(LifeCycle):
    """Writes down what it is told, and the gradient norm it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.norms = {}

    def watch(self, parameters):
        self.parameters_seen = parameters

    def _note(self, event, value):
        self.seen.append((event, value))
        grads = [p.grad for p in self.parameters_seen if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm() if grads else torch.tensor(0.0)
        self.norms[event, len(self.seen)] = float(norm)

    def on_fit_start(self, run):
        self._note("on_fit_start", run.total_steps)

    def on_epoch_start(self, epoch):
        self._note("on_epoch_start", epoch)

    def step_begin(self, step):
        self._note("step_begin", step)

    def penalty(self, batch, output):
        self._note("penalty", len(output))
        return {"penalty": output.sum() * 0.0}

    def after_backward(self, micro_batch):
        self._note("after_backward", micro_batch)

    def before_step(self, step):
        self._note("before_step", step)

    def after_step(self, step):
        self._note("after_step", step)

    def finalise(self):
        self._note("finalise", None)


class Computes(Recorder):
    """Makes the gradients itself, as the default would."""

    def compute_gradients(self, losses, closure, backward):
        self._note("compute_gradients", tuple(losses))
        backward(torch.stack(list(losses.values())).sum())


class WithListener(LoRA):
    def __init__(self, listener):
        super().__init__(rank=2)
        self.listener = listener

    def build(self, adapter):
        super().build(adapter)
        adapter.listen(self.listener)


def make_task(listener=None, **arguments):
    backbone = TinyViT(depth=1)
    method = LoRA(rank=2) if listener is None else WithListener(listener)
    adapter = method.attach(backbone)
    head = LinearHead(backbone.feature_spec(), 3)
    task = Classification(backbone, adapter, head, ("a", "b", "c"), **arguments)
    if listener is not None:
        listener.watch(list(task.named_trained().values()))
    return task


def loader(count=4, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    items = [{"image": torch.randn(3, 16, 16, generator=generator), "label": torch.tensor(i % 3)} for i in range(count)]
    return DataLoader(items, batch_size=batch_size)


def fit(task, tmp_path, train=None, **arguments):
    trainer = pl.Trainer(
        **{
            "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path, **arguments,
        }
    )  # fmt: skip
    task.train()
    trainer.fit(task, train or loader(), loader())
    return trainer


def test_events_come_in_the_order_of_the_interface(tmp_path):
    recorder = Recorder()
    fit(make_task(recorder), tmp_path, accumulate_grad_batches=2)

    assert recorder.seen == [
        ("on_fit_start", 1), ("on_epoch_start", 0), ("step_begin", 0), ("penalty", 2), ("after_backward", 0),
        ("penalty", 2), ("after_backward", 1), ("before_step", 0), ("after_step", 0), ("finalise", None),
    ]  # fmt: skip


def test_the_last_batch_of_an_epoch_ends_a_step_and_the_next_epoch_begins_one(tmp_path):
    recorder = Computes()
    fit(make_task(recorder), tmp_path, loader(count=6), accumulate_grad_batches=2, max_epochs=2)

    def micro(index):
        return [("penalty", 2), ("compute_gradients", ("loss", "penalty")), ("after_backward", index)]

    def step(index, size):
        batches = [event for i in range(size) for event in micro(i)]
        return [("step_begin", index), *batches, ("before_step", index), ("after_step", index)]

    assert recorder.seen == [
        ("on_fit_start", 4),
        ("on_epoch_start", 0), *step(0, 2), *step(1, 1),
        ("on_epoch_start", 1), *step(2, 2), *step(3, 1),
        ("finalise", None),
    ]  # fmt: skip


def test_a_method_that_computes_gradients_sees_the_losses_scaled_as_lightning_scales_them(tmp_path):
    trained = []
    for recorder in (Recorder(), Computes()):
        torch.manual_seed(0)
        task = make_task(recorder, clip_norm=None)
        fit(task, tmp_path, accumulate_grad_batches=2)
        trained.append(
            (task.tensors(), [norm for (event, _), norm in recorder.norms.items() if event == "before_step"])
        )

    (default, default_norms), (own, own_norms) = trained
    assert own_norms == pytest.approx(default_norms, rel=1e-6)
    for name, value in own.items():
        torch.testing.assert_close(value, default[name])


def test_losses_that_cancel_still_give_gradients(tmp_path):
    class Cancels(Computes):
        def penalty(self, batch, output):
            loss = torch.nn.functional.cross_entropy(output, batch["label"])
            return {"penalty": -loss.detach()}

    recorder = Cancels()
    fit(make_task(recorder), tmp_path)

    assert all(norm > 0 for (event, _), norm in recorder.norms.items() if event == "after_backward")


def test_before_step_sees_clipped_gradients_and_after_step_still_sees_them(tmp_path):
    recorder = Recorder()
    fit(make_task(recorder, clip_norm=1e-3), tmp_path)

    norms = {event: norm for (event, _), norm in recorder.norms.items()}
    assert norms["after_backward"] > 1e-2
    assert norms["before_step"] == pytest.approx(1e-3, rel=1e-3)
    assert norms["after_step"] == pytest.approx(1e-3, rel=1e-3)


def test_the_frozen_backbone_stays_in_evaluation_mode_and_the_rest_trains(tmp_path):
    modes = []

    class Look(pl.Callback):
        def look(self, when, task):
            parts = (task.backbone.network, task.adapter, task.head)
            modes.append((when, *({m.training for m in part.modules()} for part in parts)))

        def on_train_batch_end(self, trainer, task, *_):
            self.look("train", task)

        def on_validation_batch_end(self, trainer, task, *_):
            self.look("val", task)

    fit(make_task(), tmp_path, max_epochs=2, callbacks=[Look()], num_sanity_val_steps=0)
    # Two epochs of two batches, with validation between them.
    train, val = ("train", {False}, {True}, {True}), ("val", {False}, {False}, {False})
    assert modes == [train, train, val, val] * 2


def test_only_adapter_and_head_move(tmp_path):
    task = make_task(lr=0.1)
    before = {name: value.clone() for name, value in task.backbone.network.state_dict().items()}
    trained = {name: value.clone() for name, value in task.tensors().items()}
    fit(task, tmp_path)

    assert all(torch.equal(value, before[name]) for name, value in task.backbone.network.state_dict().items())
    assert all(not torch.equal(value, trained[name]) for name, value in task.tensors().items())


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path):
    task = make_task()
    trainer = fit(task, tmp_path, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 — our own file

    assert state.keys() == task.tensors().keys()
    assert not [name for name in state if "network" in name]


class Reparametrised(LoRA):
    """LoRA with a penalty network that only training needs."""

    def build(self, adapter):
        super().build(adapter)
        scale = adapter.add("scale", torch.nn.Linear(2, 3), training_only=True)
        adapter.listen(Pulls(scale))


class Pulls(LifeCycle):
    def __init__(self, scale):
        super().__init__()
        self.__dict__["scale"] = scale

    def penalty(self, batch, output):
        return {"pull": self.scale(output.new_ones(2)).square().sum()}


def reparametrised_task():
    backbone = TinyViT(depth=1)
    adapter = Reparametrised(rank=2).attach(backbone)
    return Classification(backbone, adapter, LinearHead(backbone.feature_spec(), 3), ("a", "b", "c"))


def test_what_only_training_needs_is_trained_counted_and_in_checkpoints_but_not_in_the_file(tmp_path):
    task = reparametrised_task()
    assert count_parameters(task.backbone, task.adapter, task.head).training_only == 9
    before = task.adapter.training_only.scale.weight.clone()
    trainer = fit(task, tmp_path, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 — our own file

    assert not torch.equal(task.adapter.training_only.scale.weight, before)
    assert {"training_only.scale.weight", "training_only.scale.bias"} == state.keys() - task.tensors().keys()
    fresh = reparametrised_task()
    fresh.on_load_checkpoint({"state_dict": state})
    assert torch.equal(fresh.adapter.training_only.scale.weight, task.adapter.training_only.scale.weight)


def test_the_best_state_holds_what_only_training_needs(tmp_path):
    task = reparametrised_task()
    task.keep = "best"
    seen = []

    class Look(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.append(task.adapter.training_only.scale.weight.clone())
            pl_module.log("val/accuracy", torch.tensor([0.9, 0.5][trainer.current_epoch]))

    selection = Selection(task, tmp_path / "best.ckpt")
    task.selection = ("val/accuracy", "max")
    fit(task, tmp_path, max_epochs=2, num_sanity_val_steps=0, callbacks=[Look(), selection], enable_checkpointing=True)
    assert torch.equal(task.adapter.training_only.scale.weight, seen[0])
    assert not torch.equal(seen[0], seen[1])


def test_a_loss_that_is_not_finite_stops_the_run_with_a_sentence(tmp_path):
    task = make_task()
    with torch.no_grad():
        task.head.linear.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"not finite at epoch 0, step 0 \(loss = nan\)"):
        fit(task, tmp_path)


def test_an_event_that_never_came_is_an_error(tmp_path):
    task = make_task(Recorder())
    task.adapter.events._came.clear()
    task.on_after_backward = lambda: None
    with pytest.raises(TrainingError, match="waits for after_backward"):
        fit(task, tmp_path)


def test_vectors_do_not_decay_unless_the_adapter_says_so():
    named = {"w": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.nn.Parameter(torch.ones(2)),
             "cls": torch.nn.Parameter(torch.ones(1, 1, 2)), "values": torch.nn.Parameter(torch.ones(3))}  # fmt: skip
    groups = parameter_groups(named, lr=0.1, weight_decay=0.5, decay={"cls": False, "values": True})

    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    decayed, kept = ([next(n for n, p in named.items() if p is q) for q in group["params"]] for group in groups)
    assert (decayed, kept) == (["w", "values"], ["b", "cls"])


def test_the_class_token_that_a_backbone_excepts_does_not_decay(tmp_path):
    backbone = TinyViT(depth=1)
    task = Classification(backbone, Full().attach(backbone), LinearHead(backbone.feature_spec(), 3), ("a", "b", "c"))
    trainer = fit(task, tmp_path)

    named = task.named_trained()
    names = {id(parameter): name for name, parameter in named.items()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in trainer.optimizers[0].param_groups)
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.05, 0.0]
    assert "backbone.cls_token" in kept
    assert {"backbone.pos_embed", "backbone.blocks.0.attn.qkv.weight", "head.linear.weight"} <= decayed
    assert kept == {"backbone.cls_token"} | {name for name, parameter in named.items() if parameter.dim() < 2}
    assert decayed | kept == set(named)


def test_the_schedule_warms_up_and_follows_a_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = cosine_with_warmup(optimizer, total_steps=10, warmup_share=0.2, min_share=0.1)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()

    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_the_clipping_norm_counts_frozen_tensors_only_when_asked(tmp_path):
    """Against the norm of a network whose every tensor has a gradient."""
    recorder = Recorder()
    task = make_task(recorder, clip_norm=1e-3, clip_scope="all")
    before = {name: value.clone() for name, value in task.backbone.network.state_dict().items()}
    everything = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, task, optimizer):
            stand_ins = task._frozen_gradients.stand_ins
            gradients = [p.grad for p in [*task.named_trained().values(), *stand_ins.parameters()]]
            everything["norm"] = float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
            everything["frozen"] = sum(p.numel() for p in stand_ins.parameters())

    fit(task, tmp_path, callbacks=[Look()], limit_train_batches=1)

    norms = {event: norm for (event, _), norm in recorder.norms.items()}
    assert everything["frozen"] == sum(p.numel() for p in task.backbone.network.parameters())
    assert everything["norm"] > 1.05 * norms["after_backward"]
    assert norms["before_step"] == pytest.approx(1e-3 * norms["after_backward"] / everything["norm"], rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in task.backbone.network.state_dict().items())
    assert not [m for m in task.backbone.network.modules() if set(m.__dict__) & set(m._parameters)]


def test_class_weights_multiply_each_sample_and_leave_evaluation_alone():
    weighted, plain = make_task(class_weights=[0.5, 1.0, 3.0]), make_task()
    batch = {"label": torch.tensor([2, 2, 0])}
    logits = torch.randn(3, 3)
    each = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")

    loss = weighted.losses(batch, logits)["loss"]

    torch.testing.assert_close(loss, (each * torch.tensor([3.0, 3.0, 0.5])).mean())
    assert torch.equal(weighted.evaluation_losses(batch, logits)["loss"], plain.losses(batch, logits)["loss"])


def test_balanced_weights_need_data_that_counts_its_classes():
    task = make_task(class_weights="balanced")

    with pytest.raises(ConfigError, match=r"LightningDataModule has no class_counts\(\); give one number per class"):
        task.before_fit(pl.LightningDataModule())
    with pytest.raises(ConfigError, match=r"call task.before_fit"):
        task.losses({"label": torch.tensor([0])}, torch.zeros(1, 3))


def test_a_class_without_samples_cannot_be_balanced():
    class Counting(pl.LightningDataModule):
        def class_counts(self):
            return [3, 0, 3]

    with pytest.raises(ConfigError, match="b has no training sample"):
        make_task(class_weights="balanced").before_fit(Counting())


@pytest.mark.parametrize("weights", ["none", [0.5, 1.0, 3.0]], ids=["plain", "weighted"])
def test_two_accumulated_batches_train_as_one_of_twice_the_size(tmp_path, weights):
    trained = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        task = make_task(lr=0.01, weight_decay=0.1, warmup_share=0.5, clip_norm=1.0, class_weights=weights)
        trainer = fit(
            task, tmp_path, loader(count=24, batch_size=batch_size), accumulate_grad_batches=accumulate, max_epochs=2
        )
        assert trainer.global_step == trainer.estimated_stepping_batches == 6
        trained.append((task.tensors(), trainer.optimizers[0].param_groups[0]["lr"]))

    (whole, rate), (parts, same_rate) = trained
    assert rate == same_rate
    for name, value in parts.items():
        torch.testing.assert_close(value, whole[name], atol=2e-5, rtol=1e-4)
