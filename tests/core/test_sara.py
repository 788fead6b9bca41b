"""SaRA: what is selected, what the rank loss adds and when, re-selection, and what a file holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from numeric import draw, projection_loss
from plain_backbone import PlainBackbone
from tiny_backbones import TinyCLIP, TinyViT
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from typing_extensions import override

import peft_modal.methods.sara
from peft_modal.anatomy import Anatomy, AnatomyBuilder
from peft_modal.attach import Adapter, Run, merge_
from peft_modal.errors import AttachError, BackboneMismatchError, ConfigError, FileFormatError
from peft_modal.methods.magnitude import magnitude_at
from peft_modal.methods.sara import SaRA, SaRARun, default_lr, nuclear_norm
from peft_modal.tasks.base import Task
from peft_modal.tasks.optim import parameter_groups

THRESHOLD = 0.05


class Small(nn.Module):
    """A convolution, a linear that is a candidate of the rank loss, and one that is one row too small for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(70, 65, 1)
        self.fc1 = nn.Linear(65, 66)
        self.fc2 = nn.Linear(66, 64)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, 70) to (B, 64)."""
        return self.fc2(self.fc1(self.conv(x[..., None, None]).flatten(1).tanh()).tanh())


def small_backbone() -> PlainBackbone:
    net = Small()
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(0.1 * draw(*parameter.shape, seed=seed, dtype=torch.float32))

    def describe(b: AnatomyBuilder) -> None:
        for path in ("conv", "fc1", "fc2"):
            b.op(path, path)

    return PlainBackbone(net, describe, example=(70,))


def run_of(adapter: Adapter) -> SaRARun:
    found = adapter.get_submodule("training_only.sara")
    assert isinstance(found, SaRARun)
    return found


class Steps:
    """The events of a run around AdamW, in the task's order."""

    def __init__(self, backbone: PlainBackbone, adapter: Adapter, *, total: int, lr: float = 0.02) -> None:
        self.backbone, self.adapter, self.step = backbone, adapter, 0
        groups = parameter_groups(adapter.named_trained(), lr=lr, weight_decay=0.1, decay=adapter.decay)
        self.optimizer = torch.optim.AdamW(groups)
        generator = torch.Generator().manual_seed(0)
        adapter.events.on_fit_start(Run(total, [self.optimizer], generator, adapter.named_trained()))

    def take(self, *, seed: int | None = None) -> None:
        events = self.adapter.events
        events.step_begin(self.step)
        self.optimizer.zero_grad()
        x = draw(4, 70, seed=self.step if seed is None else seed, dtype=torch.float32)
        projection_loss(self.backbone({"x": x}).tokens).backward()
        events.after_backward(0)
        events.before_step(self.step)
        self.optimizer.step()
        events.after_step(self.step)
        self.step += 1


# What is selected.


