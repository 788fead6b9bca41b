"""AST: the same numbers as transformers' through every layout of its weights, any length, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_modal.errors import ConfigError, DataError, FileFormatError, WeightsError
from peft_modal.testing import check_anatomy
from peft_modal_audio.backbone import AST
from peft_modal_audio.positions import adapted
from peft_modal_audio.sizes import AstSizes, sizes_of_file
from peft_modal_audio.weights import timm_names

CONFIG: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "patch_size": 8,
    "frequency_stride": 5, "time_stride": 6, "max_length": 50, "num_mel_bins": 32,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "width": 24, "depth": 2, "heads": 3, "mlp_width": 40, "patch": 8, "stride_frequency": 5, "stride_time": 6,
    "mels": 32, "frames": 50, "norm_eps": 1e-12,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' model with weights of which none is zero or one."""
    from transformers import ASTConfig, ASTForAudioClassification

    torch.manual_seed(3)
    model = ASTForAudioClassification(ASTConfig(**CONFIG, num_labels=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def spectrogram() -> Tensor:
    return torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(1))


def loaded(weights: Path | str, **options: Any) -> AST:
    backbone = AST(weights=str(weights), **options)
    backbone.load_weights()
    return backbone


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers 4 wrote them, and as they lie on the hub."""
    pairs = (
        ("layers.", "encoder.layer."), ("q_proj", "attention.query"), ("k_proj", "attention.key"),
        ("v_proj", "attention.value"), ("o_proj", "output.dense"), ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        new = name
        for now, before in pairs:
            new = new.replace(now, before)
        renamed[new] = tensor.contiguous()
    return renamed


def authors_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the authors' files have them: timm's names behind `module.v.`, and the classifiers."""
    found = {f"module.v.{name}": tensor for name, tensor in timm_names(state).items()}
    width = CONFIG["hidden_size"]
    for name, shape in (("v.head", (9, width)), ("v.head_dist", (9, width)), ("mlp_head.1", (4, width))):
        found |= {f"module.{name}.weight": torch.randn(shape), f"module.{name}.bias": torch.randn(shape[0])}
    return found | {"module.mlp_head.0.weight": torch.ones(width), "module.mlp_head.0.bias": torch.zeros(width)}


@pytest.mark.parametrize("layout", ["hub", "hub_bin", "transformers_5", "encoder_alone", "authors"])
def test_outputs_are_those_of_transformers(layout: str, theirs: Any, spectrogram: Tensor, tmp_path: Path) -> None:
    state = theirs.state_dict()
    if layout == "transformers_5":
        theirs.save_pretrained(tmp_path)
        backbone = loaded(tmp_path)
    elif layout == "encoder_alone":
        theirs.audio_spectrogram_transformer.save_pretrained(tmp_path)
        backbone = loaded(tmp_path)
    elif layout == "authors":
        torch.save(authors_names(state), tmp_path / "audioset_5_6_0.4593.pth")
        backbone = loaded(tmp_path / "audioset_5_6_0.4593.pth", model="custom", sizes=SIZES)
    else:
        theirs.config.save_pretrained(tmp_path)
        if layout == "hub":
            save_file(old_names(state), tmp_path / "model.safetensors")
        else:
            torch.save(old_names(state), tmp_path / "pytorch_model.bin")
        backbone = loaded(tmp_path)
    with torch.no_grad():
        expected = theirs.audio_spectrogram_transformer(spectrogram)
        found = backbone({"spectrogram": spectrogram})
    assert torch.allclose(found.tokens, expected.last_hidden_state, atol=1e-5)
    assert torch.allclose(found.extras["pooled"], expected.pooler_output, atol=1e-5)


def test_the_published_sizes_are_the_default_and_have_the_published_parameters() -> None:
    with torch.device("meta"):
        networks = [AST(weights="random", model="base", frames=frames).network for frames in (1024, 800, 500, 400, 100)]
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [86_187_264, 85_984_512, 85_708_032, 85_615_872, 85_339_392]


@pytest.mark.parametrize(
    ("name", "strides", "frames"),
    [
        ("audioset_10_10_0.4593.pth", (10, 10), 1024),
        ("audioset_14_12_0.4476.pth", (14, 12), 1024),
        ("speechcommands_10_10_0.9812.pth", (10, 10), 128),
        ("mine.pth", (10, 10), 1024),
    ],
)
def test_names_of_the_authors_files_tell_strides_and_length(name: str, strides: tuple[int, int], frames: int) -> None:
    sizes = sizes_of_file(Path(name))
    assert ((sizes.stride_frequency, sizes.stride_time), sizes.frames) == (strides, frames)


def test_shorter_spectrograms_see_the_middle_of_the_positions(spectrogram: Tensor) -> None:
    backbone = AST(weights="random", model="custom", sizes=SIZES)
    grid = backbone.network.pos_embed[0, 2:].unflatten(0, backbone.sizes.grid())  # type: ignore[index, operator]
    assert grid.shape[:2] == (5, 8)
    small = AST(weights="random", model="custom", sizes=SIZES | {"frames": 26})
    state = backbone.network.state_dict()
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :2], grid[:, 2:6].flatten(0, 1)[None]], dim=1)
    small.network.load_state_dict(state)
    cut = spectrogram[:, :26]
    with torch.no_grad():
        assert torch.allclose(backbone({"spectrogram": cut}).tokens, small({"spectrogram": cut}).tokens, atol=1e-6)


