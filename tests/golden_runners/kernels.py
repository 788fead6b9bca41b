"""Kernelised sparse updates of one linear, and the competition between linears."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from golden_runners.golden_case import GoldenCase
from peft_modal.methods.snell import KernelUpdate
from peft_modal.methods.snella import Allocator, MixedKernelUpdate


def update(case: GoldenCase) -> None:
    """SNELL's and SNELLA's update of one linear."""
    sizes = case.setting("in_features"), case.setting("out_features")
    sparsity = case.setting("sparsity", 0.0)
    pieces, norm = case.setting("heads", 2), float(case.setting("p", 2))
    made: KernelUpdate
    if case.slug == "snella":
        case.require("coeff", [0.1, -0.1])
        case.require("heads", 2)
        case.require("p", 2)
        is_sparse = case.choice("variant", {"sparse": True, "mixk": False}, default="sparse")
        made = MixedKernelUpdate(*sizes, rank=case.setting("rank"), sparsity=sparsity, is_sparse=is_sparse)
    else:
        made = KernelUpdate(
            *sizes, rank=case.setting("rank"), pieces=pieces, sparsity=sparsity, coefficients=case.setting("coeff"),
            norm=norm,
        )  # fmt: skip
    state = {name: value for name, value in made.state_dict().items() if name != "sparsity"}
    made.load_state_dict({**made.state_dict(), **case.state(state, lambda name: f"param.{name}")})
    made.eval()
    dense = made.dense(*made.generators())
    case.compare("out.merged_dense", dense)
    if not made.is_dense:
        case.compare("out.threshold", made.threshold(dense.detach().abs()))
        case.compare("out.merged_sparse", made.sparsified(dense))
    case.compare("out.delta_weight", made.delta())
    x = case.take("in.x").requires_grad_()
    y = made.branch(x, {})
    case.compare("out.y", y)
    y.backward(case.take("in.cotangent"))
    case.compare_gradient("x", x.grad)
    for name, parameter in made.named_parameters():
        case.compare_gradient(name, parameter.grad)


def allocator(case: GoldenCase) -> None:
    """Budgets, shares and moving averages over a run whose factors and gradients are given."""
    case.choice("metric", {"ipt": "ipt"}, default="ipt")
    modules, order = case.setting("modules"), case.setting("order")
    rank, epochs, steps = (case.setting(name) for name in ("rank", "total_epochs", "steps_per_epoch"))
    updates = {
        name: MixedKernelUpdate(*modules[name], rank=rank, sparsity=case.setting("init_sparsity")) for name in order
    }
    made = Allocator(
        updates,
        initial_sparsity=case.setting("init_sparsity"),
        target_sparsity=case.setting("target_sparsity"),
        initial_epochs=case.setting("init_warmup"),
        final_epochs=case.setting("final_warmup"),
        interval=case.setting("interval"),
        betas=(case.setting("beta1"), case.setting("beta2")),
    )
    run: Any = SimpleNamespace(total_epochs=epochs)
    made.on_fit_start(run)
    found: dict[str, list[torch.Tensor]] = {"sparsity": [], "total_nonzero": [], "score": []}
    for epoch in range(epochs):
        made.on_epoch_start(epoch)
        found["sparsity"].append(torch.stack([updates[name].sparsity.clone() for name in order]))
        found["total_nonzero"].append(torch.tensor(made.budget))
        scores = made.scores
        found["score"].append(torch.full((len(order),), float("nan")) if scores is None else scores.clone())
        for step in range(epoch * steps, (epoch + 1) * steps):
            for name in order:
                for factor in ("factor_in", "factor_out"):
                    parameter = getattr(updates[name], factor)
                    with torch.no_grad():
                        parameter.copy_(case.take(f"in.step{step}.{name}.{factor}"))
                    parameter.grad = case.take(f"in.step{step}.{name}.grad_{factor}")
            made.after_step(step)
    sizes = torch.tensor([modules[name][0] * modules[name][1] for name in order], dtype=torch.float64)
    # The authors count in float32; the note allows an entry.
    entries = case.note("nonzero_count_atol", 0.0)
    slack = {"sparsity": entries / sizes, "total_nonzero": torch.tensor(entries), "score": torch.tensor(0.0)}
    for name, values in found.items():
        case.compare_loosely(f"out.{name}", torch.stack(values), slack[name])
    for name, averages in zip(order, made.averages.values(), strict=True):
        for key, value in averages.named_buffers():
            case.compare(f"out.{name}.{key}", value)
