"""A frozen, pre-trained network with its anatomy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peft_modal.anatomy.anatomy import Anatomy
from peft_modal.anatomy.context import Context, Contexts
from peft_modal.anatomy.layout import Features, FeatureSpec
from peft_modal.anatomy.registered import registered
from peft_modal.files import write_tensors

FrozenMode = Literal["eval", "reference"]


class Backbone(nn.Module, ABC):
    """Base of every backbone: `network` keeps its authors' tensor names, `anatomy` says where methods can act.

    No parameter of the network ever requires a gradient; whatever trains belongs to an adapter.

    Args:
        network: The network. Its `state_dict()` is the same whether something is attached or not.
        anatomy: Its sites, ports and layouts.
        frozen_mode: `eval` keeps BatchNorm statistics still and drop-path off in the frozen network; `reference` does
            what most authors' code does: the frozen network follows the task's mode, statistics drift (they become the
            adapter's state) and drop-path is active.
    """

    modality: ClassVar[str] = ""
    merged_is_folder: ClassVar[bool] = False
    """Whether `save_merged` writes a folder, not a `.safetensors` file."""
    explained_input: ClassVar[str | None] = None
    """The key of the input (B, C, ...) whose places a report tells the relevance of; None where it tells nothing."""

    def __init__(self, network: nn.Module, anatomy: Anatomy, *, frozen_mode: FrozenMode = "eval") -> None:
        super().__init__()
        self.network = network.requires_grad_(requires_grad=False)
        self.anatomy = anatomy
        self.frozen_mode = frozen_mode
        self.contexts = Contexts()
        self.adapters: dict[str, Any] = {}
        """Attached adapters by name, in order of attachment."""
        self.shared: dict[Hashable, Any] = {}
        """What several adapters share per module: the attach layer's hubs and chains."""
        self.exports: dict[str, int] = {}
        """Tokens that attached methods hand to the head: name and how many."""
        self.train(mode=False)

    @abstractmethod
    def extract(self, batch: Mapping[str, Any], context: Context) -> Features:
        """Run the network on a batch; publish what layers share in `context` before the first block."""

    @abstractmethod
    def example_batch(self, batch_size: int = 2) -> dict[str, Any]:
        """A small random batch of the form that `forward` takes, on the network's device."""

    @property
    @abstractmethod
    def feature_width(self) -> int:
        """Number of channels of the returned tokens."""

    def load_weights(self) -> None:
        """Fill the network from what the constructor's `weights` names; constructors never read files."""

    def architecture(self) -> dict[str, Any]:
        """Constructor arguments that make this network whatever `weights` names.

        A constructor that takes its sizes from its weights (a name that stands for a size) gives them here, so that
        merged weights, which are a plain file, find a network that fits.
        """
        return {}

    def save_merged(self, path: Path, state: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Write merged weights so that `weights=<path>` loads them.

        Args:
            path: A file, or where `merged_is_folder` a folder that does not exist or is empty.
            state: The network's tensors, in the type that they are stored in; the network itself holds the same values.
            document: What the file says of itself.
        """
        write_tensors(path, state, document)

    def blocks_for_checkpointing(self, *, enabled: bool) -> None:
        """Switch gradient checkpointing (non-reentrant) of the network's blocks.

        Raises:
            NotImplementedError: The backbone does not support it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gradient checkpointing")

    def views(self, sample: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """What the network makes of a sample before its first block, for reports; by default nothing to show.

        Args:
            sample: One element of a batch without the batch axis, on the CPU.

        Returns:
            Samples that the modality's renderer draws, on the CPU, by their titles.
        """
        del sample
        return {}

    def forward(self, batch: Mapping[str, Any]) -> Features:
        """Features of a batch, with what attached methods export."""
        context = self.contexts.begin(batch)
        features = self.extract(batch, context)
        self.contexts.watch(features.tokens)
        return features.with_extras({**context.taps, **context.exports})

    def feature_spec(self) -> FeatureSpec:
        """What a head may read, including the exports of what is attached now."""
        layout = next(iter(self.anatomy.layouts.values()), None)
        return FeatureSpec(width=self.feature_width, layout=layout, exports=dict(self.exports))

    def train(self, mode: bool = True) -> Backbone:
        """Follow `mode` only where `frozen_mode` is `reference`."""
        super().train(mode and self.frozen_mode == "reference")
        self.training = mode
        return self

    @property
    def device(self) -> torch.device:
        """Device of the network's first parameter."""
        return next(self.network.parameters()).device

    def tensor(self, path: str) -> Tensor:
        """The network's own tensor of that name, whatever stands in for it at the moment.

        Raises:
            KeyError: The network has no such parameter or buffer.
        """
        holder_path, _, name = path.rpartition(".")
        holder = self.network.get_submodule(holder_path)
        found = registered(holder, name)
        if found is None:
            raise KeyError(path)
        return found