def test_longer_spectrograms_are_taken_and_frames_adapts_when_loading(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    plain, longer = loaded(tmp_path, mels=42), loaded(tmp_path, frames=98, mels=42)
    assert (longer.sizes.frames, longer.sizes.mels) == (98, 42)
    batch = {"spectrogram": torch.randn(1, 98, 42)}
    with torch.no_grad():
        assert torch.allclose(plain(batch).tokens, longer(batch).tokens, atol=1e-5)
    assert bool(longer.network.pos_embed.any())  # type: ignore[operator, union-attr]


def test_positions_of_zero_are_only_made_when_asked_for(theirs: Any, spectrogram: Tensor, tmp_path: Path) -> None:
    from transformers import ASTModel

    theirs.save_pretrained(tmp_path)
    # What transformers makes of another length.
    cut = spectrogram[:, :26]
    model = ASTModel.from_pretrained(tmp_path, max_length=26, ignore_mismatched_sizes=True).eval()
    backbone = loaded(tmp_path, positions="zeros")
    with torch.no_grad():
        expected = model(cut).last_hidden_state
        assert torch.allclose(backbone({"spectrogram": cut}).tokens, expected, atol=1e-5)
        assert not torch.allclose(loaded(tmp_path)({"spectrogram": cut}).tokens, expected, atol=1e-2)


def test_training_begins_with_a_network_for_pictures(tmp_path: Path) -> None:
    from timm.models.deit import VisionTransformerDistilled

    torch.manual_seed(0)
    deit = VisionTransformerDistilled(
        img_size=384, patch_size=16, embed_dim=24, depth=1, num_heads=3, mlp_ratio=2, num_classes=5
    )
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    sizes = {"width": 24, "depth": 1, "heads": 3, "mlp_width": 48, "frames": 512}
    network: Any = loaded(tmp_path / "deit.pth", model="custom", sizes=sizes).network
    assert torch.allclose(network.patch_embed.proj.weight, deit.patch_embed.proj.weight.sum(1, keepdim=True))
    assert torch.allclose(network.pos_embed, adapted(deit.pos_embed, (24, 24), (12, 50)))
    assert torch.equal(network.blocks[0].mlp.fc1.weight, deit.blocks[0].mlp.fc1.weight)


def test_the_distillation_token_can_be_left_out(spectrogram: Tensor) -> None:
    backbone = AST(weights="random", model="custom", sizes=SIZES, distillation_token=False)
    found = backbone({"spectrogram": spectrogram})
    assert found.tokens.shape[1] == 1 + 5 * 8
    assert found.layout is not None
    assert [segment.name for segment in found.layout.segments] == ["cls", "patches"]
    assert torch.equal(found.extras["pooled"], found.tokens[:, 0])
    assert not check_anatomy(backbone)
    assert "dist_token" in backbone.network.state_dict()


def test_what_cannot_be_loaded_is_refused_in_a_sentence(theirs: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no readable config\.json"):
        AST(weights=str(tmp_path))
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"none of the files model\.safetensors"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match=r"model\.safetensors' is no readable safetensors file"):
        loaded(tmp_path)
    (tmp_path / "mine.pth").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"mine\.pth' cannot be read as weights"):
        loaded(tmp_path / "mine.pth")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "wav2vec2"}))
    with pytest.raises(WeightsError, match="of the kind 'wav2vec2'"):
        AST(weights=str(tmp_path))
    with pytest.raises(WeightsError, match="neither 'nano' nor 'random'"):
        loaded(tmp_path / "missing.pth")
    path = tmp_path / "audioset_10_10_0.1.pth"
    torch.save(authors_names(theirs.state_dict()), path)
    with pytest.raises(WeightsError, match="has 42 positions, and spectrograms of 50 frames and 32 mel bins"):
        loaded(path, model="custom", sizes=SIZES | {"stride_time": 7})
    with pytest.raises(WeightsError, match=r"blocks\.2"):
        loaded(path, model="custom", sizes=SIZES | {"depth": 3})


