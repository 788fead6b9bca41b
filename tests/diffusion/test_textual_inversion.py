"""Textual inversion: only the words' rows are trained, and other programs read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusion_adapters import GUIDANCE, save_toy_adapter, toy_config
from safetensors.torch import load_file
from tiny_backbones import TinyViT
from toy_pipeline import open_plain
from toy_training import make_task, open_backbone

from peft_modal.api import load
from peft_modal.cli.main import main
from peft_modal.errors import AttachError, ConfigError
from peft_modal_diffusion.generation import Sampling, generate
from peft_modal_diffusion.textual_inversion import TextualInversion

Folders = Callable[[str], Path]
PROMPTS = ["a sks cat", "sks"]


def adapter_file(folder: Path, path: Path, **method: object) -> Path:
    composed = toy_config(folder, {"name": "textual_inversion", **method}, tune="denoiser_and_text")
    return save_toy_adapter(path, composed)


@pytest.mark.parametrize(("size", "encoders"), [("toy", 1), ("toy_xl", 2), ("toy_sd3", 2)])
def test_only_the_rows_of_the_words_are_trained(size: str, encoders: int, toy_folders: Folders) -> None:
    backbone = open_backbone(toy_folders(size), tune="denoiser_and_text")
    tables = {site.path: backbone.tensor(site.path).detach().clone() for site in _tables(backbone)}
    assert len(tables) == encoders
    adapter = TextualInversion(words=["sks", "sun"]).attach(backbone)
    assert sum(p.numel() for p in adapter.named_trained().values()) == sum(2 * t.shape[1] for t in tables.values())
    with torch.no_grad():
        for parameter in adapter.named_trained().values():
            parameter.add_(1.0)
    tokenizer = backbone.surroundings["tokenizer"]
    before = {path: backbone.tensor(path).detach().clone() for path in tables}
    assert all(torch.equal(before[path], tables[path]) for path in tables)
    from peft_modal.attach import merge_

    merge_(backbone)
    for path, table in tables.items():
        changed = (backbone.tensor(path) != table).any(1).nonzero().flatten().tolist()
        assert changed == sorted(tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("sks", "sun"))


def _tables(backbone):
    return [site for site in backbone.anatomy.sites if site.role == "embed.token"]


def test_words_start_from_another_ones_embedding(toy_folders: Folders) -> None:
    backbone = open_backbone(toy_folders("toy"), tune="denoiser_and_text")
    TextualInversion(words=["sks"], initializer="cat").attach(backbone)
    texts = backbone.surroundings.encode_text(["a sks", "a cat", "a dog"], width=backbone.text_width)["states"]
    assert torch.allclose(texts[0], texts[1], atol=1e-5)
    assert not torch.allclose(texts[0], texts[2], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"words": ["unheardof"]}, "method.words: 'unheardof' is .* not one known word"),
        ({"words": ["a cat"]}, "method.words: 'a cat' is 2 tokens"),
        ({"initializer": "red cat"}, "method.initializer: 'red cat' is 2 tokens"),
    ],
)
def test_a_word_has_to_be_one_token(arguments, sentence: str, toy_folders: Folders) -> None:
    backbone = open_backbone(toy_folders("toy"), tune="denoiser_and_text")
    with pytest.raises(ConfigError, match=sentence):
        TextualInversion(**arguments).attach(backbone)


@pytest.mark.parametrize("words", [[], ["sks", "sks"]])
def test_words_are_refused_that_are_none_or_alike(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="one word or several different ones"):
        TextualInversion(words=words)


def test_a_text_encoder_has_to_be_there(toy_folders: Folders) -> None:
    for backbone in (open_backbone(toy_folders("toy")), TinyViT()):
        with pytest.raises(AttachError, match="denoiser_and_text"):
            TextualInversion().attach(backbone)


def test_it_learns_from_captions_with_the_word(toy_folders: Folders) -> None:
    task = make_task(toy_folders("toy"), method=TextualInversion(words=["sks"]), tune="denoiser_and_text")
    batch = {
        "pixels": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        "caption": ["a sks", "sks cat"],
        "key": ["0", "1"],
    }
    torch.manual_seed(0)
    sum(task.losses(batch, task(batch)).values()).backward()
    (values,) = task.named_trained().values()
    assert values.grad is not None
    assert values.grad.norm() > 0
    assert not any(p.requires_grad for p in task.backbone.network.parameters())
    (name,) = task.adapter.named_trained()
    assert task.adapter.decay[name] is False


def test_diffusers_reads_the_words_and_draws_the_same(toy_folders: Folders, tmp_path: Path) -> None:
    file = adapter_file(toy_folders("toy"), tmp_path / "words.safetensors", words=["sks"])
    out = tmp_path / "embeddings"
    assert main(["export", "--adapter", str(file), "--format", "embeddings", "--out", str(out)]) == 0
    pipeline = open_plain(toy_folders("toy"))
    pipeline.load_textual_inversion(str(out / "learned_embeds.safetensors"), token="<sks>")
    drawn = pipeline(
        prompt=[prompt.replace("sks", "<sks>") for prompt in PROMPTS], num_inference_steps=2, guidance_scale=GUIDANCE,
        output_type="pt", generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images  # fmt: skip
    model = load(file)
    ours = generate(model.backbone, PROMPTS, [0, 1], Sampling(steps=2, guidance=GUIDANCE))
    assert (drawn - ours).abs().max() < 1e-4
    model.adapter.enable(on=False)
    without = generate(model.backbone, PROMPTS, [0, 1], Sampling(steps=2, guidance=GUIDANCE))
    assert (without - ours).abs().max() > 1e-3


def test_two_encoders_have_two_names(toy_folders: Folders, tmp_path: Path) -> None:
    file = adapter_file(toy_folders("toy_xl"), tmp_path / "words.safetensors", words=["sks", "sun"])
    out = tmp_path / "words_out.safetensors"
    assert main(["export", "--adapter", str(file), "--format", "embeddings", "--out", str(out)]) == 0
    tensors = load_file(out)
    assert tensors.keys() == {"clip_l", "clip_g"}
    assert all(len(tensor) == 2 for tensor in tensors.values())


def test_other_methods_have_no_words(toy_folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    composed = toy_config(toy_folders("toy"), {"name": "lora", "rank": 1})
    file = save_toy_adapter(tmp_path / "lora.safetensors", composed)
    assert main(["export", "--adapter", str(file), "--format", "embeddings", "--out", str(tmp_path / "out")]) == 2
    assert "no textual inversion but 'lora'" in capsys.readouterr().err
