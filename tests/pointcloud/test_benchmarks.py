"""ScanObjectNN, ModelNet40 and few-shot folds, as published and where a file is wrong."""

from __future__ import annotations

import logging
import pickle  # noqa: TID251 — the published form
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from cloud_benchmarks import (
    SCAN_FILES,
    clouds,
    write_modelnet_fewshot,
    write_modelnet_pickles,
    write_modelnet_text,
    write_scanobjectnn,
)

from peft_modal.comparison.items import parse_methods, parse_seeds
from peft_modal.comparison.plan import make_plan
from peft_modal.compose import compose
from peft_modal.errors import ConfigError, DataError, MissingExtraError
from peft_modal_pointcloud.augment import unit
from peft_modal_pointcloud.batches import POOL_POINTS
from peft_modal_pointcloud.data import Solids
from peft_modal_pointcloud.fewshot import ModelNetFewShot, SolidsFewShot
from peft_modal_pointcloud.modelnet import CLASSES, CLASSES_10, FOLDER, ModelNet40
from peft_modal_pointcloud.pools import farthest_of_each
from peft_modal_pointcloud.sampling import farthest_point_sample
from peft_modal_pointcloud.scanobjectnn import ScanObjectNN

SMALL = {"num_points": 24, "pool_points": 32, "batch_size": 4}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


def stacked(loader, key: str = "points") -> torch.Tensor:
    return torch.cat([batch[key] for batch in loader])


# ScanObjectNN.


@pytest.fixture
def scans(tmp_path) -> Path:
    write_scanobjectnn(tmp_path / "scans", points=64)
    return tmp_path / "scans"


@pytest.mark.parametrize("variant", SCAN_FILES)
def test_scans_come_bit_for_bit_from_the_files_of_their_variant(scans, variant):
    folder, suffix = SCAN_FILES[variant]
    data = ScanObjectNN(root=scans, variant=variant, val_share=0.0, **SMALL)
    for part, name in (("train", "training"), ("test", "test")):
        found, labels = data.prepared(data.read(part))
        with h5py.File(scans / folder / f"{name}_{suffix}") as file:
            assert np.array_equal(found.numpy(), file["data"][()])
            assert labels.tolist() == file["label"][()].tolist()
    assert torch.equal(data.load("train").clouds, data.read("train")[0])


def test_scans_have_fifteen_classes_and_the_published_defaults(scans):
    data = ScanObjectNN(root=scans / "..", variant="obj_bg")
    assert (data.num_classes, data.class_names[0], data.class_names[-1]) == (15, "bag", "toilet")
    assert data.preprocessing == {"num_points": 2048, "normalize": "none", "sampling": "farthest"}


def test_the_folder_above_main_split_serves_too(scans, tmp_path):
    (tmp_path / "above").mkdir()
    scans.rename(tmp_path / "above" / "h5_files")
    assert len(ScanObjectNN(root=tmp_path / "above", **SMALL).read("test")[0]) == 15


def test_validation_clouds_are_held_out_of_each_class_and_not_lost(scans):
    data = ScanObjectNN(root=scans, val_share=0.5, **SMALL)
    train, val = data.load("train"), data.load("val")
    assert train.labels.bincount().tolist() == val.labels.bincount().tolist() == [1] * 15
    both = {tuple(cloud.flatten().tolist()) for cloud in [*train.clouds]}
    assert len(both) == 15
    everything = data.read("train")[0]
    for cloud, label in zip(val.clouds, val.labels, strict=True):
        homes = [c for c, i in zip(everything, range(30), strict=True) if i % 15 == label]
        assert any({tuple(p) for p in cloud.tolist()} <= {tuple(p) for p in home.tolist()} for home in homes)
    assert not len(ScanObjectNN(root=scans, val_share=0.0, **SMALL).load("val"))


def test_a_count_that_is_not_the_published_one_is_told(scans, caplog):
    with caplog.at_level(logging.WARNING):
        ScanObjectNN(root=scans, variant="obj_bg", **SMALL).read("test")
    assert "15 clouds, and the published file has 581" in caplog.text


