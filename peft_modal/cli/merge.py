"""`merge`: fold an adapter into plain backbone weights, and keep its head usable beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from peft_modal.anatomy import Backbone
from peft_modal.api import Model, build, load_stack
from peft_modal.attach import merge_
from peft_modal.cli.options import Options
from peft_modal.cli.output import write, write_json
from peft_modal.compose import Composed, Node, compose
from peft_modal.errors import ConfigError, MergeError, WeightsError
from peft_modal.files import Header, fingerprint, read_index, save_adapter
from peft_modal.tasks.tensors import tensors_of
from peft_modal.testing.dry_run import no_attention_fast_path

_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SUFFIX: Final = ".safetensors"
_BATCH: Final = 8
"""Inputs that features are compared on."""


@dataclass(frozen=True)
class Deviation:
    """How far the stored weights are from the exact ones, and what that does to features."""

    weights: float
    """Largest difference of an entry from its float64 value, rounding to the stored type included."""
    features: float
    """Largest difference of a feature of the example batch, merged against adapted."""
    features_relative: float
    """The same over the largest feature."""


def merge(options: Options) -> int:
    """Write the merged backbone, and an adapter file with the head that goes with it.

    Raises:
        ConfigError: `--out` does not suit the backbone, or is the input itself.
        MergeError: The method has no equivalent in plain weights, or a weight does not fit the type.
    """
    assert options.adapter is not None
    assert options.out is not None
    out = options.out
    head_file = _head_file(out, options.adapter)
    if {path.resolve() for path, _ in options.adapters} & {out.resolve(), head_file.resolve()}:
        raise ConfigError(f"--out: merging into '{out}' would overwrite the adapter file itself.")
    model = load_stack([(path, options.alpha if weight is None else weight) for path, weight in options.adapters])
    deviation, state = _fold(model, _DTYPES[options.dtype])
    node = _node_with_weights(model.composed.nodes["backbone"], model.backbone, out)
    model.backbone.save_merged(out, state, {"kind": "backbone", "backbone": node})
    _write_head(model, node, head_file)
    if options.json:
        write_json({
            "out": str(out), "head": str(head_file), "dtype": options.dtype, "backbone": node,
            "deviation": asdict(deviation),
        })  # fmt: skip
        return 0
    write(f"merged weights  {out} ({options.dtype})")
    write(f"head            {head_file}")
    write(f"deviation       weights {deviation.weights:.2g}; features {deviation.features:.2g} "
          f"({deviation.features_relative:.2g} of the largest)")  # fmt: skip
    sizes = " ".join(
        f"--backbone.{key}={_plain(value)}" for key, value in model.backbone.architecture().items() if value is not None
    )
    write("\n")
    write(f"predict with it     peft-modal predict --adapter {head_file} ... --out DIR")
    write(f"train on from it    peft-modal fit ... --backbone.weights={out}{' ' + sizes if sizes else ''}")
    return 0


def _head_file(out: Path, adapter: Path) -> Path:
    """Where the head goes, when `out` suits the backbone's kind of merged weights.

    Raises:
        ConfigError: It does not.
    """
    _, header = read_index(adapter)
    backbone: type[Backbone] = compose(header.config).nodes["backbone"].cls
    if backbone.merged_is_folder:
        if out.suffix == _SUFFIX:
            raise ConfigError(f"--out: '{out}' is the name of a file; this backbone's merged weights are a folder.")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ConfigError(f"--out: '{out}' exists; name a new folder.")
        return out.with_name(out.name + ".head" + _SUFFIX)
    if out.suffix != _SUFFIX:
        raise ConfigError(f"--out: '{out}' does not end in {_SUFFIX}, by which backbones know the format.")
    return out.with_name(out.stem + ".head" + _SUFFIX)


def _fold(model: Model, dtype: torch.dtype) -> tuple[Deviation, dict[str, Tensor]]:
    """Merge in place, leave the network with the values that are stored, and compare.

    Raises:
        MergeError: The method has no equivalent in plain weights, or a weight does not fit the type.
    """
    adapted = _features(model.backbone)
    node = model.composed.nodes["method"]
    try:
        rounding = merge_(model.backbone, dtype=dtype)
    except MergeError as error:
        raise MergeError(
            f"method '{node.name}' cannot be merged: {error}. Use the adapter file as it is (predict, test --adapter); "
            "lora, ssf, bitfit, norm_tuning and full merge."
        ) from error
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in model.backbone.network.state_dict().items()
    }
    too_large = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if too_large:
        raise MergeError(f"'{too_large[0]}' does not fit {str(dtype).removeprefix('torch.')}; use --dtype bfloat16")
    own = model.backbone.network.state_dict()
    cast = max(float((own[name].double() - tensor.double()).abs().max()) for name, tensor in state.items() if
               tensor.is_floating_point() and tensor.numel())  # fmt: skip
    model.backbone.network.load_state_dict(state)
    merged = _features(model.backbone)
    off = max((float((adapted[k] - merged[k]).abs().max()) for k in adapted), default=0.0)
    largest = max((float(value.abs().max()) for value in adapted.values()), default=0.0)
    return Deviation(max(rounding, cast), off, off / largest if largest else 0.0), state


def _features(backbone: Backbone) -> dict[str, Tensor]:
    """Tokens of the example batch, in float64 for the comparison."""
    with torch.no_grad(), no_attention_fast_path():
        return {"tokens": backbone(backbone.example_batch(_BATCH)).tokens.double()}


def _node_with_weights(node: Node, backbone: Backbone, weights: Path) -> dict[str, Any]:
    """The backbone's node with the merged file as its weights, and its sizes written out.

    Raises:
        ConfigError: It takes no weights.
    """
    if "weights" not in node.kwargs:
        raise ConfigError(f"backbone '{node.name}' takes no 'weights', so merged weights could not be loaded into it.")
    return {**node.to_dict(), **backbone.architecture(), "weights": str(weights.resolve())}


def _write_head(model: Model, backbone: Mapping[str, Any], path: Path) -> None:
    """An adapter file on the merged backbone which attaches nothing: `linear_probe` with the trained head.

    The weights are read back for it through the backbone's own loader, so a file that would not load is noticed here.

    Raises:
        WeightsError: They do not come back as they were written.
    """
    assert model.header is not None
    config = {**model.header.config, "backbone": dict(backbone), "method": {"name": "core.linear_probe"}}
    composed: Composed = compose(config)
    plain = build(composed, model.class_names)
    own, stored = plain.backbone.network.state_dict(), model.backbone.network.state_dict()
    wrong = [name for name in stored if name not in own or not torch.equal(own[name], stored[name])]
    if wrong or len(own) != len(stored):
        raise WeightsError(
            f"the merged weights do not come back through backbone '{composed.nodes['backbone'].name}' as they were "
            f"written ({', '.join(wrong[:3]) or 'its network has other tensors'}); the adapter file is untouched"
        )
    header = Header(**{
        **model.header.__dict__, "config": composed.to_dict(), "fingerprint": fingerprint(own), "metrics": {},
        "facts": {},
    })  # fmt: skip
    save_adapter(path, tensors_of(plain.adapter, model.head), header)


def _plain(value: object) -> str:
    return str(value).replace(" ", "")
