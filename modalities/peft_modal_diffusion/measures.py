"""What a tuned model's pictures are measured by, beside the untouched's: checks of probes, FID, KID and CLIP score.

Frechet inception distance (Heusel et al., 2017, arXiv:1706.08500), kernel inception distance (Binkowski et al., 2018,
arXiv:1801.01401) and CLIP score (Hessel et al., 2021, arXiv:2104.08718) as torchmetrics computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from peft_modal.data.progress import progress
from peft_modal.errors import ConfigError, DataError
from peft_modal.report import Column, Section, Table
from peft_modal_diffusion.networks import INCEPTION, Towers, open_towers
from peft_modal_diffusion.probes import HasProbes, HasReferences, Probe, drift, mean_of

Draw = Callable[[Sequence[str], Sequence[int]], Tensor]
"""From prompts and seeds to pictures (n, 3, H, W) in 0..1."""
PREFIX: Final = "pictures/"
_LARGEST_SUBSET = 50
_WORDS: Final = {
    "concept": "Pictures of the concept that show it, share",
    "colour": "Pictures of other prompts that have their colour, share",
    "drift": "Change of pictures of other prompts, RMS of 0 to 1",
    "fid": "FID to the training pictures, less is better",
    "kid": "KID to the training pictures, less is better",
    "clip_score": "CLIP score with the prompts, 0 to 100",
}


@dataclass(frozen=True)
class Measuring:
    """What is measured.

    Args:
        pictures: How many are drawn of the data's captions for FID, KID and CLIP score; 0 for none.
        prior_prompts: What the model shall go on to show as before.
        feature_network: Of FID and KID: `inception`, or a CLIP as `open_towers` takes it.
        clip_network: Of the CLIP score.
    """

    pictures: int = 0
    prior_prompts: tuple[str, ...] = ()
    feature_network: str = "nano"
    clip_network: str = "nano"

    def check(self) -> None:
        """Refuse what would end a finished training in an error, before it starts.

        Raises:
            ConfigError: One picture alone shall be measured.
            WeightsError: A network cannot be opened.
        """
        if self.pictures == 1:
            raise ConfigError("task.measure_pictures: FID and KID need two pictures at least; 0 draws none")
        if self.pictures:
            open_towers(self.clip_network)
            if self.feature_network not in {INCEPTION, self.clip_network}:
                open_towers(self.feature_network)


def measure(measuring: Measuring, data: Any, draw: Draw, draw_untouched: Draw) -> dict[str, float]:  # noqa: ANN401 — any data module
    """All figures, by name; those that begin with `untouched_` are the untouched model's.

    Args:
        measuring: What is measured.
        data: Whose captions, pictures and probes.
        draw: Pictures of the tuned model.
        draw_untouched: Of the untouched one.

    Raises:
        DataError: Pictures shall be compared with the data's, which has fewer than two.
    """
    probes = data.probes() if isinstance(data, HasProbes) else ()
    if measuring.prior_prompts:
        probes = (*probes, Probe(measuring.prior_prompts, is_prior=True))
    figures: dict[str, float] = {}
    drifts = []
    count = 2 * sum(len(probe.prompts) for probe in probes) + 2 * measuring.pictures
    with progress("pictures to measure", count) as advance:

        def both(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
            seeds = range(len(prompts))
            pair = draw(prompts, seeds), draw_untouched(prompts, seeds)
            advance(2 * len(prompts))
            return pair

        for probe in probes:
            tuned, untouched = both(probe.prompts)
            for name, check in probe.checks.items():
                figures[name] = mean_of(check, tuned)
                figures[f"untouched_{name}"] = mean_of(check, untouched)
            if probe.is_prior:
                drifts.append((len(probe.prompts), drift(tuned, untouched)))
        if drifts:
            figures["drift"] = sum(n * value for n, value in drifts) / sum(n for n, _ in drifts)
        if measuring.pictures:
            figures |= _against_data(measuring, data, both)
    return {f"{PREFIX}{name}": value for name, value in figures.items()}


def measures_section(figures: Mapping[str, float]) -> Section | None:
    """What `measure` found as a section of a report; None where it found nothing."""
    names = [name.removeprefix(PREFIX) for name in figures if not name.startswith(f"{PREFIX}untouched_")]
    if not names:
        return None
    rows = tuple(
        (_WORDS[name], figures[f"{PREFIX}{name}"], figures.get(f"{PREFIX}untouched_{name}"))
        for name in sorted(names, key=list(_WORDS).index)
    )
    columns = (Column("Measure"), Column("Tuned", "number"), Column("Untouched", "number"))
    lead = "Pictures drawn after the run, with the same prompts and seeds by the tuned and by the untouched model."
    return Section("measures", "Measured pictures", (Table(columns, rows),), lead)


def _against_data(
    measuring: Measuring, data: Any, both: Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # noqa: ANN401
) -> dict[str, float]:  # fmt: skip
    if not isinstance(data, HasReferences):
        raise DataError(f"task.measure_pictures: data '{type(data).__name__}' has no pictures to compare with; use 0")
    real, captions = data.references(max(measuring.pictures, 500))
    if len(real) < 2:
        raise DataError(f"task.measure_pictures: FID and KID need two pictures of the data, here is {len(real)}; use 0")
    prompts = [captions[i % len(captions)] for i in range(measuring.pictures)]
    clip = open_towers(measuring.clip_network)
    features: Any = measuring.feature_network
    if features != INCEPTION:
        features = clip if features == measuring.clip_network else open_towers(features)
    figures: dict[str, float] = {}
    for sign, drawn in zip(("", "untouched_"), both(prompts), strict=True):
        fid, kid = distances(features, real, list(drawn))
        figures |= {f"{sign}fid": fid, f"{sign}kid": kid, f"{sign}clip_score": clip_score(clip, drawn, prompts)}
    return figures


def distances(features: Any, real: Sequence[Tensor], drawn: Sequence[Tensor]) -> tuple[float, float]:  # noqa: ANN401
    """FID and KID (times 1, mean over 50 random subsets) between pictures (3, H, W) in 0..1.

    Args:
        features: A network, or "inception".
        real: Pictures of the data.
        drawn: Pictures of the model.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    network = 2048 if features == INCEPTION else features
    fid = FrechetInceptionDistance(feature=network)
    kid = KernelInceptionDistance(
        feature=network, subsets=50, subset_size=min(_LARGEST_SUBSET, len(real), len(drawn))
    )  # fmt: skip
    for pictures, is_real in ((real, True), (drawn, False)):
        for picture in pictures:
            for metric in (fid, kid):
                metric.update(to_bytes(picture)[None], real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, _ = kid.compute()
    return float(fid.compute()), float(mean)


def clip_score(towers: Towers, pictures: Tensor, prompts: Sequence[str]) -> float:
    """Mean cosine between pictures (n, 3, H, W) in 0..1 and their prompts, times 100, at least 0."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    made: Any = lambda: (towers, towers.processor)  # noqa: E731 — its type says transformers' own classes
    metric = CLIPScore(made)
    metric.update([to_bytes(picture) for picture in pictures], list(prompts))
    return float(metric.compute())


def to_bytes(picture: Tensor) -> Tensor:
    """uint8 pixels of a picture in 0..1."""
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)