def rewrite(path: Path, **arrays) -> None:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"points": np.zeros(3)}, "has no 'data', it holds points"),
        ({"data": np.zeros((2, 64, 3), "f4")}, "has no 'label'"),
        ({"data": np.zeros((2, 64), "f4"), "label": [0, 1]}, r"'data' is float32 \(2, 64\)"),
        ({"data": np.zeros((2, 64, 3), "i4"), "label": [0, 1]}, "'data' is int32"),
        ({"data": np.zeros((2, 64, 3), "f4"), "label": [0]}, r"'label' is int64 \(1,\)"),
        ({"data": np.zeros((2, 64, 3), "f4"), "label": [0, 15]}, r"labels from 0 to 15, expected 0\.\.14"),
        ({"data": np.zeros((0, 64, 3), "f4"), "label": np.zeros(0, "i4")}, "holds no clouds"),
        ({"data": np.full((2, 64, 3), np.nan, "f4"), "label": [0, 1]}, "2 of 2 clouds with NaN"),
        ({"data": np.zeros((2, 20, 3), "f4"), "label": [0, 1]}, "clouds of 20 points, and data.num_points asks for 24"),
    ],
)
def test_a_file_of_scans_that_cannot_serve_is_told(scans, arrays, sentence):
    rewrite(scans / "main_split" / "test_objectdataset.h5", **arrays)
    with pytest.raises(DataError, match=sentence):
        ScanObjectNN(root=scans, variant="obj_bg", **SMALL).load("test")


def test_a_truncated_or_missing_file_of_scans_is_named(scans):
    path = scans / "main_split" / "test_objectdataset.h5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"test_objectdataset\.h5' cannot be read as HDF5"):
        ScanObjectNN(root=scans, variant="obj_bg", **SMALL).load("test")
    path.unlink()
    with pytest.raises(DataError, match=r"test_objectdataset\.h5' does not exist; data.variant 'obj_bg'"):
        ScanObjectNN(root=scans, variant="obj_bg", **SMALL).load("test")
    with pytest.raises(DataError, match=r"no folder 'main_split' \(nor 'h5_files/main_split'\)"):
        ScanObjectNN(root=scans / "main_split", **SMALL).load("test")


def test_without_h5py_the_extra_is_named(scans, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"pip install \"peft-modal\[pointcloud\]\""):
        ScanObjectNN(root=scans, **SMALL).load("test")


# From the stored cloud to the batch.


def test_a_training_batch_has_the_same_places_of_pools_that_farthest_point_sampling_took(scans):
    data = ScanObjectNN(root=scans, val_share=0.0, augment="none", **SMALL)
    source = data.train_source(data.load("train"))
    seen = {}

    def sampled(points, num):
        picked = farthest_point_sample(points, num)
        seen["pool"] = points[torch.arange(len(points))[:, None], picked]
        return picked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_modal_pointcloud.pools.farthest_point_sample", sampled)
        batch = source.batch(0, 0)
    pool = seen["pool"]
    assert pool.shape == (4, 32, 3)
    places = [
        [cloud_pool.tolist().index(point) for point in cloud.tolist()]
        for cloud, cloud_pool in zip(batch["points"], pool, strict=True)
    ]
    assert places == [places[0]] * 4
    assert len(set(places[0])) == 24
    assert sorted(places[0]) != list(range(24))
    assert torch.equal(source.batch(0, 0)["points"], batch["points"])
    assert not torch.equal(source.batch(1, 0)["points"], batch["points"])


def test_each_cloud_may_have_a_draw_of_its_own(scans):
    data = ScanObjectNN(root=scans, val_share=0.0, augment="none", draw="cloud", **SMALL)
    source = data.train_source(data.load("train"))
    cloud = torch.arange(96.0).reshape(32, 3) + 5
    source.clouds = type(source.clouds)(cloud.expand(30, -1, -1), source.clouds.labels)
    first, second, *_ = source.batch(0, 0)["points"]
    assert {tuple(p) for p in first.tolist()} != {tuple(p) for p in second.tolist()}


def test_the_pool_is_of_the_published_size_and_at_most_what_is_stored(scans):
    assert dict(POOL_POINTS) == {1024: 1200, 2048: 2400, 4096: 4800, 8192: 8192}
    data = ScanObjectNN(root=scans, val_share=0.0, num_points=24, pool_points=2400, batch_size=4)
    assert data.train_source(data.load("train")).pool_points == 64
    assert ModelNet40(root=scans).pool_points == 1200


def test_all_points_stored_are_a_permutation_but_for_those_near_the_origin(scans):
    path = scans / "main_split" / "training_objectdataset.h5"
    data = clouds(4, 64, seed=1)
    data[:, 7] = 0.01
    rewrite(path, data=data, label=[0, 1, 2, 3])
    module = ScanObjectNN(root=scans, variant="obj_bg", val_share=0.0, num_points=64, pool_points=64, batch_size=4,
                          augment="none")  # fmt: skip
    source = module.train_source(module.load("train"))
    rows = [{tuple(p) for p in cloud.tolist()} for epoch in range(9) for cloud in source.batch(epoch, 0)["points"]]
    # The point near the origin is there only where it came first.
    assert {len(row) for row in rows} <= {63, 64}
    assert 63 in {len(row) for row in rows}


