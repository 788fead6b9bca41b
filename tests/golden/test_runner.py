"""The golden runner notices a spoilt case: it compares everything, and skips only what is not built."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from golden_runners import RUNNERS, run_case
from golden_runners.golden_case import INPUTS, GoldenCase, generate, is_result
from safetensors.torch import load_file, save_file
from torch import Tensor

COMMITTED = Path(__file__).parent / "cases"
CASES = sorted(path.parent.name for path in COMMITTED.glob("*/case.json"))


@pytest.fixture(params=CASES)
def spoilt(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return _copy(request.param, tmp_path)


def test_every_runner_has_a_committed_case() -> None:
    assert sorted({GoldenCase(COMMITTED / name).slug for name in CASES}) == sorted(RUNNERS)


@pytest.mark.parametrize("prefix", ["out.", "grad", "param."])
def test_a_changed_tensor_fails(spoilt: Path, prefix: str) -> None:
    tensors = load_file(spoilt / "case.safetensors")
    floating = [n for n in sorted(tensors) if tensors[n].is_floating_point()]
    # Where a case has several parts, their names stand in front.
    own = [n for n in floating if f".{prefix}" in n and n.split(".")[0] not in INPUTS]
    names = [n for n in floating if n.startswith(prefix)] or own
    # Attention takes no notice of a shift of all keys.
    names = [n for n in names if prefix != "param." or not re.search(r"attn\.k\.(sparse\.)?bias", n)]
    if not names:
        pytest.skip(f"the case has no {prefix}")
    name = names[0]
    tensors[name].flatten()[0] += 1.0
    save_file(tensors, spoilt / "case.safetensors")
    with pytest.raises(AssertionError, match=name if prefix != "param." else "differs by"):
        run_case(spoilt)


def test_every_single_result_counts(spoilt: Path) -> None:
    """Change all results at once: each must be reported."""
    tensors = load_file(spoilt / "case.safetensors")
    results = [name for name in tensors if is_result(name)]
    for name in results:
        # More than the note of a case may allow of a count.
        tensors[name].flatten()[-1] += 2
    save_file(tensors, spoilt / "case.safetensors")
    with pytest.raises(AssertionError) as caught:
        run_case(spoilt)
    reported = {line.strip().split(": ")[0] for line in str(caught.value).splitlines()[1:]}
    assert reported == set(results)


def test_a_changed_figure_of_part_segmentation_fails(tmp_path: Path) -> None:
    folder = _copy("pointcloud-part-segmentation", tmp_path)
    figures = json.loads((folder / "case.json").read_text(encoding="utf-8"))["metrics"]
    for name in ("class_avg_iou", "per_category"):
        changed = (
            {"Mug": 0.9, **{k: v for k, v in figures[name].items() if k != "Mug"}} if name == "per_category" else 0.5
        )
        _edit(folder, metrics={**figures, name: changed})
        with pytest.raises(AssertionError, match=f"{name if name != 'per_category' else 'Mug'}: .*, expected 0"):
            run_case(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_never_passes(value: float) -> None:
    case = GoldenCase(COMMITTED / "lora-qkv")
    case.compare("out.y", torch.full(case.shape("out.y"), value))
    with pytest.raises(AssertionError, match=r"out\.y: not finite"):
        case.finish()


def test_a_result_that_nobody_compares_is_noticed(spoilt: Path) -> None:
    _add(spoilt, "out.something_new", torch.zeros(2))
    with pytest.raises(AssertionError, match=r"1 results were not compared: out\.something_new"):
        run_case(spoilt)


def test_an_input_that_nobody_uses_is_noticed(spoilt: Path) -> None:
    _add(spoilt, "param.something_new", torch.zeros(2))
    with pytest.raises(AssertionError, match=r"param\.something_new"):
        run_case(spoilt)


def test_a_parameter_that_is_left_out_is_noticed(spoilt: Path) -> None:
    tensors = load_file(spoilt / "case.safetensors")
    names = [n for n in sorted(tensors) if n.startswith("param.")]
    if not names:
        pytest.skip("the case has no parameter")
    endings = ("bias", "prompts", "lora_a.weight")
    del tensors[next((n for n in names if n.endswith(endings)), names[0])]
    save_file(tensors, spoilt / "case.safetensors")
    with pytest.raises(AssertionError, match="has no"):
        run_case(spoilt)


def test_a_setting_that_nobody_reads_is_noticed(spoilt: Path) -> None:
    _configure(spoilt, something_new=3)
    with pytest.raises(AssertionError, match="1 settings were not read: something_new"):
        run_case(spoilt)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("idpt-classifier", "cls_type", "everything"),
        ("idpt-classifier", "prompt_module", "perceptron"),
        ("backbone-pointmae", "layernorm_eps", 1e-6),
        ("backbone-pointmae", "qkv_bias", True),
        ("pointmae-pretrain", "loss", "emd"),
        ("adaptformer", "layernorm_option", "both"),
        ("adaptformer", "activation", "tanh"),
        ("adaptformer", "scale", "large"),
        ("adapter-pfeiffer", "activation", "tanh"),
        ("lora-qkv", "targets", ["q", "out"]),
        ("vpt-deep", "pool", "sum"),
        ("ssf", "mode", "predict"),
        ("mosa", "shared", "both"),
        ("mosa", "style", "houlsby"),
        ("mosa", "split", "blocks"),
        ("mosa", "activation", "tanh"),
        ("mosa", "adapter_norm_eps", 1e-5),
    ],
)
def test_an_unknown_setting_fails(tmp_path: Path, name: str, setting: str, value: object) -> None:
    folder = _copy(name, tmp_path)
    _configure(folder, **{setting: value})
    with pytest.raises(AssertionError, match=rf"unknown|made with {setting}"):
        run_case(folder)


def test_a_slug_without_a_runner_skips(tmp_path: Path) -> None:
    folder = _copy("ssf", tmp_path)
    _edit(folder, slug="not-built")
    with pytest.raises(pytest.skip.Exception, match="missing: not-built"):
        run_case(folder)


def test_a_generated_tensor_must_match_its_checksum() -> None:
    right = json.loads((COMMITTED / "backbone-pointmae" / "case.json").read_text(encoding="utf-8"))["procedural"]
    recipe = right["encoder.first_conv.3.weight"]
    assert generate("w", recipe).shape == (256, 128, 1)
    with pytest.raises(AssertionError, match="w: first"):
        generate("w", {**recipe, "seed": recipe["seed"] + 1})
    with pytest.raises(AssertionError, match="w: sum"):
        generate("w", {**recipe, "check_sum": recipe["check_sum"] + 0.01})


def test_a_note_may_loosen_one_tensor(tmp_path: Path) -> None:
    folder = _copy("lora-qkv", tmp_path)
    tensors = load_file(folder / "case.safetensors")
    tensors["out.y"][0, 0, 0] += 0.5
    save_file(tensors, folder / "case.safetensors")
    tolerance = json.loads((folder / "case.json").read_text(encoding="utf-8"))["tolerance"]
    _edit(folder, tolerance={**tolerance, "note": {"out.y": {"rtol": 0.0, "atol": 0.6}}})
    run_case(folder)


def test_an_exclusion_needs_a_reason() -> None:
    case = GoldenCase(COMMITTED / "lora-qkv")
    with pytest.raises(AssertionError):
        case.exclude("out.y", "")


def _copy(name: str, to: Path) -> Path:
    return Path(shutil.copytree(COMMITTED / name, to / name))


def _add(folder: Path, name: str, tensor: Tensor) -> None:
    save_file({**load_file(folder / "case.safetensors"), name: tensor}, folder / "case.safetensors")


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "case.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def _configure(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "case.json").read_text(encoding="utf-8"))["config"]
    _edit(folder, config={**config, **settings})
