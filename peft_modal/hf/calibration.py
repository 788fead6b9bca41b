"""Initialisations that look at data: CorDA's context-oriented factors and EVA's principal components of the inputs."""

from __future__ import annotations

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
        fill = _corda if self.settings.value_of_init == "corda" else _eva
        readers = [_Reader(self.backbone.network.get_submodule(site.owner)) for site in self.sites]
        try:
            with torch.no_grad():
                for batch in batches:
                    loss(batch)
        finally:
            for reader in readers:
                reader.handle.remove()
        with torch.no_grad():
            for site, operation, reader in zip(self.sites, self.operations, readers, strict=True):
                fill(self.backbone, site, operation, reader.inputs, self.settings)


class _Reader:
    """Keeps what a module gets, as rows."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        self.handle = module.register_forward_pre_hook(self.read)

    def read(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        self.inputs.append(x.reshape(-1, x.shape[-1]).float())


def _corda(
    backbone: Backbone, site: WeightSite, operation: TunerOperation, inputs: list[Tensor], settings: Settings
) -> None:
    """CorDA (Yang et al., 2024): factors of W C; C is the second moment of the inputs, each batch over its maximum."""
    from peft.tuners.lora.corda import collect_eigens_for_layer, crop_corda_eigens

    assert operation.start is not None
    layer: Any = operation.tuner
    config = settings.peft_config(["shell"], feedforward=[])
    shell: Any = nn.Linear(site.shape[1], site.shape[0], bias=False, device="meta")
    shell.weight = nn.Parameter(backbone.tensor(site.path).detach().float(), requires_grad=False)
    shell.covariance_matrix = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in inputs) / len(inputs)
    shell.corda_method, shell.rank = config.corda_config.corda_method, next(iter(layer.r.values()))
    shell.eigens = collect_eigens_for_layer(shell, config)
    crop_corda_eigens(nn.ModuleDict({"shell": shell}), config)
    base = layer.get_base_layer().__dict__
    # `corda_init` reads both off the base layer, and writes the residual where the network's weight would be.
    base["weight"], base["eigens"] = nn.Parameter(shell.weight.clone(), requires_grad=False), shell.eigens
    device = factors(layer)[0].device
    try:
        layer.corda_init("default", "corda")
    finally:
        base["weight"] = None
    new_down, new_up = factors(layer)
    new_down.data, new_up.data = new_down.to(device), new_up.to(device)
    operation.start.down.copy_(new_down)
    operation.start.up.copy_(new_up)


def _eva(
    _backbone: Backbone, site: WeightSite, operation: TunerOperation, inputs: list[Tensor], settings: Settings
) -> None:
    """EVA (Paischer et al., 2024): A holds the first principal components of the inputs.

    Raises:
        AttachError: The inputs have fewer rows than there are components.
    """
    from peft.utils.incremental_pca import IncrementalPCA

    layer: Any = operation.tuner
    rank = next(iter(layer.r.values()))
    pca = IncrementalPCA(n_components=rank, copy=True, lowrank=True, lowrank_seed=42)
    try:
        for x in inputs:
            pca.partial_fit(x)  # type: ignore[no-untyped-call]
    except ValueError as error:
        what = f"'eva' cannot find {rank} components of the inputs of '{site.name}'"
        raise AttachError(f"{what}: {one_line(error)}") from error
    components = pca.components_[:rank]
    if settings.peft_config(["shell"], feedforward=[]).eva_config.whiten:
        components = components / pca.singular_values_[:rank].sqrt().reshape(-1, 1)
    down, _ = factors(layer)
    down.copy_(components)