def test_evaluation_starts_at_the_first_stored_point_and_never_changes(scans):
    one, other = (ScanObjectNN(root=scans, seed=seed, **SMALL).load("test").clouds for seed in (0, 1))
    stored = ScanObjectNN(root=scans, **SMALL).read("test")[0]
    assert torch.equal(one, other)
    for cloud, whole in zip(one, stored, strict=True):
        assert torch.equal(cloud, whole[farthest_point_sample(whole[None], 24)[0]])


def test_what_was_sampled_is_kept(tmp_path, monkeypatch):
    points = torch.from_numpy(clouds(40, 50, seed=0))
    first = farthest_of_each(points, 9)
    monkeypatch.setattr("peft_modal_pointcloud.pools.farthest_point_sample", None)
    assert torch.equal(farthest_of_each(points, 9), first)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_points": 1000}, "num_points: 1000 has no pool .* expected one of 1024, 2048, 4096, 8192"),
        ({"num_points": 64, "pool_points": 32}, r"pool_points: 32 is below num_points \(64\)"),
        ({"augment": "turn"}, "unknown name 'turn'"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(tmp_path, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ScanObjectNN(root=tmp_path, **options)


@pytest.mark.parametrize("value", ["rotate", "none", "[rotate, jitter]", "[]"])
def test_augmentation_is_one_name_none_or_a_list_on_the_command_line(value):
    composed = compose("pointcloud_idpt.yaml", overrides=[f"data.augment={value}"])
    data = composed.nodes["data"].build()
    expected = {"rotate": 1, "none": 0, "[rotate, jitter]": 2, "[]": 0}[value]
    assert len(data.augmentation.steps) == expected


def test_views_to_vote_on_come_from_a_pool_of_more_points(scans):
    data = ScanObjectNN(root=scans, vote_pool=True, **SMALL)
    found = data.load("test")
    assert found.pools.shape == (15, 28, 3)
    stored = data.read("test")[0]
    assert torch.equal(found.pools[0], stored[0][farthest_point_sample(stored[:1], 28)[0]])


# ModelNet40.


@pytest.fixture
def text(tmp_path) -> Path:
    train = ["night_stand_0123", "airplane_0001", "xbox_0002", "tv_stand_0003", "airplane_0009"]
    write_modelnet_text(tmp_path / "m", {"train": train, "test": ["range_hood_0007", "night_stand_0200"]}, points=60)
    return tmp_path / "m"


def test_the_class_of_a_shape_is_all_before_its_number_and_its_label_the_place_in_the_alphabet(text):
    data = ModelNet40(root=text, stored_points=None, **SMALL)
    assert data.read("train")[1].tolist() == [23, 0, 39, 36, 0]
    assert data.read("test")[1].tolist() == [28, 23]
    assert (len(CLASSES), CLASSES[23], list(CLASSES)) == (40, "night_stand", sorted(CLASSES))
    assert set(CLASSES_10) < set(CLASSES)


def test_text_gives_the_points_of_its_files_normalised_and_without_normals(text):
    data = ModelNet40(root=text / FOLDER, stored_points=None, val_share=0.0, **SMALL)
    found = data.load("train").clouds
    stored = np.loadtxt(text / FOLDER / "night_stand" / "night_stand_0123.txt", delimiter=",")[:, :3]
    assert torch.equal(found[0], unit(torch.from_numpy(stored.astype(np.float32))))
    torch.testing.assert_close(found.norm(dim=-1).amax(1), torch.ones(5))


def test_points_of_a_text_file_are_chosen_once_from_a_random_one_on(text, monkeypatch):
    found = ModelNet40(root=text, stored_points=40, **SMALL).read("train")[0]
    assert found.shape == (5, 40, 3)
    stored = np.loadtxt(text / FOLDER / "xbox" / "xbox_0002.txt", delimiter=",", dtype=np.float32)[:, :3]
    points = torch.from_numpy(stored)
    start = int((points == found[2][0]).all(1).nonzero()[0])
    picked = farthest_point_sample(points.roll(-start, 0)[None], 40, skip_origin=False)[0]
    assert torch.equal(found[2], points.roll(-start, 0)[picked])
    monkeypatch.setattr("peft_modal_pointcloud.modelnet.read_cloud", None)
    assert torch.equal(ModelNet40(root=text, stored_points=40, **SMALL).read("train")[0], found)


def test_a_pickle_is_read_once_it_is_allowed(tmp_path):
    write_modelnet_pickles(tmp_path, {"train": [23, 0, 23, 0], "test": [39, 5]}, points=50)
    with pytest.raises(ConfigError, match=r"data\.allow_pickle: '.*_test_8192pts_fps\.dat' is a pickle"):
        ModelNet40(root=tmp_path, **SMALL).read("test")
    data = ModelNet40(root=tmp_path, allow_pickle=True, val_share=0.0, **SMALL)
    found, labels = data.read("train")
    assert labels.tolist() == [23, 0, 23, 0]
    assert np.array_equal(found.numpy(), clouds(4, 50, seed=5, columns=6)[..., :3])
    batch = next(iter(data_loaded(data)))
    assert batch["points"].shape == (4, 24, 3)


def data_loaded(data):
    data.setup("fit")
    return data.train_dataloader()


def test_of_both_forms_the_pickle_goes_first_where_it_is_allowed(text):
    write_modelnet_pickles(text, {"train": [1, 2, 3], "test": [4]}, points=50)
    assert ModelNet40(root=text, allow_pickle=True, **SMALL).read("train")[1].tolist() == [1, 2, 3]
    assert len(ModelNet40(root=text, stored_points=None, **SMALL).read("train")[1]) == 5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([[], []], "holds no clouds"),
        ([1, 2], "no list of points and list of labels"),
        ([[np.zeros((9, 3))], []], "1 clouds and 0 labels"),
        ([[np.zeros(9)], [np.array([1])]], r"a cloud of float64 \(9,\)"),
        ([[[1.0]], [0]], "a cloud of list"),
        ([[np.zeros((9, 3))], ["chair"]], "the label 'chair'"),
        ([[np.zeros((9, 3))], [40]], "labels from 40 to 40"),
        ([[np.zeros((9, 3)), np.zeros((8, 3))], [0, 1]], "clouds of 8 to 9 points"),
    ],
)
def test_a_pickle_of_another_form_is_told(tmp_path, content, sentence):
    (tmp_path / "modelnet40_test_8192pts_fps.dat").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=sentence):
        ModelNet40(root=tmp_path, allow_pickle=True, **SMALL).read("test")