def test_entries_strictly_below_the_threshold_are_selected_zeros_included_and_ties_not() -> None:
    backbone = small_backbone()
    for tensor in (backbone.network.conv.weight, backbone.network.fc1.bias):
        with torch.no_grad():
            tensor.flatten()[:3] = torch.tensor([THRESHOLD, -THRESHOLD, 0.0])
    run = run_of(SaRA(threshold=THRESHOLD).attach(backbone))
    for path, entries in run.tuned.items():
        wanted = (backbone.tensor(path).abs() < torch.tensor(THRESHOLD)).flatten().nonzero().flatten()
        assert entries.index.tolist() == wanted.tolist(), path
        assert torch.equal(entries.values, backbone.tensor(path).flatten()[wanted])
    assert list(run.tuned) == ["conv.weight", "conv.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    for path in ("conv.weight", "fc1.bias"):
        assert 2 in run.tuned[path].index
        assert not {0, 1} & set(run.tuned[path].index.tolist())


def test_a_share_is_the_quantile_over_all_tensors_together() -> None:
    backbone = small_backbone()
    run = run_of(SaRA(share=0.1).attach(backbone))
    joined = torch.cat([p.detach().abs().flatten() for p in backbone.network.parameters()]).sort().values
    wanted = round(0.1 * len(joined))
    assert run.threshold == float(joined[wanted])
    assert sum(entries.values.numel() for entries in run.tuned.values()) == wanted
    everything = run_of(SaRA(share=1.0).attach(backbone, name="all"))
    assert sum(entries.values.numel() for entries in everything.tuned.values()) == len(joined)


def test_a_magnitude_of_any_rank_is_exact() -> None:
    tensors = [
        draw(40, 5),
        1e-30 * draw(300),
        torch.zeros(7),
        draw(64, seed=3, dtype=torch.bfloat16),
        -draw(90).float(),
    ]
    joined = torch.cat([t.float().abs().flatten() for t in tensors]).sort().values
    for rank in (0, 6, 7, 100, 400, len(joined) - 1):
        assert magnitude_at(tensors, rank) == float(joined[rank])


def test_only_named_sites_are_taken_and_whole_fused_tensors_instead_of_slices() -> None:
    run = run_of(SaRA(sites={"roles": ["attn"], "blocks": [1]}, share=0.5).attach(TinyViT()))
    assert list(run.tuned) == ["blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight"]


def test_slices_of_one_tensor_are_selected_each_by_its_own_rows() -> None:
    backbone = TinyViT(depth=1)
    adapter = SaRA(sites=["attn.q", "attn.v"], threshold=0.01).attach(backbone)
    tuned = run_of(adapter).tuned
    assert list(tuned) == ["blocks.0.attn.q", "blocks.0.attn.v"]
    weight = backbone.tensor("blocks.0.attn.qkv.weight")
    wanted = (weight[64:].abs() < 0.01).flatten().nonzero().flatten()
    assert tuned["blocks.0.attn.v"].index.tolist() == wanted.tolist()
    assert torch.equal(tuned["blocks.0.attn.v"].values, weight[64:].flatten()[wanted])
    adapter.adopt(adapter.facts())


def test_every_listed_tensor_is_taken_once_on_a_network_with_packed_attention_and_bare_parameters() -> None:
    backbone = TinyCLIP()
    run = run_of(SaRA(share=0.3).attach(backbone))
    assert set(run.tuned) == {name for name, _ in backbone.network.named_parameters()} - {"logit_scale"}


def test_what_any_method_trains_whole_is_left_to_that() -> None:
    backbone = TinyViT()
    old = backbone.anatomy
    backbone.anatomy = Anatomy(
        sites=old.sites, ports=old.ports, layouts=old.layouts, depth=old.depth, always_trained=("cls_token",)
    )
    adapter = SaRA(share=0.3).attach(backbone)
    assert "cls_token" not in run_of(adapter).tuned
    assert "backbone.cls_token" in adapter.named_trained()
    with pytest.raises(AttachError, match="trained whole by any method"):
        SaRA(sites="cls", share=0.3).attach(backbone, name="other")


def test_a_threshold_below_all_entries_is_refused_with_the_smallest() -> None:
    backbone = small_backbone()
    least = min(float(p.abs().min()) for p in backbone.network.parameters())
    with pytest.raises(
        AttachError, match=rf"no entry of the 6 selected tensors is below 1e-12, .* has {least:g}; raise"
    ):
        SaRA(threshold=1e-12).attach(backbone)


def test_threshold_and_share_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"method\.share: the threshold is given already"):
        SaRA(threshold=1e-3, share=0.1)
    with pytest.raises(ConfigError, match=r"method\.share: 0\.0 is not above 0"):
        SaRA(share=0.0)
    assert SaRA().share == 0.05


def test_the_default_learning_rate_is_the_cards() -> None:
    card = {2e-4: 9.32e-4, 5e-4: 8.39e-4, 8e-4: 7.56e-4, 2e-3: 4.97e-4, 5e-3: 1.74e-4, 1e-2: 3.02e-5}
    for threshold, rate in card.items():
        assert default_lr(threshold) == pytest.approx(rate, rel=2e-3)
    with pytest.raises(ConfigError, match=r"fitted for thresholds from 0 to 0\.01, not for 0\.1"):
        default_lr(0.1)


# What is trained.


