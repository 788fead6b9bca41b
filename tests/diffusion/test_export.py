"""LoRA files for other programs: what diffusers makes of them is what the adapter computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_adapters import GUIDANCE, PROMPTS, attach_toy, our_pictures, save_toy_adapter, toy_config
from numeric import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_pipeline import open_plain

from peft_modal.api import Exported, Model, load
from peft_modal.cli.main import main
from peft_modal.compose import Composed, compose
from peft_modal.errors import ConfigError, FileFormatError, RegistryError
from peft_modal.hf.importing import import_lora
from peft_modal.methods.base import Method
from peft_modal.methods.bitfit import BitFit
from peft_modal.methods.hf import HF
from peft_modal.methods.lora import LoRA
from peft_modal.methods.ssf import SSF
from peft_modal.registry import Entry, Flag, Plugin, Registry
from peft_modal_diffusion import exporting
from peft_modal_diffusion.backbone import StableDiffusion, Tuned
from peft_modal_diffusion.exporting import export_diffusers, export_kohya
from peft_modal_diffusion.importing import read_lora_file

ROLES = ("attn", "cross", "mlp", "conv", "proj", "time", "context", "mod", "embed")
EVERYTHING = {"roles": [*ROLES], "path": r"^(?!.*(bias|norm|token_embedding|position_embedding))"}
"""Every linear and convolution."""

FEW = {
    "roles": [*ROLES],
    "path": "|".join([
        r"add_embedding\.linear", r"down_blocks\.0\.resnets\.0\.conv1", r"down_blocks\.0.*(proj_in|attn2\.to_out)",
        r"transformer_blocks\.0.*(add_k|to_add_out|ff\.net|norm1\.linear)", r"layers\.0.*(q_proj|fc1)$",
        r"text_projection",
    ]),
}  # fmt: skip
"""Some of each kind of name."""

CASES: Mapping[str, tuple[str, Tuned, Method]] = {
    "sd": ("toy", "denoiser_and_text", LoRA(sites=FEW, rank=2, alpha=5.0)),
    "sdxl": ("toy_xl", "denoiser_and_text", LoRA(sites=FEW, rank=2, alpha=5.0)),
    "sd3": ("toy_sd3", "denoiser_and_text", LoRA(sites=FEW, rank=2, alpha=5.0)),
    "dora": (
        "toy",
        "denoiser_and_text",
        HF(tuner="dora", sites={**FEW, "roles": ["attn", "mlp"]}, config={"r": 2, "lora_alpha": 3}),
    ),
}


@dataclass(frozen=True)
class Case:
    """An adapter, what it draws, and its files."""

    pipeline: Path
    model: Model
    expected: Tensor
    folder: Path

    @property
    def diffusers(self) -> Path:
        return self.folder / "pytorch_lora_weights.safetensors"

    @property
    def kohya(self) -> Path:
        return self.folder / "lora.safetensors"

    def drawn_with(self, file: Path) -> Tensor:
        """What diffusers alone draws with a file."""
        pipeline = open_plain(self.pipeline)
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        return pictures(pipeline)


def pictures(pipeline: Any) -> Tensor:
    """The counterpart of `our_pictures`."""
    return pipeline(
        prompt=[*PROMPTS], num_inference_steps=2, guidance_scale=GUIDANCE, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def composed(toy_folders: Callable[[str], Path]) -> Composed:
    return toy_config(toy_folders("toy"), {"name": "lora"})


@pytest.fixture(scope="module")
def loaded(toy_folders: Callable[[str], Path]) -> Callable[[str, Tuned], StableDiffusion]:
    @cache
    def load_once(size: str, tune: Tuned) -> StableDiffusion:
        backbone = StableDiffusion(weights=str(toy_folders(size)), tune=tune)
        backbone.load_weights()
        return backbone

    return load_once


@pytest.fixture(scope="module")
def case_of(
    toy_folders: Callable[[str], Path], composed: Composed, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    @cache
    def make(name: str) -> Case:
        size, tune, method = CASES[name]
        backbone = StableDiffusion(weights=str(toy_folders(size)), tune=tune)
        backbone.load_weights()
        model = attach_toy(backbone, method, composed)
        folder = tmp_path_factory.mktemp(name)
        export_diffusers(model, folder)
        if name in {"sd", "sdxl"}:
            export_kohya(model, folder)
        return Case(toy_folders(size), model, our_pictures(backbone), folder)

    return make


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


# Export


@pytest.mark.parametrize("name", CASES)
def test_diffusers_draws_the_same_with_its_own_layout(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    for adapter in case.model.backbone.adapters.values():
        adapter.enable(on=False)
    untouched = our_pictures(case.model.backbone)  # type: ignore[arg-type]
    for adapter in case.model.backbone.adapters.values():
        adapter.enable(on=True)

    assert (untouched - case.expected).abs().max() > 0.01
    assert_close(case.drawn_with(case.diffusers), case.expected, tolerance=1e-5)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_diffusers_draws_the_same_with_the_layout_of_kohya(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    assert_close(case.drawn_with(case.kohya), case.expected, tolerance=1e-5)


@pytest.mark.parametrize("size", ["toy", "toy_xl"])
def test_every_linear_and_convolution_has_a_name_in_the_layout_of_kohya(
    size: str, loaded: Callable[[str, Tuned], StableDiffusion], composed: Composed, tmp_path: Path
) -> None:
    model = attach_toy(loaded(size, "denoiser_and_text"), LoRA(sites=EVERYTHING, rank=1, alpha=2.0), composed)
    export_kohya(model, tmp_path / "lora.safetensors")  # refused unless diffusers reads every name
    assert len(load_file(tmp_path / "lora.safetensors")) == 3 * len(model.adapter.attachments)


def test_one_forward_of_the_denoiser_agrees_to_rounding(
    loaded: Callable[[str, Tuned], StableDiffusion], composed: Composed, tmp_path: Path
) -> None:
    backbone = loaded("toy", "denoiser")
    model = attach_toy(backbone, LoRA(sites=["attn", "cross"], rank=2, alpha=3.0), composed)
    batch = backbone.example_batch(2)
    with torch.no_grad():
        expected = backbone(batch).tokens
    for write in (export_diffusers, export_kohya):
        file = tmp_path / f"{write.__name__}.safetensors"
        assert write(model, file).files == (file,)
    # The strength is the same for readers that take no notice of the header.
    save_file(load_file(tmp_path / "export_diffusers.safetensors"), tmp_path / "bare.safetensors")
    for file in tmp_path.iterdir():
        pipeline = open_plain(Path(backbone.weights), vae=None)
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        with torch.no_grad():
            found = pipeline.unet(batch["sample"], batch["time"], encoder_hidden_states=batch["states"]).sample
        assert_close(found, expected, tolerance=1e-6)


def test_keys_and_header_of_diffusers(case_of: Callable[[str], Case]) -> None:
    with safe_open(case_of("sd").diffusers, framework="pt") as file:
        keys, header = set(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])

    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert {f"{place}.lora_A.weight", f"{place}.lora_B.weight"} <= keys
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    assert {f"{text}.down.weight", f"{text}.up.weight"} <= keys
    assert (header["unet.r"], header["unet.lora_alpha"], header["text_encoder.r"]) == (2, 2.0, 2)


def test_keys_alphas_and_header_of_kohya(case_of: Callable[[str], Case]) -> None:
    tensors = load_file(case_of("sdxl").kohya)
    with safe_open(case_of("sdxl").kohya, framework="pt") as file:
        header = file.metadata()

    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (2, 8, 3, 3)
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape == (8, 2, 1, 1)
    assert {"lora_unet_label_emb_0_0.alpha", "lora_te2_text_projection.alpha"} <= set(tensors)
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    alphas = [tensor for name, tensor in tensors.items() if name.endswith(".alpha")]
    assert len(alphas) == len(tensors) / 3
    # diffusers reads the others of an attention by it.
    assert not tensors["lora_te1_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight"].any()
    assert all(float(alpha) == 5.0 and alpha.dim() == 0 for alpha in alphas)
    assert (header["ss_network_dim"], float(header["ss_network_alpha"])) == ("2", 5.0)
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.resolution"] == "16x16"
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in load_file(case_of("sd").kohya)


def test_the_header_of_kohya_tells_the_words_that_call_a_subject(
    case_of: Callable[[str], Case], toy_folders: Callable[[str], Path]
) -> None:
    data = {"name": "subject", "root": "mine", "instance_prompt": "a photo of sks dog"}
    composed = compose({**toy_config(toy_folders("toy"), {"name": "lora"}).to_dict(), "data": data})
    model = replace(case_of("sd").model, composed=composed)
    header = exporting._kohya_metadata(model, model.backbone, exporting.pairs_of(model.adapter))
    assert header["modelspec.trigger_phrase"] == "a photo of sks dog"
    assert (header["ss_base_model_version"], header["modelspec.architecture"]) == ("sd_v1", "stable-diffusion-v1/lora")


def test_a_file_that_computes_something_else_is_not_written(
    loaded: Callable[[str, Tuned], StableDiffusion], composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach_toy(loaded("toy", "denoiser"), LoRA(sites=["attn"], rank=2, alpha=3.0), composed)
    scaled = exporting._unscaled
    monkeypatch.setattr(exporting, "_unscaled", lambda pair: replace(scaled(pair), up=pair.up))  # the scale is lost

    with pytest.raises(FileFormatError, match="does not compute what the adapter computes, so it was not written"):
        export_diffusers(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("size", "method", "write", "sentence"),
    [
        ("toy", BitFit(), export_diffusers, "`merge` writes a complete pipeline"),
        ("toy", SSF(sites=["mlp"]), export_kohya, "`merge` writes a complete pipeline"),
        ("toy", HF(tuner="dora", sites=["attn"], config={"r": 2}), export_kohya, "use --format diffusers, or merge"),
        ("toy_sd3", LoRA(), export_kohya, "use --format diffusers, which ComfyUI reads, too"),
    ],
    ids=["trained tensors", "ssf", "dora-kohya", "sd3-kohya"],
)
def test_what_a_layout_has_no_place_for_is_refused_in_one_sentence(
    size: str, method: Method, write: Callable[..., Exported], sentence: str, composed: Composed, tmp_path: Path,
    loaded: Callable[[str, Tuned], StableDiffusion],
) -> None:  # fmt: skip
    model = attach_toy(loaded(size, "denoiser"), method, composed)
    with pytest.raises(FileFormatError, match=re.escape(sentence)):
        write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_random_weights_fit_no_pipeline_of_anyone_else(composed: Composed, tmp_path: Path) -> None:
    model = attach_toy(StableDiffusion(weights="random", architecture="toy"), LoRA(rank=2), composed)
    with pytest.raises(ConfigError, match="an adapter of random weights fits no pipeline"):
        export_diffusers(model, tmp_path)


# Import


@pytest.mark.parametrize(
    ("name", "layout"), [("sd", "kohya"), ("sdxl", "kohya"), ("sd3", "diffusers"), ("dora", "diffusers")]
)
def test_a_file_comes_back_as_a_method_that_draws_the_same(
    name: str, layout: str, case_of: Callable[[str], Case], loaded: Callable[[str, Tuned], StableDiffusion]
) -> None:
    case = case_of(name)
    size, tune, _ = CASES[name]
    backbone = loaded(size, tune)
    for adapter in list(backbone.adapters.values()):
        adapter.detach()
    found = import_lora(read_lora_file(getattr(case, layout), backbone), backbone)
    arguments = {key: value for key, value in found.method.items() if key != "name"}
    method = HF(**arguments) if found.method["name"] == "hf" else LoRA(**arguments)
    method.attach(backbone).load(found.tensors)

    assert isinstance(method, HF if name == "dora" else LoRA)
    assert_close(our_pictures(backbone), case.expected, tolerance=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ("tune", ConfigError, "adapts the text encoder, too; import it with --backbone.tune=denoiser_and_text"),
        ("other", FileFormatError, "as a LoRA of this network"),
        ("dora_scale", FileFormatError, "`dora_scale`"),
        ("pickle", FileFormatError, "pickles (.bin, .pt) are never opened"),
        ("tensors", FileFormatError, "is no LoRA"),
        ("damaged", FileFormatError, "no readable safetensors file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: str, error: type[Exception], sentence: str, case_of: Callable[[str], Case], tmp_path: Path,
    loaded: Callable[[str, Tuned], StableDiffusion],
) -> None:  # fmt: skip
    case = case_of("sd")
    file = case.kohya if change == "dora_scale" else case.diffusers
    size, tune = ("toy_xl", "denoiser_and_text") if change == "other" else ("toy", "denoiser_and_text")
    match change:
        case "tune":
            tune = "denoiser"
        case "dora_scale":
            tensors = {**load_file(file), "lora_unet_conv_in.dora_scale": torch.ones(8, 1)}
            file = tmp_path / "lora.safetensors"
            save_file(tensors, file)
        case "pickle":
            file = tmp_path / "lora.bin"
            file.write_bytes(b"")
        case "tensors":
            file = tmp_path / "lora.safetensors"
            save_file({"weight": torch.ones(2)}, file)
        case "damaged":
            content = file.read_bytes()
            file = tmp_path / "lora.safetensors"
            file.write_bytes(content[: len(content) // 2])

    with pytest.raises(error, match=re.escape(sentence)):
        read_lora_file(file, loaded(size, tune))  # type: ignore[arg-type]


# Command line


def test_export_and_import_through_the_command_line(
    toy_folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = {"name": "lora", "rank": 2, "alpha": 3.0}
    adapter = save_toy_adapter(tmp_path / "a.safetensors", toy_config(toy_folders("toy"), method))
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(load(adapter).composed.to_dict()))
    lora, back = tmp_path / "lora.safetensors", tmp_path / "back.safetensors"
    capsys.readouterr()

    assert main(["export", "--adapter", str(adapter), "--format", "kohya", "--out", str(lora), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["files"] == [str(lora)]
    assert "checked with diffusers" in captured.out
    assert not captured.err
    assert main(["import", "--config", str(settings), "--input", str(lora), "--out", str(back)]) == 0
    assert_close(our_pictures(load(back).backbone), our_pictures(load(adapter).backbone), tolerance=1e-5)  # type: ignore[arg-type]


def test_an_unknown_format_gives_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--adapter", "absent", "--format", "difusers", "--out", str(tmp_path)]) == 2
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
        (plugin("smell", exporters={"nose": entry}), "a"), (plugin("sound"), "c"),
        (Plugin("base", modality="", exporters={"plain": entry}), "b"),
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
