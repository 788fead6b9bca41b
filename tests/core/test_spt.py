"""SPT: the sweep's rules, what is attached by an allocation, files, and a run from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import TinyUNet, TinyViT

from peft_modal.__main__ import main
from peft_modal.anatomy import Selector
from peft_modal.api import load
from peft_modal.attach import Adapter, Run
from peft_modal.attach.merge import merge_
from peft_modal.errors import AttachError, ConfigError, FileFormatError, MergeError, TrainingError
from peft_modal.methods.spt import SPT, Target, allocate
from peft_modal.methods.spt.method import SPTRun, sensitivities
from peft_modal.methods.spt.places import MATRICES, places_of

QUIET: dict[str, Any] = {"dropout": 0.0, "drop_path": 0.0}


def losses(backbone: Any) -> Any:
    return lambda batch: {"loss": backbone(batch).tokens.square().mean()}


def calibrated(backbone: Any = None, **options: Any) -> tuple[Adapter, SPTRun]:
    backbone = backbone or TinyViT()
    adapter = SPT(rank=2, unit=1000.0, **{"budget": 1.0, **QUIET, **options}).attach(backbone)
    adapter.events.prepare([backbone.example_batch()], losses(backbone))
    return adapter, next(module for module in adapter.modules() if isinstance(module, SPTRun))


def shake(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.named_trained().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


VECTOR, MATRIX = Target("v", "vector", 10), Target("m", "matrix", 100, 40)


def share(budget: float, values: dict[str, torch.Tensor], **options: Any) -> Any:
    settings: dict[str, Any] = {"unit": 100, "alpha": 10.0, "beta": 5.0, "overhead": 0, **options}
    return allocate([VECTOR, MATRIX], values, [budget], **settings)[0]


def test_a_fifth_of_a_vectors_entries_tunes_it_whole_and_a_tenth_of_its_cost_gives_a_matrix_a_module() -> None:
    vector, matrix = torch.zeros(10), torch.zeros(10, 10)
    vector[[3, 7]] = 10.0
    matrix.view(-1)[[5, 50, 60]] = 5.0
    found = share(0.13, {"v": vector, "m": matrix})
    # Two entries are a fifth of the vector; three are below a tenth of 40 for the matrix.
    assert found.vectors == ("v",)
    assert not found.structured
    assert found.entries["m"].tolist() == [5, 50] or found.entries["m"].tolist() == [5, 50, 60]
    matrix.view(-1)[70] = 5.0
    found = share(0.5, {"v": vector, "m": matrix})
    assert found.structured == ("m",)
    assert found.total == pytest.approx(0.5)


def test_structured_only_tunes_no_single_entries() -> None:
    values = {"v": torch.zeros(10), "m": torch.rand(10, 10)}
    assert not share(0.02, values, structured_only=True).entries
    assert share(0.02, values).entries


def test_the_class_token_is_part_of_the_budget() -> None:
    values = {"v": torch.rand(10), "m": torch.rand(10, 10)}
    assert share(0.4, values, overhead=30).total >= 0.3


def test_sensitivities_are_sums_of_squared_batch_gradients_and_leave_nothing_behind() -> None:
    backbone = TinyViT(depth=1)
    adapter = SPT().attach(backbone)
    (run,) = (module for module in adapter.modules() if isinstance(module, SPTRun))
    before = {name: tensor.clone() for name, tensor in backbone.network.state_dict().items()}
    batch = backbone.example_batch()
    once = sensitivities(backbone, run.places, [batch], losses(backbone))
    thrice = sensitivities(backbone, run.places, [batch] * 3, losses(backbone))
    assert set(once) == set(run.places)
    torch.testing.assert_close(thrice["blocks.0.attn.k.weight"], 3 * once["blocks.0.attn.k.weight"])
    assert once["blocks.0.attn.v.bias"].shape == (32,)
    assert not any(parameter.requires_grad for parameter in backbone.network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.network.state_dict().items())
    assert list(backbone.adapters) == ["default"]


@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_a_calibrated_adapter_starts_as_the_network_and_comes_back_from_its_file(form: str) -> None:
    backbone = TinyViT()
    batch = backbone.example_batch()
    bare = backbone(batch).tokens
    adapter, run = calibrated(backbone, form=form)
    assert run.allocation is not None
    assert run.allocation.structured
    assert run.allocation.vectors
    torch.testing.assert_close(backbone(batch).tokens, bare, rtol=1e-5, atol=1e-6)
    shake(adapter)
    state, facts = adapter.state(), json.loads(json.dumps(adapter.facts()))
    other = TinyViT()
    fresh = SPT(rank=2, unit=1000.0, form=form, **QUIET).attach(other, name="read")
    with pytest.raises(FileFormatError):
        fresh.load(state)
    fresh.rebuild(facts)
    fresh.load(state)
    assert torch.equal(other(batch).tokens, backbone(batch).tokens)


def test_single_entries_of_slices_and_of_norms() -> None:
    # A small budget has only single entries and vectors.
    adapter, run = calibrated(budget=0.06, alpha=1e-3, beta=0.9, norm_entries=True, train_cls=False)
    assert run.allocation is not None
    assert not run.allocation.structured
    assert run.allocation.entries
    counts = sum(len(index) for index in run.allocation.entries.values())
    assert sum(parameter.numel() for parameter in adapter.named_trained().values()) == counts
    without, second = calibrated(budget=0.06, alpha=1e-3, beta=0.9, train_cls=False)
    assert second.allocation is not None
    norms = sum(len(index) for name, index in second.allocation.entries.items() if "norm" in name)
    assert sum(parameter.numel() for parameter in without.named_trained().values()) == counts - norms


def test_the_lora_form_merges_and_the_adapter_form_says_why_not() -> None:
    adapter, _ = calibrated()
    shake(adapter)
    backbone = adapter.backbone
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    merge_(backbone)
    torch.testing.assert_close(backbone(batch).tokens, before, rtol=1e-4, atol=1e-4)
    sequential, _ = calibrated(form="adapter")
    with pytest.raises(MergeError, match="no equivalent in plain weights"):
        merge_(sequential.backbone)


def test_the_released_start_is_not_the_network() -> None:
    backbone = TinyViT()
    batch = backbone.example_batch()
    bare = backbone(batch).tokens
    calibrated(backbone, init="trunc_normal")
    assert not torch.allclose(backbone(batch).tokens, bare)


def test_separate_queries_and_keys_have_their_own_biases() -> None:
    adapter, run = calibrated(TinyUNet(), budget=0.5)
    assert run.allocation is not None
    assert all(name in run.places for name in run.allocation.vectors)
    assert adapter.named_trained()


@pytest.mark.parametrize(("unit", "warns"), [(1000.0, False), (1e6, True)])
def test_a_budget_that_cannot_be_met_is_said(unit: float, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    backbone = TinyViT()
    adapter = SPT(rank=2, unit=unit, budget=1.0, **QUIET).attach(backbone)

    adapter.events.prepare([backbone.example_batch()], losses(backbone))

    said = [message for message in caplog.messages if "method.budget asks for" in message]
    assert bool(said) == warns
    if warns:
        run = next(module for module in adapter.modules() if isinstance(module, SPTRun))
        assert run.allocation is not None
        assert "1,000,000" in said[0]
        assert f"{round(run.allocation.total * unit):,}" in said[0]


def test_what_was_never_calibrated_is_not_trained() -> None:
    adapter = SPT().attach(TinyViT())
    run = Run(4, [], torch.Generator(), adapter.named_trained())
    with pytest.raises(TrainingError, match="was not calibrated"):
        adapter.events.on_fit_start(run)
    with pytest.raises(TrainingError, match="there is none"):
        adapter.events.prepare([], losses(adapter.backbone))


def test_a_file_of_another_network_is_refused() -> None:
    adapter, _ = calibrated(TinyViT(depth=3))
    other = SPT(rank=2, unit=1000.0).attach(TinyViT(depth=1))
    with pytest.raises(FileFormatError, match="none of this network's tensors"):
        other.rebuild(adapter.facts())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SPT(dropout=1.0), "method.dropout: expected a number from 0 to below 1, got 1.0"),
        (lambda: SPT(drop_path=1.0), "drop_path"),
    ],
)
def test_wrong_numbers_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_no_linear_is_refused() -> None:
    with pytest.raises(AttachError, match="no linear is selected"):
        SPT(sites=["embed"]).attach(TinyViT())


def test_a_run_calibrates_trains_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = '{"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}'
    Path("run.yaml").write_text(
        f"backbone: {{name: vit, model: custom, weights: random, sizes: {sizes}}}\n"
        "method: {name: spt, rank: 2, budget: 2.0, unit: 1000.0}\nhead: {name: linear}\n"
        "task: {name: classification}\n"
        "data: {name: patterns, resolution: 16, shots: 2, val_per_class: 1, test_per_class: 1}\n"
        "trainer: {max_epochs: 1}\n",
        encoding="utf-8",
    )
    assert main(["fit", "--config", "run.yaml", "--out", "run"]) == 0
    model = load("run/adapter.safetensors")
    (run,) = (module for module in model.adapter.modules() if isinstance(module, SPTRun))
    assert run.allocation is not None
    assert run.allocation.structured
    assert main(["test", "--adapter", "run/adapter.safetensors"]) == 0


def test_norms_of_the_patch_embedding_are_not_ranked() -> None:
    from peft_modal_vision.backbone import Swin

    backbone = Swin.tiny()
    assert "patch_embed.norm.weight" in {site.path for site in backbone.anatomy.sites}
    ranked = places_of(backbone.anatomy, Selector.parse(list(MATRICES)))
    assert not [name for name in ranked if name.startswith("patch_embed")]
    assert "norm.weight" in ranked
    assert any("downsample.norm" in name for name in ranked)


@pytest.mark.parametrize(("batches", "seen"), [(3, 3), (20, 20)])
def test_a_run_shows_as_many_batches_as_are_asked_for(
    batches: int, seen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft_modal.methods.spt.method as module

    found: list[int] = []

    def counting(backbone: Any, places: Any, shown: Any, loss: Any) -> Any:
        shown = list(shown)
        found.append(len(shown))
        return sensitivities(backbone, places, shown[:1], loss)

    monkeypatch.setattr(module, "sensitivities", counting)
    monkeypatch.chdir(tmp_path)
    sizes = json.dumps({"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2})
    code = main([
        "fit", "--backbone=vit", "--backbone.weights=random", "--backbone.model=custom", f"--backbone.sizes={sizes}",
        "--method=spt", f"--method.batches={batches}", "--method.unit=1000", "--head=linear", "--task=classification",
        "--data=patterns", "--data.shots=2", "--data.batch_size=2", "--trainer.fast_dev_run=true", "--out=run",
    ])  # fmt: skip
    assert code == 0
    assert found == [seen]