def test_gradients_and_state_are_as_many_as_the_entries_and_nothing_else_has_any() -> None:
    backbone = small_backbone()
    adapter = SaRA(threshold=THRESHOLD, rank_weight=0.1).attach(backbone)
    steps = Steps(backbone, adapter, total=8)
    for _ in range(3):
        steps.take()
    chosen = sum(int((p.abs() < THRESHOLD).sum()) for p in backbone.network.parameters())
    with_gradient = [p for m in (backbone, adapter) for p in m.parameters() if p.grad is not None]
    assert sum(p.grad.numel() for p in with_gradient if p.grad is not None) == chosen
    state = [t for values in steps.optimizer.state.values() for t in values.values() if t.numel() > 1]
    assert sum(t.numel() for t in state) == 2 * chosen


def test_what_is_not_selected_stays_equal_to_the_bit_in_spite_of_decay() -> None:
    backbone = small_backbone()
    before = copy.deepcopy(backbone.network.state_dict())
    adapter = SaRA(threshold=THRESHOLD, reselect_share=None).attach(backbone)
    steps = Steps(backbone, adapter, total=4)
    for _ in range(4):
        steps.take()
    adapter.events.finalise()
    merge_(backbone)
    for name, tensor in backbone.network.state_dict().items():
        selected = before[name].abs() < THRESHOLD
        assert torch.equal(tensor[~selected], before[name][~selected])
        assert (tensor[selected] != before[name][selected]).all()


def test_decay_pulls_the_values_themselves_to_zero_in_biases_too() -> None:
    backbone = small_backbone()
    adapter = SaRA(threshold=THRESHOLD).attach(backbone)
    groups = parameter_groups(adapter.named_trained(), lr=0.1, weight_decay=0.5, decay=adapter.decay)
    assert [group["weight_decay"] for group in groups] == [0.5]
    entries = run_of(adapter).tuned["fc1.bias"]
    before = entries.values.detach().clone()
    optimizer = torch.optim.AdamW(groups)
    entries.values.grad = torch.zeros_like(entries.values)
    optimizer.step()
    torch.testing.assert_close(entries.values.detach(), before * (1 - 0.1 * 0.5))


def test_negative_entries_start_as_they_are() -> None:
    # The released compact optimiser starts from their absolute values.
    backbone = small_backbone()
    before = backbone(backbone.example_batch()).tokens
    adapter = SaRA(threshold=THRESHOLD).attach(backbone)
    assert (run_of(adapter).tuned["fc1.weight"].values < 0).any()
    assert torch.equal(backbone(backbone.example_batch()).tokens, before)


# The rank loss.


def test_candidates_are_matrices_with_both_sides_above_64() -> None:
    assert run_of(SaRA(share=0.5).attach(small_backbone())).matrices == ["fc1.weight"]


