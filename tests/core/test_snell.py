"""SNELL and SNELLA: what backward keeps, thresholds, counts, the shared dropout, and the competition's traps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_backbones import TinyCLIP, TinyViT

from peft_modal.attach.merge import merge_
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.snell import SNELL, KernelUpdate, quantile
from peft_modal.methods.snella import SNELLA, Allocator, MixedKernelUpdate, share_out
from peft_modal_vision.backbone import ViT


def update(*, sparsity: float = 0.6, **options: Any) -> KernelUpdate:
    torch.manual_seed(0)
    return KernelUpdate(20, 14, rank=8, sparsity=sparsity, **options).eval()


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_nothing_dense_is_kept_for_backward(sparsity: float) -> None:
    made = update(sparsity=sparsity)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made.branch(torch.randn(3, 5, 20), {})
    assert sorted(kept) == [(2, 14, 4), (2, 20, 4), (3, 5, 20)]


def test_factors_learn_where_the_input_needs_no_gradient() -> None:
    made = update()
    made.branch(torch.randn(3, 20), {}).square().sum().backward()
    assert made.factor_in.grad is not None
    assert bool(made.factor_in.grad.any())


def test_backward_is_that_of_the_matrix_kept() -> None:
    made, kept = update(), update()
    x = torch.randn(3, 20)
    made.branch(x, {}).square().sum().backward()
    (x @ kept.generate(*kept.generators())).square().sum().backward()
    torch.testing.assert_close(made.factor_in.grad, kept.factor_in.grad)
    torch.testing.assert_close(made.factor_out.grad, kept.factor_out.grad)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.73, 0.999, 1.0])
def test_the_threshold_is_the_interpolated_quantile(count: int, share: float) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(1)).abs().round(decimals=1)
    expected = torch.quantile(values.double(), share)
    assert float(quantile(values.double(), share)) == pytest.approx(float(expected), abs=1e-12)


def test_a_matrix_of_more_than_16_million_entries() -> None:
    values = torch.arange(2**24 + 10, dtype=torch.float32)
    assert float(quantile(values, 0.5)) == pytest.approx((2**24 + 9) / 2, rel=1e-6)


def test_the_share_of_zeros_is_what_was_asked_for() -> None:
    assert float((update(sparsity=0.75).delta() == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    # With 0 SNELL has no competition at all, and SNELLA's loses the smallest entry.
    assert int((update(sparsity=0.0).delta() == 0).sum()) == 0
    torch.manual_seed(0)
    assert int((MixedKernelUpdate(20, 14, rank=8, sparsity=0.0).delta() == 0).sum()) == 1


def test_the_papers_threshold_is_soft() -> None:
    hard, soft = update(), update(threshold="paper")
    assert torch.equal(hard.delta() != 0, soft.delta() != 0)
    assert bool((hard.delta().abs() >= soft.delta().abs()).all())


def vit_b() -> ViT:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return ViT(model="custom", weights="random", sizes=sizes)


@pytest.mark.parametrize(
    ("method", "count"),
    [(SNELL(rank=8), 1_327_104 + 768), (SNELL(rank=32), 5_308_416 + 768), (SNELLA(rank=32), 5_308_632 + 768)],
)
def test_as_many_are_trained_as_the_papers_count(method: Any, count: int) -> None:
    adapter = method.attach(vit_b())
    assert sum(parameter.numel() for parameter in adapter.named_trained().values()) == count


def test_q_k_and_v_see_the_same_dropped_input() -> None:
    adapter = SNELL(sites=["attn"], rank=4, dropout=0.5, drop_path=0.0).attach(TinyViT(depth=1)).train()
    seen = []
    for module in adapter.modules():
        if isinstance(module, KernelUpdate):
            original = module.branch

            def watched(x: torch.Tensor, dropped: dict[float, torch.Tensor], o: Any = original) -> torch.Tensor:
                out = o(x, dropped)
                seen.append(dict(dropped))
                return out

            module.branch = watched
    adapter.backbone(adapter.backbone.example_batch())
    q, k, v, out = seen
    assert q[0.5] is k[0.5] is v[0.5]
    assert out == {}


def test_it_merges_and_packed_attention_takes_it_without_dropout() -> None:
    for backbone in (TinyViT(), TinyCLIP()):
        SNELL(rank=4, sparsity=0.3, dropout=0.0, drop_path=0.0).attach(backbone).eval()
        batch = backbone.example_batch()
        before = backbone(batch).tokens
        merge_(backbone)
        torch.testing.assert_close(backbone(batch).tokens, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(AttachError, match="inputs cannot be dropped"):
        SNELL(rank=4).attach(TinyCLIP())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SNELL(rank=1), "1 is below the kernel's 2 pieces"),
        (lambda: SNELL(coefficients=[0.1]), "method.coefficients: 1 numbers for 2 pieces"),
        (lambda: SNELL(sparsity=1.0), "method.sparsity: 1 leaves nothing"),
        (lambda: SNELL(dropout=1.0), "method.dropout: expected a number from 0 to below 1, got 1.0"),
        (lambda: SNELL(drop_path=1.0), "method.drop_path: expected a number from 0 to below 1, got 1.0"),
        (lambda: SNELLA(target_sparsity=1.0), "method.target_sparsity: 1 leaves nothing"),
    ],
)
def test_wrong_numbers_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_entries_are_shared_out_up_to_the_size_of_each() -> None:
    assert share_out(30.0, [0.5, 0.5], [100, 100]) == [15, 15]
    # The first is full; the others take over, in proportion.
    assert share_out(60.0, [0.8, 0.1, 0.1], [10, 100, 100]) == [10, 25, 25]
    assert share_out(1000.0, [0.5, 0.5], [10, 20]) == [10, 20]
    assert share_out(50.0, [1.0, 0.0], [10, 100]) == [10, 0]


def competition(**options: Any) -> tuple[dict[str, MixedKernelUpdate], Allocator]:
    torch.manual_seed(0)
    updates = {name: MixedKernelUpdate(8, 8, rank=4, sparsity=0.1) for name in ("a", "b")}
    allocator = Allocator(updates, initial_sparsity=0.1, target_sparsity=0.5, **options)
    run: Any = SimpleNamespace(total_epochs=4)
    allocator.on_fit_start(run)
    return updates, allocator


def step(updates: dict[str, MixedKernelUpdate], allocator: Allocator, **sizes: float) -> None:
    for name, made in updates.items():
        for factor in (made.factor_in, made.factor_out):
            factor.grad = torch.full_like(factor, sizes[name])
    allocator.after_step(0)


def test_nothing_is_shared_out_before_anything_has_moved() -> None:
    updates, allocator = competition()
    allocator.on_epoch_start(2)
    assert [float(made.sparsity) for made in updates.values()] == [0.1, 0.1]


def test_the_more_sensitive_one_keeps_more() -> None:
    updates, allocator = competition()
    step(updates, allocator, a=1.0, b=0.1)
    allocator.on_epoch_start(3)
    found = allocator.site_entries()
    assert found["a"] > found["b"]
    assert sum(found.values()) <= allocator.budget


def test_gradients_that_are_no_numbers_count_nothing() -> None:
    updates, allocator = competition()
    step(updates, allocator, a=float("nan"), b=1.0)
    assert all(bool(value.isfinite().all()) for value in allocator.buffers())


def test_resuming_goes_on_with_the_averages() -> None:
    first = SNELLA(rank=4).attach(TinyViT(depth=1))
    for parameter in first.named_trained().values():
        parameter.grad = torch.ones_like(parameter)
    first.events.after_step(0)
    state = first.state(training_only=True)
    assert any(".importance_in" in name for name in state)
    assert not any(".importance_in" in name for name in first.state())
    second = SNELLA(rank=4).attach(TinyViT(depth=1))
    second.load(state, training_only=True)
    run: Any = SimpleNamespace(total_epochs=4)
    for adapter in (first, second):
        adapter.events.on_fit_start(run)
        adapter.events.on_epoch_start(2)
    sparsities = [
        [float(value) for name, value in adapter.state().items() if name.endswith(".sparsity")]
        for adapter in (first, second)
    ]
    assert sparsities[0] == sparsities[1]
    assert len(set(sparsities[0])) > 1


def test_a_step_that_overflowed_counts_nothing() -> None:
    updates, allocator = competition()
    step(updates, allocator, a=float("inf"), b=1.0)
    assert not any(bool(value.any()) for value in allocator.buffers())


def test_shares_that_outlast_the_run_are_refused() -> None:
    updates, _ = competition()
    allocator = Allocator(updates, initial_sparsity=0.1, target_sparsity=0.5, initial_epochs=3, final_epochs=2)
    run: Any = SimpleNamespace(total_epochs=4)
    with pytest.raises(ConfigError, match="5 epochs keep a share, and the run has 4"):
        allocator.on_fit_start(run)


def test_what_is_left_is_shared_out_to_the_end() -> None:
    # One site has nearly all of the score and little room: seventy rounds of rounding would lose an entry each.
    scores = [0.9] + [0.1 / 71] * 71
    counts = share_out(5000.0, scores, [100] + [1000] * 71)
    assert counts[0] == 100
    assert sum(counts) > 5000 - 72


def test_a_run_without_epochs_is_refused() -> None:
    _, allocator = competition()
    run: Any = SimpleNamespace(total_epochs=None)
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs"):
        allocator.on_fit_start(run)
