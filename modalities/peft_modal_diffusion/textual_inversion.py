"""Textual inversion: new meanings for a few words (Gal et al., 2022, arXiv:2208.01618)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from peft_modal.anatomy import Selector, WeightSite
from peft_modal.api import Exported, Model
from peft_modal.attach import Adapter, merge_
from peft_modal.errors import AttachError, ConfigError, FileFormatError
from peft_modal.files import replacing
from peft_modal.methods.base import Method
from peft_modal_diffusion.backbone import StableDiffusion

_SITES = "embed.token"
_SUFFIX = ".safetensors"
_CLIP_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""What web interfaces call the encoders of pipelines that have two."""


class TextualInversion(Method):
    """Train the embeddings of a few rare words, and nothing else (Gal et al., 2022, arXiv:2208.01618).

    The words have to be in the vocabulary already (`sks` and `zwx` are in CLIP's): so tokenizers stay as they are,
    merged pipelines need no new tokens, and the rows of all other words keep every bit. Captions and prompts use them
    like any other word; several words give a subject several vectors. Decay is off.

    The text encoder has to be in the graph: `backbone.tune: denoiser_and_text`.

    Args:
        words: What is learnt; one token each, in every text encoder.
        initializer: A word whose embedding all of them start from (`dog`); null starts from their own.

    Raises:
        ConfigError: There is no word, or one is given twice.
    """

    def __init__(self, *, words: list[str] = ["sks"], initializer: str | None = None) -> None:  # noqa: B006 — never changed
        if not words or len(set(words)) < len(words):
            raise ConfigError(f"method.words: {words} has to hold one word or several different ones")
        self.words = tuple(words)
        self.initializer = initializer

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]
        """Unless the words start from another one's embedding."""
        return self.initializer is None

    def build(self, adapter: Adapter) -> None:
        """The rows of the words in every text encoder's table.

        Raises:
            AttachError: The backbone has no text encoder in its graph.
            ConfigError: A word is not one token.
        """
        backbone = adapter.backbone
        if not isinstance(backbone, StableDiffusion) or backbone.tune == "denoiser":
            raise AttachError(
                "textual inversion trains a pipeline's text encoder, which is not part of this network; set "
                "backbone.tune to denoiser_and_text"
            )
        for site in backbone.anatomy.select(Selector.parse(_SITES), needs=("weight", "leaf")):
            rows, width = torch.tensor(self.rows(backbone, site, self.words)), site.shape[1]
            entries = adapter.sparse(site, (rows[:, None] * width + torch.arange(width)).flatten(), decay=False)
            if self.initializer is not None:
                (row,) = self.rows(backbone, site, (self.initializer,))
                with torch.no_grad():
                    start = backbone.tensor(site.path)[row].to(entries.values)
                    entries.values.copy_(start.repeat(len(self.words)))

    def rows(self, backbone: StableDiffusion, site: WeightSite, words: tuple[str, ...]) -> list[int]:
        """Rows of words in a table; where no tokenizer was loaded, as for measuring, the last ones before the end.

        Raises:
            ConfigError: A word is not one token.
        """
        name = encoder_of(site).replace("text_encoder", "tokenizer")
        if name not in backbone.surroundings.parts:
            return [site.shape[0] - 2 - place for place in range(len(words))]
        tokenizer = backbone.surroundings[name]
        found = []
        for word in words:
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if len(ids) != 1 or ids[0] in tokenizer.all_special_ids:
                key = "words" if word in self.words else "initializer"
                raise ConfigError(
                    f"method.{key}: '{word}' is {len(ids)} tokens of the {name}, not one known word: "
                    f"{tokenizer.convert_ids_to_tokens(ids)}; choose another, such as 'sks'"
                )
            found.append(int(ids[0]))
        return found


def encoder_of(site: WeightSite) -> str:
    """The component of the pipeline that a site of a text encoder lies in."""
    return site.path.partition(".")[0]


def export_embeddings(model: Model, out: Path) -> Exported:
    """`export --format embeddings`: `learned_embeds.safetensors` as `load_textual_inversion` of diffusers opens it.

    Each word's vector goes under `<word>`, the placeholder to write in prompts there. Of pipelines with two text
    encoders it holds `clip_l` and `clip_g`, as web interfaces read them, (words, D) each.

    Raises:
        FileFormatError: The adapter is no textual inversion.
        WriteError: The file cannot be written.
    """
    node, backbone = model.composed.nodes["method"], model.backbone
    method = node.build()
    if not isinstance(method, TextualInversion) or not isinstance(backbone, StableDiffusion):
        raise FileFormatError(
            f"the adapter is no textual inversion but '{node.name}', without embeddings of words; use another --format"
        )
    merge_(backbone)
    sites = backbone.anatomy.select(Selector.parse(_SITES), needs=("weight",))
    found = {
        encoder_of(site): backbone.tensor(site.path).detach()[method.rows(backbone, site, method.words)].float()
        for site in sites
    }
    if len(found) == 1:
        (vectors,) = found.values()
        tensors = {f"<{word}>": vectors[place : place + 1] for place, word in enumerate(method.words)}
        note = f"pipeline.load_textual_inversion(FILE), then write {', '.join(tensors)} in prompts"
    else:
        tensors = {_CLIP_NAMES[name]: vectors for name, vectors in found.items()}
        note = f"one row for each of {', '.join(method.words)}, by text encoder"
    file = out if out.suffix == _SUFFIX else out / "learned_embeds.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    return Exported((file,), (note,))
