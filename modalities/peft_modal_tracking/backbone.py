"""LoRAT's tracker as a backbone, on the ViTs of the vision modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_modal.anatomy import Backbone, Context, Features, FeatureSpec, FrozenMode
from peft_modal.errors import ConfigError, DataError
from peft_modal.files import is_own, read_tensors
from peft_modal.ranges import DropRate, PositiveInt
from peft_modal.weights import fill_network
from peft_modal_tracking.anatomy import tracker_anatomy
from peft_modal_tracking.boxes import size_of
from peft_modal_tracking.network import Grid, OneStreamViT, Positions
from peft_modal_vision.backbone import ViT

TYPES = "token_type_embed"
_NANO_SIZES = (32, 64)
_GRIDS = (8, 16)
"""Patches along the sides of template and search picture of the authors' smaller variants."""


class LoRAT(Backbone):
    """A one-stream tracker on a plain ViT (Lin et al., Tracking Meets LoRA, ECCV 2024, arXiv:2403.05231).

    Every method trains the token-type embedding. Positions stay those of the ViT.

    Args:
        model: `nano` (the vision modality's, 0.8 M parameters), or a name of timm's such as
            `vit_base_patch14_dinov2`.
        weights: As of the vision modality's `vit`: `nano`, `random`, `pretrained`, a tag of timm's,
            `hf-hub:OWNER/NAME`, or a file; also a merged tracker.
        template_size: Height and width of the template in pixels, or one number for both; None for 8 patches a side,
            32 pixels for the nano.
        search_size: Likewise of the search picture; None for 16 patches a side, 64 pixels for the nano.
        positions: `interpolate` resizes the ViT's positions to the search picture; `slice` takes the top left corner of
            them, as the authors' port to timm does.
        drop_path: Drop-path rate of every block; active in mode `reference` only.
        frozen_mode: See `Backbone`.
        init_seed: Seed of random weights and of the type embedding.
        sizes: timm's arguments of a network of your own, with model `custom`.

    Raises:
        ConfigError: There is no such model, it is no plain ViT, or a size is no multiple of its patches.
    """

    modality: ClassVar[str] = "tracking"

    def __init__(
        self,
        *,
        model: str = "nano",
        weights: str = "nano",
        template_size: PositiveInt | list[PositiveInt] | None = None,
        search_size: PositiveInt | list[PositiveInt] | None = None,
        positions: Positions = "interpolate",
        drop_path: DropRate = 0.0,
        frozen_mode: FrozenMode = "eval",
        init_seed: int = 0,
        sizes: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.init_seed = init_seed
        self.sizes = sizes
        self.positions: Positions = positions
        vit: Any = self._vit().network
        patch: Grid = tuple(vit.patch_embed.patch_size)
        default = _NANO_SIZES if model == "nano" else tuple(count * patch[0] for count in _GRIDS)
        self.template_size = size_of(template_size or default[0], "backbone.template_size")
        self.search_size = size_of(search_size or default[1], "backbone.search_size")
        self.grids = {
            name: _grid(name, size, patch)
            for name, size in (("template", self.template_size), ("search", self.search_size))
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            network = self._tracker(vit, drop_path)
        super().__init__(network, tracker_anatomy(network), frozen_mode=frozen_mode)

    def _vit(self) -> ViT:
        return ViT(model=self.model, weights=self.weights, init_seed=self.init_seed, sizes=self.sizes)

    def _tracker(self, vit: Any, drop_path: float = 0.0) -> OneStreamViT:  # noqa: ANN401 — timm's class
        return OneStreamViT(
            vit, template_grid=self.grids["template"], search_grid=self.grids["search"], positions=self.positions,
            drop_path=drop_path,
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> LoRAT:
        """The same network at toy size with random weights; a search picture that is no square."""
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
        return cls(model="custom", weights="random", template_size=8, search_size=[12, 16], sizes=sizes)

    def load_weights(self) -> None:
        """Fill the network from what `weights` names.

        Raises:
            WeightsError: See `peft_modal_vision.weights.load`; or a merged tracker is of other sizes.
        """
        path = Path(self.weights).expanduser()
        if path.is_file() and is_own(path):
            state = read_tensors(path)[0]
            if TYPES in state:
                fill_network(self.network, state, self.weights)
                return
        vit = self._vit()
        vit.load_weights()
        state = self._tracker(vit.network).state_dict()
        # No file of a ViT holds it: its seeded values stay.
        state[TYPES] = self.network.state_dict()[TYPES]
        self.network.load_state_dict(state)

    def architecture(self) -> dict[str, Any]:
        """The model and the sizes of its two pictures."""
        return {
            "model": self.model, "template_size": list(self.template_size), "search_size": list(self.search_size),
        }  # fmt: skip

    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """Tokens of `template` (B, 3, h, w) and `search` (B, 3, H, W), the target marked by `template_mask` (B, r, c).

        `level.0` (B, D, R, C) among the extras is the map of the search picture.

        Raises:
            DataError: The pictures are not of the sizes that the network is made for.
        """
        for name, size in (("template", self.template_size), ("search", self.search_size)):
            found = tuple(batch[name].shape[-2:])
            if found != size:
                raise DataError(
                    f"the {name} has {found[1]} x {found[0]} pixels, the network takes {size[1]} x {size[0]}; set "
                    f"backbone.{name}_size or data.{name}_size"
                )
        rows, columns = self.grids["search"]
        context.put("grid", (rows, columns))
        tokens = self.network(batch["template"], batch["search"], batch["template_mask"])
        layout = self.anatomy.layouts["blocks"]
        found_there = tokens[:, layout.slice("search", tokens.shape[1])]
        level = found_there.transpose(1, 2).unflatten(2, (rows, columns))
        return Features(tokens, layout, {"level.0": level})

    def feature_spec(self) -> FeatureSpec:
        """Tokens, and the one map."""
        return replace(super().feature_spec(), levels=(self.feature_width,))

    @property
    def feature_width(self) -> int:
        """Width of the tokens."""
        return int(self.network.embed_dim)  # type: ignore[arg-type]

    def example_batch(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Random pictures, the target somewhere in the middle of the template."""
        generator = torch.Generator().manual_seed(0)
        rows, columns = self.grids["template"]
        mask = torch.zeros(batch_size, rows, columns, dtype=torch.int64)
        mask[:, rows // 4 : rows - rows // 4, columns // 4 : max(1, columns // 2)] = 1
        batch = {
            "template": torch.randn(batch_size, 3, *self.template_size, generator=generator),
            "search": torch.randn(batch_size, 3, *self.search_size, generator=generator),
            "template_mask": mask,
        }
        return {name: value.to(self.device) for name, value in batch.items()}

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Compute blocks again during backward instead of keeping their activations."""
        self.network.set_grad_checkpointing(enabled)  # type: ignore[operator]


def _grid(name: str, size: tuple[int, int], patch: Grid) -> Grid:
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ConfigError(
            f"backbone.{name}_size: {size[0]} x {size[1]} pixels are no multiple of the patches of {patch[0]} x "
            f"{patch[1]}"
        )
    return size[0] // patch[0], size[1] // patch[1]
