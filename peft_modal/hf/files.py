"""Hugging Face peft's LoRA folders: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Another key format (diffusers) needs only its own naming of the pairs that `peft_modal.hf.pairs` collects.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_modal.attach import Adapter
from peft_modal.errors import FileFormatError
from peft_modal.extras import require
from peft_modal.files import read_tensors, write_tensors, write_text
from peft_modal.hf.pairs import Pair, pairs_of

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
REST: Final = "rest.safetensors"
"""What peft's format has no place for: the head, and trained tensors of the backbone's own."""

_PREFIX: Final = "base_model.model."
_IN_PROJ: Final = "in_proj_weight"
_OUT_PROJ: Final = ".base_layer.out_proj"
"""Where peft's layer for MultiheadAttention keeps the output projection."""

_TWICE: Final = (
    "peft applies it twice (huggingface/peft#3774), so it means two things; adapt `attn.qkv` without `attn.out`, or "
    "merge the adapter"
)

_README: Final = """\
# LoRA for {backbone}

`{weights}` and `{config}` are in Hugging Face peft's format; they fit the network of the backbone `{backbone}` of
peft_modal under its own module names:

    from peft import PeftModel
    model = PeftModel.from_pretrained(network, "this folder")

{rest}
"""


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA folder that was read: pairs of whole tensors under peft's module paths."""

    pairs: tuple[Pair, ...]
    config: Mapping[str, Any]
    rest: Mapping[str, Tensor]
    """`head.*` and `backbone.*` where the folder was written here; else empty."""


def export_lora(
    adapter: Adapter, folder: Path, *, head: nn.Module | None = None, backbone_name: str = "the backbone"
) -> tuple[Path, ...]:
    """Write an adapter that is nothing but LoRA (or DoRA) as a folder of peft's.

    Loaded by peft over the plain network, it computes what the adapter computes. Slices of a fused tensor become one
    pair of the summed rank; MultiheadAttention gets a pair of zeros for its output projection, as peft adapts both. The
    head and trained tensors of the backbone's own go into a file beside them.

    Args:
        adapter: The adapter, attached.
        folder: Where to.
        head: The head, if there is one.
        backbone_name: For the folder's README.

    Returns:
        The files written.

    Raises:
        FileFormatError: Part of the adapter is no low-rank update.
        MissingExtraError: peft is not installed.
    """
    require("peft", extra="hf")
    pairs = _for_peft(pairs_of(adapter), adapter)
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        tensors |= {f"{_PREFIX}{path}.lora_A.weight": pair.down, f"{_PREFIX}{path}.lora_B.weight": pair.up}
        if pair.magnitude is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = pair.magnitude
    rest = {name: value for name, value in adapter.state().items() if name.startswith("backbone.")}
    if head is not None:
        rest |= {f"head.{name}": value for name, value in head.state_dict().items()}
    written = [folder / CONFIG, folder / WEIGHTS, folder / "README.md"]
    write_text(written[0], json.dumps(_config(pairs, adapter), indent=2, sort_keys=True) + "\n")
    write_tensors(written[1], tensors, {"kind": "peft_lora"})
    if rest:
        write_tensors(folder / REST, rest, {"kind": "peft_rest"})
        written.append(folder / REST)
    else:
        (folder / REST).unlink(missing_ok=True)  # of an earlier export
    told = f"`{REST}` holds what that format has no place for: {', '.join(_kinds(rest))}." if rest else ""
    write_text(written[2], _README.format(backbone=backbone_name, weights=WEIGHTS, config=CONFIG, rest=told))
    return tuple(written)


def _kinds(rest: Iterable[str]) -> list[str]:
    names = {"head": "the head (`head.*`)", "backbone": "trained tensors of the network's own (`backbone.*`)"}
    return [text for key, text in names.items() if any(name.startswith(f"{key}.") for name in rest)]


