"""The nano tokenizer: CLIP's byte-pair encoding with merges learned on the captions of generated pictures.

Token ids are those of CLIP's scheme: 256 byte symbols, the same at the end of a word, one per merge, then the start and
the end of text. Text towers pool at the largest id of a sequence, so the end of text has to be the last.

The merges are shipped, in the file format of open_clip: what was trained with them must find them unchanged, whatever a
later version of `tokenizers` would learn. `learn_merges` is how they were made.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peft_modal.data.drawn import CONCEPT_WORDS, caption_scenes, plan_scenes
from peft_modal.data.seeding import seeded
from peft_modal.extras import require
from peft_modal.files import write_bytes

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

Merge = tuple[str, str]

CONTEXT_LENGTH: Final = 20
"""Tokens of a text, its start and end included; longer ones are cut."""
SPARE_WORDS: Final = (*CONCEPT_WORDS, "ohwx", "drawing", "face", "neon", "object", "painting", "thing", "toy")
"""Words that no caption has, each one token all the same: names and descriptions of what is taught later."""
START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
_END_OF_WORD = "</w>"
_MERGES = "nano_merges.txt.gz"
_NUM_CAPTIONS = 4000


def learn_merges() -> tuple[Merge, ...]:
    """Merges that make every word of captions, and every spare word, one token; the same in every call.

    Raises:
        MissingExtraError: `tokenizers` is not installed.
    """
    tokenizers = require("tokenizers", extra="diffusion")
    generator = seeded("tokenizer")
    texts = [*caption_scenes(plan_scenes(_NUM_CAPTIONS, generator, pairs="all"), generator), " ".join(SPARE_WORDS)]
    learned = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix=_END_OF_WORD))
    learned.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+"), behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=10_000,  # never reached: merging ends where every word is one token
        min_frequency=1,
        end_of_word_suffix=_END_OF_WORD,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    return _pairs(_model_of(learned)["merges"])


def write_merges(path: Path, merges: Iterable[Merge]) -> None:
    """Write merges in the format of open_clip: compressed text, a header, then one merge a line."""
    lines = ["peft_modal: merges of the nano tokenizer", *(" ".join(merge) for merge in merges)]
    write_bytes(path, gzip.compress("\n".join(lines).encode(), mtime=0))


def nano_merges() -> tuple[Merge, ...]:
    """The shipped merges, in the order in which they apply."""
    content = (resources.files("peft_modal_clip") / _MERGES).read_bytes()
    return _pairs(line.split(" ") for line in gzip.decompress(content).decode().split("\n")[1:])


def clip_vocabulary(merges: Sequence[Merge]) -> dict[str, int]:
    """Token to id, in CLIP's order.

    Raises:
        MissingExtraError: `transformers` is not installed.
    """
    conversion = require("transformers.convert_slow_tokenizer", extra="diffusion")
    symbols = list(conversion.bytes_to_unicode().values())
    tokens = [*symbols, *(symbol + _END_OF_WORD for symbol in symbols), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


def hf_tokenizer(merges: Sequence[Merge] | None = None) -> CLIPTokenizer:
    """The tokenizer as Stable Diffusion pipelines want it: it pads with the end of text.

    Args:
        merges: Other merges than the shipped ones.

    Raises:
        MissingExtraError: `transformers` is not installed.
    """
    transformers = require("transformers", extra="diffusion")
    merges = nano_merges() if merges is None else merges
    tokenizer: CLIPTokenizer = transformers.CLIPTokenizer(
        vocab=clip_vocabulary(merges),
        merges=list(merges),
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=CONTEXT_LENGTH,
    )
    return tokenizer


def open_clip_tokenizer() -> SimpleTokenizer:
    """The same ids from open_clip's tokenizer, which pads with 0; called with texts, it gives (n, 20) int64.

    Raises:
        MissingExtraError: `open_clip` is not installed.
    """
    tokenizer = require("open_clip.tokenizer", extra="clip")
    with resources.as_file(resources.files("peft_modal_clip") / _MERGES) as path:
        made: SimpleTokenizer = tokenizer.SimpleTokenizer(bpe_path=str(path), context_length=CONTEXT_LENGTH)
    return made


def _model_of(tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401 - tokenizers has no types
    import json

    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _pairs(merges: Iterable[Sequence[str]]) -> tuple[Merge, ...]:
    return tuple((first, second) for first, second in merges)
