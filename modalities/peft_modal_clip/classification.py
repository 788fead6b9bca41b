"""Classification of pictures by the names of the classes: CLIP (Radford et al., ICML 2021, arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import ConfigError
from peft_modal.tasks.classification import Classification
from peft_modal_clip.backbone import OpenCLIPBackbone


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
        templates: What the name of a class is put into, at `{}`.
        options: Arguments of `Classification`.

    Raises:
        ConfigError: A template has no place for the name, or the backbone embeds no texts.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        head: nn.Module,
        class_names: tuple[str, ...],
        *,
        templates: list[str] = ["a photo of a {}."],  # noqa: B006 — never changed
        **options: Any,  # noqa: ANN401 — typed by `Classification`
    ) -> None:
        super().__init__(backbone, adapter, head, class_names, **options)
        if not isinstance(backbone, OpenCLIPBackbone):
            raise ConfigError(
                f"task 'classification' of CLIP needs a backbone of pictures and texts, got {type(backbone).__name__}"
            )
        if not templates:
            raise ConfigError("task.templates: the list is empty; '{}' alone stands for the class's name")
        for template in templates:
            if template.count("{}") != 1:
                raise ConfigError(f"task.templates: '{template}' has no {{}} for the name of the class, or several")
        self.templates = tuple(templates)
        self._texts: tuple[object, Tensor] | None = None
        self._ids: Tensor | None = None

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, C) float32."""
        image = super().forward({"image": batch["image"]})
        scale = self.backbone.similarity_scale  # type: ignore[operator]
        return scale * functional.normalize(image[:, 0].float(), dim=-1) @ self.class_embeddings().T

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
            self._ids = self.backbone.tokenize(texts_of(self.class_names, self.templates))  # type: ignore[operator]
        embedded = super().forward({"text": self._ids.to(self.backbone.device)})[:, 0].float()
        embedded = functional.normalize(embedded, dim=-1)
        return functional.normalize(embedded.view(len(self.class_names), len(self.templates), -1).mean(1), dim=-1)

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
