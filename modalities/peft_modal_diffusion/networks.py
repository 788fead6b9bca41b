"""Networks that judge generated pictures: CLIP's towers in the form that torchmetrics' CLIPScore, FID and KID take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.errors import PeftModalError, WeightsError
from peft_modal.extras import require

NANO: Final = "nano"
INCEPTION: Final = "inception"
"""The network that published FIDs are measured with; torch-fidelity fetches its weights."""
_OPEN_CLIP_FILE = "open_clip_config.json"
_MEANS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Towers(nn.Module):
    """A CLIP as torchmetrics' `CLIPScore` asks it: `get_image_features`, `get_text_features`, and a processor.

    Args:
        model: open_clip's, or transformers' `CLIPModel`.
        tokenizer: From texts to ids (n, L).
        side: Sides of the pictures that it reads, in pixels.
        norms: Mean and deviation of the channels.
        context_length: Tokens of a text.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, side: int, norms: tuple[Sequence[float], ...], context_length: int  # noqa: ANN401 — of either library
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.side = side
        self.norms = tuple(torch.tensor(values)[:, None, None] for values in norms)
        # Read by torchmetrics.
        self.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=context_length))

    def forward(self, pictures: Tensor) -> Tensor:
        """Embeddings of unit length (n, D) of pictures (n, 3, H, W) uint8: a feature network for FID and KID."""
        features = self.get_image_features(self._pixels(list(pictures)))
        return functional.normalize(features, dim=-1)

    @property
    def num_features(self) -> int:
        """Width of the embeddings."""
        return int(self.get_image_features(torch.zeros(1, 3, self.side, self.side)).shape[1])

    @torch.no_grad()
    def get_image_features(self, pixels: Tensor) -> Tensor:
        """Embeddings (n, D)."""
        model: Any = self.model
        if hasattr(model, "encode_image"):
            return model.encode_image(pixels)
        return _tensor_of(model.get_image_features(pixels))

    @torch.no_grad()
    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (n, D)."""
        model: Any = self.model
        if hasattr(model, "encode_text"):
            return model.encode_text(ids)
        return _tensor_of(model.get_text_features(ids, mask))

    def processor(
        self, *, text: list[str] | None = None, images: list[Tensor] | None = None, **_options: object
    ) -> dict[str, Tensor]:  # fmt: skip
        """Ids of texts with their mask, or pixels of pictures (3, H, W) uint8."""
        if images is not None:
            return {"pixel_values": self._pixels(images)}
        ids: Tensor = self.tokenizer(text)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _pixels(self, pictures: list[Tensor]) -> Tensor:
        """Resized and normalised as the model was trained."""
        mean, std = self.norms
        size = [self.side, self.side]
        resized = [
            picture[None].float() / 255
            if list(picture.shape[1:]) == size
            else functional.interpolate(picture[None].float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
            for picture in pictures
        ]
        return (torch.cat(resized) - mean) / std


def open_towers(name: str) -> Towers:
    """A CLIP.

    Args:
        name: `nano`; a folder or hub name of open_clip (`hf-hub:OWNER/NAME`); or a folder or hub name of transformers'
            CLIP (`openai/clip-vit-large-patch14`).

    Raises:
        WeightsError: There is none, or it cannot be read.
        MissingExtraError: The library that reads it is not installed.
    """
    folder = Path(name).expanduser()
    if name == NANO or name.startswith("hf-hub:") or (folder / _OPEN_CLIP_FILE).is_file():
        return _of_open_clip(name)
    return _of_transformers(name)


def _of_open_clip(name: str) -> Towers:
    require("open_clip", extra="clip")
    from peft_modal_clip.backbone import OpenCLIPBackbone

    backbone = OpenCLIPBackbone(weights=name)
    backbone.load_weights()
    norms = _HALVES if name == NANO else _MEANS
    sizes = backbone.sizes
    return Towers(
        backbone.network, backbone.tokenize, side=sizes.image_size, norms=norms, context_length=sizes.context_length
    )


def _of_transformers(name: str) -> Towers:
    transformers = require("transformers", extra="diffusion")
    try:
        model = transformers.CLIPModel.from_pretrained(name)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
    except PeftModalError:
        raise
    except Exception as error:  # transformers raises whatever its parts do
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"the CLIP '{name}' cannot be opened ({reason}); name a folder, or use 'nano'") from error
    length = int(model.config.text_config.max_position_embeddings)

    def tokenize(texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        ids: Tensor = tokenizer(texts, **options).input_ids
        return ids

    side = int(model.config.vision_config.image_size)
    return Towers(model, tokenize, side=side, norms=_MEANS, context_length=length)


def _tensor_of(found: Any) -> Tensor:  # noqa: ANN401 — a tensor, or from transformers 5 on an output that holds it
    tensor: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return tensor
