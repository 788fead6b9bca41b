"""The audio modality as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

PLUGIN: Final = Plugin(
    name="audio",
    extra="audio",
    requires=("timm", "torchaudio", "soundfile"),
    backbones={
        "ast": Entry(
            "peft_modal_audio.backbone:AST",
            summary="Transformer over overlapping patches of a log-mel spectrogram.",
            paper="Gong et al., AST: Audio Spectrogram Transformer, Interspeech 2021, arXiv:2104.01778",
        ),
    },
)