def test_the_rank_loss_is_the_nuclear_norm_of_the_selected_entries_in_place() -> None:
    backbone = small_backbone()
    run = run_of(SaRA(threshold=THRESHOLD, rank_weight=0.3).attach(backbone))
    weight = backbone.tensor("fc1.weight").detach()
    masked = torch.where(weight.abs() < THRESHOLD, weight, 0.0).double().requires_grad_()
    wanted = 0.3 * torch.linalg.svdvals(masked).sum()
    (gradient,) = torch.autograd.grad(wanted, masked)
    with torch.autocast("cpu", torch.bfloat16):
        value, got = run.rank_loss("fc1.weight")
    torch.testing.assert_close(value, wanted.detach())
    torch.testing.assert_close(
        got, gradient.flatten()[run.tuned["fc1.weight"].index.long()].float(), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_the_gradient_of_a_matrix_without_full_rank_is_the_subgradient_of_least_norm(shape: tuple[int, int]) -> None:
    left, values, right = torch.linalg.svd(draw(*shape), full_matrices=False)
    values[3:] = 0.0
    norm, gradient = nuclear_norm(left @ values.diag() @ right)
    torch.testing.assert_close(norm, values.sum(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, left[:, :3] @ right[:3], atol=1e-6, rtol=1e-6)
    assert torch.equal(
        nuclear_norm(torch.zeros(shape, dtype=torch.float64))[1], torch.zeros(shape, dtype=torch.float64)
    )


def test_few_entries_have_no_rank_loss() -> None:
    backbone = small_backbone()
    magnitudes = backbone.tensor("fc1.weight").detach().abs().flatten().sort().values
    for count, has in ((100, False), (101, True)):
        adapter = SaRA(sites="fc1", threshold=float(magnitudes[count])).attach(backbone, name=str(count))
        run = run_of(adapter)
        assert run.tuned["fc1.weight"].values.numel() == count
        run.before_step(0)
        assert (run.tuned["fc1.weight"].values.grad is not None) == has
        assert ("rank_loss" in adapter.events.figures()) == has


def test_the_matrix_of_a_step_follows_from_its_number_alone() -> None:
    net = nn.Sequential(*(nn.Linear(65, 65) for _ in range(3)))
    backbone = PlainBackbone(net, lambda b: [b.op("op", str(i)) for i in range(3)], example=(65,))
    runs = [run_of(SaRA(share=0.5).attach(backbone, name=name)) for name in "ab"]
    picked = [[run.pick(step) for step in range(40)] for run in runs]
    assert picked[0] == picked[1]
    assert set(picked[0]) == {"0.weight", "1.weight", "2.weight"}
    assert any(one == other for one, other in zip(picked[0], picked[0][1:], strict=False))  # with replacement
    other = SaRA(share=0.5).attach(backbone, name="c", generator=torch.Generator().manual_seed(9))
    assert [run_of(other).pick(step) for step in range(40)] != picked[0]


# Re-selection.


def test_from_the_step_after_t_only_what_is_still_below_is_trained() -> None:
    backbone = small_backbone()
    adapter = SaRA(threshold=THRESHOLD, reselect_share=0.5).attach(backbone)
    run = run_of(adapter)
    steps = Steps(backbone, adapter, total=4)
    counts = []
    for _ in range(4):
        before = {name: entries.tuned() for name, entries in run.tuned.items()}
        trained = {name: set(entries.index.tolist()) for name, entries in run.tuned.items()}
        steps.take()
        counts.append(sum(entries.values.numel() for entries in run.tuned.values()))
        for name, entries in run.tuned.items():
            index, now = entries.tuned()
            moved = set(index[now != before[name][1]].tolist())
            if steps.step == 3:  # the step after T = 2
                small = before[name][0][before[name][1].abs() < torch.tensor(THRESHOLD)]
                trained[name] &= set(small.tolist())
            assert moved == trained[name]
    assert counts[0] == counts[1] > counts[2] == counts[3] > 0
    assert int(run.reselected_after) == 2


@pytest.mark.parametrize("reset", [False, True])
def test_moments_of_what_goes_on_are_kept_unless_asked(reset: bool) -> None:
    backbone = small_backbone()
    adapter = SaRA(threshold=THRESHOLD, reset_state_on_reselect=reset).attach(backbone)
    run = run_of(adapter)
    steps = Steps(backbone, adapter, total=4)
    steps.take()
    steps.take()
    entries = run.tuned["fc1.weight"]
    first = {k: v.clone() for k, v in steps.optimizer.state[entries.values].items()}
    alive = entries.values.detach().abs() < torch.tensor(THRESHOLD)
    adapter.events.step_begin(2)
    after = steps.optimizer.state.get(entries.values, {})
    if reset:
        assert after == {}
    else:
        assert torch.equal(after["exp_avg"], first["exp_avg"][alive])
        assert torch.equal(after["exp_avg_sq"], first["exp_avg_sq"][alive])
        assert float(after["step"]) == 2.0
    assert (
        sum(p.numel() for group in steps.optimizer.param_groups for p in group["params"])
        < first["exp_avg"].numel() + 9000
    )


def test_without_re_selection_all_go_on() -> None:
    backbone = small_backbone()
    adapter = SaRA(threshold=THRESHOLD, reselect_share=None).attach(backbone)
    count = sum(p.numel() for p in adapter.parameters())
    steps = Steps(backbone, adapter, total=3)
    for _ in range(3):
        steps.take()
    assert sum(p.numel() for p in adapter.parameters()) == count


def test_several_processes_cannot_follow_re_selection() -> None:
    adapter = SaRA(threshold=THRESHOLD).attach(small_backbone())
    run = Run(4, [], torch.Generator(), {}, world_size=2)
    with pytest.raises(ConfigError, match=r"method\.reselect_share: .* several processes cannot follow"):
        adapter.events.on_fit_start(run)


# Files, factors, stacking.


def trained_pair() -> tuple[PlainBackbone, Adapter]:
    backbone = small_backbone()
    adapter = SaRA(threshold=THRESHOLD).attach(backbone)
    steps = Steps(backbone, adapter, total=4)
    for _ in range(4):
        steps.take()
    adapter.events.finalise()
    return backbone, adapter


def test_a_file_holds_every_entry_that_was_ever_trained() -> None:
    backbone, adapter = trained_pair()
    state, facts = adapter.state(), adapter.facts()
    assert [name for name in state if not name.endswith((".index", ".delta"))] == []
    for path in ("conv.weight", "fc1.bias"):
        loaded = backbone.tensor(path).flatten()
        index = (loaded.abs() < torch.tensor(THRESHOLD)).nonzero().flatten()
        assert state[f"adapter.{path}.index"].tolist() == index.tolist()
        assert state[f"adapter.{path}.index"].dtype == torch.int32
        assert (state[f"adapter.{path}.delta"] != 0).all()
    assert facts["sara"]["format"] == "sara-v1"
    assert facts["sara"]["threshold"] == THRESHOLD
    assert facts["sara"]["reselect_step"] == 2
    assert facts["sara"]["alpha"] == 1.0

    other = small_backbone()
    fresh = SaRA(threshold=THRESHOLD).attach(other)
    fresh.load(state)
    fresh.adopt(facts)
    batch = backbone.example_batch()
    assert torch.equal(other(batch).tokens, backbone(batch).tokens)


def test_a_file_of_other_base_values_is_refused() -> None:
    _, adapter = trained_pair()
    other = small_backbone()
    index = int(adapter.state()["adapter.fc2.weight.index"][0])
    with torch.no_grad():
        other.tensor("fc2.weight").view(-1)[index] *= 1.0001
    fresh = SaRA(threshold=THRESHOLD).attach(other)
    fresh.load(adapter.state())
    with pytest.raises(BackboneMismatchError, match="the SaRA entries were trained on other weights: base_sha256"):
        fresh.adopt(adapter.facts())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"format": "sara-v2"}, "of format 'sara-v2', this peft_modal reads 'sara-v1'"), ({"alpha": "1"}, "alpha is '1'")],
)
def test_facts_that_cannot_be_read_are_refused(change: Mapping[str, Any], sentence: str) -> None:
    adapter = SaRA(threshold=THRESHOLD).attach(small_backbone())
    with pytest.raises(FileFormatError, match=sentence):
        adapter.adopt({"sara": {**adapter.facts()["sara"], **change}})


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_alpha_scales_the_change_and_is_the_files_default(alpha: float) -> None:
    backbone, adapter = trained_pair()
    other = small_backbone()
    base = {name: p.detach().clone() for name, p in other.network.named_parameters()}
    adapter.weight = alpha
    fresh = SaRA(threshold=THRESHOLD).attach(other)
    fresh.load(adapter.state())
    fresh.adopt(adapter.facts())
    assert fresh.weight == alpha
    batch = backbone.example_batch()
    assert torch.equal(other(batch).tokens, backbone(batch).tokens)
    adapter.weight = 1.0
    merge_(backbone)
    tuned = dict(backbone.network.named_parameters())
    mixed = {name: base[name] + alpha * (tuned[name] - base[name]) for name in base}
    plain = torch.func.functional_call(small_backbone().network, mixed, (batch["x"],))
    torch.testing.assert_close(other(batch).tokens, plain)


