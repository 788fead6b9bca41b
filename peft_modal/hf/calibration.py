"""Initialisations that look at data: CorDA's context-oriented factors and EVA's principal components of the inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from peft_modal.anatomy import Backbone, WeightSite
from peft_modal.attach import LifeCycle
from peft_modal.attach.lifecycle import Batch, Losses
from peft_modal.errors import AttachError
from peft_modal.hf.operation import TunerOperation, factors
from peft_modal.hf.settings import Settings, one_line


class Calibration(LifeCycle):
    """Fills the factors of LoRA layers from the inputs that their sites get in calibration batches.

    The decompositions are peft's; the network is run as it is, and its inputs are read by hooks that are taken away.

    Args:
        backbone: The backbone.
        sites: Sites of linears that are called.
        operations: Their operations, in the same order.
        settings: The tuner's, whose initialisation is `corda` or `eva`.

    Raises:
        AttachError: A site has no inputs that could be read.
    """

    def __init__(
        self, backbone: Backbone, sites: Sequence[WeightSite], operations: Sequence[TunerOperation], settings: Settings
    ) -> None:
        super().__init__()
        for site in sites:
            if site.op != "linear" or "call" not in site.reach:
                raise AttachError(
                    f"'{site.name}' is no linear that is called, so '{settings.value_of_init}' cannot see its inputs; "
                    "leave that site out"
                )
        self.__dict__["_backbone"] = backbone  # referred to, never registered
        self.sites = tuple(sites)
        self.operations = list(operations)
        self.settings = settings

    @property
    def backbone(self) -> Backbone:
        """The backbone."""
        return self.__dict__["_backbone"]

    @override
    def prepare(self, batches: Iterable[Batch], loss: Losses) -> None:
        batches = list(batches)
        if not batches:
            raise AttachError(f"'{self.settings.value_of_init}' needs calibration data, and there is none")
        kind = _Corda if self.settings.value_of_init == "corda" else _Eva
        seen = [kind(site, operation) for site, operation in zip(self.sites, self.operations, strict=True)]
        network = self.backbone.network
        handles = [network.get_submodule(s.site.owner).register_forward_pre_hook(s.read) for s in seen]
        with torch.no_grad():
            try:
                for batch in batches:
                    loss(batch)
            finally:
                for handle in handles:
                    handle.remove()
            for statistics in seen:
                statistics.fill(self.backbone.tensor(statistics.site.path), self.settings)


class _Inputs(ABC):
    """Running statistics of the inputs of one site, and the factors that follow from them."""

    def __init__(self, site: WeightSite, operation: TunerOperation) -> None:
        self.site = site
        self.operation = operation
        self.rank = int(next(iter(operation.tuner.r.values())))

    def read(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the site's owner."""
        x = args[0].detach()
        self.add(x.reshape(-1, x.shape[-1]).float())

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Take in one batch of inputs (N, in)."""

    @abstractmethod
    def fill(self, weight: Tensor, settings: Settings) -> None:
        """Set the factors of the operation."""


class _Corda(_Inputs):
    """CorDA (Yang et al., 2024): factors of W C; C is the second moment of the inputs, each batch over its maximum."""

    def __init__(self, site: WeightSite, operation: TunerOperation) -> None:
        super().__init__(site, operation)
        self.moment: Tensor | None = None
        self.count = 0

    @override
    def add(self, rows: Tensor) -> None:
        rows = rows / rows.max().abs()
        self.moment = rows.T @ rows if self.moment is None else self.moment + rows.T @ rows
        self.count += 1

    @override
    def fill(self, weight: Tensor, settings: Settings) -> None:
        from peft.tuners.lora.corda import collect_eigens_for_layer, crop_corda_eigens

        start = self.operation.start
        assert start is not None
        assert self.moment is not None
        layer: Any = self.operation.tuner
        config = settings.peft_config(["shell"], feedforward=[])
        shell: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        shell.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
        shell.covariance_matrix = self.moment / self.count
        shell.corda_method, shell.rank = config.corda_config.corda_method, self.rank
        shell.eigens = collect_eigens_for_layer(shell, config)
        crop_corda_eigens(nn.ModuleDict({"shell": shell}), config)
        base = layer.get_base_layer().__dict__
        # `corda_init` reads both off the base layer, and writes the residual where the network's weight would be.
        base["weight"], base["eigens"] = nn.Parameter(shell.weight.clone(), requires_grad=False), shell.eigens
        try:
            layer.corda_init("default", "corda")
        finally:
            base["weight"] = None
        for kept, factor in zip((start.down, start.up), factors(layer), strict=True):
            factor.data = factor.to(kept.device)
            kept.copy_(factor)


class _Eva(_Inputs):
    """EVA (Paischer et al., 2024): A holds the first principal components of the inputs."""

    def __init__(self, site: WeightSite, operation: TunerOperation) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        super().__init__(site, operation)
        self.pca = IncrementalPCA(n_components=self.rank, copy=True, lowrank=True, lowrank_seed=42)

    @override
    def add(self, rows: Tensor) -> None:
        try:
            self.pca.partial_fit(rows)  # type: ignore[no-untyped-call]
        except ValueError as error:
            what = f"'eva' cannot find {self.rank} components of the inputs of '{self.site.name}'"
            raise AttachError(f"{what}: {one_line(error)}") from error

    @override
    def fill(self, weight: Tensor, settings: Settings) -> None:
        components = self.pca.components_[: self.rank]
        if settings.peft_config(["shell"], feedforward=[]).eva_config.whiten:
            components = components / self.pca.singular_values_[: self.rank].sqrt().reshape(-1, 1)
        factors(self.operation.tuner)[0].copy_(components)
