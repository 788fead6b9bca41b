"""LoRA folders of peft: what is written, peft loads; what peft wrote, is read; everything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close, randomise
from safetensors.torch import load_file, save_file
from tiny_backbones import TinyCLIP, TinyUNet, TinyViT
from torch import nn

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import FileFormatError
from peft_modal.hf.files import CONFIG, REST, WEIGHTS, export_lora, read_lora
from peft_modal.hf.importing import import_lora
from peft_modal.methods.base import Method
from peft_modal.methods.compose import Compose
from peft_modal.methods.hf import HF
from peft_modal.methods.lora import LoRA
from peft_modal.methods.norm_tuning import NormTuning
from peft_modal.methods.ssf import SSF
from peft_modal.testing.sandbox import outputs, quiet, shift


def vit() -> Backbone:
    backbone = TinyViT(depth=2)
    randomise(backbone.network, std=0.1)
    return backbone


def clip() -> Backbone:
    return TinyCLIP()


def exported(method: Method, make: Callable[[], Backbone], folder: Path) -> tuple[Backbone, Adapter]:
    backbone = make()
    adapter = method.attach(backbone)
    shift(adapter, std=0.2)
    export_lora(adapter, folder)
    return backbone, adapter


EXPORTS: dict[str, tuple[Method, Callable[[], Backbone]]] = {
    "whole": (LoRA(sites=["attn.qkv", "attn.out", "mlp"], rank=3, alpha=7), vit),
    "slices": (LoRA(sites=["attn.q", "attn.v"], rank=2, alpha=3, rank_stabilised=True), vit),
    "mixed": (
        Compose(methods=[LoRA(sites=["attn.q", "mlp.in"], rank=2, alpha=3), LoRA(sites=["attn.qkv", "embed"], rank=3)]),
        vit,
    ),
    "dora": (HF(tuner="dora", config={"r": 2, "rank_pattern": {"blocks.1.mlp.fc1": 3}}), vit),
    "pissa": (HF(tuner="pissa", config={"r": 2, "lora_alpha": 3}), vit),
    "attention": (LoRA(sites=["attn.q", "attn.v", "mlp.in"], rank=2, alpha=3), clip),
    "convolutions": (LoRA(sites=["conv", "cross"], rank=2, alpha=3), TinyUNet),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_peft_computes_from_the_folder_what_the_adapter_computes(case: str, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    method, make = EXPORTS[case]
    backbone, _ = exported(method, make, tmp_path)
    other = make()
    config = LoraConfig.from_pretrained(str(tmp_path))
    inject_adapter_in_model(config, other.network)
    result = set_peft_model_state_dict(other.network, load_file(tmp_path / WEIGHTS))
    assert not result.unexpected_keys
    with quiet():
        assert_close(outputs(other)["tokens"], outputs(backbone)["tokens"], tolerance=1e-5)


def test_peft_model_opens_the_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    backbone, _ = exported(*EXPORTS["slices"], tmp_path)
    plain = vit()
    model = PeftModel.from_pretrained(plain.network, str(tmp_path)).eval()
    image = backbone.example_batch()["image"]
    with torch.no_grad():
        assert_close(model(image), backbone.network(image), tolerance=1e-5)


@pytest.mark.parametrize("case", EXPORTS)
def test_a_folder_that_was_written_is_read_back_to_the_same_outputs(case: str, tmp_path: Path) -> None:
    method, make = EXPORTS[case]
    backbone, _ = exported(method, make, tmp_path)
    other = make()
    found = import_lora(read_lora(tmp_path), other)
    node = dict(found.method)
    cls = {"lora": LoRA, "hf": HF}[node.pop("name")]
    cls(**node).attach(other).load(found.tensors)
    with quiet():
        assert_close(outputs(other)["tokens"], outputs(backbone)["tokens"], tolerance=1e-5)


def test_what_peft_wrote_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    backbone = vit()
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["qkv", "fc1"], rank_pattern={"fc1": 2},
        alpha_pattern={"blocks.1.mlp.fc1": 9}, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(vit().network, config).eval()
    model.save_pretrained(str(tmp_path))
    found = import_lora(read_lora(tmp_path), backbone)
    assert found.method["name"] == "hf"
    HF(**{key: value for key, value in found.method.items() if key != "name"}).attach(backbone).load(found.tensors)
    image = backbone.example_batch()["image"]
    with torch.no_grad():
        assert_close(backbone.network(image), model(image), tolerance=1e-5)


def test_one_rank_and_scale_becomes_our_own_lora(tmp_path: Path) -> None:
    exported(*EXPORTS["whole"], tmp_path)
    node = import_lora(read_lora(tmp_path), vit()).method
    assert node == {
        "name": "lora",
        "sites": {"roles": ["attn.out", "attn.qkv", "mlp.in", "mlp.out"]},
        "rank": 3,
        "alpha": pytest.approx(7),
    }


def test_a_part_of_a_role_is_selected_by_name(tmp_path: Path) -> None:
    exported(LoRA(sites={"roles": ["mlp.in"], "blocks": "last: 1"}, rank=2), vit, tmp_path)
    found = import_lora(read_lora(tmp_path), vit())
    assert found.method["sites"] == {"roles": ["mlp.in"], "path": r"^(?:blocks\.1\.mlp\.fc1)$"}
    assert {name.rpartition(".")[0] for name in found.tensors} == {"adapter.blocks.1.mlp.fc1"}


def test_slices_become_one_pair_of_the_summed_rank_with_blocks(tmp_path: Path) -> None:
    _, adapter = exported(*EXPORTS["slices"], tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    up = tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    assert up.shape == (96, 4)
    q = adapter.adapter.get_submodule("blocks.0.attn.q")
    assert torch.equal(up[:32, :2], q.up)  # the scale stands in lora_alpha, nothing is rounded
    assert not up[32:64].any()
    assert not up[:32, 2:].any()
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 4


def test_the_head_and_trained_tensors_of_the_network_lie_beside(tmp_path: Path) -> None:
    backbone = vit()
    adapter = Compose(methods=[LoRA(sites=["mlp"], rank=2), NormTuning()]).attach(backbone)
    head = nn.Linear(3, 2)
    export_lora(adapter, tmp_path, head=head, backbone_name="tiny")
    rest = load_file(tmp_path / REST)
    assert torch.equal(rest["head.weight"], head.weight)
    assert any(name.startswith("backbone.") for name in rest)
    readme = (tmp_path / "README.md").read_text()
    assert "the head (`head.*`), trained tensors of the network's own" in readme
    assert set(read_lora(tmp_path).rest) == set(rest)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (SSF(sites=["mlp"]), "a branch from .* is no low-rank update"),
        (HF(tuner="oft", config={"oft_block_size": 8}), "is no plain LoRA or DoRA pair"),
        (NormTuning(), "no low-rank update, so there is nothing to write"),
        (Compose(methods=[HF(tuner="dora", sites=["attn"], config={"r": 2}), LoRA(sites=["mlp"], rank=2)]),
         "only some of the updates are DoRA's"),
    ],
    ids=["ssf", "oft", "norm_tuning", "half_dora"],
)  # fmt: skip
def test_what_is_no_pair_is_not_written(method: Method, sentence: str, tmp_path: Path) -> None:
    adapter = method.attach(vit())
    with pytest.raises(FileFormatError, match=sentence):
        export_lora(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_projection_of_attention_that_peft_applies_twice_is_refused_both_ways(tmp_path: Path) -> None:
    adapter = LoRA(sites=["attn.out"], rank=2).attach(clip())
    shift(adapter)
    with pytest.raises(FileFormatError, match=r"out_proj' cannot be written: peft applies it twice"):
        export_lora(adapter, tmp_path / "out")
    exported(*EXPORTS["attention"], tmp_path)
    name = "base_model.model.visual.transformer.resblocks.0.attn.base_layer.out_proj.lora_B.weight"
    change_tensors(tmp_path, lambda tensors: tensors[name].fill_(1.0))
    with pytest.raises(FileFormatError, match=r"cannot be read: peft applies it twice"):
        read_lora(tmp_path)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


QKV = "base_model.model.blocks.0.attn.qkv.lora_A.weight"

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json' does not exist"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors' does not exist"),
    "cut config": (lambda f: (f / CONFIG).write_text("{"), "is damaged"),
    "cut weights": (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 9), "no readable safetensors file"),
    "another type": (lambda f: change_config(f, peft_type="VERA"), "is of peft type 'VERA'"),
    "a rank of text": (lambda f: change_config(f, r="8"), "its 'r' is '8'"),
    "biases": (lambda f: change_config(f, bias="all"), "has bias = 'all'"),
    "a variant": (lambda f: change_config(f, use_qalora=True), "uses use_qalora"),
    "another rank": (lambda f: change_config(f, r=5), "not rank 5"),
    "half a pair": (lambda f: change_tensors(f, lambda t: t.pop(QKV)), "holds no lora_A for 'blocks.0.attn.qkv'"),
    "another key": (lambda f: change_tensors(f, rename("blocks.0.attn.qkv.lora_A", "head")), "holds 'base_model.mod"),
    "an unknown module": (
        lambda f: change_tensors(f, rename("blocks.0.attn.qkv", "blocks.0.attn.qvk")),
        "adapts 'blocks.0.attn.qvk', which is no site of this network; did you mean 'blocks.0.attn.qkv'",
    ),
    "another width": (lambda f: change_tensors(f, lambda t: t.update({QKV: torch.zeros(3, 31)})), r"needs \(3, 32\)"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_does_not_fit_is_refused_with_a_sentence(damage: str, tmp_path: Path) -> None:
    exported(*EXPORTS["whole"], tmp_path)
    spoil, sentence = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(FileFormatError, match=sentence):
        import_lora(read_lora(tmp_path), vit())
