import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_backbones import TinyCLIP

from peft_modal.errors import ConfigError, DataError, WeightsError
from peft_modal.files import write_tensors
from peft_modal_clip.backbone import TINY, OpenCLIPBackbone
from peft_modal_clip.sizes import ClipSizes, model_by_name
from peft_modal_clip.tokenizer import hf_tokenizer


def perturbed(seed: int = 1) -> TinyCLIP:
    backbone = TinyCLIP()
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.network.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as open_clip writes it, of a network other than the random one."""
    root = tmp_path_factory.mktemp("clip")
    backbone = perturbed()
    config = {"model_cfg": backbone.sizes.config(), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (root / "open_clip_config.json").write_text(json.dumps(config))
    save_file(backbone.network.state_dict(), root / "open_clip_model.safetensors")
    return root


def test_a_folder_of_open_clip_gives_what_open_clip_gives(folder):
    backbone = OpenCLIPBackbone(weights=str(folder))
    backbone.load_weights()
    reference = open_clip.create_model(f"local-dir:{folder}").eval()
    batch = backbone.example_batch(3)
    with torch.no_grad():
        image, text, scale = reference(batch["image"], batch["text"])
        found_image, found_text = backbone(batch).tokens[:, 0].chunk(2, dim=-1)
    assert torch.allclose(torch.nn.functional.normalize(found_image, dim=-1), image, atol=1e-6)
    assert torch.allclose(torch.nn.functional.normalize(found_text, dim=-1), text, atol=1e-6)
    assert torch.equal(backbone.similarity_scale, scale)


@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_a_file_of_weights_fills_a_network_of_its_sizes(tmp_path, kind):
    source = perturbed()
    state = source.network.state_dict()
    if kind == "own":
        write_tensors(tmp_path / "w.safetensors", {name: tensor.half() for name, tensor in state.items()}, {})
    else:
        save_file({**state, "logit_scale": state["logit_scale"].reshape(1)}, tmp_path / "w.safetensors")
    backbone = OpenCLIPBackbone(**{**TINY, "weights": str(tmp_path / "w.safetensors")})
    backbone.load_weights()
    for name, tensor in backbone.network.state_dict().items():
        assert torch.allclose(tensor, state[name], atol=1e-3 if kind == "own" else 0.0), name


def test_architecture_makes_the_same_network_of_any_weights(folder):
    backbone = OpenCLIPBackbone(weights=str(folder))
    again = OpenCLIPBackbone(weights="random", **backbone.architecture())
    assert again.sizes == backbone.sizes
    assert again.tokenizer == backbone.tokenizer == "clip"


@pytest.mark.parametrize("given", [("image",), ("text",), ("image", "text")], ids="+".join)
def test_what_is_missing_in_a_batch_is_not_embedded(given):
    backbone = TinyCLIP()
    batch = backbone.example_batch()
    both = backbone(batch).tokens
    parts = {"image": both[..., :16], "text": both[..., 16:]}
    found = backbone({name: batch[name] for name in given}).tokens
    assert torch.allclose(found, torch.cat([parts[name] for name in given], dim=-1), atol=1e-6)


def test_captions_are_tokenised_by_the_tokenizer_of_the_weights():
    backbone = OpenCLIPBackbone(weights="random", vision_layers=1, text_layers=1)
    captions = ["a red circle", "an orange ring left of a blue cross"]
    ids = backbone.tokenize(captions)
    assert ids[0].tolist()[:5] == hf_tokenizer()("a red circle").input_ids
    assert torch.equal(backbone({"caption": captions}).tokens, backbone({"text": ids}).tokens)


def test_a_folder_with_a_tokenizer_of_its_own_is_used(tmp_path):
    sizes = ClipSizes().with_given({"vision_layers": 1, "text_layers": 1})
    config = sizes.config()
    config["text_cfg"]["hf_tokenizer_name"] = "here"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    hf_tokenizer().save_pretrained(tmp_path)
    backbone = OpenCLIPBackbone(weights=str(tmp_path))
    assert backbone.tokenizer == f"local-dir:{tmp_path.resolve()}"
    assert backbone.tokenize(["a red circle"])[0].tolist()[:5] == hf_tokenizer()("a red circle").input_ids


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-32", {"vision_heads": 12, "text_heads": 8, "image_size": 224, "quick_gelu": False}),
        ("ViT-L-14-336-quickgelu", {"vision_heads": 16, "text_heads": 12, "image_size": 336, "quick_gelu": True}),
        ("ViT-bigG-14", {"vision_heads": 16, "vision_mlp_ratio": 4.9231, "text_width": 1280, "vocab_size": 49408}),
    ],
)
def test_sizes_of_known_models(name, expected):
    sizes = model_by_name(name).sizes
    assert {key: getattr(sizes, key) for key in expected} == expected
    config = open_clip.get_model_config(name)
    made = sizes.config()
    assert made["embed_dim"] == config["embed_dim"]
    assert config["vision_cfg"].items() <= made["vision_cfg"].items()
    assert config["text_cfg"].items() <= made["text_cfg"].items()


@pytest.mark.parametrize("weights", ["openai", "laion2b_s34b_b79k"])
def test_the_activation_is_that_of_the_named_weights(monkeypatch, weights):
    built = []
    monkeypatch.setattr("peft_modal_clip.backbone.build_clip", lambda sizes, **_: built.append(sizes) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # 151 M parameters are not built for this
        OpenCLIPBackbone(model="ViT-B-32", weights=weights)
    assert built[0].quick_gelu == (weights == "openai")


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "coca_ViT-B-32", "roberta-ViT-B-32"])
def test_networks_of_other_parts_are_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' is not built of a plain vision tower and a plain text"):
        model_by_name(name)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"model": "ViT-B-23", "weights": "random"}, ConfigError, "open_clip has no model 'ViT-B-23'.*ViT-B-32"),
        ({"model": "ViT-B-32", "weights": "nano"}, ConfigError, "weights 'nano' bring their own sizes"),
        (
            {"weights": "random", "vision_heads": 5},
            ConfigError,
            r"vision_width: 128 is no multiple of vision_heads \(5\)",
        ),
        ({"weights": "random", "patch_size": 5}, ConfigError, r"image_size: 32 is no multiple of patch_size \(5\)"),
    ],
)
def test_arguments_that_do_not_fit_end_in_a_sentence(arguments, error, said):
    with pytest.raises(error, match=said):
        OpenCLIPBackbone(**arguments)


def test_weights_that_are_nowhere_end_in_a_sentence(tmp_path):
    with pytest.raises(WeightsError, match="neither 'nano' nor 'random' nor an existing file or folder"):
        OpenCLIPBackbone(**{**TINY, "weights": "nowhere"}).load_weights()
    with pytest.raises(WeightsError, match=r"has no readable open_clip_config\.json"):
        OpenCLIPBackbone(weights=str(tmp_path))
    (tmp_path / "w.pt").write_bytes(b"none")
    with pytest.raises(WeightsError, match="cannot be read as weights of a CLIP"):
        OpenCLIPBackbone(**{**TINY, "weights": str(tmp_path / "w.pt")}).load_weights()


def test_weights_of_other_sizes_are_refused(folder):
    backbone = OpenCLIPBackbone(weights=str(folder), text_layers=1)
    with pytest.raises(WeightsError, match=r"is of another architecture: it has an unknown 'transformer.resblocks.1"):
        backbone.load_weights()


def test_a_tokenizer_with_too_many_tokens_is_refused():
    backbone = OpenCLIPBackbone(weights="random", tokenizer="clip", vision_layers=1, text_layers=1)
    with pytest.raises(ConfigError, match="'clip' has more tokens than the network's 686"):
        backbone.tokenize(["a red circle"])
    with pytest.raises(ConfigError, match="'words' is neither 'nano' nor 'clip'"):
        OpenCLIPBackbone(**TINY, tokenizer="words").tokenize(["a red circle"])


def test_a_batch_without_pictures_and_texts_is_refused():
    with pytest.raises(DataError, match="needs image, text or caption, this one has points"):
        TinyCLIP()({"points": torch.zeros(1)})


def test_texts_that_are_cut_are_known():
    backbone = OpenCLIPBackbone(weights="random", vision_layers=1, text_layers=1)
    full = " ".join(["red"] * (backbone.sizes.context_length - 2))
    assert backbone.are_cut(["", "a red circle", full, f"{full} circle", f"{full} red"]) == [False] * 3 + [True] * 2
