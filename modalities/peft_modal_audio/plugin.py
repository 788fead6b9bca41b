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
    methods={
        "conformer": Entry(
            "peft_modal_audio.conformer:Conformer",
            summary="A bottleneck with a convolution over neighbouring tokens.",
            paper="Cappellazzo et al., PETL of Audio Spectrogram Transformers, MLSP 2024, arXiv:2312.03694",
        ),
        "mixture_of_adapters": Entry(
            "peft_modal_audio.mixture:MixtureOfAdapters",
            summary="Several bottlenecks, mixed softly by slots or densely by a router.",
            paper="Cappellazzo et al., Soft Mixture of Adapters, Interspeech 2024, arXiv:2402.00828",
        ),
    },
)
