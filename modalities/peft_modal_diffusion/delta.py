"""Few changed entries of a pipeline's weights as a file of their own: what SaRA learns, for any diffusers pipeline.

A file holds for each changed tensor, under its name in the pipeline (`unet.conv_in.weight`), two vectors of one length:
`<name>.index`, flat row-major positions (int32, or int64 where a tensor has more entries), and `<name>.delta`, what is
added there (float32). `apply_delta` is all that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from peft_modal.api import Exported, Model
from peft_modal.attach import merge_
from peft_modal.errors import BackboneMismatchError, FileFormatError, MergeError
from peft_modal.files import fingerprint, read_tensors, write_tensors
from peft_modal_diffusion.reference import Reference

KIND: Final = "pipeline_delta"
_SUFFIX: Final = ".safetensors"


def apply_delta(pipeline: Any, file: str | Path, alpha: float = 1.0, *, check: bool = True) -> Callable[[], None]:  # noqa: ANN401
    """Add the changes of a file to a plain diffusers pipeline, in place.

    Args:
        pipeline: A pipeline of diffusers.
        file: What `export --format delta` wrote.
        alpha: Factor of the changes, usually 0 to 2.
        check: Refuse a float32 pipeline of other weights; switch it off to add a second file to a first.

    Returns:
        A function that puts the former values back; of several, undo the last first.

    Raises:
        FileFormatError: It is no such file, or damaged.
        BackboneMismatchError: The pipeline lacks a tensor, or has other weights than those that were tuned.
    """
    tensors, document = read_tensors(Path(file))
    if document.get("kind") != KIND:
        raise FileFormatError(f"'{file}' holds no changes of a pipeline; `export --format delta` writes them")
    names = [name.removesuffix(".index") for name in tensors if name.endswith(".index")]
    where = {name: tensors[f"{name}.index"].long() for name in names}
    places = {name: (_parameter(pipeline, name, index, file), index) for name, index in where.items()}
    former = {name: parameter.detach().take(index.to(parameter.device)) for name, (parameter, index) in places.items()}
    is_exact = all(value.dtype == torch.float32 for value in former.values())
    if check and is_exact and fingerprint(former) != document["base"]:
        raise BackboneMismatchError(f"'{file}' was made on other weights than this pipeline's: {document['weights']}")
    for name, (parameter, index) in places.items():
        changed = former[name] + alpha * tensors[f"{name}.delta"].to(parameter.device)
        _put(parameter, index, changed)

    def undo() -> None:
        for name, (parameter, index) in places.items():
            _put(parameter, index, former[name])

    return undo


def export_delta(model: Model, out: Path) -> Exported:
    """`export --format delta`: the entries that merging would change, of an adapter that changes few.

    Raises:
        ConfigError: The adapter is not of a pipeline's denoiser.
        FileFormatError: It changes too many entries, or adds tensors; or a fresh pipeline computes something else.
        MergeError: It has no equivalent in plain weights.
    """
    reference = Reference.of(model.backbone)
    network = model.backbone.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        merge_(model.backbone)
    except MergeError as error:
        raise MergeError(f"the adapter has no changes of weights that could be written: {error}") from error
    tensors, base = _changes(before, network.state_dict())
    size, whole = (sum(t.numel() * t.element_size() for t in found.values()) for found in (tensors, before))
    if size >= whole / 2:
        raise FileFormatError(
            f"the adapter changes so many entries that the file would take {size / whole:.0%} of the network itself; "
            "`merge` writes a complete pipeline, `export --format diffusers` a LoRA"
        )
    file = out if out.suffix == _SUFFIX else out / "delta.safetensors"
    document = {
        "kind": KIND, "base": fingerprint(base), "weights": reference.backbone.layout.source,
        "method": model.composed.nodes["method"].name,
    }  # fmt: skip
    deviation = reference.write(file, lambda path: write_tensors(path, tensors, document), apply_delta)
    changed = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".index"))
    return Exported(
        (file,),
        (
            f"{changed} changed entries; apply_delta of peft_modal_diffusion.delta adds them to a pipeline",
            f"checked with diffusers: outputs differ by at most {deviation:.2g}",
        ),
    )


def _changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Positions and changes, and the values that stood there.

    Raises:
        FileFormatError: A tensor was added.
    """
    if added := [name for name in after if name not in before]:
        raise FileFormatError(f"the adapter adds '{added[0]}', which the pipeline lacks; `merge` writes a complete one")
    tensors: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for name, tensor in after.items():
        old, new = before[name].flatten(), tensor.flatten()
        index = (old != new).nonzero().flatten()
        if index.numel():
            small = torch.int32 if old.numel() < 2**31 else torch.int64
            base[name] = old[index]
            tensors |= {f"{name}.index": index.to(small), f"{name}.delta": new[index] - base[name]}
    return tensors, base


def _parameter(pipeline: Any, name: str, index: Tensor, file: str | Path) -> Tensor:  # noqa: ANN401
    part, _, path = name.partition(".")
    try:
        found: Tensor = getattr(pipeline, part).get_parameter(path)
    except AttributeError as error:
        raise BackboneMismatchError(f"the pipeline has no '{name}', which '{file}' changes") from error
    if index.numel() and int(index.max()) >= found.numel():
        raise BackboneMismatchError(f"'{name}' of the pipeline is smaller than the one that '{file}' changes")
    return found


@torch.no_grad()
def _put(parameter: Tensor, index: Tensor, values: Tensor) -> None:
    parameter.put_(index.to(parameter.device), values.to(parameter))