def test_the_changes_of_two_adapters_add_up() -> None:
    first, second = trained_pair()[1], trained_pair()[1]
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(-1.5)
    backbone = small_backbone()
    wanted = {name: p.detach().clone() for name, p in backbone.network.named_parameters()}
    for name, trained in (("first", first), ("second", second)):
        adapter = SaRA(threshold=THRESHOLD).attach(backbone, name=name)
        adapter.load(trained.state())
        adapter.weight = 0.6
        for path, parameter in wanted.items():
            index = trained.state()[f"adapter.{path}.index"].long()
            parameter.view(-1)[index] += 0.6 * trained.state()[f"adapter.{path}.delta"]
    batch = backbone.example_batch()
    expected = torch.func.functional_call(small_backbone().network, wanted, (batch["x"],))
    torch.testing.assert_close(backbone(batch).tokens, expected)
    merge_(backbone)
    torch.testing.assert_close(backbone(batch).tokens, expected)


# In a task.


class Regression(Task):
    """Mean squared error of the features."""

    @override
    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        return self.backbone(batch).tokens

    @override
    def losses(self, batch: Mapping[str, Any], output: Tensor) -> dict[str, Tensor]:
        return {"loss": functional.mse_loss(output, batch["y"])}

    @override
    def update_metrics(self, stage: str, batch: Mapping[str, Any], output: Tensor) -> None:
        """None."""


