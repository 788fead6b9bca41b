"""Stable Diffusion as a backbone: anatomies, sizes, weights from a folder, what the denoiser reads of a caption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from peft_modal.errors import ConfigError, WeightsError
from peft_modal.methods.adaptformer import AdaptFormer
from peft_modal.testing import assert_anatomy
from peft_modal_diffusion.backbone import StableDiffusion
from peft_modal_diffusion.layout import read_layout
from peft_modal_diffusion.surroundings import T5_LENGTH, uses_penultimate_only

TOYS = ("toy", "toy_xl", "toy_sd3", "toy_sd35")
CAPTIONS = ["a red sun", "sks", "a cat a dog a red sun a cat"]
Folders = Callable[[str], Path]


def opened(folder: Path, **arguments: object) -> StableDiffusion:
    backbone = StableDiffusion(weights=str(folder), **arguments)
    backbone.load_weights()
    return backbone


def pipeline(folder: Path) -> diffusers.DiffusionPipeline:
    index = json.loads((folder / "model_index.json").read_text())
    left_out = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    return diffusers.DiffusionPipeline.from_pretrained(folder, **left_out)


def changed(file: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# The U-Net with its text encoder is the tiny of the registered backbone, and version 3.5 the contract tests' `mmdit`.
@pytest.mark.parametrize(
    ("size", "tune"),
    [("toy_xl", "denoiser_and_text"), ("toy_sd3", "denoiser_and_text"), ("toy_sd3", "denoiser"),
     ("toy_sd35", "denoiser_and_text")],
)  # fmt: skip
def test_anatomy_describes_the_network(size: str, tune: str) -> None:
    assert_anatomy(StableDiffusion(weights="random", architecture=size, tune=tune))


@pytest.mark.parametrize("size", TOYS)
@pytest.mark.parametrize("tune", ["denoiser", "denoiser_and_text"])
def test_every_parameter_that_is_read_has_a_site(size: str, tune: str) -> None:
    backbone = StableDiffusion(weights="random", architecture=size, tune=tune)
    unread = {
        f"{name}.{path}"
        for name, encoder in backbone.network.named_children()
        if name.startswith("text_encoder") and uses_penultimate_only(encoder, backbone.layout.family)
        for path, _ in encoder.named_parameters()
        if path.startswith(("encoder.layers.1.", "final_layer_norm."))
    }
    sites = [site.path for site in backbone.anatomy.sites]

    assert len(sites) == len(set(sites))
    assert set(sites) == {path for path, _ in backbone.network.named_parameters()} - unread
    assert bool(unread) == (size == "toy_xl" and tune == "denoiser_and_text")


def test_sites_and_ports_have_the_roles_that_users_know() -> None:
    unet = StableDiffusion(weights="random", architecture="toy").anatomy
    assert unet.depth == {"unet.down": 1, "unet.mid": 1, "unet.up": 2}
    assert {site.role for site in unet.sites if site.stack == "unet.mid" and site.block == 0} == {
        "norm.scale", "norm.shift", "attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.k", "cross.v",
        "cross.out", "mlp.in", "mlp.out", "bias.attn.out", "bias.cross.out", "bias.mlp.in", "bias.mlp.out",
    }  # fmt: skip
    # The text reaches the U-Net through keys and values of its cross-attention alone.
    widths = {site.role: site.shape[1] for site in unet.sites if site.role.startswith("cross.") and len(site.shape) > 1}
    assert widths["cross.k"] == widths["cross.v"] == 12 != widths["cross.q"]
    transformer = StableDiffusion(weights="random", architecture="toy_sd35").anatomy
    roles = [{site.role for site in transformer.sites if site.block == block} for block in (0, 1)]
    assert "attn2.q" in roles[0] - roles[1]
    # Nothing reads the text behind the last block.
    assert {"context.mlp.in", "context.out"} <= roles[0] - roles[1]


@pytest.mark.parametrize(
    ("size", "parameters", "candidates", "millions"),
    [
        ("sd15", 859_520_964, 184, 270.0),
        ("sd2", 865_910_724, 216, 301.2),
        ("sdxl", 2_567_463_684, 743, 2_232.6),
        ("sd3", 2_028_328_000, 339, 2_027.0),
    ],
)
def test_the_published_sizes_count_as_published(size: str, parameters: int, candidates: int, millions: float) -> None:
    with torch.device("meta"):
        backbone = StableDiffusion(weights="random", architecture=size)
    matrices = [site.shape for site in backbone.anatomy.sites if len(site.shape) == 2 and min(site.shape) > 64]

    assert sum(p.numel() for p in backbone.network.parameters()) == parameters
    assert len(matrices) == candidates
    assert round(sum(rows * columns for rows, columns in matrices) / 1e6, 1) == millions


@pytest.mark.parametrize("tune", ["denoiser", "denoiser_and_text"])
def test_a_folder_fills_the_network_and_what_is_around_it(toy_folders: Folders, tune: str) -> None:
    backbone = opened(toy_folders("toy_xl"), tune=tune)
    expected = pipeline(toy_folders("toy_xl"))

    names = ("text_encoder", "text_encoder_2", "unet") if tune == "denoiser_and_text" else ("unet",)
    assert [name for name, _ in backbone.network.named_children()] == list(names)
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        module = backbone.network.get_submodule(name) if name in names else backbone.surroundings[name]
        state = getattr(expected, name).state_dict()
        assert module.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        assert not any(parameter.requires_grad or module.training for parameter in module.parameters())
    if tune == "denoiser_and_text":
        assert backbone.surroundings["text_encoder"] is backbone.network.get_submodule("text_encoder")


def test_half_precision_files_are_opened_in_single_precision(toy_folders: Folders, tmp_path: Path) -> None:
    whole = pipeline(toy_folders("toy"))
    whole.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    backbone = opened(tmp_path)

    weight = whole.unet.conv_in.weight
    assert weight.dtype == torch.float16
    assert torch.equal(backbone.network.get_parameter("unet.conv_in.weight"), weight.float())
    assert {part.dtype for part in (backbone.surroundings["vae"], backbone.surroundings["text_encoder"])} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("name", "side"), [("stabilityai/stable-diffusion-2-1", 96), ("stabilityai/stable-diffusion-2-1-base", 64)]
)
def test_a_known_hub_name_needs_no_network_for_its_sizes(name: str, side: int) -> None:
    assert read_layout(name).configs["unet"]["sample_size"] == side


# What the denoiser reads of captions.


def encoded_by_diffusers(folder: Path, captions: list[str]) -> Iterator[dict[str, Tensor | None]]:
    """Of the captions, and of no caption, as diffusers does it by itself."""
    pipe = pipeline(folder)
    arguments = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        if isinstance(pipe, diffusers.StableDiffusionPipeline):
            states, empty = pipe.encode_prompt(captions, **arguments)
            pooled = empty_pooled = None
        else:
            others = {"prompt_3": None} if isinstance(pipe, diffusers.StableDiffusion3Pipeline) else {}
            states, empty, pooled, empty_pooled = pipe.encode_prompt(captions, prompt_2=None, **others, **arguments)
    yield {"states": states, "pooled": pooled}
    yield {"states": empty, "pooled": empty_pooled}


def assert_read_as_by_diffusers(folder: Path, **arguments: object) -> dict[str, Tensor]:
    backbone = opened(folder, **arguments)
    expected, expected_empty = encoded_by_diffusers(folder, CAPTIONS)
    found = backbone.surroundings.encode_text(CAPTIONS, width=backbone.text_width)
    empty = backbone.surroundings.no_caption(len(CAPTIONS), width=backbone.text_width)

    for name, value in expected.items():
        assert (value is None) == (name not in found)
        if value is not None:
            assert torch.equal(found[name], value)
            assert torch.equal(empty[name], expected_empty[name])
    return found


@pytest.mark.parametrize("size", ["toy", "toy_xl", "toy_sd3"])
def test_text_states_are_those_of_diffusers(toy_folders: Folders, size: str) -> None:
    assert_read_as_by_diffusers(toy_folders(size))


def test_no_caption_is_an_empty_one_where_the_pipeline_says_so(toy_folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_folders("toy_xl"), tmp_path / "pipeline")
    changed(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    zeros, empty = (opened(f).surroundings.no_caption(1, width=24) for f in (toy_folders("toy_xl"), folder))

    assert not zeros["states"].any()
    assert not zeros["pooled"].any()
    assert empty["states"].any()
    assert_read_as_by_diffusers(folder)


def with_t5(folder: Path) -> Path:
    """Give a copy of Stable Diffusion 3's toy its T5 encoder."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in ("a", "red", "cat"))]
    T5Tokenizer(vocab=words, extra_ids=0, model_max_length=512).save_pretrained(folder / "tokenizer_3")
    config = T5Config(vocab_size=len(words), d_model=28, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")
    parts = {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5Tokenizer"]}
    changed(folder / "model_index.json", **parts)
    return folder


def test_t5_states_follow_those_of_clip(toy_folders: Folders, tmp_path: Path) -> None:
    folder = with_t5(shutil.copytree(toy_folders("toy_sd3"), tmp_path / "pipeline"))
    found = assert_read_as_by_diffusers(folder)["states"]
    backbone = opened(folder, t5=False)
    without = backbone.surroundings.encode_text(CAPTIONS, width=backbone.text_width)["states"]

    assert found.shape == without.shape == (3, 6 + T5_LENGTH, 28)
    assert torch.equal(found[:, :6], without[:, :6])
    assert found[:, 6:].any()
    assert not without[:, 6:].any()


@pytest.mark.parametrize("size", ["toy", "toy_xl", "toy_sd3"])
def test_tuned_text_encoders_read_tokens_as_frozen_ones_read_captions(toy_folders: Folders, size: str) -> None:
    frozen, tuned = opened(toy_folders(size)), opened(toy_folders(size), tune="denoiser_and_text")
    batch = frozen.example_batch(3)
    states = frozen.surroundings.encode_text(CAPTIONS, width=frozen.text_width)
    tokens = tuned.surroundings.tokenize(CAPTIONS)
    with torch.no_grad():
        expected = frozen({**batch, **states}).tokens
        found = tuned({**batch, **tokens}).tokens
        other = tuned({**batch, **tuned.surroundings.tokenize(["a dog"] * 3)}).tokens

    assert torch.equal(found, expected)
    assert not torch.allclose(other, expected, atol=1e-4)


def test_an_adapter_on_the_penultimate_layer_acts_whatever_has_looked_at_it_before(toy_folders: Folders) -> None:
    # transformers hangs hooks of its own there when it is first asked for hidden states.
    found = []
    for looked in (False, True):
        backbone = opened(toy_folders("toy_xl"), tune="denoiser_and_text")
        if looked:
            backbone.surroundings["text_encoder"](torch.zeros(1, 6, dtype=torch.long), output_hidden_states=True)
        adapter = AdaptFormer(hidden_dim=2, blocks=[0]).attach(backbone)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(0.3)
            found.append(backbone.surroundings.encode_text(CAPTIONS, width=backbone.text_width)["states"])
            adapter.detach()
            bare = backbone.surroundings.encode_text(CAPTIONS, width=backbone.text_width)["states"]

    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], bare, atol=1e-3)


