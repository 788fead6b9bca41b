"""What becomes of one weight: quantised matrices and cosine spectra, without a network."""

from __future__ import annotations

import torch
from torch.nn import functional

from golden_runners.golden_case import GoldenCase
from peft_modal.methods.loca import Spectrum
from peft_modal.methods.quantised import EPSILON, QuantisedMatrix, levels_of, pack


def quantiser(case: GoldenCase) -> None:
    """Levels, codes, bytes, and gradients of the latent weight for several numbers of bits."""
    case.require("eps", EPSILON)
    rows, columns = case.setting("out_features"), case.setting("in_features")
    bits = case.setting("bits")
    for count in bits if isinstance(bits, list) else [bits]:
        name = f"b{count}"
        matrix = QuantisedMatrix(rows, columns, count)
        with torch.no_grad():
            matrix.weight.copy_(case.take(f"param.{name}.weight"))
        x = case.take(f"in.{name}.x").requires_grad_()
        effective = matrix()
        y = functional.linear(x, effective)
        codes, mean, std = matrix.codes()
        results = {
            "levels": levels_of(count)[0].float(), "weight_q": effective, "codes": codes, "y": y, "mean": mean,
            "std": std, "packed": pack(codes, count),
        }  # fmt: skip
        for what, ours in results.items():
            case.compare(f"out.{name}.{what}", ours)
        y.backward(case.take(f"in.{name}.cotangent"))
        case.compare_gradient(f"{name}.weight", matrix.weight.grad)
        case.compare_gradient(f"{name}.x", x.grad)


def cosine_spectrum(case: GoldenCase) -> None:
    """An update made of cosines, and the gradients of coefficients and places."""
    shape = case.setting("out_features"), case.setting("in_features")
    known = {"dense": "dense", "sparse": "sparse", "default": "dense"}
    transform = case.choice("mode", known, default="dense")
    spectrum = Spectrum(
        shape, case.setting("n_frequency"), alpha=case.setting("scale", 1.0), location_steps=None, transform=transform
    )
    case.require("dropout", 0.0)
    with torch.no_grad():
        spectrum.coef.copy_(case.take("param.coef"))
        spectrum.location.copy_(case.take("param.location"))
    spectrum.eval()
    weight = case.take("base.weight") if "base.weight" in case else torch.zeros(shape)
    x = case.take("in.x").requires_grad_()
    y = functional.linear(x, spectrum(weight))
    case.compare("out.index", spectrum.index())
    case.compare("out.delta_weight", spectrum.delta())
    case.compare("out.y", y)
    y.backward(case.take("in.cotangent"))
    case.compare_gradient("x", x.grad)
    case.compare_gradient("coef", spectrum.coef.grad)
    case.compare_gradient("location", spectrum.location.grad)
