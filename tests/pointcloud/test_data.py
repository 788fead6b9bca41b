from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import trimesh
from lightning.pytorch.callbacks import ModelCheckpoint

from peft_modal.errors import ConfigError, DataError
from peft_modal_pointcloud import data as data_module
from peft_modal_pointcloud.augment import unit
from peft_modal_pointcloud.data import Folder, Solids
from peft_modal_pointcloud.readers import read_cloud
from peft_modal_pointcloud.solids import DOWNSTREAM_FAMILIES, PRETRAIN_FAMILIES

# Lightning advises on worker counts, logging intervals and folders that exist: none of it matters to such small runs.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = {"shots": 3, "val_per_class": 1, "test_per_class": 2, "num_points": 24, "pool_points": 40, "batch_size": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def solids(**options) -> Solids:
    module = Solids(**{**SMALL, **options})
    module.setup()
    return module


def stacked(loader, key: str = "points") -> torch.Tensor:
    return torch.cat([batch[key] for batch in loader])


def test_the_downstream_set_has_the_stated_sizes():
    module = solids()
    assert module.class_names == DOWNSTREAM_FAMILIES
    assert module.num_classes == 12
    assert module.preprocessing == {"num_points": 24, "normalize": "unit"}
    train = list(module.train_dataloader())
    assert [len(b["label"]) for b in train] == [8] * 4  # 36 clouds, the last 4 dropped
    assert all(b["points"].shape == (8, 24, 3) and b["points"].dtype == torch.float32 for b in train)
    assert train[0]["label"].dtype == torch.int64
    for loader, per_class in ((module.val_dataloader(), 1), (module.test_dataloader(), 2)):
        assert stacked(loader).shape == (12 * per_class, 24, 3)
        assert stacked(loader, "label").bincount().tolist() == [per_class] * 12
    assert next(iter(module.test_dataloader()))["points"].shape[0] == 16


def test_the_defaults_are_the_published_protocol():
    module = Solids()
    assert module.per_class == {"train": 30, "val": 10, "test": 40}
    assert (module.num_points, module.pool_points, module.batch_size) == (512, 768, 32)


def test_a_seed_changes_training_and_validation_but_never_the_test_set():
    one, other = solids(seed=1), solids(seed=2)
    assert torch.equal(stacked(one.test_dataloader()), stacked(other.test_dataloader()))
    assert not torch.equal(stacked(one.val_dataloader()), stacked(other.val_dataloader()))
    assert not torch.equal(one._sets["train"].clouds, other._sets["train"].clouds)


def test_the_test_set_does_not_depend_on_the_training_options():
    one, other = solids(), solids(shots=2, val_per_class=2, pool_points=50, batch_size=4, augment=[])
    assert torch.equal(stacked(one.test_dataloader()), stacked(other.test_dataloader()))


def test_splits_do_not_share_clouds():
    module = solids(augment=[], pool_points=24, shots=2)
    parts = [module._sets[part].clouds for part in ("train", "val", "test")]
    clouds = torch.cat(parts)
    assert len({tuple(c.flatten().tolist()) for c in clouds}) == len(clouds)


def test_clouds_come_from_the_cache_the_second_time(cache, monkeypatch):
    first = solids()
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(data_module, "make_solids", None)
    again = solids()
    assert torch.equal(stacked(first.train_dataloader()), stacked(again.train_dataloader()))
    assert torch.equal(stacked(first.test_dataloader(), "label"), stacked(again.test_dataloader(), "label"))


def test_a_new_version_of_the_generator_ignores_old_files(cache, monkeypatch):
    solids()
    monkeypatch.setattr(data_module, "GENERATOR_VERSION", 99)
    solids()
    assert len(list(cache.iterdir())) == 6


def test_pretraining_clouds_have_no_labels_and_two_observations_of_each_solid(cache):
    module = solids(split="pretrain", per_family=2, augment=["scale_translate"])
    assert module.class_names == PRETRAIN_FAMILIES
    assert module._sets["train"].clouds.shape == (18 * 2 * 2, 40, 3)
    batches = list(module.train_dataloader())
    assert len(batches) == 9
    assert [list(b) for b in batches] == [["points"]] * 9
    assert list(next(iter(module.val_dataloader()))) == ["points"]
    assert not cache.exists()


def test_a_training_batch_redraws_points_of_its_clouds_and_augments_them():
    module = solids(augment=["rotate"])
    plain = solids(augment=[])
    batch, unturned = (next(iter(m.train_dataloader())) for m in (module, plain))
    pool = module._sets["train"]
    for cloud, label in zip(unturned["points"], unturned["label"], strict=True):
        homes = [c for c, k in zip(pool.clouds, pool.labels, strict=True) if k == label]
        rows = {tuple(p) for p in cloud.tolist()}
        assert len(rows) == 24
        assert any(rows <= {tuple(p) for p in home.tolist()} for home in homes)
    assert torch.equal(batch["label"], unturned["label"])
    torch.testing.assert_close(batch["points"][..., 1], unturned["points"][..., 1])
    assert not torch.allclose(batch["points"], unturned["points"])


