"""Peft's tuner layers, made outside the network: over shells with a site's shape and, while peft looks, its weight.

Peft wraps modules of the network it adapts. Here it gets a tree of its own that has nothing but one shell for each
site, under the site's module path, and what it makes of the shells belongs to the adapter.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Backbone, WeightSite
from peft_modal.attach.namespace import Namespace
from peft_modal.errors import AttachError
from peft_modal.hf.operation import Start, TunerOperation
from peft_modal.hf.settings import Settings, one_line

ADAPTER = "default"
"""Name of the adapter inside peft's layers; ours never goes into tensor names."""


def module_path(site: WeightSite) -> str:
    """The path under which peft knows a site; a tensor that is not called `weight` is written behind its module."""
    return site.holder if site.tensor == "weight" else site.path


def make_operations(backbone: Backbone, sites: Sequence[WeightSite], settings: Settings) -> list[TunerOperation]:
    """One operation per site, initialised by peft from the network's own weights.

    Raises:
        AttachError: peft cannot make one of them.
    """
    tree = Namespace()
    originals: dict[str, Tensor] = {}
    for site in sites:
        _refuse(backbone, site, settings)
        shell = _shell(backbone, site)
        originals[site.name] = backbone.tensor(site.path).detach().clone()
        tree.place(module_path(site), shell)
    _inject(tree, sites, settings)
    operations = []
    for site in sites:
        layer: Any = tree.get_submodule(module_path(site))
        operations.append(_operation(layer, site, originals[site.name], settings))
    return operations


def _refuse(backbone: Backbone, site: WeightSite, settings: Settings) -> None:
    what = f"peft's '{settings.name}' cannot act on '{site.name}'"
    if site.op not in {"linear", "conv", "embedding"}:
        raise AttachError(f"{what}: its operation is '{site.op}'; weight-space tuners act on linears and convolutions")
    module = backbone.network.get_submodule(site.holder)
    if getattr(module, "groups", 1) != 1:
        raise AttachError(f"{what}: it is a convolution with {getattr(module, 'groups', 1)} groups")
    if getattr(module, "padding_mode", "zeros") != "zeros" or any(d != 1 for d in getattr(module, "dilation", ())):
        raise AttachError(f"{what}: peft leaves a convolution's dilation and padding mode out of account")
    kernel = site.shape[2:]
    if settings.tuner.kernels != "any" and len(set(kernel)) > 1:
        raise AttachError(f"{what}: peft takes both sides of its kernel {kernel} for equally long")
    if settings.tuner.kernels == "single" and any(side > 1 for side in kernel):
        raise AttachError(f"{what}: peft adds up the overlapping windows of its kernel {kernel}, which is not OFT")
    if not backbone.tensor(site.path).is_floating_point():
        raise AttachError(f"{what}: its weight is packed; `lora` works beside packed weights")


def _shell(backbone: Backbone, site: WeightSite) -> nn.Module:
    module: Any = backbone.network.get_submodule(site.holder)
    weight = backbone.tensor(site.path)
    common: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    bias = site.bias is not None and getattr(module, site.bias) is not None
    shell: nn.Module
    if site.op == "conv":
        # Not `type(module)`: peft looks at the plain classes, and a subclass may have another constructor.
        kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(site.shape) - 2]
        shell = kind(
            module.in_channels, module.out_channels, module.kernel_size, stride=module.stride, padding=module.padding,
            bias=bias, **common,
        )  # fmt: skip
    elif site.op == "embedding":
        shell = nn.Embedding(site.shape[0], site.shape[1], **common)
    else:
        shell = nn.Linear(site.shape[1], site.shape[0], bias=bias, **common)
    shell.weight = nn.Parameter(weight.detach().clone())
    if bias:
        shell.bias = nn.Parameter(getattr(module, str(site.bias)).detach().clone())
    return shell


def _inject(tree: Namespace, sites: Sequence[WeightSite], settings: Settings) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    config = settings.peft_config(
        [module_path(site) for site in sites],
        feedforward=[module_path(site) for site in sites if site.role == "mlp.out"],
    )
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    if settings.value_of_init in {"corda", "eva"}:
        # Factors come from calibration data; until then a fresh adapter does nothing.
        config.init_lora_weights = True
    try:
        with warnings.catch_warnings(), environment_kept():
            warnings.simplefilter("ignore")
            tuner_class(tree, config, ADAPTER)
    except (ValueError, TypeError, NotImplementedError, ImportError, RuntimeError, AttributeError, KeyError) as error:
        raise AttachError(f"peft's '{settings.name}' cannot act on these sites: {one_line(error)}") from error


@contextmanager
def environment_kept() -> Iterator[None]:
    """Undo what peft leaves in the environment: BOFT sets CC and CXX when its CUDA extension cannot be built."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _operation(layer: Any, site: WeightSite, original: Tensor, settings: Settings) -> TunerOperation:  # noqa: ANN401
    shell = layer.get_base_layer()
    residual = shell.weight.detach()
    start = None
    if settings.value_of_init in {"corda", "eva"}:
        start = Start(layer, zero=True) if settings.value_of_init == "corda" else None
    elif residual.is_meta:
        # Without values nothing can be compared: what the kind of initialisation does has to be known.
        start = Start(layer) if settings.name == "lora" and settings.takes_from_weight else None
    elif not torch.equal(residual, original):
        start = Start(layer) if settings.name == "lora" else None
        expected = original if start is None else original - start.delta()
        if not torch.allclose(expected, residual, rtol=0.0, atol=1e-4 * float(original.abs().max())):
            raise AttachError(
                f"peft's '{settings.name}' changes the weight of '{site.name}' by something else than its own first "
                "update, which the network's weights have no place for"
            )
    for name in ("weight", "bias"):
        shell._parameters.pop(name, None)  # noqa: SLF001 — nothing registered may be left beside what `call` shows
        shell.__dict__[name] = None
    _own_buffers(layer, settings.tuner.derived)
    return TunerOperation(
        layer, site.op, site.shape, start=start, has_dropout=settings.has_dropout, changes_bias=settings.changes_bias
    )


def _own_buffers(layer: nn.Module, derived: Sequence[str]) -> None:
    """Turn parameters that peft freezes into buffers, and keep what it would derive again from other weights."""
    for path, module in layer.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                del module._parameters[name]  # noqa: SLF001 — `delattr` of a ParameterDict also forgets its key
                module.register_buffer(name, parameter.detach())
        if path.partition(".")[0] in derived:
            module._non_persistent_buffers_set.clear()  # noqa: SLF001 — torch offers no switch after registration
