"""Reading the checkpoint files that Point-MAE, Point-BERT, ACT, ReCon and IDPT publish (not PointGPT: another network).

The files differ in the entry that holds the weights, in a prefix, and in what else lies beside the backbone. Reading
gives the backbone's own names; matching then insists that every tensor of the backbone is there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 — only the exception class, raised by torch's safe reader
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_modal.errors import WeightsError

ENTRIES = ("base_model", "model", "model_state_dict", "state_dict")
"""Entries that may hold the weights, in order of preference."""

PREFIXES = ("", "MAE_encoder.", "transformer_q.", "ACT_encoder.", "base_model.")
"""What may stand in front of the backbone's names. Not `transformer_k.`, Point-BERT's momentum copy of the network."""

PROBE = "blocks.blocks.0.attn.qkv.weight"

_IGNORED = frozenset(
    {
        # pre-training heads and tokens
        *("mask_token", "decoder_pos_embed", "MAE_decoder", "increase_dim", "lm_head", "cls_head", "dvae"),
        # ReCon's image and text queries
        *("img_token", "img_pos", "text_token", "text_pos"),
    }
)
_IGNORED_IN_BLOCK = frozenset({"norm1_contrast", "norm2_contrast", "mlp_contrast", "attn_contrast"})

_OPTIONAL = ("cls_token", "cls_pos")
_REDUCTION = "reduce_dim.weight"
_COUNTER = "num_batches_tracked"

_REFUSED = re.compile(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) (\S+)")
"""How torch's safe reader names a class that it does not open; its own text recommends the unsafe reader."""


@dataclass(frozen=True)
class BackboneMatch:
    """How a file's tensors fit a network."""

    filled: dict[str, Tensor]
    """The tensors to load, under the network's names."""
    missing: tuple[str, ...]
    """Of `cls_token` and `cls_pos`, those the file lacks: they stay at their random draw and must be trained."""
    unexpected: tuple[str, ...]
    """Names in the file that the network does not have, for instance a head."""


def read_point_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a published point-transformer file under the authors' names, without prefix and `module.`.

    Reads `.safetensors` files, and PyTorch files without running any code stored in them. Pre-training decoders,
    teachers, momentum copies and ReCon's contrast branch are left out; heads of fine-tuned files stay.

    Args:
        path: The file, of any of the sources above, or a plain state dict of the network.

    Returns:
        Names and tensors, on the CPU.

    Raises:
        WeightsError: The file is missing, damaged, holds objects other than weights, has no weights of a point
            transformer, or has them under an unknown prefix.
    """
    path = Path(path)
    content = _read(path)
    state = {_drop_module(name): tensor for name, tensor in _weights_of(content, path).items()}
    prefix = _find_prefix(state, path)
    stripped = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in stripped.items() if not _is_ignored(name)}


def match_backbone(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str = "the file"
) -> BackboneMatch:
    """Sorts a file's tensors into those that fill the network and the rest.

    Args:
        state: The result of `read_point_checkpoint`.
        expected: The network's state dict; only names and shapes are read.
        where: What errors call the file.

    Returns:
        What to load, and what is missing or left over. Only `cls_token` and `cls_pos` may be missing (Point-MAE's
        pre-training has none), and BatchNorm's batch counters, which no result depends on.

    Raises:
        WeightsError: A tensor of encoder, position MLP, blocks or norm is missing or has another shape, or the file has
            a layer behind the mini-PointNet that the network lacks.
    """
    if _REDUCTION in state and _REDUCTION not in expected:
        raise WeightsError(
            f"backbone weights: {where} holds '{_REDUCTION}' {tuple(state[_REDUCTION].shape)}, as Point-BERT's do; set "
            f"backbone.encoder_dim to {state[_REDUCTION].shape[-1]}."
        )
    missing = [name for name in expected if name not in state and not name.endswith(_COUNTER)]
    required = [name for name in missing if name not in _OPTIONAL]
    if required:
        raise WeightsError(
            f"backbone weights: {len(required)} of {len(expected)} tensors are not in {where}: {_some(required)}; "
            "check that depth and encoder_dim of the backbone are those of the file."
        )
    filled = {name: state[name] for name in expected if name in state}
    wrong = [
        f"{name} is {tuple(tensor.shape)} and should be {tuple(expected[name].shape)}"
        for name, tensor in filled.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise WeightsError(
            f"backbone weights: {len(wrong)} tensors of {where} have another shape: {_some(wrong)}; "
            "choose the backbone sizes that the file was trained with."
        )
    return BackboneMatch(
        filled=filled, missing=tuple(missing), unexpected=tuple(name for name in state if name not in expected)
    )


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise WeightsError(f"backbone weights: there is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_harmless_classes()):
            content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 — published files are pickles; weights_only runs no code of theirs
    except Exception as error:  # a parser that meets damaged bytes raises whatever it likes, struct.error for one
        refused = _REFUSED.search(str(error)) if isinstance(error, UnpicklingError) else None
        if refused:
            raise WeightsError(
                f"backbone weights: {path} also stores an object of {refused[1]}, which is not opened because it could "
                "run code; in the project that made the file, save the weights alone."
            ) from error
        raise WeightsError(
            f"backbone weights: {path} is damaged or not a weights file; fetch it again. Reason: {_reason(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"backbone weights: {path} holds a {type(content).__name__}, not a dictionary of weights.")
    return content


def _harmless_classes() -> list[Any]:
    """Classes beside tensors that published files hold: command-line arguments, and metrics as NumPy scalars."""
    scalar = np.float64(0).__reduce__()[0]
    old_name = "numpy.core.multiarray.scalar"  # as NumPy 1 wrote it
    kinds = ("float64", "float32", "float16", "int64", "int32", "bool")
    return [argparse.Namespace, scalar, (scalar, old_name), np.dtype, *(type(np.dtype(kind)) for kind in kinds)]


def _weights_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    for entry in ENTRIES:
        if isinstance(content.get(entry), Mapping):
            content = content[entry]
            break
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise WeightsError(
            f"backbone weights: {path} holds no weights; looked for {', '.join(ENTRIES)}, found {_some(list(content))}."
        )
    return weights


def _drop_module(name: str) -> str:
    """Removes every `module.` that DataParallel wrote, wherever it stands."""
    return ".".join(part for part in name.split(".") if part != "module")


def _find_prefix(state: Mapping[str, Tensor], path: Path) -> str:
    found = [prefix for prefix in PREFIXES if prefix + PROBE in state]
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(
            f"backbone weights: {path} holds several point transformers, under {_some([f'{p!r}' for p in found])}; "
            "keep one of them."
        )
    elsewhere = [name.removesuffix(PROBE) for name in state if name.endswith(PROBE)]
    if elsewhere:
        raise WeightsError(
            f"backbone weights: {path} has a point transformer under the unknown prefix '{elsewhere[0]}'; known are "
            f"{', '.join(repr(prefix) for prefix in PREFIXES)}. Rename its tensors to one of these."
        )
    raise WeightsError(
        f"backbone weights: {path} has no point transformer: no tensor is called '{PROBE}'; it holds "
        f"{_some(list(state))}."
    )


def _is_ignored(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in _IGNORED or (parts[0] == "blocks" and not _IGNORED_IN_BLOCK.isdisjoint(parts))


def _some(names: list[str], *, count: int = 4) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):
        return "its pickle cannot be read"
    return str(error).strip().split("\n", 1)[0].split(". ", 1)[0] or type(error).__name__