def _for_peft(pairs: Sequence[Pair], adapter: Adapter) -> dict[str, Pair]:
    """Pairs by the module path that peft gives them.

    Raises:
        FileFormatError: peft has no name for one of them.
    """
    by_place = {(pair.holder, pair.tensor): pair for pair in pairs}
    named: dict[str, Pair] = {}
    for (holder, tensor), pair in by_place.items():
        parent, _, name = holder.rpartition(".")
        attention = holder if tensor == _IN_PROJ else parent if name == "out_proj" else ""
        module = adapter.backbone.network.get_submodule(attention) if attention else None
        if isinstance(module, nn.MultiheadAttention):
            named |= _attention(attention, module, by_place)
        elif tensor == "weight":
            named[holder] = pair
        else:
            raise FileFormatError(f"'{holder}.{tensor}' is no module's weight, so peft has no name for its update")
    if len({pair.magnitude is None for pair in named.values()}) > 1:
        raise FileFormatError("only some of the updates are DoRA's, which one configuration of peft's cannot say")
    return named


def _attention(path: str, module: nn.MultiheadAttention, pairs: Mapping[tuple[str, str], Pair]) -> dict[str, Pair]:
    """Both pairs of a MultiheadAttention, of one rank; peft adapts its input and output projection together.

    Raises:
        FileFormatError: One of them is DoRA's, or the output projection is adapted.
    """
    found = {_IN_PROJ: pairs.get((path, _IN_PROJ)), "out_proj": pairs.get((f"{path}.out_proj", "weight"))}
    if any(pair is not None and pair.magnitude is not None for pair in found.values()):
        raise FileFormatError(f"peft has no DoRA for the MultiheadAttention '{path}'")
    if found["out_proj"] is not None and bool(found["out_proj"].up.any()):
        raise FileFormatError(f"the update of '{path}.out_proj' cannot be written: {_TWICE}")
    rank = max(pair.rank for pair in found.values() if pair is not None)
    weights = {_IN_PROJ: module.in_proj_weight, "out_proj": module.out_proj.weight}
    named = {}
    for which, suffix in ((_IN_PROJ, ""), ("out_proj", _OUT_PROJ)):
        weight, pair = weights[which].detach(), found[which]
        if pair is None:
            none = Pair(path, which, weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(len(weight), rank), 1.0)
        named[path + suffix] = none if pair is None else pair.padded(rank)
    return named


def _config(pairs: Mapping[str, Pair], adapter: Adapter) -> dict[str, Any]:
    from peft import LoraConfig

    modules = {path: pair for path, pair in pairs.items() if not path.endswith(_OUT_PROJ)}
    names = [path for path, _ in adapter.backbone.network.named_modules()]
    config = LoraConfig(**lora_settings(modules, names), inference_mode=True)
    written: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    written["peft_type"] = "LORA"
    return {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}


def lora_settings(pairs: Mapping[str, Pair], names: Iterable[str]) -> dict[str, Any]:
    """Arguments of peft's `LoraConfig` that make of pairs what they are here.

    Args:
        pairs: By the path of their module.
        names: Paths of all modules of the network.
    """
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0]
    scale = Counter(pair.scale for pair in pairs.values()).most_common(1)[0][0]
    # peft takes a pattern for the end of a path and the first that fits; the longer one is the more exact.
    paths = sorted(pairs, key=lambda path: (-len(path), path))
    alphas = {path: pairs[path].scale * pairs[path].rank for path in paths}
    return {
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": _targets(sorted(pairs), names),
        "rank_pattern": {re.escape(path): pairs[path].rank for path in paths if pairs[path].rank != rank},
        "alpha_pattern": {re.escape(path): alpha for path, alpha in alphas.items() if alpha != scale * rank},
        "use_dora": any(pair.magnitude is not None for pair in pairs.values()),
    }


def _targets(paths: list[str], names: Iterable[str]) -> list[str] | str:
    """The modules' full paths; as one expression where the end of another module's path is the same."""
    chosen = set(paths)
    for path in names:
        if path not in chosen and any(path.endswith(f".{target}") for target in paths):
            return "|".join(re.escape(target) for target in paths)
    return paths