def test_lists_that_do_not_fit_their_files_are_told(text):
    folder = text / FOLDER

    def refused(sentence: str) -> None:
        with pytest.raises(DataError, match=sentence):
            ModelNet40(root=text, stored_points=None, **SMALL).read("test")

    (folder / "modelnet40_test.txt").write_text("night_stand_0123\nnight_stand_0009\n", encoding="utf-8")
    refused(r"names 1 shapes without a file, such as '.*night_stand_0009\.txt'")
    (folder / "modelnet40_test.txt").write_text("night_0123\n", encoding="utf-8")
    refused("there is no class 'night'")
    (folder / "modelnet40_shape_names.txt").write_text("airplane\n", encoding="utf-8")
    refused("does not hold the 40 classes")
    (folder / "modelnet40_test.txt").unlink()
    refused(r"neither 'modelnet40_test\.txt' nor 'modelnet40_test_8192pts_fps\.dat'")


def test_a_shape_with_too_few_points_is_named(text):
    with pytest.raises(DataError, match=r"night_stand_0123\.txt' has 60 points, and data.stored_points asks for 61"):
        ModelNet40(root=text, stored_points=61, **SMALL).read("train")


# Few-shot.


@pytest.mark.parametrize("folder", ["5way_10shot", "5way10shot"])
def test_a_fold_is_read_from_either_spelling_and_its_number_is_the_seed(tmp_path, folder):
    for fold in (0, 3):
        write_modelnet_fewshot(tmp_path / folder, fold=fold, points=40)
    options = {"root": tmp_path, "allow_pickle": True, **SMALL}
    data = ModelNetFewShot(seed=3, **options)
    assert data.load("train").labels.bincount().tolist() == [10] * 5
    assert data.load("test").labels.bincount().tolist() == [20] * 5
    assert not len(data.load("val"))
    assert np.array_equal(data.read("train")[0].numpy(), clouds(50, 40, seed=13, columns=6)[..., :3])
    assert torch.equal(ModelNetFewShot(fold=3, seed=0, **options).read("test")[0], data.read("test")[0])
    with pytest.raises(DataError, match=r"1\.pkl' does not exist"):
        ModelNetFewShot(seed=1, **options).read("train")
    with pytest.raises(ConfigError, match=r"data\.allow_pickle"):
        ModelNetFewShot(root=tmp_path).read("train")


