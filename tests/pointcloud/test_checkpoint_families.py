"""Contracts of the point clouds' own methods, and of the usual ones, on weights of every published family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contract.cases import BF16_TOLERANCE, EXEMPT, REFUSED, registry
from point_checkpoints import LAYOUTS

from peft_modal.methods import Method
from peft_modal.testing import check_bf16, run_contract
from peft_modal.testing.matrix import example_methods
from peft_modal_pointcloud.backbone import PointMAEBackbone

FAMILIES = ("point-mae", "point-bert", "act", "recon")
OWN = ("idpt", "idpt_parts", "point_peft", "pointgst", "lora", "vpt", "pfeiffer", "ssf", "bitfit")
"""By day; all others at night."""
SIZES = {
    "dim": 24, "depth": 3, "num_heads": 3, "num_group": 24, "group_size": 8, "pointnet_dims": [8, 16, 16],
    "drop_path": 0.0, "init": "torch",
}  # fmt: skip
ONLY = {"idpt": "classification", "idpt_parts": "segmentation"}
"""Two forms of one method."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each family."""
    folder, made = tmp_path_factory.mktemp("families"), {}
    for family in FAMILIES:
        source = PointMAEBackbone(weights="random", **SIZES, **own_sizes(family), init_seed=1)  # type: ignore[arg-type]
        made[family] = folder / f"{family}.pth"
        torch.save(LAYOUTS[family](source.network.state_dict()), made[family])
    return made


def own_sizes(family: str) -> dict[str, int]:
    return {"encoder_dim": 16} if family == "point-bert" else {}


def loaded(family: str, path: Path, *, segments: bool) -> Callable[[], PointMAEBackbone]:
    options = {**SIZES, **own_sizes(family), **({"has_cls": False, "levels": 2} if segments else {})}

    def make() -> PointMAEBackbone:
        backbone = PointMAEBackbone(weights=str(path), **options)  # type: ignore[arg-type]
        backbone.load_weights()
        return backbone

    return make


@functools.cache
def methods() -> dict[str, Method]:
    return dict(example_methods(registry(), modality="pointcloud"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("job", ["classification", "segmentation"])
@pytest.mark.parametrize(
    "name", [name if name in OWN else pytest.param(name, marks=pytest.mark.nightly) for name in sorted(methods())]
)
def test_contracts_hold_on_weights_of_every_family(name: str, job: str, family: str, files: dict[str, Path]) -> None:
    if ONLY.get(name, job) != job:
        pytest.skip("the other form of it serves this task")
    if (name, "point_mae") in REFUSED:
        pytest.skip("it is refused; tests/contract says why")
    factory = loaded(family, files[family], segments=job == "segmentation")
    exempt = EXEMPT.get((name, "point_mae"), ())
    results = run_contract(factory, methods()[name], exempt=exempt, leave_out=["bf16", "compile"])
    assert {contract: said for contract, said in results.items() if said.startswith("failed")} == {}
    check_bf16(factory, methods()[name], tolerance=BF16_TOLERANCE["idpt", "point_mae"])
