"""The Audio Spectrogram Transformer: its front end, its positions, and a tiny network with AST's own head."""

from __future__ import annotations

import torch

from golden_runners.golden_case import GoldenCase
from peft_modal.anatomy import Selector
from peft_modal.methods.full import Full
from peft_modal_audio.backbone import AST
from peft_modal_audio.features import (
    FILTERS,
    FRAME_LENGTH,
    FRAME_SHIFT,
    SAMPLE_RATE,
    STATISTICS,
    FrontEnd,
    log_mel,
    resampled,
)
from peft_modal_audio.positions import adapted
from peft_modal_audio.weights import with_one_channel
from peft_modal_heads.linear import LinearHead


def features(case: GoldenCase) -> None:
    """Filter banks, both ways to a spectrogram, and resampling."""
    case.require("sample_rate", SAMPLE_RATE)
    fbank = case.setting("fbank")
    assert (fbank["frame_length_ms"], fbank["frame_shift_ms"]) == (
        1000 * FRAME_LENGTH // SAMPLE_RATE, 1000 * FRAME_SHIFT // SAMPLE_RATE
    )  # fmt: skip
    waveform, mels = case.take("in.waveform"), fbank["num_mel_bins"]
    case.compare("out.fbank_raw", log_mel(waveform, mels))
    for name, frames in (("input_values", "T"), ("input_values_short", "T_short")):
        front = FrontEnd(frames=case.setting(frames), mels=mels, statistics="audioset")
        case.compare(f"out.{name}", front.spectrogram(waveform))
    statistics = (case.setting("dataset_mean"), case.setting("dataset_std"))
    own = next(name for name, values in STATISTICS.items() if values == statistics)
    # The authors subtract the waveform's mean, which the frames' own subtraction makes all but invisible.
    front = FrontEnd(frames=case.setting("T"), mels=mels, statistics=own)  # type: ignore[arg-type]
    case.compare("out.input_values_authors", front.spectrogram(waveform - waveform.mean()))
    assert case.setting("kaiser_best") == FILTERS["kaiser_best"]
    other = case.take("in.waveform_44100")
    case.compare("out.resampled_kaiser_best", resampled(other, 44_100))
    case.compare("out.resampled_default", resampled(other, 44_100, "hann"))


def positions(case: GoldenCase) -> None:
    """Cut and interpolated grids, and the start from a network for pictures."""
    audioset, imagenet = tuple(case.setting("audioset_grid")), tuple(case.setting("imagenet_grid"))
    picture = case.setting("imagenet_case")
    wanted = [
        *((f"out.pos_embed_{of['index']}", "in.pos_embed", audioset, of) for of in case.setting("cases")),
        ("out.imagenet_pos_embed", "in.imagenet_pos_embed", imagenet, picture),
    ]
    for result, given, old, of in wanted:
        sizes = {"stride_frequency": case.setting("fstride"), "stride_time": case.setting("tstride")}
        sizes |= {"patch": case.setting("patch"), "mels": of["mel"], "frames": of["frames"], "width": 4, "depth": 1}
        grid = AST(model="custom", weights="random", sizes={**sizes, "heads": 1}).sizes.grid()
        assert grid == tuple(of["grid"])
        case.compare(result, adapted(case.take(given), old, grid))
    case.compare("out.imagenet_patch_weight", with_one_channel(case.take("in.imagenet_patch_weight")))


def network(case: GoldenCase) -> None:
    """Tokens, logits and gradients of a tiny network with its own head."""
    case.require("act", "gelu (erf)")
    backbone = AST(
        model="custom",
        weights="random",
        sizes={
            "width": case.setting("dim"), "depth": case.setting("depth"), "heads": case.setting("heads"),
            "mlp_width": case.setting("mlp_ratio") * case.setting("dim"), "patch": case.setting("patch"),
            "stride_frequency": case.setting("fstride"), "stride_time": case.setting("tstride"),
            "mels": case.setting("mel"), "frames": case.setting("frames"), "norm_eps": case.setting("block_norm_eps"),
        },
    )  # fmt: skip
    case.fill(backbone.network, lambda name: f"param.{name}")
    head = LinearHead(backbone.feature_spec(), case.setting("classes"), normalise="layer")
    case.fill(head, lambda name: f"param.{name.replace('norm.', 'mlp_head.0.').replace('linear.', 'mlp_head.1.')}")
    case.require("head_norm_eps", head.norm.eps)
    adapter = Full().attach(backbone)
    adapter.tap(backbone.anatomy.select_ports(Selector.parse(["embed.out"]), needs="read")[0], "embeddings")
    spectrogram = case.take("in.spectrogram").requires_grad_()
    backbone.eval()
    found = backbone({"spectrogram": spectrogram})
    logits = head.eval()(found)
    case.compare("out.embeddings", found.extras["embeddings"])
    case.compare("out.final_tokens", found.tokens)
    case.compare("out.logits", logits)
    torch.sum(logits * case.take("in.loss_weight")).backward()
    case.compare_gradient("spectrogram", spectrogram.grad)
    for name, parameter in adapter.named_trained().items():
        case.compare_gradient(name.removeprefix("backbone."), parameter.grad)
    for name, parameter in head.named_parameters():
        case.compare_gradient(name.replace("norm.", "mlp_head.0.").replace("linear.", "mlp_head.1."), parameter.grad)