# What ends in a sentence.


def without(file: Path, ending: str) -> None:
    """Leave one tensor out of a file."""
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(ending)}
    save_file(tensors, file, metadata={"format": "pt"})


def shortened(file: Path, ending: str, rows: int) -> None:
    """Keep some rows of one tensor of a file."""
    tensors = {n: t[:rows].clone() if n.endswith(ending) else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "corrupt": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:5000]), r"'unet' of '.*' cannot be opened: "),
    "pickled": (lambda f: (f / UNET).rename(f / UNET.replace("safetensors", "bin")), r"'unet' of .*\.safetensors"),
    "incomplete denoiser": (
        lambda f: without(f / UNET, "conv_in.weight"),
        r"'unet' of .*: it has no 'conv_in.weight'$",
    ),
    "incomplete text encoder": (
        lambda f: without(f / TEXT, "final_layer_norm.weight"),
        r"'text_encoder' of '.*' cannot be opened: it has no '.*final_layer_norm.weight'$",
    ),
    "other shapes": (lambda f: changed(f / "unet/config.json", cross_attention_dim=16), r"'unet' of .* expected shape"),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"'.*pipeline' is no .* it has no model_index.json$"),
    "index no JSON": (lambda f: (f / "model_index.json").write_text("{"), r"model_index.json' cannot be read: "),
    "unknown family": (
        lambda f: changed(f / "model_index.json", _class_name="FluxPipeline"),
        r"is a FluxPipeline; supported are StableDiffusionPipeline, StableDiffusionXLPipeline",
    ),
    "no denoiser": (lambda f: shutil.rmtree(f / "unet"), r"it has no unet.config.json$"),
    "no autoencoder": (lambda f: shutil.rmtree(f / "vae"), r"'vae' of '.*' cannot be opened: "),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"'tokenizer' of '.*' has no words"),
    "another's tokenizer": (
        lambda f: (
            shortened(f / TEXT, "token_embedding.weight", 40),
            changed(f / "text_encoder/config.json", vocab_size=40),
        ),
        r"'tokenizer' of '.*' has 50 tokens, but its text encoder reads 40",
    ),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"'scheduler' of '.*' cannot be opened: "),
    "unknown scheduler": (
        lambda f: changed(f / "scheduler/scheduler_config.json", _class_name="MagicScheduler"),
        r"the scheduler 'MagicScheduler' is none of diffusers",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_serve_ends_in_a_sentence(toy_folders: Folders, tmp_path: Path, fault: str) -> None:
    folder = shutil.copytree(toy_folders("toy"), tmp_path / "pipeline")
    harm, sentence = FAULTS[fault]
    harm(folder)

    with pytest.raises(WeightsError, match=sentence) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def test_opening_says_nothing(toy_folders: Folders, capfd: pytest.CaptureFixture[str]) -> None:
    opened(toy_folders("toy"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ("nowhere", "'nowhere' is neither 'nano' nor 'random' nor an existing folder nor a hub name 'owner/name'"),
        ("./no/where", "'./no/where' is neither 'nano'"),
        ("v1-5.ckpt", "'v1-5.ckpt' is a single file; give a diffusers pipeline folder"),
        ("models/v1-5.safetensors", "is a single file; give a diffusers pipeline folder"),
        ("somebody/something", "'model_index.json' of 'somebody/something' cannot be opened: "),
        ("stabilityai/stable-diffusion-2-1", "'unet' of 'stabilityai/stable-diffusion-2-1' cannot be opened: "),
    ],
)
def test_a_name_that_cannot_serve_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: str, sentence: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    with torch.device("meta"), pytest.raises(WeightsError) as caught:
        StableDiffusion(weights=weights).load_weights()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_belong_to_random_weights(toy_folders: Folders) -> None:
    with pytest.raises(ConfigError, match=r"backbone.architecture: '.*' has its own sizes"):
        StableDiffusion(weights=str(toy_folders("toy")), architecture="toy")
    with pytest.raises(ConfigError, match=r"backbone.denoiser: '.*' has its own sizes"):
        StableDiffusion(weights=str(toy_folders("toy")), denoiser={"sample_size": 8})
    with pytest.raises(WeightsError, match=r"backbone.architecture: unknown size 'sd1'; did you mean 'sd15'"):
        StableDiffusion(weights="random", architecture="sd1")


def test_what_is_not_there_is_named() -> None:
    backbone = StableDiffusion(weights="random", architecture="toy")
    backbone.load_weights()
    with pytest.raises(WeightsError, match="there is no 'vae' around this denoiser"):
        backbone.surroundings.encode_images(torch.zeros(1, 3, 16, 16))


def test_an_example_fits_a_denoiser_of_changed_sizes() -> None:
    backbone = StableDiffusion(weights="random", architecture="toy", denoiser={"cross_attention_dim": 20})
    batch = backbone.example_batch()
    assert batch["states"].shape[-1] == backbone.text_width == 20
    assert backbone(batch).tokens.shape == batch["sample"].shape
