"""The audio modality as a plugin; imports nothing heavy."""

from __future__ import annotations

from typing import Final

from peft_modal.registry import Entry, Plugin

_READING: Final = ("soundfile", "torchaudio")

PLUGIN: Final = Plugin(
    name="audio",
    extra="audio",
    requires=("timm", "torchaudio", "soundfile"),
    renderer="peft_modal_audio.render:render",
    backbones={
        "ast": Entry(
            "peft_modal_audio.backbone:AST",
            summary="Transformer over overlapping patches of a log-mel spectrogram.",
            paper="Gong et al., AST: Audio Spectrogram Transformer, Interspeech 2021, arXiv:2104.01778",
        ),
    },
    data={
        "sounds": Entry(
            "peft_modal_audio.sounds:Sounds",
            summary="Generated instruments, sweeps, percussion, noises and vowels, made in seconds.",
            requires=("torchaudio",),
        ),
        "folder": Entry(
            "peft_modal_audio.data:Folder", summary="Your own recordings, one folder a class.", requires=_READING
        ),
        "tagged": Entry(
            "peft_modal_audio.data:Tagged", summary="Your own recordings with several labels each.", requires=_READING
        ),
        "esc50": Entry(
            "peft_modal_audio.folds:ESC50",
            summary="ESC-50: 50 classes of environmental sounds, five folds.",
            paper="Piczak, ESC: Dataset for Environmental Sound Classification, ACM Multimedia 2015",
            requires=_READING,
        ),
        "urbansound8k": Entry(
            "peft_modal_audio.folds:UrbanSound8K",
            summary="UrbanSound8K: ten classes of city sounds, ten folds.",
            paper="Salamon et al., A Dataset and Taxonomy for Urban Sound Research, ACM Multimedia 2014",
            requires=_READING,
        ),
        "speech_commands": Entry(
            "peft_modal_audio.speech:SpeechCommands",
            summary="Speech Commands v2: 35 spoken words.",
            paper="Warden, Speech Commands, 2018, arXiv:1804.03209",
            requires=_READING,
        ),
        "fluent_speech_commands": Entry(
            "peft_modal_audio.speech:FluentSpeechCommands",
            summary="Fluent Speech Commands: 31 intents of spoken commands.",
            paper="Lugosch et al., Speech Model Pre-training for End-to-End SLU, Interspeech 2019, arXiv:1904.03670",
            requires=_READING,
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
