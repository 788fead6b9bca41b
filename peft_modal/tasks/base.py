"""The base of every task: it trains adapter and head, and forwards Lightning's hooks to the adapter's life cycle."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from peft_modal.anatomy import Backbone, Features
from peft_modal.attach import Adapter, Run
from peft_modal.data.seeding import seeded
from peft_modal.errors import ConfigError, TrainingError
from peft_modal.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from peft_modal.report import Collector, Section, batch_size
from peft_modal.tasks.averaging import MovingAverage
from peft_modal.tasks.clipping import FrozenGradients
from peft_modal.tasks.optim import cosine_with_warmup, parameter_groups, summed_learning_rates
from peft_modal.tasks.sight import SightCollector
from peft_modal.tasks.tensors import load_tensors, tensors_of

Stage = Literal["train", "val", "test"]
ClipScope = Literal["trainable", "all"]
Keep = Literal["last", "best"]
Output: TypeAlias = Any
"""What a task's forward gives: logits, rebuilt points, boxes."""


class Task(LightningModule):
    """Backbone, adapter, head, losses and metrics as one Lightning module.

    A subclass gives `losses` and `update_metrics`; its constructor names what it adds and hands the rest on as
    `**options`. Only adapter and head train; a checkpoint holds nothing else.

    Args:
        backbone: Frozen network with its anatomy; supplied by the program.
        adapter: What a method attached to it; supplied by the program.
        head: Features to predictions; supplied by the program.
        lr: Learning rate of AdamW.
        betas: Its decay rates of the gradient's mean and of its square.
        weight_decay: Decay of tensors with two and more axes, and of what the method says.
        warmup_share: Share of the run's steps with a linearly growing learning rate.
        min_lr_share: Share of the learning rate that the cosine ends at.
        clip_norm: Largest gradient norm, or None.
        clip_scope: Whose gradients count for that norm: `trainable`, or `all` tensors, frozen ones included, as in
            released code that never switches their gradients off. `all` costs what full fine-tuning's backward costs.
        keep: Which state becomes the adapter file: that of the `last` epoch, or of the `best` validation, the earliest
            of equals. Test data never decides.
        patience: Stop after this many validations in a row without a better one; null trains to the end. The learning
            rate follows its schedule over the whole run either way.
        ema_decay: Average what is trained over steps with this decay (0.999, say), and validate and save the average;
            null saves what the last step left.

    Raises:
        ConfigError: A decay rate is 1.
    """

    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/loss", "min")
    """The figure on validation data by which states, and runs, are compared, and which end of it is better."""
    runtime_args: ClassVar[frozenset[str]] = frozenset({"backbone", "adapter", "head", "class_names"})
    share_metrics: ClassVar[frozenset[str]] = frozenset()
    """Figures that are fractions of 1, without their stage; shown in percent."""
    gives_logits: ClassVar[bool] = False
    """Whether a forward pass gives class logits (B, C, ...), which methods may compare as distributions."""
    reads_class_names: ClassVar[bool] = False
    """Whether classes are known by their names alone, so that others may be measured than were trained."""
    compared: ClassVar[tuple[str, ...]] = ()
    """Figures that a comparison shows beside the one of `selection`, by their whole names."""
    balanced: ClassVar[tuple[str, str] | None] = None
    """Two figures that a comparison balances, by their whole names: of the first less is better, of the second more."""

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        *,
        lr: NonNegativeFloat = 5e-4,
        betas: tuple[Share, Share] = (0.9, 0.999),
        weight_decay: NonNegativeFloat = 0.05,
        warmup_share: Share = 0.1,
        min_lr_share: Share = 0.002,
        clip_norm: PositiveFloat | None = 10.0,
        clip_scope: ClipScope = "trainable",
        keep: Keep = "last",
        patience: PositiveInt | None = None,
        ema_decay: Share | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.head = head
        if max(betas) >= 1:
            raise ConfigError(f"task.betas: {list(betas)} has a 1, with which nothing is ever forgotten; try 0.999")
        self.lr = lr
        self.betas = betas
        self.weight_decay = weight_decay
        self.warmup_share = warmup_share
        self.min_lr_share = min_lr_share
        self.clip_norm = clip_norm
        self.clip_scope: ClipScope = clip_scope
        self.keep: Keep = keep
        self.patience = patience
        self.average = None if ema_decay is None else MovingAverage(ema_decay)
        self._frozen_gradients: FrozenGradients | None = None
        self.strict_loading = False
        self._losses: dict[str, Tensor] = {}
        self._total: Tensor | None = None
        self._batch: Any = None
        self._step = -1
        self._micro = 0
        self._collectors: tuple[Collector, ...] = ()

    # What a subclass gives.

    @abstractmethod
    def losses(self, batch: Mapping[str, Any], output: Output) -> dict[str, Tensor]:
        """Named losses of one batch; their sum is minimised."""

    def evaluation_losses(self, batch: Mapping[str, Any], output: Output) -> dict[str, Tensor]:
        """Named losses reported on validation and test data; by default those that training minimises."""
        return self.losses(batch, output)

    def suit(self, preprocessing: Mapping[str, Any]) -> None:
        """Take what the task needs from what data, or a model's file, says of samples; by default nothing."""

    def before_fit(self, data: LightningDataModule) -> None:
        """Take from the training data, set up by now, what the losses need; by default nothing."""

    def final_figures(self, data: LightningDataModule) -> dict[str, float]:
        """Figures of the trained model beyond those of its splits, by their whole names; by default none."""
        del data
        return {}

    def before_test(self, data: LightningDataModule) -> None:
        """Tell data what it has to know of the network before it is evaluated; by default nothing."""

    @abstractmethod
    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: Output) -> None:
        """Add a batch to the stage's metrics and log them."""

    def make_collector(self, *, seed: int) -> Collector | None:
        """What watches an evaluation for the task's own part of a report; None: the task has none.

        Args:
            seed: Of choices among samples.
        """
        del seed
        return None

    def forward(self, batch: Mapping[str, Any]) -> Output:
        """Predictions of a batch."""
        features: Features = self.backbone(batch)
        return self.head(features)

    # What is trained.

    def named_trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter, by its name in the adapter file."""
        head = {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return {**self.adapter.named_trained(), **head}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training makes: the adapter's and the head's parameters and buffers."""
        return tensors_of(self.adapter, self.head)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 — Lightning's signature
        """AdamW with a cosine schedule per step.

        Raises:
            TrainingError: Nothing is trained.
        """
        groups = parameter_groups(
            self.named_trained(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            decay=self.adapter.decay,
            own_lr=self.adapter.lr,
        )
        if not groups:
            raise TrainingError("nothing is trained: neither the method nor the head has a parameter")
        # One pass over all tensors: a method trains hundreds of small ones, each of which costs a dozen calls else.
        # In mixed precision Lightning clips no gradients of such an optimiser, which might have to unscale them itself.
        is_fused = "mixed" not in str(self.trainer.precision) and self.device.type in {"cpu", "cuda", "mps"}
        optimizer = torch.optim.AdamW(groups, betas=self.betas, fused=is_fused or None)
        schedule = cosine_with_warmup(
            optimizer,
            total_steps=int(self.trainer.estimated_stepping_batches),
            warmup_share=self.warmup_share,
            min_share=self.min_lr_share,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # The loop.

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> Tensor:
        """Losses and penalties of one micro-batch.

        Raises:
            TrainingError: The loss is not finite.
        """
        del batch_index
        output = self(batch)
        named = {**self.losses(batch, output), **self.adapter.events.penalty(batch, output)}
        self._losses, self._batch = named, batch
        for name, value in named.items():
            self.log(f"train/{name}", value.detach(), on_step=False, on_epoch=True, batch_size=batch_size(batch))
        self.update_metrics("train", batch, output)
        self._total = loss = torch.stack([value.reshape(()) for value in named.values()]).sum()
        if not torch.isfinite(loss):
            parts = ", ".join(f"{name} = {float(value.detach()):.4g}" for name, value in named.items())
            raise TrainingError(
                f"the loss is not finite at epoch {self.current_epoch}, step {self.global_step} ({parts}); lower "
                "task.lr, check the data for broken samples, or use trainer.precision=32-true; "
                "what was saved before is kept"
            )
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 — Lightning's signature
        """Let the method compute the gradients; by default of the sum of the losses."""

        def propagate(value: Tensor) -> None:
            value.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

        def closure() -> Mapping[str, Tensor]:
            return self.losses(self._batch, self(self._batch))

        if self.adapter.events.wants("compute_gradients"):
            # Lightning has divided the sum by the micro-batches of a step, and scaled it in half precision.
            assert self._total is not None
            (scale,) = torch.autograd.grad(loss, self._total, retain_graph=True)
            losses = {name: value * scale for name, value in self._losses.items()}
            self.adapter.events.compute_gradients(losses, closure, propagate)
        else:
            self.adapter.events.compute_gradients({"loss": loss}, closure, propagate)

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Loss and metrics on validation data."""
        del batch_index
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Loss and metrics on test data."""
        del batch_index
        self._evaluate("test", batch)

    def _evaluate(self, stage: Stage, batch: Mapping[str, Any]) -> None:
        output = self.evaluate(stage, batch)
        for name, value in self.evaluation_losses(batch, output).items():
            self.log(f"{stage}/{name}", value, on_epoch=True, batch_size=batch_size(batch))
        self.update_metrics(stage, batch, output)
        for collector in self._collectors:
            collector.add(batch, output)

    def start_report(self, *, seed: int) -> None:
        """Let the task watch every batch that is evaluated from now on."""
        own = self.make_collector(seed=seed)
        self._collectors = () if own is None else (own,)
        if type(self.backbone).views is not Backbone.views or self.adapter.events.wants("views"):
            self._collectors += (SightCollector(self.backbone.views, self.adapter.events.views, seed=seed),)

    def report_sections(self) -> tuple[Section, ...]:
        """The task's own part of a report on what was evaluated since `start_report`."""
        return tuple(section for collector in self._collectors for section in collector.sections())

    def evaluate(self, stage: Stage, batch: Mapping[str, Any]) -> Output:
        """Predictions outside training; a task may average several passes here."""
        del stage
        return self(batch)

    def predict_batch(self, batch: Mapping[str, Any]) -> Output:
        """Predictions of a batch of new samples, without gradients."""
        with torch.no_grad():
            return self(batch)

    # Lightning's hooks become the adapter's events here, in one place.

    def on_fit_start(self) -> None:
        """Tell the adapter that the optimiser exists.

        Raises:
            ConfigError: The clipping norm shall count frozen tensors, whose gradients this precision scales.
        """
        if self.clip_scope == "all" and self.clip_norm is not None:
            if str(self.trainer.precision) == "16-mixed":
                raise ConfigError("task.clip_scope: 'all' does not go with trainer.precision=16-mixed; use bf16-mixed")
            self._frozen_gradients = FrozenGradients(self.backbone)
        run = Run(
            total_steps=int(self.trainer.estimated_stepping_batches),
            optimizers=self.trainer.optimizers,
            generator=seeded("run", torch.initial_seed()),
            named_parameters=self.named_trained(),
            world_size=self.trainer.world_size,
            total_epochs=self.trainer.max_epochs if (self.trainer.max_epochs or 0) > 0 else None,
            forward=self,
            gives_logits=self.gives_logits,
            learning_rates=self._learning_rates,
        )
        self.adapter.events.on_fit_start(run)

    def _learning_rates(self, parameter: nn.Parameter) -> float:
        return summed_learning_rates(
            self.trainer.optimizers[0], self.lr_schedulers(), parameter, int(self.trainer.estimated_stepping_batches)
        )

    def on_train_epoch_start(self) -> None:
        """See `LifeCycle.on_epoch_start`."""
        self.adapter.events.on_epoch_start(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401 — Lightning's signature
        """See `LifeCycle.step_begin`; fires for the first micro-batch of a step only."""
        del batch, batch_idx
        if self.global_step != self._step:
            self._step, self._micro = self.global_step, 0
            self.adapter.events.step_begin(self.global_step)

    def on_after_backward(self) -> None:
        """See `LifeCycle.after_backward`."""
        self.adapter.events.after_backward(self._micro)
        self._micro += 1

    def configure_gradient_clipping(
        self,
        optimizer: Any,  # noqa: ANN401 — Lightning's signature
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, then tell the adapter: Lightning's own hook before the step runs before clipping."""
        value = self.clip_norm if gradient_clip_val is None else gradient_clip_val
        if value is not None and self._frozen_gradients is not None:
            self._frozen_gradients.clip(self.named_trained().values(), float(value))
        elif value is not None:
            self.clip_gradients(
                optimizer, gradient_clip_val=value, gradient_clip_algorithm=gradient_clip_algorithm or "norm"
            )
        self.adapter.events.before_step(self.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401 — Lightning's
        """See `LifeCycle.after_step`; fires after the optimiser's step."""
        del outputs, batch, batch_idx
        self._losses, self._total, self._batch = {}, None, None
        if self.global_step != self._step:
            self.adapter.events.after_step(self._step)
            if self.average is not None:
                self.average.update(self.named_trained())
            for name, value in self.adapter.events.figures().items():
                self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=1)

    def on_validation_start(self) -> None:
        """Validate the average, where there is one."""
        if self.average is not None:
            self.average.put_in_place(self.named_trained())

    def on_validation_end(self) -> None:
        """Go on with what training made; callbacks, which may keep a state, come before this."""
        if self.average is not None:
            self.average.take_out(self.named_trained())

    def on_fit_end(self) -> None:
        """Finalise, and refuse a run in which an event that a method waits for never came.

        Unlike the end of training, this comes in a resumed run that has nothing left to train, too.

        Raises:
            TrainingError: One did not.
        """
        if self._frozen_gradients is not None:
            self._frozen_gradients.detach()
            self._frozen_gradients = None
        if self.average is not None and self.keep == "last":
            self.average.put_in_place(self.named_trained())
            self.average.keep()
        self.adapter.events.finalise()
        unheard = [event for event in self.adapter.events.unheard() if event != "prepare"]
        if unheard and self._step >= 0:
            raise TrainingError(
                f"the method waits for {', '.join(unheard)}, which never came: its result is not the method's"
            )

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained."""
        checkpoint["state_dict"] = tensors_of(self.adapter, self.head, training_only=True)
        if self.average is not None:
            checkpoint["state_dict"] |= self.average.trained_values()
            checkpoint["average"] = self.average.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill adapter and head; Lightning then finds nothing left to load."""
        load_tensors(self.adapter, self.head, checkpoint["state_dict"], training_only=True)
        checkpoint["state_dict"] = {}
        if self.average is not None and "average" in checkpoint:
            self.average.load(checkpoint["average"])
