"""Merged pipelines as complete folders, and sparse changes as files of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_adapters import GUIDANCE, PROMPTS, attach_toy, our_pictures, save_toy_adapter, toy_config
from numeric import assert_close
from safetensors.torch import load_file
from torch import Tensor
from toy_pipeline import open_plain

from peft_modal.api import Model, load
from peft_modal.cli.main import main
from peft_modal.errors import BackboneMismatchError, FileFormatError, MergeError
from peft_modal.methods.bitfit import BitFit
from peft_modal.methods.lora import LoRA
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.delta import apply_delta, export_delta


def pictures(pipeline: Any) -> Tensor:
    return pipeline(
        prompt=[*PROMPTS], num_inference_steps=2, guidance_scale=GUIDANCE, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images  # fmt: skip


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def adapter(toy_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of denoiser and text encoder."""
    method = {"name": "lora", "rank": 2, "alpha": 3.0, "sites": ["attn.q", "mlp.in", "conv.in"]}
    composed = toy_config(toy_folders("toy"), method, tune="denoiser_and_text")
    return save_toy_adapter(tmp_path_factory.mktemp("adapter") / "a.safetensors", composed)


@pytest.fixture(scope="module")
def expected(adapter: Path) -> Tensor:
    return our_pictures(load(adapter).backbone)  # type: ignore[arg-type]


