"""Memory and floating-point operations of one training step, without running it.

The step runs on fake tensors: they have shapes, types and storages but no values, and choose the same kernels as a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from peft_modal.anatomy import Features
from peft_modal.errors import PeftModalError
from peft_modal.inspection.building import MetaModel
from peft_modal.tasks.clipping import FrozenGradients

LEFT_OUT: Final = (
    "workspace of the kernels", "temporaries within one operation", "the allocator's rounding and fragments",
    "the batch itself and the data loader", "the task's own loss and metrics", "element-wise operations (in FLOPs)",
)  # fmt: skip
"""What the estimate does not count."""

_PRECISIONS: Final[Mapping[str, torch.dtype | None]] = {
    "32-true": None, "32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16,
}  # fmt: skip
"""Lightning's names of the precisions that an estimate is made for; mixed ones run under autocast."""

Output: TypeAlias = Any  # what a task makes of a batch
Shape: TypeAlias = Any  # FlopCounterMode hands shapes over as sequences of integers


@dataclass(frozen=True)
class Estimate:
    """Bytes that live at the end of the forward pass or at the optimiser's step, and operations of one step."""

    parameters: int
    """Network, adapter and head, buffers included; copies that stand in for trained tensors count beside these."""
    gradients: int
    optimizer: int
    """AdamW: two tensors of each trained one's size, and its step count."""
    activations: int
    """What autograd saves for the backward pass, each storage once, without parameters and buffers."""
    flops: int
    """Forward and backward: matrix products, convolutions and attention, two for a multiplication with addition."""

    @property
    def memory(self) -> int:
        """The sum of the four."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    def to_dict(self) -> dict[str, int]:
        """All figures by name."""
        return {**asdict(self), "memory": self.memory}


@dataclass(frozen=True)
class Unknown:
    """No estimate, and why."""

    reason: str


def precision_of(trainer: Mapping[str, Any]) -> tuple[str, bool]:
    """The precision to estimate in, and whether it is the one that the trainer names."""
    named = str(trainer.get("precision") or "32-true")
    return (named, True) if named in _PRECISIONS else ("32-true", False)


def estimate(model: MetaModel, batch: Mapping[str, Any], *, precision: str = "32-true") -> Estimate | Unknown:
    """Estimate one step of a model on the meta device; afterwards the model's tensors are fake ones.

    Args:
        model: What is trained; put into training mode.
        batch: Inputs on any device; only shapes matter.
        precision: One that `precision_of` returns.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = [*model.modules, *_frozen_gradients(model)]
    try:
        with mode:
            _leave_meta(modules)
            inputs = {
                key: torch.empty_like(v, device="cpu") if isinstance(v, Tensor) else v for key, v in batch.items()
            }
            return measure_step(
                lambda: _forward(model, inputs), modules, trained_of(model), autocast=_PRECISIONS[precision],
                train=lambda: _train(model),
            )  # fmt: skip
    except PeftModalError as error:
        return Unknown(str(error))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        return Unknown(f"what the step computes depends on values of its inputs ({_first_line(error)} reads one)")
    except (RuntimeError, NotImplementedError, KeyError) as error:
        return Unknown(f"the step cannot be run without values ({type(error).__name__}: {_first_line(error)})")


def measure_step(
    forward: Callable[[], Output], modules: Iterable[nn.Module], trained: Iterable[nn.Parameter], *,
    autocast: torch.dtype | None = None, train: Callable[[], None] = lambda: None,
) -> Estimate:  # fmt: skip
    """Count what one forward and backward does, with real tensors or fake ones.

    Args:
        forward: Makes the output; the sum of its tensors stands for the loss.
        modules: What holds parameters and buffers.
        trained: What the optimiser moves; `.grad` is filled and taken away again.
        autocast: Type of mixed precision, None for none.
        train: Switches the training mode on.
    """
    train()
    trained = list(trained)
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(modules)}  # noqa: SLF001 — identity of a storage; torch offers no public one
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata  # noqa: SLF001 — as above
        if key not in held:
            saved.setdefault(key, tensor)  # kept alive, so that no other storage takes its place
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS)
    context: AbstractContextManager[object] = nullcontext()
    if autocast is not None:
        context = torch.autocast("cpu", dtype=autocast)
    for parameter in trained:
        parameter.grad = None
    with counter:
        with context, saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = _stand_in_loss(forward())
        activations = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
    moved = [p for p in trained if p.grad is not None]
    gradients = sum(_bytes(p) for p in moved)
    for parameter in trained:
        parameter.grad = None
    return Estimate(
        parameters=sum(held.values()),
        gradients=gradients,
        optimizer=2 * gradients + 4 * len(moved),
        activations=activations,
        flops=counter.get_total_flops(),
    )


def trained_of(model: MetaModel) -> list[nn.Parameter]:
    """What the optimiser moves."""
    head = [] if model.head is None else list(model.head.parameters())
    return [*model.adapter.named_trained().values(), *head]


def _forward(model: MetaModel, batch: Mapping[str, Any]) -> Output:
    if model.task is not None:
        return model.task(batch)
    features = model.backbone(batch)
    return features if model.head is None else model.head(features)


def _train(model: MetaModel) -> None:
    for part in (model.backbone, model.adapter, model.head):
        if part is not None:
            part.train()


def _frozen_gradients(model: MetaModel) -> list[nn.Module]:
    """What stands in for the frozen tensors where the task clips by the norm of all gradients."""
    if getattr(model.task, "clip_scope", None) != "all" or getattr(model.task, "clip_norm", None) is None:
        return []
    return [FrozenGradients(model.backbone).stand_ins]


def _leave_meta(modules: Iterable[nn.Module]) -> None:
    """Replace meta tensors by fake ones of the CPU; a tied tensor stays one storage."""
    made: dict[int, Tensor] = {}
    alive = []

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor, device="cpu")
            alive.append(tensor)  # an id is free again once its tensor is gone
        return made[id(tensor)]

    for module in modules:
        module._apply(fake)  # type: ignore[no-untyped-call]  # noqa: SLF001 — what `to`, `half` and `to_empty` are made of; these forget ties


def _stand_in_loss(output: Output) -> Tensor | None:
    """Sum of every tensor with a gradient in an output of any structure."""
    if isinstance(output, Features):
        output = [output.tokens, *output.extras.values()]
    terms = [leaf.float().sum() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack(terms).sum() if terms else None


def _tensors(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _addmm_inplace(_base: Shape, a: Shape, b: Shape, **_more: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention(query: Shape, key: Shape, value: Shape, *_args: object, **_more: object) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_args: object, **_more: object) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


_MORE_FLOPS: Final[dict[Any, Any]] = {
    torch.ops.aten.addmm_: _addmm_inplace,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001 — an operator's name
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,  # noqa: SLF001 — as above
}
"""Operators that torch's counter does not know: LoRA's products in place, and attention on a CPU."""