def test_plain_training_clouds_are_all_clouds_in_a_fixed_order_without_augmentation():
    data = solids(shots=3)
    data.setup("fit")

    points = stacked(data.plain_train_dataloader())

    held = data._sets["train"].clouds
    assert points.shape == (len(held), data.num_points, 3)
    assert torch.equal(points, stacked(data.plain_train_dataloader()))
    for drawn, whole in zip(points, held, strict=True):
        assert {tuple(p) for p in drawn.tolist()} <= {tuple(p) for p in whole.tolist()}


def test_an_epoch_visits_every_cloud_once_and_epochs_differ():
    module = solids(shots=2, augment=[])
    source = module.train_dataloader().dataset.source
    assert len(source) == 3
    labels = [torch.cat([source.batch(epoch, i)["label"] for i in range(3)]) for epoch in (0, 1)]
    assert all(row.bincount().tolist() == [2] * 12 for row in labels)
    assert not torch.equal(*labels)
    assert torch.equal(source.batch(1, 2)["points"], source.batch(1, 2)["points"])
    first, second = (source.batch(epoch, 0)["points"] for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_a_set_smaller_than_a_batch_is_one_batch_of_all():
    module = solids(shots=1, batch_size=100)
    batches = list(module.train_dataloader())
    assert [len(b["label"]) for b in batches] == [12]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_worker_processes_change_nothing(num_workers):
    expected = solids()
    module = solids(num_workers=num_workers)
    assert torch.equal(stacked(module.train_dataloader()), stacked(expected.train_dataloader()))
    assert torch.equal(stacked(module.val_dataloader()), stacked(expected.val_dataloader()))


def test_the_global_generator_is_left_alone():
    module = solids()
    before = torch.get_rng_state()
    for _ in module.train_dataloader().dataset:
        break
    module.train_dataloader().dataset[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_points": 0}, "num_points is 0"),
        ({"shots": 0, "test_per_class": -1}, "shots is 0, expected 1 or more.\ntest_per_class is -1"),
        ({"pool_points": 10}, "pool_points is 10, expected num_points"),
        ({"split": "train"}, "split is 'train'"),
        ({"augment": ["rotated"]}, "did you mean 'rotate'"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_wrong_arguments_of_solids_end_in_a_sentence(options, message):
    with pytest.raises(ConfigError, match=message):
        Solids(**{**SMALL, **options})


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[torch.Tensor] = []

    def training_step(self, batch, _index):
        self.batches.append(batch["points"].clone())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, epochs: int, *, resume: Path | None = None, callbacks=()) -> list[torch.Tensor]:
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
    )
    trainer.fit(recorder, Solids(**SMALL, seed=7), ckpt_path=resume)
    return recorder.batches


def test_a_run_resumed_at_epoch_3_sees_the_batches_of_an_uninterrupted_run(tmp_path):
    whole = fit(tmp_path, 5)
    fit(tmp_path, 3, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    rest = fit(tmp_path, 5, resume=tmp_path / "last.ckpt")
    assert len(whole) == 20
    assert len(rest) == 8
    assert all(torch.equal(a, b) for a, b in zip(whole[12:], rest, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole[:8], rest, strict=True))


@pytest.fixture
def root(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "own"
    for name, count in (("cup", 10), ("chair", 12)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            points = rng.normal(size=(20 + 10 * i, 3)).astype(np.float32) * 3 + 5
            np.save(folder / name / f"{i:02d}.npy", points)
    return folder


def folder(root: Path, stage: str | None = None, **options) -> Folder:
    module = Folder(root=root, **{"num_points": 32, "batch_size": 4, **options})
    module.setup(stage)
    return module


def test_a_folder_is_split_read_and_batched(root):
    module = folder(root)
    assert module.class_names == ("chair", "cup")
    assert module.num_classes == 2
    train = list(module.train_dataloader())
    assert [b["points"].shape for b in train] == [(4, 32, 3)] * 4
    assert stacked(module.val_dataloader(), "label").tolist() == [0, 1]
    assert stacked(module.test_dataloader(), "label").tolist() == [0, 0, 1, 1]
    assert stacked(module.test_dataloader()).shape == (4, 32, 3)


def test_clouds_are_normalised_before_points_are_drawn(root):
    module = folder(root, augment=[])
    for item, cloud in zip(module._index.train, module._sets["train"].clouds, strict=True):
        torch.testing.assert_close(cloud.norm(dim=1).max(), torch.tensor(1.0))
        torch.testing.assert_close(cloud, unit(read_cloud(item.path, num_points=128)))


def test_without_normalisation_coordinates_are_those_of_the_file(root):
    module = folder(root, normalize="none", num_points=50)
    assert module.preprocessing == {"num_points": 50, "normalize": "none"}
    for item, cloud in zip(module._index.test, module._sets["test"].clouds, strict=True):
        stored = {tuple(p) for p in read_cloud(item.path).tolist()}
        assert {tuple(p) for p in cloud.tolist()} <= stored


def test_a_pool_holds_at_most_four_times_the_points(root):
    module = folder(root, num_points=8)
    assert max(len(c) for c in module._sets["train"].clouds) == 32


def test_evaluation_repeats_points_only_where_a_file_has_too_few(root):
    module = folder(root, num_points=60, val_share=0.0, test_share=0.5)
    for item, cloud in zip(module._index.test, module._sets["test"].clouds, strict=True):
        stored = len(read_cloud(item.path))
        assert len(cloud) == 60
        assert len({tuple(p) for p in cloud.tolist()}) == min(stored, 60)


def test_evaluation_and_prediction_see_the_same_points_whatever_the_seed(root):
    module = folder(root)
    item = module._index.test[0]
    paths, batches = Folder(root=root, num_points=32, seed=5).predict_items(item.path)
    assert paths == [item.path]
    (batch,) = list(batches)
    assert torch.equal(batch["points"][0], module._sets["test"].clouds[0])


def test_small_clouds_are_drawn_with_replacement_in_training(root):
    module = folder(root, num_points=500, augment=[])
    batch = next(iter(module.train_dataloader()))
    assert batch["points"].shape == (4, 500, 3)
    assert len({tuple(p) for p in batch["points"][0].tolist()}) < 140


def test_augmentation_is_that_of_the_names(root):
    plain, turned = folder(root, augment=[]), folder(root, augment=["rotate"])
    source = plain.train_dataloader().dataset.source
    expected = source.batch(2, 1)["points"]
    actual = turned.train_dataloader().dataset.source.batch(2, 1)["points"]
    # The same generator has drawn the points before it turns them.
    assert torch.equal(actual[..., 1], expected[..., 1])
    radius = [points[..., [0, 2]].norm(dim=-1) for points in (actual, expected)]
    torch.testing.assert_close(*radius)
    assert not torch.allclose(actual, expected)


def test_each_stage_reads_only_what_it_needs(root):
    assert set(folder(root, "test")._sets) == {"test"}
    assert set(folder(root, "fit")._sets) == {"train", "val"}
    assert folder(root, "test").class_names == ("chair", "cup")
    module = folder(root, "fit")
    stored = module._sets["train"]
    module.setup("fit")
    assert module._sets["train"] is stored


def test_no_test_files_is_an_error_only_when_testing(root):
    module = folder(root, "test", test_share=0.0)
    assert module.test_dataloader() == []
    assert "has no test files: add 'test/<class>/', or set a test_share" in module.no_samples("test")


def test_training_without_validation_files_works(root):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    recorder = Recorder()
    trainer.fit(recorder, Folder(root=root, num_points=16, batch_size=4, val_share=0.0))
    assert len(recorder.batches) == 4


def test_prediction_needs_no_data_folder_and_keeps_the_order_of_the_files(tmp_path, root):
    trimesh.creation.box((1.0, 2.0, 3.0)).export(root / "cup" / "zz.ply")
    module = Folder(root=tmp_path / "gone", num_points=16, batch_size=4)
    paths, batches = module.predict_items(root)
    assert paths == sorted(root.rglob("*.*"))
    sizes = [len(b["points"]) for b in batches]
    assert sizes == [8, 8, 7]
    assert all(list(b) == ["points"] for b in batches)
    paths, batches = Solids(**SMALL).predict_items(root / "cup" / "zz.ply")
    assert next(iter(batches))["points"].shape == (1, 24, 3)


def test_a_damaged_file_is_named(root):
    (root / "cup" / "00.npy").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"00\.npy' cannot be read as \.npy"):
        folder(root)
    with pytest.raises(DataError, match=r"00\.npy"):
        list(Folder(root=root).predict_items(root / "cup")[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "sphere"}, "normalize is 'sphere'"),
        ({"augment": ["blur"]}, "known: batch_rotate, batch_scale_translate"),
    ],
)
def test_wrong_arguments_of_folder_end_in_a_sentence(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        Folder(root=tmp_path, **options)


def test_votes_differ_between_views_and_not_between_calls():
    data = Solids(batch_size=4, shots=1, val_per_class=1, test_per_class=1, num_points=32, pool_points=32)
    batch = {"points": torch.rand(2, 32, 3)}
    first, again, second = (data.vote(batch, index)["points"] for index in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_vote_draws_the_same_positions_of_every_clouds_pool():
    data = Solids(batch_size=4, shots=1, val_per_class=1, test_per_class=1, num_points=8, pool_points=8)
    pool = torch.arange(40.0).repeat(2, 3, 1).transpose(1, 2).contiguous()
    view = data.vote({"points": torch.zeros(2, 8, 3), "pool": pool}, 3)["points"]
    spread = (view - view.mean(1, keepdim=True)) / view.std(1, keepdim=True)
    torch.testing.assert_close(spread[0], spread[1])
