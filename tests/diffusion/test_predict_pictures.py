"""`predict` draws pictures, with flags of the modality and with stacked adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusion_adapters import save_toy_adapter, toy_config
from numeric import assert_close
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from peft_modal.api import load_stack
from peft_modal.attach import merge_
from peft_modal.cli.main import main
from peft_modal.cli.options import parse
from peft_modal.cli.plugin_options import read_flags
from peft_modal.errors import BackboneMismatchError, ConfigError, FileFormatError
from peft_modal.files import load_adapter, save_adapter
from peft_modal.registry import Entry, Flag, Plugin, Registry
from peft_modal_diffusion.pictures import read_settings

Adapters = dict[str, Path]


@pytest.fixture(scope="module")
def adapters(toy_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Two LoRA files and the changes of all biases on one pipeline, and a LoRA file on another."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = {"name": "lora", "rank": 2, "alpha": 3.0, "sites": ["attn", "cross"]}
    first = toy_config(toy_folders("toy"), lora)
    return {
        "one": save_toy_adapter(folder / "one.safetensors", first, seed=1),
        "two": save_toy_adapter(folder / "two.safetensors", first, seed=2),
        "sd3": save_toy_adapter(folder / "sd3.safetensors", toy_config(toy_folders("toy_sd3"), {"name": "lora"})),
    }


def predict(out: Path, *arguments: str) -> int:
    return main(["predict", "--out", str(out), "--steps", "2", *arguments])


def pixels(path: Path) -> Tensor:
    return pil_to_tensor(Image.open(path)).int()


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# Pictures


def test_pictures_say_how_they_were_made(
    adapters: Adapters, tmp_path: Path, toy_folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--adapter", f"{adapters['one']}:0.5", "--prompt", "a red cat", "--prompt", "sks dog", "--seed", "7"]
    arguments += ["--count", "2", "--guidance", "2.5", "--negative", "sun", "--size", "24x16", "--json"]
    assert predict(tmp_path, *arguments) == 0
    captured = capsys.readouterr()

    files = ["00-7.png", "00-8.png", "01-7.png", "01-8.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    settings = read_settings(tmp_path / "01-8.png")
    assert settings == {
        "prompt": "sks dog", "seed": 8, "steps": 2, "guidance": 2.5, "height": 16, "width": 24,
        "negative_prompt": "sun", "adapters": [{"file": str(adapters["one"]), "weight": 0.5}],
        "backbone": str(toy_folders("toy")), "peft_modal": settings["peft_modal"],
    }  # fmt: skip
    assert json.loads(captured.out)[3] == {"path": str(tmp_path / "01-8.png"), **settings}
    assert Image.open(tmp_path / "01-8.png").size == (24, 16)
    assert "bug" not in captured.err


def test_a_picture_depends_on_prompt_and_seed_and_not_on_what_is_drawn_beside_it(
    adapters: Adapters, tmp_path: Path
) -> None:
    adapter = ["--adapter", str(adapters["one"])]
    assert predict(tmp_path / "alone", *adapter, "--prompt", "sks dog", "--seed", "3") == 0
    assert predict(tmp_path / "many", *adapter, "--prompt", "sks dog", "--prompt", "a red sun", "--count", "4") == 0

    assert (pixels(tmp_path / "alone/00-3.png") - pixels(tmp_path / "many/00-3.png")).abs().max() <= 1
    assert (pixels(tmp_path / "many/00-3.png") - pixels(tmp_path / "many/01-3.png")).abs().max() > 5
    assert (pixels(tmp_path / "many/00-3.png") - pixels(tmp_path / "many/00-2.png")).abs().max() > 5


# Stacks


def test_effects_of_a_stack_add_up_with_their_weights(adapters: Adapters) -> None:
    network = load_stack([(adapters["one"], 0.6), (adapters["two"], -0.5)]).backbone
    base = {name: tensor.clone() for name, tensor in network.network.state_dict().items()}
    merge_(network)
    merged = network.network.state_dict()

    changes: dict[str, Tensor] = {}
    for name, weight in (("one", 0.6), ("two", -0.5)):
        tensors, _ = load_adapter(adapters[name])
        for key in (key.removesuffix(".up") for key in tensors if key.endswith(".up")):
            change = weight * (3.0 / 2) * tensors[f"{key}.up"] @ tensors[f"{key}.down"]
            changes[key] = changes.get(key, 0) + change
    sites = {site.name: site.path for site in network.anatomy.sites}
    assert len(changes) == len(load_adapter(adapters["one"])[0]) / 2
    for key, change in changes.items():
        assert_close(merged[sites[key.removeprefix("adapter.")]], base[sites[key.removeprefix("adapter.")]] + change,
                     tolerance=1e-6)  # fmt: skip


def test_predict_and_merge_stack(adapters: Adapters, tmp_path: Path) -> None:
    files = ["--adapter", f"{adapters['one']}:0.6", "--adapter", str(adapters["two"]), "--alpha", "0.25"]
    assert predict(tmp_path / "drawn", *files, "--prompt", "a cat") == 0
    stacked = read_settings(tmp_path / "drawn/00-0.png")["adapters"]
    assert [entry["weight"] for entry in stacked] == [0.6, 0.25]
    assert main(["merge", *files, "--out", str(tmp_path / "merged")]) == 0
    head = ["--adapter", str(tmp_path / "merged.head.safetensors")]
    assert predict(tmp_path / "again", *head, "--prompt", "a cat") == 0
    assert (pixels(tmp_path / "drawn/00-0.png") - pixels(tmp_path / "again/00-0.png")).abs().max() <= 1


def test_adapters_of_different_backbones_are_not_stacked(adapters: Adapters) -> None:
    with pytest.raises(BackboneMismatchError, match=r"cannot be stacked on .* trained on other backbone weights"):
        load_stack([(adapters["one"], None), (adapters["sd3"], None)])


def test_a_second_head_is_refused(adapters: Adapters, tmp_path: Path) -> None:
    tensors, header = load_adapter(adapters["two"])
    save_adapter(tmp_path / "headed.safetensors", {**tensors, "head.weight": torch.ones(2)}, header)
    with pytest.raises(FileFormatError, match="has a head of its own, and predictions come from one head"):
        load_stack([(adapters["one"], None), (tmp_path / "headed.safetensors", None)])


def test_a_file_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a:1").touch()
    options = parse("predict", ["--adapter", str(tmp_path / "a:1"), "--adapter", "b:-0.5", "--out", "o"])
    assert options.adapters == ((tmp_path / "a:1", None), (Path("b"), -0.5))
    assert options.adapter == tmp_path / "a:1"


# Flags


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--prompt is missing"),
        (["--prompt", "a", "--input", "x"], "--input: this adapter draws pictures and reads no files"),
        (["--prompt", "a", "--count", "0"], "--count: 0 is below 1"),
        (["--prompt", "a", "--count", "many"], "--count: 'many' is no integer"),
        (["--prompt", "a", "--guidance", "nan"], "--guidance: nan is no number from 0 on"),
        (["--prompt", "a", "--size", "20x16"], "--size: '20x16' is neither WIDTHxHEIGHT"),
        (["--prompt", "a", "--negative", "b", "--negative", "c"], "--negative: given 2 times; give it once"),
        (["--promt", "a"], "unknown option '--promt'; did you mean '--prompt'?"),
        (["--prompt", "a", "--alpha", "nan"], "--alpha: 'nan' is no number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_sentence_and_nothing_is_written(
    arguments: list[str], sentence: str, adapters: Adapters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tmp_path / "out", "--adapter", str(adapters["one"]), *arguments) == 2
    error = error_of(capsys)
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_shows_the_flags_of_each_modality(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--help"]) == 0
    shown = capsys.readouterr().out
    _, _, section = shown.partition("with adapters of modality 'diffusion':")
    for flag in ("--prompt TEXT", "--negative TEXT", "--count N", "--steps N", "--guidance NUMBER", "--size SIZE"):
        assert flag in section


def registry() -> Registry:
    entry = {"net": Entry("m:N")}
    drawing = {"prompt": Flag("what", repeatable=True), "steps": Flag("how many", type="integer")}
    boxes = {"box": Flag("where", type="number"), "steps": Flag("how far", type="number")}
    return Registry.from_plugins([
        (Plugin("draw", backbones=entry, predict_flags=drawing), "a"),
        (Plugin("track", backbones=entry, predict_flags=boxes), "b"),
    ])  # fmt: skip


def test_a_flag_is_read_as_the_adapter_s_own_modality_declares_it() -> None:
    options = parse(
        "predict", ["--adapter", "f", "--out", "o", "--steps=2", "--prompt=a", "--prompt", "b"], plugins=registry
    )
    assert read_flags(options.flags, registry(), "draw") == {"prompt": ("a", "b"), "steps": 2}
    assert read_flags({"steps": ("2.5",)}, registry(), "track") == {"steps": 2.5}


def test_a_flag_of_another_modality_says_whose_it_is() -> None:
    with pytest.raises(ConfigError) as caught:
        read_flags({"box": ("1",)}, registry(), "draw")
    (problem,) = caught.value.problems
    assert problem.startswith("--box: it is for adapters of modality 'track', and this one is of 'draw'")
    assert problem.endswith("whose own flags are: --prompt, --steps")