def read_lora(folder: Path) -> LoraFolder:
    """Read a LoRA folder of peft's.

    Raises:
        FileFormatError: It is incomplete, damaged, of another tuner, or holds what is no low-rank pair.
    """
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        hint = "; pickles (adapter_model.bin) are never opened" if (folder / "adapter_model.bin").is_file() else ""
        raise FileFormatError(f"'{path}' does not exist{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"'{path}' is no readable safetensors file ({error})") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_A|lora_B)\.weight|(.+)\.(lora_magnitude_vector)(?:\.weight)?", key)
        if match is None:
            raise FileFormatError(
                f"'{path}' holds '{key}', which is no low-rank pair; only LoRA and DoRA without trained biases and "
                "modules_to_save can be read"
            )
        module = (match[1] or match[3]).removeprefix(_PREFIX)
        found.setdefault(module, {})[match[2] or match[4]] = value
    pairs = tuple(_pair(module, parts, config, path) for module, parts in found.items())
    for pair in pairs:
        if pair.holder.endswith(_OUT_PROJ) and bool(pair.up.any()):
            raise FileFormatError(f"the update of '{pair.holder}' in '{path}' cannot be read: {_TWICE}")
    pairs = tuple(pair for pair in pairs if not pair.holder.endswith(_OUT_PROJ))
    rest: dict[str, Tensor] = {}
    if (folder / REST).is_file():
        rest, _ = read_tensors(folder / REST)
    return LoraFolder(pairs, config, rest)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileFormatError(f"'{path}' does not exist; --input names the folder of a peft adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise FileFormatError(f"'{path}' is damaged ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise FileFormatError(f"'{path}' is of peft type {kind!r}; only LORA folders can be read")
    wrong = [key for key, kind in (("r", int), ("lora_alpha", (int, float)), ("rank_pattern", (dict, type(None))),
                                   ("alpha_pattern", (dict, type(None))))
             if not isinstance(config.get(key), kind) or isinstance(config.get(key), bool)]  # fmt: skip
    if wrong:
        raise FileFormatError(f"'{path}' is damaged: its '{wrong[0]}' is {config.get(wrong[0])!r}")
    for key, plain in (("bias", "none"), ("fan_in_fan_out", False), ("lora_bias", False), ("modules_to_save", None)):
        if config.get(key, plain) not in {plain, None}:
            raise FileFormatError(f"'{path}' has {key} = {config[key]!r}, which is no low-rank pair and cannot be read")
    variants = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
                "monteclora_config", "layer_replication", "target_parameters", "trainable_token_indices")  # fmt: skip
    used = [key for key in variants if config.get(key)]
    if used:
        raise FileFormatError(f"'{path}' uses {used[0]}, a variant of LoRA that cannot be read")
    return config


def _pair(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> Pair:
    from peft.utils.other import get_pattern_key

    missing = {"lora_A", "lora_B"} - set(parts)
    if missing:
        raise FileFormatError(f"'{path}' holds no {sorted(missing)[0]} for '{module}'")
    if ("lora_magnitude_vector" in parts) != bool(config.get("use_dora")):
        raise FileFormatError(f"'{path}' and its {CONFIG} disagree on use_dora at '{module}'")
    down, up, target = parts["lora_A"], parts["lora_B"], module.removesuffix(_OUT_PROJ)
    ranks: dict[str, int] = config["rank_pattern"] or {}
    alphas: dict[str, float] = config["alpha_pattern"] or {}
    rank = ranks.get(get_pattern_key(list(ranks), target), config["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), target), config["lora_alpha"])
    if down.dim() < 2 or up.dim() < 2 or not down.shape[0] == up.shape[1] == rank:
        raise FileFormatError(
            f"'{path}': the pair of '{module}' has shapes {tuple(down.shape)} and {tuple(up.shape)}, not rank {rank}"
        )
    magnitude = parts.get("lora_magnitude_vector")
    scale = float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
    return Pair(module, "weight", down, up, scale, magnitude)
