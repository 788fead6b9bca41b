"""Data of part segmentation: parts of generated objects, ShapeNetPart on disk, augmentation, files to predict on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shapenet_trees import write_shapenet

from peft_modal.errors import ConfigError, DataError
from peft_modal_pointcloud.augment import batch_scale_translate, build_augment, scale, shift
from peft_modal_pointcloud.part_data import PartSolids, ShapeNetPart
from peft_modal_pointcloud.shapenet_part import PART_NAMES, list_clouds, read_parts
from peft_modal_pointcloud.solids import DOWNSTREAM_FAMILIES, make_solids, observe_parts, part_labels, part_names
from peft_modal_pointcloud.solids.assembly import Assembly
from peft_modal_pointcloud.solids.families_downstream import FAMILIES
from peft_modal_pointcloud.solids.parts import NO_PART, RUNS
from peft_modal_pointcloud.solids.primitives import sample_primitives, sample_surface

SMALL: dict[str, Any] = {
    "shots": 2, "val_per_category": 1, "test_per_category": 2, "num_points": 24, "pool_points": 40, "batch_size": 6,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def solids(**options: Any) -> PartSolids:
    module = PartSolids(**{**SMALL, **options})
    module.setup()
    return module


@pytest.mark.parametrize("family", DOWNSTREAM_FAMILIES)
def test_every_primitive_of_a_family_belongs_to_one_part(family: str) -> None:
    assembly = Assembly(3, generator=generator())
    FAMILIES[family](assembly)
    assert sum(count for _, count in RUNS[family]) == len(assembly._slots)


def test_parts_are_numbered_through_and_spare_places_have_none() -> None:
    names, labels = part_names(DOWNSTREAM_FAMILIES), part_labels(DOWNSTREAM_FAMILIES)
    assert len(DOWNSTREAM_FAMILIES) >= 6
    assert len(names) == len(set(names)) == int(labels.max()) + 1 >= 18
    for row, family in zip(labels, DOWNSTREAM_FAMILIES, strict=True):
        found = sorted({names[label] for label in row[row != NO_PART].tolist()})
        assert found == sorted({f"{family}/{part}" for part, _ in RUNS[family]})


def test_a_point_lies_on_the_primitive_that_it_is_said_to_lie_on() -> None:
    made = make_solids(DOWNSTREAM_FAMILIES, 4, generator=generator())
    points, chosen = sample_primitives(made, 200, generator=generator(1))
    assert torch.equal(points, sample_surface(made, 200, generator=generator(1)))
    row = torch.arange(len(made))[:, None]
    assert bool(made.on[row, chosen].all())
    local = ((points - made.centre[row, chosen])[..., None, :] @ made.rotation[row, chosen]).squeeze(-2)
    is_box = made.kind[row, chosen] == 0
    inside = (local.abs() <= made.shape[row, chosen][..., :3] + 1e-4).all(-1)
    assert bool(inside[is_box].all())


@pytest.mark.parametrize(
    ("family", "above", "below"),
    [
        ("chair", "back", "leg"), ("stool", "seat", "leg"), ("sofa", "back", "foot"), ("desk", "top", "drawers"),
        ("display", "screen", "stand"), ("bin", "lid", "wheel"), ("bag", "handle", "pocket"), ("sink", "tap", "basin"),
        ("toilet", "seat", "foot"), ("pedestal_table", "top", "foot"), ("cabinet", "door", "foot"),
    ],
)  # fmt: skip
def test_parts_stand_where_they_belong(family: str, above: str, below: str) -> None:
    made = make_solids((family,), 40, generator=generator())
    points, parts = observe_parts(
        made, part_labels((family,)), num_points=400, generator=generator(1), corrupt=False
    )  # fmt: skip
    names = part_names((family,))
    high, low = (parts == names.index(f"{family}/{part}") for part in (above, below))
    both = high.any(1) & low.any(1)
    assert int(both.sum()) >= 3
    mean = [(points[..., 1] * mask).sum(1) / mask.sum(1) for mask in (high, low)]
    assert float((mean[0] > mean[1])[both].float().mean()) > 0.9


def test_the_shelf_has_its_boards_between_its_sides() -> None:
    made = make_solids(("shelf",), 40, generator=generator())
    points, parts = observe_parts(made, part_labels(("shelf",)), num_points=400, generator=generator(1), corrupt=False)
    names = part_names(("shelf",))
    side, board = (points[..., 0].abs()[parts == names.index(f"shelf/{part}")].mean() for part in ("side", "board"))
    assert float(side) > float(board)


def test_corrupted_clouds_keep_the_part_of_every_point() -> None:
    made = make_solids(("pedestal_table",), 60, generator=generator())
    points, parts = observe_parts(made, part_labels(("pedestal_table",)), num_points=300, generator=generator(1))
    assert points.shape == (60, 300, 3)
    torch.testing.assert_close(points.norm(dim=2).amax(1), torch.ones(60))
    # Turned about y alone, a top is still above its foot.
    top, foot = ((points[..., 1] * mask).sum(1) / mask.sum(1).clamp(min=1) for mask in (parts == 0, parts == 2))
    seen = (parts == 0).any(1) & (parts == 2).any(1)
    assert int(seen.sum()) > 30
    assert bool((top > foot)[seen].all())
    assert not torch.equal(points, observe_parts(
        made, part_labels(("pedestal_table",)), num_points=300, generator=generator(2))[0])  # fmt: skip


def test_the_embedded_set_has_the_stated_sizes() -> None:
    module = solids()
    assert module.class_names == part_names(DOWNSTREAM_FAMILIES)
    train = list(module.train_dataloader())
    assert len(train) == 4
    for batch in train:
        assert batch["points"].shape == (6, 24, 3)
        assert batch["parts"].shape == (6, 24)
        assert batch["parts"].dtype == batch["category"].dtype == torch.int64
        owner = module.table.category_of[batch["parts"]]
        assert torch.equal(owner, batch["category"][:, None].expand_as(owner))
    test = next(iter(module.test_dataloader()))
    assert test["points"].shape == (12, 24, 3)
    assert len(module.test_dataloader().dataset) == 24


def test_a_seed_changes_training_clouds_but_never_the_test_set() -> None:
    one, other = solids(seed=1), solids(seed=2)
    assert torch.equal(one._sets["test"].points, other._sets["test"].points)
    assert not torch.equal(one._sets["train"].points, other._sets["train"].points)
    again = solids(seed=1)
    first, second = (next(iter(module.train_dataloader())) for module in (one, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parts_stay_with_their_points_when_these_are_drawn_and_moved() -> None:
    module = solids(augment=["shift"])
    pool = module._sets["train"]
    batch = module.train_source(pool).make([3, 5], generator(0))
    for row, index in enumerate((3, 5)):
        moved = batch["points"][row] - (batch["points"][row, 0] - pool.points[index])[:, None]  # (P, 24, 3)
        distances = (moved[:, :, None] - pool.points[index]).norm(dim=3)  # (P, 24, P)
        found, nearest = distances.min(2)
        fits = found.amax(1)
        assert float(fits.min()) < 1e-5
        assert torch.equal(pool.parts[index][nearest[fits.argmin()]], batch["parts"][row])


def test_categories_may_be_chosen() -> None:
    module = solids(categories=["stool", "chair"])
    assert module.table.categories == ("stool", "chair")
    assert module.class_names == PartSolids.class_names_without_data({"categories": ["stool", "chair"]})
    for options, sentence in (
        ({"categories": ["char"]}, "unknown 'char': did you mean 'chair'"),
        ({"categories": ["chair", "chair"]}, "each category once"),
        ({"categories": []}, "each category once, and one at least"),
        ({"category": "cup"}, r"data\.category: 'cup' is unknown"),
        ({"pool_points": 8}, "pool_points is 8"),
        ({"augment": ["turn"]}, "unknown name 'turn'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            PartSolids(**{**SMALL, **options})


def test_augmentations_of_part_segmentation_are_the_published_ones() -> None:
    points = torch.randn(400, 5, 3)
    factor = scale(points, generator()) / points
    torch.testing.assert_close(factor, factor[:, :1, :1].expand_as(factor), atol=1e-3, rtol=1e-4)
    assert 0.8 <= float(factor.min()) < 0.81
    assert 1.24 < float(factor.max()) <= 1.2501
    moved = shift(points, generator()) - points
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), atol=1e-5, rtol=0)
    assert float(moved.abs().max()) == pytest.approx(0.1, abs=1e-3)
    assert len(moved[:, 0].unique()) > 1000
    first, second = batch_scale_translate(points, generator())[:2], points[:2]
    s = (first[0, 0] - first[0, 1]) / (second[0, 0] - second[0, 1])
    torch.testing.assert_close(first, second * s + (first[0, 0] - second[0, 0] * s), atol=1e-4, rtol=1e-4)
    assert len(set(s.tolist())) == 3
    build_augment(["batch_scale_translate", "shift"])


def test_shapenet_part_is_read_as_published(tmp_path: Path) -> None:
    root = tmp_path / "shapenet"
    write_shapenet(root)
    assert len(PART_NAMES) == 50
    assert (PART_NAMES[0], PART_NAMES[36], PART_NAMES[49]) == ("Airplane/0", "Mug/0", "Table/2")
    module = ShapeNetPart(root=root, num_points=20, batch_size=4, augment=[])
    module.setup()
    # By category and name, whatever the order of the list.
    assert [path.stem for path in list_clouds(root, "train")] == ["airplane0", "airplane1", "mug0", "mug1"]
    cloud = module._sets["train"][2]
    assert cloud.category == 11
    assert set(cloud.parts.tolist()) == {36, 37}
    assert float(cloud.points.norm(dim=1).max()) == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(cloud.points.mean(0), torch.zeros(3), atol=1e-6)
    batch = next(iter(module.train_dataloader()))
    assert batch["points"].shape == (4, 20, 3)
    assert sorted(batch["category"].tolist()) == [0, 0, 11, 11]
    first, second = (next(iter(module.test_dataloader())) for _ in range(2))
    assert torch.equal(first["points"], second["points"])
    assert first["points"].shape == (2, 20, 3)
    # Drawn with replacement: 20 draws of 33 points repeat one, but for one chance in 2,000.
    assert len(first["points"][0].unique(dim=0)) < 20


def test_published_numbers_train_on_validation_clouds_too(tmp_path: Path) -> None:
    root = tmp_path / "shapenet"
    write_shapenet(root)
    module = ShapeNetPart(root=root, train_on="trainval", num_points=20, batch_size=2)
    module.setup()
    assert [len(module._sets[part]) for part in ("train", "val", "test")] == [6, 0, 2]
    assert module.val_dataloader() == []


def test_damaged_folders_of_shapenet_part_are_refused_by_name(tmp_path: Path) -> None:
    root = tmp_path / "shapenet"
    with pytest.raises(DataError, match="is not a folder"):
        ShapeNetPart(root=root).setup()
    write_shapenet(root)
    mug = root / "01691156" / "mug0.txt"
    rows = np.loadtxt(mug)
    np.savetxt(mug, rows[:, :6])
    with pytest.raises(DataError, match=r"mug0\.txt' has shape \(30, 6\)"):
        read_parts(mug, "Mug")
    rows[0, 6] = 3
    np.savetxt(mug, rows)
    with pytest.raises(DataError, match=r"has parts \[3, 36, 37\], and those of 'Mug' are 36 to 37"):
        read_parts(mug, "Mug")
    mug.write_text("no numbers")
    with pytest.raises(DataError, match="cannot be read"):
        read_parts(mug, "Mug")
    mug.unlink()
    with pytest.raises(DataError, match=r"mug0\.txt' does not exist, but"):
        list_clouds(root, "train")
    table = root / "train_test_split" / "shuffled_test_file_list.json"
    table.write_text('["shape_data/7/x"]')
    with pytest.raises(DataError, match="expected shape_data/<synset>/<id> of a known synset"):
        list_clouds(root, "test")
    table.write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        list_clouds(root, "test")
    (root / "synsetoffset2category.txt").write_text("Cup\t01\n")
    with pytest.raises(DataError, match="names the category 'Cup'"):
        list_clouds(root, "train")


def test_files_to_predict_on_get_their_category_from_the_option_or_the_folder(tmp_path: Path) -> None:
    (tmp_path / "stool").mkdir()
    points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.save(tmp_path / "stool" / "a.npy", points)
    files, loader = PartSolids(**SMALL).predict_items(tmp_path)
    assert [file.name for file in files] == ["a.npy"]
    (batch,) = loader
    assert batch["points"].shape == (1, 24, 3)
    assert batch["queries"].shape == (1, 50, 3)
    assert batch["category"].tolist() == [DOWNSTREAM_FAMILIES.index("stool")]
    (batch,) = PartSolids(**SMALL, category="desk").predict_items(tmp_path)[1]
    assert batch["category"].tolist() == [DOWNSTREAM_FAMILIES.index("desk")]
    (tmp_path / "stool").rename(tmp_path / "thing")
    with pytest.raises(DataError, match=r"its folder names no category; set --data\.category to one of chair, stool"):
        PartSolids(**SMALL).predict_items(tmp_path)


def test_a_synset_names_a_category_too(tmp_path: Path) -> None:
    root = tmp_path / "shapenet"
    write_shapenet(root)
    module = ShapeNetPart(root=root, num_points=20)
    (batch,) = module.predict_items(root / "01691156" / "mug3.txt")[1]
    assert batch["category"].tolist() == [11]
    assert batch["queries"].shape == (1, 33, 3)
