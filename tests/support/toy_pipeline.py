"""Complete diffusers pipelines at toy size, with random weights: every part real, nothing of this project in them.

    from toy_pipeline import WORDS, open_plain, save_toy_pipeline

    folder = save_toy_pipeline(tmp_path / "toy", "toy")     # 'toy', 'toy_xl', 'toy_sd3' or 'toy_sd35'

writes what `save_pretrained` writes of a `StableDiffusionPipeline`, `...XLPipeline` or `...3Pipeline`: a denoiser and
text encoders of the sizes that `architecture` names, their tokenizers, an autoencoder of factor 2 and a scheduler; the
same values in every call. `--backbone.weights=FOLDER` opens it, and `open_plain(FOLDER)` with diffusers alone.

Tests do not call `save_toy_pipeline` but take copies that nobody changes (`tests/diffusion/conftest.py`):

    def test_something(toy_folders: Callable[[str], Path]) -> None:
        folder = toy_folders("toy_xl")

Pictures are 16 pixels wide, latents 8. A text has at most 4 tokens between start and end, and each of `WORDS` is one
token; every other word is the unknown token. Version 3 comes without T5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from peft_modal_diffusion.families import FAMILIES, SIZES

WORDS: Final = ("a", "red", "sun", "cat", "dog", "sks")
SIDE: Final = 16
"""Of a picture, in pixels."""
_END_OF_WORD: Final = "</w>"
_START: Final = "<|startoftext|>"
_END: Final = "<|endoftext|>"
_UNKNOWN: Final = "<unknown>"
_SCHEDULE: Final = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def save_toy_pipeline(folder: Path, size: str = "toy", *, scheduler: Mapping[str, Any] | None = None) -> Path:
    """Write a pipeline and return its folder.

    Args:
        folder: Where to.
        size: One of the toys of `SIZES`.
        scheduler: Changes of the scheduler's configuration, as `{"prediction_type": "v_prediction"}`.
    """
    sizes = SIZES[size]
    family = FAMILIES[sizes.pipeline]
    flow = family.name == "sd3"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        parts: dict[str, Any] = {
            family.denoiser: getattr(diffusers, family.denoiser_class)(**sizes.denoiser),
            "vae": diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=SIDE,
                scaling_factor=1.5305 if flow else 0.18215, shift_factor=0.0609 if flow else None,
            ),
        }  # fmt: skip
        for name, config in zip(family.text_encoders, sizes.text_encoders, strict=True):
            projects = flow or name == "text_encoder_2"
            cls = CLIPTextModelWithProjection if projects else CLIPTextModel
            parts[name] = cls(CLIPTextConfig(**config))
            parts[name.replace("text_encoder", "tokenizer")] = _tokenizer(config)
    if flow:
        sampler = diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(scheduler or {})})
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    else:
        sampler = diffusers.DDIMScheduler(**{**_SCHEDULE, **(scheduler or {})})
    if family.name == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, family.pipeline)(**parts, scheduler=sampler)
    pipeline.save_pretrained(folder)
    return folder


def open_plain(folder: Path, **options: Any) -> Any:
    """The pipeline of a folder as any program opens it, without this project."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if (folder / "transformer").is_dir() else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer(config: Mapping[str, Any]) -> CLIPTokenizer:
    """A byte-pair tokenizer that has `WORDS` and as many ids as a text encoder of `config`."""
    merges: list[tuple[str, str]] = []
    tokens: list[str] = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + _END_OF_WORD]
        tokens += symbols
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = ["".join(symbols[:2])]
            tokens.append(symbols[0])
    tokens = list(dict.fromkeys(tokens))
    start, end = int(config["bos_token_id"]), int(config["eos_token_id"])
    tokens += [f"<unused{i}>" for i in range(start - 1 - len(tokens))] + [_UNKNOWN]
    vocabulary = {token: number for number, token in enumerate(tokens)} | {_START: start, _END: end}
    return CLIPTokenizer(
        vocab=vocabulary, merges=list(dict.fromkeys(merges)), bos_token=_START, eos_token=_END, pad_token=_END,
        unk_token=_UNKNOWN, model_max_length=int(config["max_position_embeddings"]),
    )  # fmt: skip
