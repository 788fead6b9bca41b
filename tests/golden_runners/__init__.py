"""Golden cases: numbers of the authors' code, fed to the product's own classes.

Each module runs the cases of a few slugs; none computes anything itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from golden_runners import (
    audio_adapters,
    audio_network,
    block_adapters,
    expert_mixture,
    geometry_prompts,
    kernels,
    magnitude_selection,
    part_segmentation,
    point_network,
    point_pretraining,
    prompt_generator,
    sensitivity_allocation,
    single_weight,
    spectral_adapter,
    tracking,
    vision_transformer,
    weight_masks,
)
from golden_runners.golden_case import GoldenCase

RUNNERS: dict[str, Callable[[GoldenCase], None]] = {
    "backbone-pointmae": point_network.plain,
    "vpt-3d": point_network.static_prompts,
    "idpt-classifier": point_network.dynamic_prompt,
    "pointmae-pretrain": point_pretraining.step,
    "pointgst": spectral_adapter.adapter,
    "point-peft": geometry_prompts.prior_and_geometry,
    "idpt": prompt_generator.generators,
    "pointcloud-part-segmentation": part_segmentation.pieces,
    "pointcloud-part-segmentation-full-plain": part_segmentation.plain,
    "pointcloud-part-segmentation-full-idpt": part_segmentation.prompted,
    "ssf": vision_transformer.ssf,
    "vpt-shallow": vision_transformer.vpt_shallow,
    "vpt-deep": vision_transformer.vpt_deep,
    "adaptformer": block_adapters.adaptformer,
    "adaptformer-bench": block_adapters.adaptformer,
    "adapter-pfeiffer": block_adapters.pfeiffer,
    "lora-qkv": block_adapters.lora,
    "bi-adaptformer": block_adapters.bi_adaptformer,
    "bi-lora": block_adapters.bi_lora,
    "bi-quantizer": single_weight.quantiser,
    "spt-allocation": sensitivity_allocation.allocation,
    "spt-lora-block": sensitivity_allocation.block,
    "spt-adapter-block": sensitivity_allocation.block,
    "mosa": expert_mixture.mosa,
    "snell": kernels.update,
    "snell-dense": kernels.update,
    "snella": kernels.update,
    "snella-allocator": kernels.allocator,
    "loca": single_weight.cosine_spectrum,
    "convpass": block_adapters.convpass,
    "repadapter": block_adapters.repadapter,
    "fact-tt": block_adapters.fact,
    "fact-tk": block_adapters.fact,
    "r-amt": weight_masks.step,
    "sara": magnitude_selection.sara,
    "backbone-ast-features": audio_network.features,
    "backbone-ast-posembed": audio_network.positions,
    "backbone-ast-model": audio_network.network,
    "petl-ast-houlsby": audio_adapters.houlsby,
    "petl-ast-pfeiffer": audio_adapters.pfeiffer,
    "petl-ast-placements": audio_adapters.placements,
    "petl-ast-conformer": audio_adapters.conformer,
    "petl-ast-lora": audio_adapters.lora,
    "petl-ast-prefix": audio_adapters.prefix,
    "petl-ast-prompt": audio_adapters.prompts,
    "petl-ast-moa": audio_adapters.mixtures,
    "lorat-input-embed": tracking.input_embed,
    "lorat-head": tracking.head,
    "lorat-loss": tracking.loss,
    "lorat-network": tracking.network,
    "lorat-crop": tracking.crops,
    "data-tracking-metrics": tracking.metrics,
}


def run_case(folder: Path) -> None:
    """Run the case in a folder; a slug without a runner skips.

    Raises:
        AssertionError: Something differs, or was left out.
    """
    slug = json.loads((folder / "case.json").read_text(encoding="utf-8"))["slug"]
    if slug not in RUNNERS:
        pytest.skip(f"missing: {slug}")
    case = GoldenCase(folder)
    RUNNERS[slug](case)
    case.finish()
