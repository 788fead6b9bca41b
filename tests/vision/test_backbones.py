"""Backbones of timm: anatomies of the family's members, and weights in the layouts that authors release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_modal.errors import ConfigError, DataError, WeightsError
from peft_modal.methods.lora import LoRA
from peft_modal.testing import check_anatomy
from peft_modal_vision.backbone import ConvNeXt, Swin, ViT

CREATE = timm.create_model
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_PLAIN = {"embed_dim": 32, "depth": 2, "num_heads": 2}
# Each member of the family with what is special in it, at toy size.
FAMILY: dict[str, dict[str, Any]] = {
    "deit_tiny_distilled_patch16_224": {"img_size": 32, **_PLAIN},  # two class tokens
    "vit_base_patch16_clip_224": {"img_size": 32, **_PLAIN},  # a norm before the blocks
    "vit_small_patch14_dinov2": {"img_size": 28, **_PLAIN},  # layer scale
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, **_PLAIN},  # registers
    "vit_giant_patch14_dinov2": {"img_size": 28, **_PLAIN},  # packed SwiGLU
    "vit_medium_patch16_reg4_gap_256": {"img_size": 32, **_PLAIN},  # registers, average
    "vit_base_patch16_gap_224": {"img_size": 32, **_PLAIN},  # no class token
    "vit_base_patch16_siglip_224": {"img_size": 32, **_PLAIN},  # pools by attention
    "eva_giant_patch14_224": {"img_size": 28, **_PLAIN},  # biases of q and v beside the fused weight
    "eva02_tiny_patch14_224": {"img_size": 28, **_PLAIN},  # rotary positions, q, k and v of their own, SwiGLU
    "vit_small_patch16_dinov3": {"img_size": 32, **_PLAIN},  # registers and rotary positions
}


def small(monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> ViT:
    """A model by its name at toy size."""
    sizes = FAMILY[name]
    monkeypatch.setattr(timm, "create_model", lambda model, **given: CREATE(model, **{**given, **sizes}))
    return ViT(model=name, weights="random", **options)


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_of_the_family_has_an_anatomy_that_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small(monkeypatch, name, levels=2)
    batch = backbone.example_batch(2)
    features = backbone(batch)
    assert not check_anatomy(backbone)
    assert features.extras["pooled"].shape == (2, backbone.feature_width)
    assert [features.extras[f"level.{i}"].shape[:2] for i in range(2)] == [(2, 32)] * 2
    layout = backbone.anatomy.layouts["blocks"]
    patches = features.tokens[:, layout.slice("patches", features.tokens.shape[1])]
    assert patches.shape[1] == 4
    adapter = LoRA(rank=2, sites=["attn", "mlp"]).attach(backbone)
    backbone(batch).extras["pooled"].square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.named_trained().values())


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_pictures_of_another_size_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small(monkeypatch, name)
    patch = 14 if "14" in name else 16
    tokens = backbone({"image": torch.randn(1, 3, 3 * patch, 4 * patch)}).tokens
    layout = backbone.anatomy.layouts["blocks"]
    assert tokens[:, layout.slice("patches", tokens.shape[1])].shape[1] == 12
    with pytest.raises(DataError, match="cannot be cut into patches"):
        backbone({"image": torch.randn(1, 3, 3 * patch + 1, 4 * patch)})


def test_a_model_of_another_family_names_the_backbone_that_takes_it() -> None:
    with pytest.raises(ConfigError, match="use --backbone=convnext"):
        ViT(model="convnext_atto", weights="random")
    with pytest.raises(ConfigError, match="no backbone here takes it"):
        ViT(model="resnet18", weights="random")
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224"):
        ViT(model="vit_tinny_patch16_224", weights="random")


def made(**sizes: Any) -> Any:
    """timm's own network with a classifier, as a training script would save it."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(7)
    network = VisionTransformer(**{**SIZES, "num_classes": 5, **sizes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return network.eval()


def custom(weights: Path | str, **options: Any) -> ViT:
    backbone = ViT(model="custom", weights=str(weights), sizes=SIZES, **options)
    backbone.load_weights()
    return backbone


def pooled(backbone: ViT, image: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone({"image": image}).extras["pooled"]


@pytest.mark.parametrize("layout", ["pth", "state_dict", "safetensors"])
def test_files_with_a_classifier_load(layout: str, tmp_path: Path) -> None:
    network, path = made(), tmp_path / "weights.pth"
    if layout == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(network.state_dict(), path)
    else:
        state = network.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if layout == "state_dict" else state, path)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(image), pre_logits=True)
    assert torch.allclose(pooled(custom(path), image), expected, atol=1e-6)


def test_positions_are_resampled_to_the_size_asked_for(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    network, path = made(), tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    large = custom(path, img_size=64)
    expected = resample_abs_pos_embed(network.pos_embed, [8, 8])
    assert torch.allclose(large.network.pos_embed, expected, atol=1e-6)  # type: ignore[arg-type]
    assert large({"image": torch.randn(1, 3, 64, 64)}).tokens.shape == (1, 65, 32)


def jax_state(network: Any) -> dict[str, np.ndarray]:
    """The arrays of `ViT-B_16.npz`, by the names and in the axes of the authors."""
    width, heads = network.embed_dim, network.blocks[0].attn.num_heads

    def numpy(tensor: Tensor) -> np.ndarray:
        return tensor.detach().numpy()

    state = {
        "embedding/kernel": numpy(network.patch_embed.proj.weight).transpose(2, 3, 1, 0),
        "embedding/bias": numpy(network.patch_embed.proj.bias),
        "cls": numpy(network.cls_token),
        "Transformer/posembed_input/pos_embedding": numpy(network.pos_embed),
        "Transformer/encoder_norm/scale": numpy(network.norm.weight),
        "Transformer/encoder_norm/bias": numpy(network.norm.bias),
        "head/kernel": numpy(network.head.weight).T,
        "head/bias": numpy(network.head.bias),
    }
    for i, block in enumerate(network.blocks):
        start = f"Transformer/encoderblock_{i}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            state[f"{start}/{theirs}/scale"] = numpy(getattr(block, ours).weight)
            state[f"{start}/{theirs}/bias"] = numpy(getattr(block, ours).bias)
        attention = f"{start}/MultiHeadDotProductAttention_1"
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            state[f"{attention}/{name}/kernel"] = numpy(weight).T.reshape(width, heads, -1)
            state[f"{attention}/{name}/bias"] = numpy(bias).reshape(heads, -1)
        state[f"{attention}/out/kernel"] = numpy(block.attn.proj.weight).T.reshape(heads, -1, width)
        state[f"{attention}/out/bias"] = numpy(block.attn.proj.bias)
        for number, linear in enumerate((block.mlp.fc1, block.mlp.fc2)):
            state[f"{start}/MlpBlock_3/Dense_{number}/kernel"] = numpy(linear.weight).T
            state[f"{start}/MlpBlock_3/Dense_{number}/bias"] = numpy(linear.bias)
    return state


def test_the_authors_npz_loads(tmp_path: Path) -> None:
    network = made()
    np.savez(tmp_path / "ViT.npz", **jax_state(network))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(image), pre_logits=True)
    assert torch.allclose(pooled(custom(tmp_path / "ViT.npz"), image), expected, atol=1e-5)
    large = custom(tmp_path / "ViT.npz", img_size=48)
    assert large({"image": torch.randn(1, 3, 48, 48)}).tokens.shape == (1, 37, 32)


def test_weights_that_do_not_fit_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"no weights at all")
    with pytest.raises(WeightsError, match=r"weights\.pth' cannot be read as weights"):
        custom(path)
    torch.save(made(depth=3).state_dict(), path)
    with pytest.raises(WeightsError, match=r"blocks\.2"):
        custom(path)
    torch.save(made(embed_dim=48, num_heads=3).state_dict(), path)
    with pytest.raises(WeightsError, match="48"):
        custom(path)
    arrays = jax_state(made())
    del arrays["cls"]
    np.savez(tmp_path / "cut.npz", **arrays)
    with pytest.raises(WeightsError, match="is not a checkpoint of this architecture"):
        custom(tmp_path / "cut.npz")


@pytest.mark.parametrize(
    ("make", "model"),
    [(ViT, "vit_tiny_patch16_224"), (Swin, "swin_tiny_patch4_window7_224"), (ConvNeXt, "convnext_atto")],
)
def test_without_a_network_the_hub_is_named(make: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **given: Any) -> Any:
        if given.get("pretrained"):
            raise OSError("Connection refused\nand more")
        return CREATE(name, **given)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=rf"'pretrained' is no file, and '{model}' cannot be fetched: Connection"):
        make(model=model, weights="pretrained").load_weights()