def test_a_merged_folder_is_a_complete_pipeline(
    adapter: Path, expected: Tensor, tmp_path: Path, toy_folders: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "merged"
    assert main(["merge", "--adapter", str(adapter), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert not captured.err
    assert told["deviation"]["weights"] < 1e-6
    assert {path.name for path in out.iterdir()} == {path.name for path in toy_folders("toy").iterdir()}

    assert_close(pictures(open_plain(out)), expected, tolerance=1e-5)
    beside = load(told["head"])
    assert beside.composed.nodes["backbone"].kwargs["weights"] == str(out)
    assert_close(our_pictures(beside.backbone), expected, tolerance=1e-5)  # type: ignore[arg-type]


def test_every_part_is_stored_in_the_type_asked_for(toy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = StableDiffusion(weights=str(toy_folders("toy")))
    backbone.load_weights()
    half = {name: tensor.half() for name, tensor in backbone.network.state_dict().items()}
    backbone.save_merged(tmp_path / "half", half, {})
    files = {file.parent.name: load_file(file) for file in (tmp_path / "half").rglob("*.safetensors")}

    assert set(files) == {"unet", "text_encoder", "vae"}
    assert {tensor.dtype for tensors in files.values() for tensor in tensors.values()} == {torch.float16}
    assert torch.equal(files["unet"]["conv_in.weight"], half["unet.conv_in.weight"])


@pytest.mark.parametrize("size", ["toy_xl", "toy_sd3"])
def test_the_other_families_merge_too(size: str, toy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = StableDiffusion(weights=str(toy_folders(size)))
    backbone.load_weights()
    with torch.no_grad():
        for parameter in backbone.network.parameters():
            parameter.add_(0.01)
    expected = our_pictures(backbone)
    backbone.save_merged(tmp_path / "merged", backbone.network.state_dict(), {})

    assert_close(pictures(open_plain(tmp_path / "merged")), expected, tolerance=1e-5)


def test_a_folder_is_made_as_a_whole_or_not_at_all(
    toy_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    backbone = StableDiffusion(weights=str(toy_folders("toy")))
    backbone.load_weights()
    monkeypatch.setattr(AutoencoderKL, "save_pretrained", full)
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        backbone.save_merged(tmp_path / "merged", backbone.network.state_dict(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "sentence"),
    [("merged.safetensors", "is the name of a file"), ("taken", "exists; name a new folder")],
)
def test_a_name_that_does_not_suit_is_refused(
    out: str, sentence: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").touch()
    assert main(["merge", "--adapter", str(adapter), "--out", str(tmp_path / out)]) == 2
    assert sentence in error_of(capsys)


def test_a_size_for_measuring_has_no_pipeline(tmp_path: Path) -> None:
    backbone = StableDiffusion.tiny()
    with pytest.raises(MergeError, match="has no pipeline around it"):
        backbone.save_merged(tmp_path / "merged", backbone.network.state_dict(), {})


# Sparse changes


@pytest.fixture(scope="module")
def tuned(toy_folders: Callable[[str], Path]) -> Model:
    """Biases alone are trained: few entries of each family of tensors."""
    backbone = StableDiffusion(weights=str(toy_folders("toy")), tune="denoiser_and_text")
    backbone.load_weights()
    return attach_toy(backbone, BitFit(), toy_config(toy_folders("toy"), {"name": "bitfit"}))


@pytest.fixture(scope="module")
def delta(tuned: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """The file, and what the adapter draws."""
    expected = our_pictures(tuned.backbone)  # type: ignore[arg-type]
    file = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    written = export_delta(tuned, file)
    assert written.files == (file,)
    return file, expected


def states(pipeline: Any) -> dict[str, Tensor]:
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    return {f"{part}.{k}": v.clone() for part, module in parts.items() for k, v in module.state_dict().items()}


def test_changes_draw_the_same_in_a_plain_pipeline_and_can_be_undone(
    delta: tuple[Path, Tensor], toy_folders: Callable[[str], Path]
) -> None:
    file, expected = delta
    pipeline = open_plain(toy_folders("toy"))
    before = states(pipeline)
    undo = apply_delta(pipeline, file)
    after = states(pipeline)

    assert_close(pictures(pipeline), expected, tolerance=1e-5)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name.removesuffix(".index") for name in load_file(file) if name.endswith(".index")}
    assert {name.partition(".")[0] for name in changed} == {"unet", "text_encoder"}
    undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(pipeline).items())


def test_alpha_scales_the_changes_and_a_second_file_adds_up(
    delta: tuple[Path, Tensor], toy_folders: Callable[[str], Path]
) -> None:
    file, _ = delta
    pipeline = open_plain(toy_folders("toy"))
    name = "unet.conv_in.bias"
    before, change = states(pipeline)[name], load_file(file)[f"{name}.delta"]
    undo_first = apply_delta(pipeline, file, alpha=0.5)
    assert_close(states(pipeline)[name], before + 0.5 * change, tolerance=1e-6)
    undo_second = apply_delta(pipeline, file, alpha=1.0, check=False)
    assert_close(states(pipeline)[name], before + 1.5 * change, tolerance=1e-6)
    undo_second()
    undo_first()
    assert torch.equal(states(pipeline)[name], before)


def test_changes_are_flat_positions_and_what_is_added_there(
    delta: tuple[Path, Tensor], tuned: Model, toy_folders: Callable[[str], Path]
) -> None:
    tensors = load_file(delta[0])
    base = states(open_plain(toy_folders("toy")))["unet.conv_in.bias"]
    index, change = tensors["unet.conv_in.bias.index"], tensors["unet.conv_in.bias.delta"]
    assert (index.dtype, change.dtype) == (torch.int32, torch.float32)
    merged = base.flatten()
    merged[index.long()] += change
    assert_close(merged, tuned.backbone.tensor("unet.conv_in.bias").flatten(), tolerance=1e-6)


def test_changes_go_into_a_pipeline_in_half_precision(
    delta: tuple[Path, Tensor], toy_folders: Callable[[str], Path]
) -> None:
    pipeline = open_plain(toy_folders("toy"), dtype=torch.bfloat16)
    before = states(pipeline)["unet.conv_in.bias"]
    apply_delta(pipeline, delta[0])
    change = load_file(delta[0])["unet.conv_in.bias.delta"]
    assert_close(states(pipeline)["unet.conv_in.bias"], (before.float() + change).bfloat16(), tolerance=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("weights", "was made on other weights"),
        ("size", "is smaller than the one"),
        ("part", "has no 'unet.conv_in.bias'"),
    ],
)
def test_changes_of_another_pipeline_are_refused_and_leave_it_alone(
    change: str, sentence: str, delta: tuple[Path, Tensor], toy_folders: Callable[[str], Path]
) -> None:
    pipeline = open_plain(toy_folders("toy"))
    with torch.no_grad():
        match change:
            case "weights":
                pipeline.unet.conv_in.bias += 1e-6
            case "size":
                pipeline.unet.conv_in.bias = torch.nn.Parameter(torch.zeros(2))
            case "part":
                pipeline.unet.conv_in.register_parameter("bias", None)
    before = states(pipeline)
    with pytest.raises(BackboneMismatchError, match=sentence):
        apply_delta(pipeline, delta[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(pipeline).items())


def test_another_file_is_no_changes(adapter: Path, toy_folders: Callable[[str], Path]) -> None:
    with pytest.raises(FileFormatError, match="holds no changes of a pipeline"):
        apply_delta(open_plain(toy_folders("toy")), adapter)


def test_an_adapter_that_changes_most_entries_is_refused(toy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = StableDiffusion(weights=str(toy_folders("toy")))
    backbone.load_weights()
    method = LoRA(sites=["attn", "cross", "mlp", "conv.in", "conv.out"], rank=2)
    model = attach_toy(backbone, method, toy_config(toy_folders("toy"), {"name": "lora"}))
    with pytest.raises(FileFormatError, match="`merge` writes a complete pipeline"):
        export_delta(model, tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())
