"""open_clip's CLIP as a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from peft_modal.anatomy import Backbone, Context, Features, FeatureSpec, FrozenMode
from peft_modal.errors import ConfigError, DataError
from peft_modal.extras import require
from peft_modal.ranges import PositiveFloat, PositiveInt
from peft_modal_clip import weights as sources
from peft_modal_clip.network import build_clip, clip_anatomy
from peft_modal_clip.tokenizer import open_clip_tokenizer

TINY: Final[dict[str, Any]] = {
    "weights": "random", "embed_dim": 16, "image_size": 16, "patch_size": 4, "vision_width": 32, "vision_layers": 2,
    "vision_heads": 2, "context_length": 8, "vocab_size": 50, "text_width": 24, "text_layers": 2, "text_heads": 2,
}  # fmt: skip
"""Arguments of a network of toy size."""


class OpenCLIPBackbone(Backbone):
    """A vision tower and a text transformer that embed into one space (Radford et al., ICML 2021, arXiv:2103.00020).

    The vision tower is a transformer or CLIP's ResNet.

    Sizes left at None are those of the model, of the weights, or else the nano's.

    Args:
        weights: `nano` (shipped), `random`, a folder with `open_clip_config.json`, `hf-hub:OWNER/NAME`, the path of a
            checkpoint, or with `model` a name of open_clip such as `laion2b_s34b_b79k`.
        model: A model that open_clip knows, such as `ViT-B-32` or `RN50`.
        frozen_mode: See `Backbone`; it concerns a ResNet's BatchNorm alone.
        embed_dim: Width of the common space.
        image_size: Side of the pictures in pixels.
        patch_size: Side of a patch in pixels; of a ResNet always 32.
        vision_width: Width of the vision tower's tokens, or of a ResNet's stem.
        vision_layers: Its blocks; of a ResNet those of each of its four stages.
        vision_heads: Its attention heads per block; of a ResNet those of the attention that pools.
        vision_mlp_ratio: Hidden width of its MLPs over `vision_width`; a ResNet has none.
        context_length: Tokens of a text.
        vocab_size: Rows of the table of token embeddings.
        text_width: Width of the text tower's tokens.
        text_layers: Its blocks.
        text_heads: Its attention heads per block.
        quick_gelu: The activation of OpenAI's weights.
        tokenizer: `nano`, `clip`, or what open_clip takes a tokenizer from (`local-dir:DIR`, `hf-hub:OWNER/NAME`); None
            for the one that belongs to the weights.
        init_seed: Of random weights.

    Raises:
        ConfigError: Sizes do not fit each other, or the model is unknown or of another kind.
        WeightsError: The sizes of the weights cannot be read or fetched.
        MissingExtraError: open_clip is not installed.
    """

    modality: ClassVar[str] = "clip"

    def __init__(
        self,
        *,
        weights: str = "nano",
        model: str | None = None,
        frozen_mode: FrozenMode = "eval",
        embed_dim: PositiveInt | None = None,
        image_size: PositiveInt | None = None,
        patch_size: PositiveInt | None = None,
        vision_width: PositiveInt | None = None,
        vision_layers: PositiveInt | list[PositiveInt] | None = None,
        vision_heads: PositiveInt | None = None,
        vision_mlp_ratio: PositiveFloat | None = None,
        context_length: PositiveInt | None = None,
        vocab_size: PositiveInt | None = None,
        text_width: PositiveInt | None = None,
        text_layers: PositiveInt | None = None,
        text_heads: PositiveInt | None = None,
        quick_gelu: bool | None = None,
        tokenizer: str | None = None,
        init_seed: int = 0,
    ) -> None:
        described = sources.describe(weights, model)
        self.sizes = described.sizes.with_given(
            {
                "embed_dim": embed_dim, "image_size": image_size, "patch_size": patch_size,
                "vision_width": vision_width, "vision_layers": vision_layers, "vision_heads": vision_heads,
                "vision_mlp_ratio": vision_mlp_ratio, "context_length": context_length, "vocab_size": vocab_size,
                "text_width": text_width, "text_layers": text_layers, "text_heads": text_heads,
                "quick_gelu": quick_gelu,
            }
        )  # fmt: skip
        self.weights = weights
        self.model = model
        described = replace(described, sizes=self.sizes)
        self.tokenizer = sources.tokenizer_of(weights, described) if tokenizer is None else tokenizer
        network = build_clip(self.sizes, init_seed=init_seed)
        super().__init__(network, clip_anatomy(network, self.sizes), frozen_mode=frozen_mode)
        self._encode: Any = None

    @classmethod
    def tiny(cls) -> OpenCLIPBackbone:
        """The same network at toy size with random weights."""
        return cls(**TINY)

    def load_weights(self) -> None:
        """Fill the network from what `weights` names.

        Raises:
            WeightsError: It is missing, unreadable, or of another architecture.
        """
        sources.load(self.network, self.weights, self.model)

    def architecture(self) -> dict[str, Any]:
        """The sizes and the tokenizer, which the constructor otherwise takes from `weights`."""
        return {"model": None, **asdict(self.sizes), "tokenizer": self.tokenizer}

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (n, context_length) int64 of texts, on the network's device; longer texts are cut.

        Raises:
            ConfigError: The tokenizer is unknown, or has more tokens than the network.
        """
        if self._encode is None:
            self._encode = self._make_tokenizer()
        ids: Tensor = self._encode(list(texts), context_length=self.sizes.context_length)
        if int(ids.max()) >= self.sizes.vocab_size:
            raise ConfigError(
                f"backbone.tokenizer: '{self.tokenizer}' has more tokens than the network's {self.sizes.vocab_size}; "
                "choose the one that the weights were trained with"
            )
        return ids.to(self.device)

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts have more tokens than the network reads."""
        ids = self.tokenize(texts)
        length = self.sizes.context_length
        longer: Tensor = self._encode(list(texts), context_length=length + 1)
        # The last token of a text that is cut is its end, where the whole text goes on.
        return [bool(cut) for cut in (longer[:, length - 1].to(ids.device) != ids[:, -1]).tolist()]

    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """Embeddings side by side, (B, 1, 2 * embed_dim): of the picture, then of the text; of one if one is missing.

        Args:
            batch: `image` (B, 3, S, S), and `text` (B, context_length) int64 or `caption`, B texts.
            context: Not used.

        Raises:
            DataError: The batch has neither.
        """
        del context
        parts = []
        if "image" in batch:
            parts.append(self.network.encode_image(batch["image"]))  # type: ignore[operator]
        if "text" in batch or "caption" in batch:
            text = batch["text"] if "text" in batch else self.tokenize(batch["caption"])
            parts.append(self.network.encode_text(text))  # type: ignore[operator]
        if not parts:
            raise DataError(f"a batch for CLIP needs image, text or caption, this one has {', '.join(batch)}")
        return Features(torch.cat(parts, dim=-1)[:, None], None)

    @property
    def similarity_scale(self) -> Tensor:
        """Factor of cosine similarities (), the inverse of the temperature; trained where a method trains it."""
        return self.network.logit_scale.exp()  # type: ignore[operator]

    @property
    def feature_width(self) -> int:
        """Width of both embeddings together."""
        return 2 * self.sizes.embed_dim

    def feature_spec(self) -> FeatureSpec:
        """Without a layout: what is returned are pooled embeddings, not the tokens of a tower."""
        return replace(super().feature_spec(), layout=None)

    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Random pictures and random tokens."""
        generator = torch.Generator().manual_seed(1)
        side, length = self.sizes.image_size, self.sizes.context_length
        image = torch.randn(batch_size, 3, side, side, generator=generator)
        text = torch.randint(1, self.sizes.vocab_size, (batch_size, length), generator=generator)
        return {"image": image.to(self.device), "text": text.to(self.device)}

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Compute blocks again during backward instead of keeping their activations."""
        self.network.set_grad_checkpointing(enabled)  # type: ignore[operator]

    def _make_tokenizer(self) -> Any:  # noqa: ANN401 - open_clip has several classes without a common base
        if self.tokenizer == "nano":
            return open_clip_tokenizer()
        open_clip = require("open_clip", extra="clip")
        if self.tokenizer == "clip":
            return open_clip.SimpleTokenizer()
        if not self.tokenizer.startswith((sources.HUB, sources.FOLDER)):
            raise ConfigError(
                f"backbone.tokenizer: '{self.tokenizer}' is neither 'nano' nor 'clip' nor begins with "
                f"'{sources.FOLDER}' or '{sources.HUB}'"
            )
        try:
            return open_clip.get_tokenizer(self.tokenizer)
        except Exception as error:  # whatever transformers and the hub's client let out
            raise ConfigError(f"backbone.tokenizer: '{self.tokenizer}' cannot be opened: {error}") from error