def test_fifty_clouds_in_batches_of_32_are_one_step(tmp_path):
    write_modelnet_fewshot(tmp_path / "5way_10shot", points=40)
    data = ModelNetFewShot(root=tmp_path, allow_pickle=True, num_points=24, pool_points=32, batch_size=32)
    assert [len(batch["label"]) for batch in data_loaded(data)] == [32]


def test_the_head_may_keep_the_authors_forty_outputs(tmp_path):
    data = ModelNetFewShot(root=tmp_path, outputs=40)
    assert (data.num_classes, data.class_names[4:6]) == (40, ("class 4", "unused 5"))
    assert ModelNetFewShot(root=tmp_path).num_classes == 5
    with pytest.raises(ConfigError, match=r"data\.outputs: 4 is below way \(5\)"):
        ModelNetFewShot(root=tmp_path, outputs=4)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "no list 'train'"),
        ({"train": 3}, "no list 'train'"),
        ({"train": [(np.zeros((9, 3)), 0)]}, r"\[1, 0, 0, 0, 0\] train clouds of its classes, expected 10 of each"),
        ({"train": [(np.zeros((9, 3)), 5)]}, r"labels from 5 to 5, expected 0\.\.4"),
    ],
)
def test_a_fold_of_another_form_is_told(tmp_path, content, sentence):
    (tmp_path / "5way_10shot").mkdir()
    (tmp_path / "5way_10shot" / "0.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=sentence):
        ModelNetFewShot(root=tmp_path, allow_pickle=True, **SMALL).read("train")
    with pytest.raises(DataError, match=r"no folder '10way_10shot' \(nor '10way10shot'\)"):
        ModelNetFewShot(root=tmp_path, way=10, allow_pickle=True, **SMALL).read("train")


def few(**options) -> SolidsFewShot:
    data = SolidsFewShot(**{"num_points": 24, "pool_points": 32, "way": 3, "shot": 2, **options})
    data.setup()
    return data


def test_a_fold_of_solids_has_its_classes_shots_and_twenty_test_clouds():
    data = few(fold=4)
    assert data._sets["train"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert stacked(data.test_dataloader(), "label").bincount().tolist() == [20] * 3
    assert data.val_dataloader() == []
    whole = Solids(num_points=24, pool_points=32, shots=2, val_per_class=1, seed=4)
    everything = whole.load("train")
    for label, name in enumerate(data.class_names):
        members = everything.clouds[everything.labels == whole.class_names.index(name)]
        assert torch.equal(data._sets["train"].clouds[data._sets["train"].labels == label], members)
    tested = {tuple(cloud.flatten().tolist()) for cloud in data._sets["test"].clouds}
    assert tested <= {tuple(cloud.flatten().tolist()) for cloud in whole.load("test").clouds}
    assert len(tested) == 60


def test_folds_are_numbered_by_the_seed_and_differ():
    first, again, second = few(seed=1), few(fold=1, seed=7), few(seed=2)
    assert first.class_names == again.class_names != second.class_names
    assert torch.equal(first._sets["train"].clouds, again._sets["train"].clouds)
    assert not torch.equal(first._sets["train"].clouds, second._sets["train"].clouds)
    assert not torch.equal(stacked(first.train_dataloader()), stacked(again.train_dataloader()))


def test_a_fold_may_have_validation_clouds():
    data = few(val_per_class=2)
    assert stacked(data.val_dataloader(), "label").bincount().tolist() == [2] * 3
    with pytest.raises(ConfigError, match=r"data\.way: 13 is outside of 2\.\.12"):
        few(way=13)


@pytest.mark.parametrize("config", ["pointcloud_fewshot.yaml", "modelnet_fewshot_idpt.yaml"])
def test_ten_seeds_of_a_comparison_are_ten_folds(config):
    plan = make_plan(
        [config], parse_methods("idpt"), overrides=[], grid=[1.0], seeds=parse_seeds("10"), cost_rounds=0
    )  # fmt: skip
    (label,) = plan.methods
    configs = [plan.run_config(plan.training(label, plan.lrs[0], seed)) for seed in plan.seeds]
    assert [compose(config).nodes["data"].build().fold for config in configs] == list(range(10))


def test_new_files_are_sampled_as_the_test_clouds_are(scans, tmp_path):
    stored = ScanObjectNN(root=scans, **SMALL).read("test")[0]
    np.save(tmp_path / "new.npy", stored[0].numpy())
    data = ScanObjectNN(root=tmp_path / "gone", num_workers=1, **SMALL)
    (batch,) = list(data.predict_items(tmp_path / "new.npy")[1])
    assert torch.equal(batch["points"][0], ScanObjectNN(root=scans, **SMALL).load("test").clouds[0])
