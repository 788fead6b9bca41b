"""What an adapted denoiser computes, to compare with: nothing is called written before another program agrees."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from peft_modal.errors import ConfigError, FileFormatError
from peft_modal.files import replacing
from peft_modal_diffusion.backbone import StableDiffusion, denoise
from peft_modal_diffusion.layout import in_one_sentence, open_pipeline, quiet

_OF_EFFECT: Final = 0.01
"""Largest deviation as a share of the adapter's own effect: a lost scale, or one lost module, shows."""
_OF_OUTPUT: Final = 2e-5
"""And as a share of the output: what another order of float32 sums makes."""


@dataclass(frozen=True)
class Reference:
    """One forward pass of an adapted backbone."""

    backbone: StableDiffusion
    batch: dict[str, Any]
    adapted: Tensor
    """Output (1, C, H, W) with what is attached."""
    effect: float
    """Largest difference that what is attached makes."""

    @classmethod
    def of(cls, backbone: object) -> Reference:
        """Run a backbone with and without what is attached.

        Raises:
            ConfigError: It is no denoiser of a pipeline.
        """
        if not isinstance(backbone, StableDiffusion):
            raise ConfigError(
                f"only adapters of 'stable_diffusion' go into its files, not of {type(backbone).__name__}"
            )
        if backbone.weights == "random":
            raise ConfigError("backbone.weights: an adapter of random weights fits no pipeline of anyone else")
        batch = backbone.example_batch(1)
        adapters = [adapter for adapter in backbone.adapters.values() if adapter.is_enabled]
        with torch.no_grad():
            adapted: Tensor = backbone(batch).tokens
            for adapter in adapters:
                adapter.enable(on=False)
            plain: Tensor = backbone(batch).tokens
            for adapter in adapters:
                adapter.enable(on=True)
        return cls(backbone, batch, adapted, float((adapted - plain).abs().max()))

    def fresh_pipeline(self) -> Any:  # noqa: ANN401 — a class of diffusers
        """A plain pipeline of the same source with the tuned components alone."""
        family = self.backbone.layout.family
        others = {"vae", *family.text_encoders} - {name for name, _ in self.backbone.network.named_children()}
        if family.name == "sd":
            others |= {"safety_checker", "feature_extractor"}
        if family.t5:
            others |= {family.t5, family.t5.replace("text_encoder", "tokenizer")}
        left_out: dict[str, Any] = dict.fromkeys(others)
        return open_pipeline(self.backbone.layout, **left_out)

    def write(self, file: Path, save: Callable[[Path], None], load: Callable[[Any, Path], object]) -> float:
        """Write a file beside its place, let a fresh pipeline load it and compute, and put it there when it agrees.

        Args:
            file: Its place.
            save: Writes it under another name in another folder.
            load: Loads it into a plain pipeline.

        Returns:
            The largest deviation of an output.

        Raises:
            FileFormatError: It cannot be loaded, or the pipeline computes something else.
        """
        with replacing(file) as temporary, tempfile.TemporaryDirectory(dir=file.parent) as folder, quiet():
            saved = Path(folder) / file.name
            save(saved)
            pipeline = self.fresh_pipeline()
            with in_one_sentence(f"a fresh pipeline cannot load '{file}', so it was not written", FileFormatError):
                load(pipeline, saved)
            deviation = self._deviation(pipeline, file)
            saved.replace(temporary)
        return deviation

    def _deviation(self, pipeline: Any, file: Path) -> float:  # noqa: ANN401
        parts = {name: getattr(pipeline, name).eval() for name, _ in self.backbone.network.named_children()}
        with torch.no_grad():
            found = denoise(self.backbone.layout, parts, self.batch)
        deviation = float((found - self.adapted).abs().max())
        if not deviation <= _OF_EFFECT * self.effect + _OF_OUTPUT * float(self.adapted.abs().max()):
            raise FileFormatError(
                f"a fresh pipeline with '{file}' does not compute what the adapter computes, so it was not written: "
                f"outputs differ by {deviation:.2g}, where the adapter changes them by {self.effect:.2g}"
            )
        return deviation