def test_a_missing_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repository: str, name: str) -> str:
        raise OSError("Connection refused\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(WeightsError, match=r"'config\.json' of 'MIT/ast' cannot be fetched: Connection refused$"):
        AST(weights="MIT/ast")


def test_the_hub_is_asked_for_safetensors_first(
    theirs: Any, spectrogram: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.config.save_pretrained(tmp_path)
    torch.save(old_names(theirs.state_dict()), tmp_path / "pytorch_model.bin")
    asked = []

    def fetch(repository: str, name: str) -> str:
        asked.append(name)
        if not (tmp_path / name).is_file():
            raise OSError("404")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    backbone = loaded("MIT/ast")
    assert asked == ["config.json", "model.safetensors", "pytorch_model.bin"]
    assert backbone({"spectrogram": spectrogram}).tokens.shape == (3, 42, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "large", "weights": "random"}, "'large' is unknown"),
        ({"model": "base"}, "'nano' is of model 'nano'"),
        ({"model": "custom", "weights": "random"}, "it needs them"),
        ({"sizes": SIZES}, "belong to backbone.model=custom"),
        ({"model": "custom", "weights": "random", "sizes": {"widht": 3}}, "did you mean 'width'"),
        ({"model": "custom", "weights": "random", "sizes": {"width": 10, "heads": 3}}, "no multiple"),
        ({"weights": "random", "frames": 15}, "smaller than a patch"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AST(**options)


def test_a_spectrogram_without_room_for_a_patch_is_refused(spectrogram: Tensor) -> None:
    with pytest.raises(DataError, match="7 frames and 32 mel bins is smaller than a patch"):
        AST(weights="random", model="custom", sizes=SIZES)({"spectrogram": spectrogram[:, :7]})


def test_other_mel_bins_than_the_network_s_are_refused_with_both_numbers(spectrogram: Tensor) -> None:
    with pytest.raises(DataError, match=r"have 30 mel bins, the network is for 32; set data\.mels to 32, or backbone"):
        AST(weights="random", model="custom", sizes=SIZES)({"spectrogram": spectrogram[..., :30]})


def test_merged_weights_find_a_network_that_fits(tmp_path: Path, spectrogram: Tensor) -> None:
    from peft_modal.files import write_tensors

    backbone = AST(weights="random", model="custom", sizes=SIZES, frames=40)
    assert backbone.architecture()["sizes"]["frames"] == 40
    write_tensors(tmp_path / "merged.safetensors", backbone.network.state_dict(), {})
    again = loaded(tmp_path / "merged.safetensors", **backbone.architecture())
    with torch.no_grad():
        assert torch.equal(again({"spectrogram": spectrogram}).tokens, backbone({"spectrogram": spectrogram}).tokens)
    assert AST(weights="random").architecture()["model"] == "nano"
    assert AstSizes().tokens == 1214
