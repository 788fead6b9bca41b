"""Classification of pictures by the names of the classes: CLIP (Radford et al., ICML 2021, arXiv:2103.00020)."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassF1Score

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError, DataError
from peft_modal.tasks.base import Stage
from peft_modal.tasks.classification import Classification
from peft_modal.tasks.predicting import PredictRequest
from peft_modal_clip.backbone import OpenCLIPBackbone

_LOG = logging.getLogger(__name__)
_HALVES = ("base", "new")
_TEMPLATES = ("a photo of a {}.",)
_SHOWN: Final = 60
"""Characters of a name that a sentence shows."""


class ClassNames(Classification):
    """Logits are the similarities of a picture's embedding with those of the classes' texts, times CLIP's factor.

    z_c = tau f(x) . t_c, with unit vectors f and t_c; t_c is the mean over the templates, scaled back to length 1.
    Texts are embedded once, and again in each pass only where something of the text tower is trained. Nothing is random
    at the start: an untrained model is the zero-shot classifier.

    Args:
        backbone: Supplied by the program.
        adapter: Supplied by the program.
        head: Supplied by the program: `identity`.
        class_names: Supplied by the program; `_` is read as a space.
        templates: What the name of a class is put into, at `{}`; null takes the data's own (each set of `fewshot`
            has one), or else "a photo of a {}.".
        base_to_new: Train on the first half of the classes (of an odd number one more) with their names alone, and
            measure each half with its own names: `accuracy_base`, `accuracy_new` and their harmonic mean.
        options: Arguments of `Classification`.

    Raises:
        ConfigError: A template has no place for the name, or the backbone embeds no texts.
    """

    share_metrics: ClassVar[frozenset[str]] = frozenset(
        {"accuracy", "mean_class_accuracy", "macro_f1", "accuracy_base", "accuracy_new", "harmonic_mean"}
    )

    reads_class_names: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        templates: list[str] | None = None,
        base_to_new: bool = False,
        **options: Any,  # noqa: ANN401 — typed by `Classification`
    ) -> None:
        super().__init__(backbone, adapter, head, class_names, **options)
        for metrics in self.metrics.values():
            metrics.add_metrics({"macro_f1": MulticlassF1Score(len(class_names), average="macro")})  # type: ignore[operator]
        if not isinstance(backbone, OpenCLIPBackbone):
            raise ConfigError(
                f"task 'classification' of CLIP needs a backbone of pictures and texts, got {type(backbone).__name__}"
            )
        if templates is not None and not templates:
            raise ConfigError("task.templates: the list is empty; '{}' alone stands for the class's name")
        for template in templates or ():
            if template.count("{}") != 1:
                raise ConfigError(f"task.templates: '{template}' has no {{}} for the name of the class, or several")
        self.takes_templates = templates is None
        self.templates = _TEMPLATES if templates is None else tuple(templates)
        self.num_base = math.ceil(len(class_names) / 2) if base_to_new else len(class_names)
        self.halves = nn.ModuleDict(
            {f"{stage}_{half}": MeanMetric() for stage in ("val", "test") for half in _HALVES} if base_to_new else {}
        )
        self._texts: tuple[object, Tensor] | None = None
        self._ids: Tensor | None = None

    def before_fit(self, data: LightningDataModule) -> None:
        """See `Classification`; tell of data whose classes are half of those that are measured."""
        super().before_fit(data)
        if getattr(data, "classes", "all") == "base" and not self.halves:
            _LOG.warning(
                "data.classes is base, and all classes are measured together, which is not what papers report; "
                "task.base_to_new=true measures each half among its own names"
            )

    def suit(self, preprocessing: Mapping[str, Any]) -> None:
        """Put the names of the classes into the data's own prompt, unless another was asked for."""
        if self.takes_templates and "templates" in preprocessing:
            self.templates = tuple(preprocessing["templates"])
            self._texts = self._ids = None

    @classmethod
    def check_request(cls, request: PredictRequest) -> None:
        """Refuse names that cannot be told apart.

        Raises:
            ConfigError: See `parse_names`.
        """
        if "classes" in request.flags:
            parse_names(request.flags["classes"])

    def take_flags(self, flags: Mapping[str, Any]) -> None:
        """Predict among the names of `--classes` from now on, whatever was trained.

        Raises:
            ConfigError: See `parse_names`.
        """
        self.class_names = parse_names(flags["classes"])
        self.num_base = len(self.class_names)
        self._texts = self._ids = None

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, C) float32; while base classes are trained, theirs."""
        image = super().forward({"image": batch["image"]})
        scale: Any = self.backbone.similarity_scale
        texts = self.class_embeddings()[: self.num_base if self.training else None]
        logits: Tensor = scale * functional.normalize(image[:, 0].float(), dim=-1) @ texts.T
        return logits

    def losses(self, batch: Mapping[str, Any], output: Tensor) -> dict[str, Tensor]:
        """See `Classification`.

        Raises:
            DataError: A class is trained that counts as new.
        """
        if self.halves and (wrong := int(batch["label"].max())) >= self.num_base:
            raise DataError(
                f"task.base_to_new trains on the first {self.num_base} of {len(self.class_names)} classes, and the "
                f"training data has '{self.class_names[wrong]}'; set data.classes to base"
            )
        return super().losses(batch, output)

    def evaluation_losses(self, batch: Mapping[str, Any], output: Tensor) -> dict[str, Tensor]:
        """See `Classification`; of base-to-new among the names of the sample's own half."""
        return super().evaluation_losses(batch, self._own_half(batch, output))

    def update_metrics(self, stage: Stage, batch: Mapping[str, Any], output: Tensor) -> None:
        """See `Classification`; of base-to-new among the names of the sample's own half, and of each half."""
        missing = len(self.class_names) - output.shape[1]
        own = functional.pad(self._own_half(batch, output), (0, missing), value=-torch.inf)
        super().update_metrics(stage, batch, own)
        if not self.halves or stage == "train":
            return
        is_new = batch["label"] >= self.num_base
        for half, chosen in zip(_HALVES, (~is_new, is_new), strict=True):
            if chosen.any():
                self.halves[f"{stage}_{half}"].update((own.argmax(-1) == batch["label"])[chosen])  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the halves."""
        self._log_halves("val")

    def on_test_epoch_end(self) -> None:
        """Log the halves."""
        self._log_halves("test")

    def _log_halves(self, stage: Stage) -> None:
        found = {}
        for half in _HALVES if self.halves else ():
            metric: Any = self.halves[f"{stage}_{half}"]
            if metric.update_called:
                found[half] = metric.compute()
                self.log(f"{stage}/accuracy_{half}", found[half])
            metric.reset()
        if len(found) == len(_HALVES):
            base, new = found.values()
            self.log(f"{stage}/harmonic_mean", 2 * base * new / (base + new).clamp(min=1e-9))

    def _own_half(self, batch: Mapping[str, Any], output: Tensor) -> Tensor:
        if not self.halves or output.shape[1] == self.num_base:
            return output
        is_new = torch.arange(output.shape[1], device=output.device) >= self.num_base
        return output.masked_fill(is_new != (batch["label"] >= self.num_base)[:, None], -torch.inf)

    def predictions(self, output: Tensor) -> list[dict[str, Any]]:
        """See `Classification`; and the cosine of the picture with the likeliest class's text."""
        scale: Any = self.backbone.similarity_scale
        cosines = output.float().amax(-1) / float(scale)
        rows = super().predictions(output)
        return [{**row, "similarity": round(float(cosine), 4)} for row, cosine in zip(rows, cosines, strict=True)]

    def class_embeddings(self) -> Tensor:
        """Unit vectors of the classes' texts (C, D) float32."""
        if self.training and self._touches_texts:
            self._texts = None
            return self._embed()
        state = self.adapter.is_enabled, self.adapter.weight
        if self._texts is None or self._texts[0] != state:
            with torch.no_grad():
                self._texts = state, self._embed()
        return self._texts[1]

    def _embed(self) -> Tensor:
        if self._ids is None:
            self._ids = self._tokens()
        embedded = super().forward({"text": self._ids.to(self.backbone.device)})[:, 0].float()
        embedded = functional.normalize(embedded, dim=-1)
        return functional.normalize(embedded.view(len(self.class_names), len(self.templates), -1).mean(1), dim=-1)

    def _tokens(self) -> Tensor:
        """Ids of all texts; names that are the same to the text tower are said."""
        texts = texts_of(self.class_names, self.templates)
        ids: Tensor = self.backbone.tokenize(texts)  # type: ignore[operator]
        cut = sum(self.backbone.are_cut(texts))  # type: ignore[operator]
        if cut:
            _LOG.warning(
                "%d of %d texts with names of classes are longer than the %d tokens that the network reads: it does "
                "not see how they end",
                cut, len(texts), ids.shape[1],
            )  # fmt: skip
        by_class = ids.view(len(self.class_names), -1).tolist()
        first: dict[tuple[int, ...], str] = {}
        for name, tokens in zip(self.class_names, by_class, strict=True):
            if (other := first.setdefault(tuple(tokens), name)) != name:
                _LOG.warning(
                    "the names '%s' and '%s' are one text of %d tokens to the network (capitals do not count, longer "
                    "texts are cut), so that it cannot tell these classes apart",
                    _short(other), _short(name), ids.shape[1],
                )  # fmt: skip
        return ids

    @property
    def _touches_texts(self) -> bool:
        """Whether the adapter acts on anything outside the vision tower."""
        return any(
            not f"{path}.".startswith("visual.")
            for attachment in self.adapter.attachments
            for path in attachment.touches
        )


def texts_of(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class in every template, class by class."""
    return [template.replace("{}", name.replace("_", " ")) for name in class_names for template in templates]


def parse_names(text: str) -> tuple[str, ...]:
    """Names of classes as typed: a comma between them, double quotes around one that has a comma.

    Raises:
        ConfigError: There are fewer than two, an empty one, or one twice.
    """
    try:
        (names,) = csv.reader([re.sub(r"[\r\n]+", " ", text).strip(" ")], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise ConfigError(
            f"--classes: '{_short(text)}' is no list of names: {error or 'it is empty'}; write a comma between names, "
            "and double quotes around one that has a comma"
        ) from error
    names = [name.strip() for name in names]
    if len(names) < 2:
        raise ConfigError(
            f"--classes: '{_short(text)}' is one class, and every picture would be of it; name two or more"
        )
    if not all(names):
        raise ConfigError(f"--classes: one of the names in '{_short(text)}' is empty; leave out the comma")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"--classes: '{_short(twice[0])}' stands there {names.count(twice[0])} times; name it once")
    return tuple(names)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
