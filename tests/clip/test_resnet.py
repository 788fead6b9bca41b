"""CLIP with a ResNet: what it is made of, which methods work on it, and how weights and configurations are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_backbones import TinyResNetCLIP

from peft_modal.__main__ import main
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.r_amt import RAMT
from peft_modal.registry import default_registry
from peft_modal.testing import assert_anatomy
from peft_modal.testing.contract import run_contract
from peft_modal.testing.matrix import example_methods
from peft_modal_clip.backbone import OpenCLIPBackbone

REFUSED = {
    "consolidator": "is read inside a function", "repadapter": "is read inside a function",
    "convpass": "works on a grid of patches", "prefix": "takes no prefix", "vpt": "takes no prompts",
}  # fmt: skip
METHODS = example_methods(default_registry(), modality="clip")
CORE = ("lora", "full", "bitfit", "norm_tuning", "ssf", "r_amt", "sara", "linear_probe", "adaptformer")
"""Methods whose contracts are checked here; the others of the core attach."""

NO_GRADIENT = ("backbone.logit_scale", "adapter.visual.layer1.0.conv3.weight.values")
"""The factor is no part of embeddings; of that convolution sara trains one entry, whose channel this batch cuts off."""


def test_the_anatomy_is_true_of_the_network() -> None:
    backbone = TinyResNetCLIP()
    assert_anatomy(backbone)
    roles = [site.role for site in backbone.anatomy.sites if site.stack == "visual" and site.op != "raw"]
    assert roles.count("conv") == 3 * 5
    assert roles.count("conv.downsample") == 4
    assert roles.count("embed") == 3
    assert [role for role in roles if role.startswith("attn")] == ["attn.q", "attn.k", "attn.v", "attn.out"]
    assert backbone.anatomy.depth["visual"] == 5


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_attach_or_say_why_not(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(AttachError, match=REFUSED[name]):
            METHODS[name].attach(TinyResNetCLIP())
    else:
        METHODS[name].attach(TinyResNetCLIP())


@pytest.mark.parametrize("name", CORE)
def test_methods_keep_their_contracts(name: str) -> None:
    results = run_contract(TinyResNetCLIP, METHODS[name], leave_out=["compile"], exempt=NO_GRADIENT)
    assert not {contract: result for contract, result in results.items() if result.startswith("failed")}


def test_masks_reach_every_convolution_and_the_pooling_attention() -> None:
    backbone = TinyResNetCLIP()
    method = RAMT(sites={"roles": ["embed", "conv", "attn"], "stacks": ["visual"]}, gate_strength=0.0)
    trained = method.attach(backbone).named_trained()
    named = backbone.network.visual.named_parameters()
    weights = [tensor for name, tensor in named if tensor.ndim > 1 and "positional" not in name]
    assert sum(mask.numel() for mask in trained.values()) == sum(weight.numel() for weight in weights)


def test_statistics_of_batches_stand_still_while_training() -> None:
    backbone = TinyResNetCLIP()
    METHODS["lora"].attach(backbone)
    before = backbone.network.visual.bn1.running_mean.clone()
    backbone.train()
    backbone(backbone.example_batch())
    assert torch.equal(backbone.network.visual.bn1.running_mean, before)


def test_models_of_open_clip_are_built_by_their_names() -> None:
    sizes = OpenCLIPBackbone(model="RN50", weights="random").sizes
    assert (sizes.vision_layers, sizes.vision_width, sizes.vision_heads) == ((3, 4, 6, 3), 64, 32)
    assert (sizes.image_size, sizes.embed_dim, sizes.is_resnet) == (224, 1024, True)


def test_the_network_is_that_of_open_clip(tmp_path: Path) -> None:
    backbone = TinyResNetCLIP()
    config = backbone.sizes.config()
    with torch.random.fork_rng():
        reference = open_clip.model.CLIP(**config).eval()
    reference.load_state_dict(backbone.network.state_dict())
    batch = backbone.example_batch()
    with torch.no_grad():
        expected = torch.cat([reference.encode_image(batch["image"]), reference.encode_text(batch["text"])], -1)
        # Not to the bit: out of training open_clip's attention takes another path.
        torch.testing.assert_close(backbone(batch).tokens[:, 0], expected, rtol=0, atol=1e-5)
    # A folder as open_clip leaves it.
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(reference.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    loaded = OpenCLIPBackbone(weights=str(tmp_path))
    loaded.load_weights()
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).tokens[:, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"vision_layers": [1, 2]}, r"vision_layers: \[1, 2\] has 2 numbers, expected one for a transformer or 4"),
        ({"vision_layers": [1, 1, 1, 1], "image_size": 40}, r"image_size: 40 is no multiple of patch_size \(32\)"),
    ],
)
def test_sizes_of_no_network_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        OpenCLIPBackbone(weights="random", **given)


def test_a_run_trains_masks_on_a_resnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    command = [
        "fit", "--config=clip_mask_tuning.yaml", "--backbone.weights=random", "--backbone.image_size=32",
        "--backbone.vision_layers=[1, 1, 1, 1]", "--backbone.vision_width=8", "--backbone.vision_heads=4",
        "--method.sites.roles=[embed, conv, attn]", "--data.shots=1", "--data.test_per_class=1",
        "--data.val_per_class=1", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--out=run",
    ]  # fmt: skip
    assert main(command) == 0
    assert main(["test", "--adapter=run/adapter.safetensors", "--out=again"]) == 0
    first, again = (json.loads(Path(f, "metrics.json").read_text()) for f in ("run", "again"))
    assert first["test/loss"] == pytest.approx(again["test/loss"], rel=1e-5)
