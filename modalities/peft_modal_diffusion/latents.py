"""Caches of what the frozen image and text encoders make of the training data, so that a run can do without them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from peft_modal.data.epochs import Batch
from peft_modal.data.progress import progress
from peft_modal.data.sample_cache import SampleCache
from peft_modal.data.splits import batches_within
from peft_modal.errors import ConfigError, TrainingError
from peft_modal_diffusion.samples import Choice, ImageSet

_VERSION: Final = 1
"""Of the pixels that a picture is cut to; to be raised with every change that alters them."""

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From pixels (B, 3, H, W) in [-1, 1] to mean and standard deviation of the posterior, (B, C, h, w) each."""
EncodeText = Callable[[list[str]], dict[str, Tensor]]
"""From captions to what the denoiser reads of them; the first axis of each tensor is the captions'."""


def cache_latents(
    sets: Sequence[ImageSet],
    encode: Encode,
    *,
    encoder: str,
    dtype: str,
    batch_size: int,
    num_workers: int = 0,
) -> SampleCache:
    """Encode every picture, and its mirror image where half of them are flipped, and let the sets read the result.

    What an earlier run left is used; what is missing or damaged is made again. Mean and standard deviation are kept,
    not a draw: each epoch draws anew (the pitfalls of diffusers' script, whose cache is in the order of the epoch, are
    avoided by naming each entry after its picture).

    Args:
        sets: The pictures; their samples hold latents from now on.
        encode: The image encoder, without gradients; it brings pixels to its own device and type.
        encoder: What identifies its weights, a fingerprint.
        dtype: What it computes in; also part of the cache's key.
        batch_size: The most pictures encoded at once.
        num_workers: Processes that read them.

    Raises:
        ConfigError: Crops are random, so that there is no end to what would have to be cached.
        TrainingError: The encoder returns numbers that are not finite.
        DataError: A picture cannot be read.
        WriteError: The cache cannot be written; what is already in it is whole.
    """
    if any(images.framing.crop == "random" for images in sets):
        raise ConfigError("data.crop is 'random', and cached latents need fixed crops: set data.crop to 'centre'.")
    cache = SampleCache("latents", {"version": _VERSION, "encoder": encoder, "dtype": dtype})
    missing = _Missing(sets, cache)
    batches = batches_within(missing.groups, range(len(missing)), batch_size)
    loader: DataLoader[Batch] = DataLoader(missing, batch_sampler=batches, num_workers=num_workers)
    with progress("latents", len(missing)) as advance:
        for batch in loader if batches else ():
            mean, std = (tensor.detach().cpu() for tensor in encode(batch["pixels"]))
            for i, key in enumerate(batch["key"]):
                if not (mean[i].isfinite().all() and std[i].isfinite().all()):
                    raise TrainingError(
                        f"the latents of '{batch['path'][i]}' are not finite; let the image encoder compute in float32."
                    )
                cache.put(key, {"mean": mean[i], "std": std[i]})
            advance(len(batch["key"]))
    for images in sets:
        images.latents = cache
    return cache


class _Missing(Dataset[Batch]):
    """Pictures, and mirror images, that are not in a cache; each once."""

    def __init__(self, sets: Iterable[ImageSet], cache: SampleCache) -> None:
        found = {images.key(i, flip=flip): (images, i, flip) for images in sets for i, flip in images.variants()}
        self.samples = [variant for key, variant in found.items() if cache.get(key) is None]
        self.groups = [images.pictures[i].target for images, i, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        images, i, flip = self.samples[index]
        pixels = images.pixels(i, Choice(flip=flip))
        return {"pixels": pixels, "key": images.key(i, flip=flip), "path": str(images.pictures[i].path)}


class TextCache:
    """What frozen text encoders make of captions, on disk.

    Args:
        encode: The text encoders, without gradients.
        encoder: What identifies their weights and tokenizers.
        dtype: What they compute in; also part of the cache's key.
    """

    def __init__(self, encode: EncodeText, *, encoder: str, dtype: str) -> None:
        self.encode = encode
        self.cache = SampleCache("texts", {"version": _VERSION, "encoder": encoder, "dtype": dtype})

    def fill(self, captions: Iterable[str], *, batch_size: int = 16) -> None:
        """Encode the captions that are not there yet.

        Args:
            captions: All that will be asked for, "" too where captions are dropped.
            batch_size: The most captions encoded at once.

        Raises:
            WriteError: The cache cannot be written; what is already in it is whole.
        """
        missing = [text for text in dict.fromkeys(captions) if self.cache.get(_key(text)) is None]
        with progress("captions", len(missing)) as advance:
            for start in range(0, len(missing), batch_size):
                texts = missing[start : start + batch_size]
                self._keep(texts)
                advance(len(texts))

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of captions, (B, ...) each; those that are not in the cache are encoded now."""
        stored = [self.cache.get(_key(text)) or self._keep([text])[0] for text in captions]
        return {name: torch.stack([tensors[name] for tensors in stored]) for name in stored[0]}

    def _keep(self, texts: list[str]) -> list[dict[str, Tensor]]:
        made = {name: tensor.detach().cpu() for name, tensor in self.encode(texts).items()}
        samples = [{name: tensor[i] for name, tensor in made.items()} for i in range(len(texts))]
        for text, tensors in zip(texts, samples, strict=True):
            self.cache.put(_key(text), tensors)
        return samples


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