def fit(folder: Path, *callbacks: pl.Callback, resume: str | None = None, clip_norm: float | None = 1.0) -> Regression:
    backbone = small_backbone()
    adapter = SaRA(threshold=THRESHOLD, rank_weight=0.05).attach(backbone)
    task = Regression(backbone, adapter, nn.Identity(), lr=0.02, clip_norm=clip_norm)
    batches = [
        {"x": draw(4, 70, seed=i, dtype=torch.float32), "y": draw(4, 64, seed=9 + i, dtype=torch.float32)}
        for i in range(2)
    ]
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(task, DataLoader(batches, batch_size=None), ckpt_path=resume, weights_only=True)
    return task


class SaveEveryEpoch(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained: list[int] = []

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")
        self.trained.append(sum(p.numel() for p in pl_module.parameters() if p.requires_grad))


def test_a_run_resumed_before_or_after_re_selection_equals_the_straight_one(tmp_path: Path) -> None:
    saved = SaveEveryEpoch(tmp_path)
    straight = fit(tmp_path, saved)
    assert saved.trained[0] > saved.trained[1]  # T = 3 lies in the second of three epochs of two steps
    for epoch in (0, 1):
        resumed = fit(tmp_path, resume=str(tmp_path / f"{epoch}.ckpt"))
        assert resumed.adapter.facts() == straight.adapter.facts()
        for name, value in resumed.adapter.state().items():
            assert torch.equal(value, straight.adapter.state()[name]), (epoch, name)
    assert sum(p.numel() for p in straight.adapter.parameters()) == saved.trained[0]


class SeeGradients(pl.Callback):
    """The gradients that the first step was taken with, the rank loss's before it, and what was logged."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.wanted = torch.zeros(0)
        self.logged: set[str] = set()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step == 0:
            self.wanted = run_of(pl_module.adapter).rank_loss("fc1.weight")[1]

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.seen:
            tuned = run_of(pl_module.adapter).tuned
            self.seen = {name: entries.values.grad.clone() for name, entries in tuned.items()}

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.logged = {name for name in trainer.callback_metrics if name.startswith("train/")}


def test_the_rank_loss_comes_after_clipping_and_is_logged(tmp_path: Path) -> None:
    seen = SeeGradients()
    fit(tmp_path, seen, clip_norm=1e-7)
    torch.testing.assert_close(seen.seen["fc1.weight"], seen.wanted, atol=1e-7, rtol=0)
    assert float(seen.wanted.norm()) > 1e-3
    rest = torch.cat([gradient for name, gradient in seen.seen.items() if name != "fc1.weight"])
    assert 0 < float(rest.norm()) <= 1.01e-7
    assert "train/rank_loss" in seen.logged


def test_the_method_is_registered_under_the_cards_name() -> None:
    from peft_modal.plugin import PLUGIN

    module, _, name = PLUGIN.methods["sara"].target.partition(":")
    assert getattr(peft_modal.methods.sara, name) is SaRA
    assert module == "peft_modal.methods.sara"
