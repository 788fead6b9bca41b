"""LoRA files for other programs: what diffusers makes of them is what the adapter computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusion_adapters import save_toy_adapter
from numeric import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_modal.api import load
from peft_modal.cli.main import main
from peft_modal.errors import RegistryError
from peft_modal.registry import Entry, Flag, Plugin, Registry
from peft_modal_diffusion import exporting

ATTENTION = {"name": "lora", "rank": 2, "alpha": 3.0, "sites": ["attn", "cross", "context"]}
EVERYTHING = {
    "name": "lora", "rank": 2, "alpha": 5.0,
    "sites": {"roles": ["attn", "cross", "mlp", "conv", "proj", "time", "context", "mod", "embed"],
              "path": r"^(?!.*(bias|norm|token_embedding|position_embedding))"},
}  # fmt: skip
DORA = {"name": "hf", "tuner": "dora", "sites": ["attn", "mlp"], "config": {"r": 2, "lora_alpha": 3}}

CASES = {
    "sd-all": ("toy", EVERYTHING, "denoiser_and_text"),
    "sdxl-all": ("toy_xl", EVERYTHING, "denoiser_and_text"),
    "sdxl-attention": ("toy_xl", ATTENTION, "denoiser"),
    "sd3-all": ("toy_sd3", EVERYTHING, "denoiser_and_text"),
    "sd-dora": ("toy", DORA, "denoiser_and_text"),
}


@pytest.fixture
def adapter_of(tmp_path: Path, toy_folders: Callable[[str], Path]) -> Callable[..., Path]:
    def make(size: str, method: Mapping[str, Any], tune: str = "denoiser", **data: Any) -> Path:
        return save_toy_adapter(tmp_path / "adapter.safetensors", toy_folders(size), method, tune=tune, **data)

    return make


def export(adapter: Path, layout: str, out: Path) -> int:
    return main(["export", "--adapter", str(adapter), "--format", layout, "--out", str(out)])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def plain_pipeline(folder: Path) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if "sd3" in folder.name else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(pipeline: Any) -> Tensor:
    """Two steps with guidance, through text encoders, denoiser and autoencoder."""
    return pipeline(
        prompt=["a red cat", "sks dog"], num_inference_steps=2, guidance_scale=3.0, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images  # fmt: skip


def ours(adapter: Path) -> Tensor:
    from peft_modal_diffusion.generation import Sampling, generate

    return generate(load(adapter).backbone, ["a red cat", "sks dog"], [0, 1], Sampling(steps=2, guidance=3.0))


@pytest.mark.parametrize("case", CASES)
def test_diffusers_loads_its_own_layout_to_the_same_pictures(
    case: str, adapter_of: Callable[..., Path], toy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    size, method, tune = CASES[case]
    adapter = adapter_of(size, method, tune)
    assert export(adapter, "diffusers", tmp_path / "out") == 0

    pipeline = plain_pipeline(toy_folders(size))
    untouched = pictures(pipeline)
    pipeline.load_lora_weights(tmp_path / "out")
    expected = ours(adapter)
    assert (untouched - expected).abs().max() > 0.01
    assert_close(pictures(pipeline), expected, tolerance=5e-6)


@pytest.mark.parametrize("case", ["sd-all", "sdxl-all", "sdxl-attention"])
def test_diffusers_loads_the_layout_of_kohya_to_the_same_pictures(
    case: str, adapter_of: Callable[..., Path], toy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    size, method, tune = CASES[case]
    adapter = adapter_of(size, method, tune)
    assert export(adapter, "kohya", tmp_path / "mine.safetensors") == 0

    pipeline = plain_pipeline(toy_folders(size))
    pipeline.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    assert_close(pictures(pipeline), ours(adapter), tolerance=5e-6)


def test_one_forward_of_the_denoiser_agrees_to_rounding(
    adapter_of: Callable[..., Path], toy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = adapter_of("toy", ATTENTION)
    backbone = load(adapter).backbone
    batch = backbone.example_batch(2)
    for layout in ("diffusers", "kohya"):
        assert export(adapter, layout, tmp_path / f"{layout}.safetensors") == 0
        pipeline = plain_pipeline(toy_folders("toy"))
        pipeline.load_lora_weights(tmp_path, weight_name=f"{layout}.safetensors")
        with torch.no_grad():
            found = pipeline.unet(batch["sample"], batch["time"], encoder_hidden_states=batch["states"]).sample
            expected = backbone(batch).tokens
        assert_close(found, expected, tolerance=1e-6)


def test_the_strength_is_the_same_for_readers_without_the_header(
    adapter_of: Callable[..., Path], toy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = adapter_of("toy", EVERYTHING, "denoiser_and_text")
    assert export(adapter, "diffusers", tmp_path / "out") == 0
    save_file(load_file(tmp_path / "out/pytorch_lora_weights.safetensors"), tmp_path / "bare.safetensors")

    pipeline = plain_pipeline(toy_folders("toy"))
    pipeline.load_lora_weights(tmp_path, weight_name="bare.safetensors")
    assert_close(pictures(pipeline), ours(adapter), tolerance=5e-6)


def test_keys_and_header_of_diffusers(adapter_of: Callable[..., Path], tmp_path: Path) -> None:
    assert export(adapter_of("toy", ATTENTION, "denoiser_and_text"), "diffusers", tmp_path / "out") == 0
    with safe_open(tmp_path / "out/pytorch_lora_weights.safetensors", framework="pt") as file:
        keys, header = set(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])

    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert {f"{place}.lora_A.weight", f"{place}.lora_B.weight"} <= keys
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    assert {f"{text}.down.weight", f"{text}.up.weight"} <= keys
    assert (header["unet.r"], header["unet.lora_alpha"], header["text_encoder.r"]) == (2, 2.0, 2)


def test_keys_alphas_and_header_of_kohya(adapter_of: Callable[..., Path], tmp_path: Path) -> None:
    assert export(adapter_of("toy_xl", EVERYTHING, "denoiser_and_text"), "kohya", tmp_path) == 0
    tensors = load_file(tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        header = file.metadata()

    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (2, 8, 3, 3)
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape == (8, 2, 1, 1)
    assert {"lora_unet_label_emb_0_0.alpha", "lora_te2_text_projection.alpha"} <= set(tensors)
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    alphas = [tensor for name, tensor in tensors.items() if name.endswith(".alpha")]
    assert len(alphas) == len(tensors) / 3
    assert all(float(alpha) == 5.0 and alpha.dim() == 0 for alpha in alphas)
    assert (header["ss_network_dim"], float(header["ss_network_alpha"])) == ("2", 5.0)
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.resolution"] == "16x16"


def test_a_file_that_computes_something_else_is_not_written(
    adapter_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(exporting, "_unscaled", lambda pair: pair)  # the scale is lost, the header says it all the same
    monkeypatch.setattr(exporting, "lora_settings", lambda pairs, names: {"r": 2, "lora_alpha": 2, "target_modules": [*pairs]})

    assert export(adapter_of("toy", ATTENTION), "diffusers", tmp_path / "out") == 2
    assert "does not compute what the adapter computes, so it was not written" in error_of(capsys)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("size", "method", "layout", "sentence"),
    [
        ("toy", {"name": "full"}, "diffusers", "`merge` writes a complete pipeline"),
        ("toy", {"name": "bitfit"}, "kohya", "`merge` writes a complete pipeline"),
        ("toy", DORA, "kohya", "use --format diffusers, or merge"),
        ("toy_sd3", ATTENTION, "kohya", "use --format diffusers, which ComfyUI reads, too"),
    ],
    ids=["full", "bitfit", "dora", "sd3"],
)
def test_what_a_layout_has_no_place_for_is_refused_in_one_sentence(
    size: str, method: Mapping[str, Any], layout: str, sentence: str, adapter_of: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert export(adapter_of(size, method), layout, tmp_path / "out") == 2
    assert sentence in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_gives_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path / "absent.safetensors", "difusers", tmp_path / "out") == 2
    assert "unknown format 'difusers'; did you mean 'diffusers'?" in error_of(capsys)


def test_help_lists_the_formats_of_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("peft", "diffusers", "kohya", "delta"):
        assert f"  {name} " in shown


def plugin(name: str, **fields: Any) -> Plugin:
    return Plugin(name, backbones={"net": Entry("m:N")}, **fields)


def test_a_format_belongs_to_its_modality_and_the_core_s_to_all() -> None:
    entry = Entry("peft_modal.cli.export:export_peft")
    registry = Registry.from_plugins([
        (plugin("smell", exporters={"nose": entry}), "a"), (Plugin("base", modality="", exporters={"plain": entry}), "b"),
        (plugin("sound"), "c"),
    ])  # fmt: skip

    assert set(registry.formats("smell")) == {"nose", "plain"}
    assert set(registry.formats("sound")) == {"plain"}
    assert registry.exporter("plain", "sound") is registry.exporter("nose", "smell")
    with pytest.raises(RegistryError, match="no format 'nose' for modality 'sound'; known: plain"):
        registry.exporter("nose", "sound")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"exporters": {"a-b": Entry("m:f")}}, "export format name 'a-b'"),
        ({"exporters": {"ab": Entry("m.f")}}, "export format 'ab' is not an Entry"),
        ({"importer": "m.f"}, "its importer 'm.f'"),
        ({"predict_flags": {"out": Flag("x")}}, "predict flag 'out' is the program's own"),
        ({"predict_flags": {"seed": Flag("x")}}, "predict flag 'seed' is the program's own"),
        ({"predict_flags": {"Box": Flag("x")}}, "predict flag 'Box' is not made of"),
        ({"predict_flags": {"box": Flag("x", type="tensor")}}, "predict flag 'box' is not a Flag of type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plugin_that_declares_something_unusable_is_broken(fields: dict[str, Any], reason: str) -> None:
    registry = Registry.from_plugins([(plugin("smell", **fields), "a")])
    assert reason in registry.broken[0].reason


# Import


@pytest.mark.parametrize(
    ("case", "layout"),
    [("sd-all", "diffusers"), ("sd-all", "kohya"), ("sdxl-all", "kohya"), ("sd3-all", "diffusers"),
     ("sd-dora", "diffusers")],
)  # fmt: skip
def test_a_file_comes_back_as_an_adapter_with_the_same_pictures(
    case: str, layout: str, adapter_of: Callable[..., Path], toy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    size, method, tune = CASES[case]
    adapter = adapter_of(size, method, tune)
    assert export(adapter, layout, tmp_path / "lora.safetensors") == 0
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps(load(adapter).composed.to_dict()))
    arguments = ["import", "--config", str(settings), "--input", str(tmp_path / "lora.safetensors")]

    assert main([*arguments, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = load(tmp_path / "back.safetensors")
    assert back.composed.nodes["method"].name == ("hf" if method is DORA else "lora")
    assert_close(ours(tmp_path / "back.safetensors"), ours(adapter), tolerance=5e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("tune", "adapts the text encoder, too; import it with --backbone.tune=denoiser_and_text"),
        ("other", "as a LoRA of this network"),
        ("dora_scale", "`dora_scale`"),
        ("pickle", "pickles (.bin, .pt) are never opened"),
        ("tensors", "is no LoRA"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(
    change: str, sentence: str, adapter_of: Callable[..., Path], toy_folders: Callable[[str], Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapter = adapter_of("toy", EVERYTHING, "denoiser_and_text")
    config = load(adapter).composed.to_dict()
    file = tmp_path / "lora.safetensors"
    assert export(adapter, "kohya" if change == "dora_scale" else "diffusers", file) == 0
    capsys.readouterr()
    match change:
        case "tune":
            config["backbone"]["tune"] = "denoiser"
        case "other":
            config["backbone"]["weights"] = str(toy_folders("toy_xl"))
        case "dora_scale":
            save_file({**load_file(file), "lora_unet_conv_in.dora_scale": torch.ones(8, 1)}, file)
        case "pickle":
            file = file.rename(tmp_path / "lora.bin")
        case "tensors":
            save_file({"weight": torch.ones(2)}, file)
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps(config))

    out = tmp_path / "back.safetensors"
    assert main(["import", "--config", str(settings), "--input", str(file), "--out", str(out)]) == 2
    assert sentence in error_of(capsys)
    assert not out.exists()
