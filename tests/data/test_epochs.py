import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from peft_modal.data.epochs import epoch_loader
from peft_modal.data.seeding import seeded

NUM_BATCHES = 4
# Lightning advises on worker counts, logging intervals and folders that exist: none of it matters to such small runs.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Counting:
    """Batches that say which they are."""

    def __len__(self) -> int:
        return NUM_BATCHES

    def batch(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        return {"which": torch.tensor([epoch, index])}


class Data(pl.LightningDataModule):
    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self):
        return epoch_loader(Counting(), trainer=lambda: self.trainer, num_workers=self.num_workers)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 1))


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch, _index):
        self.seen.append(tuple(batch["which"].tolist()))
        return self.weight.sum()

    def validation_step(self, batch, _index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, epochs: int, *, data=None, resume=None, callbacks=(), **options) -> Recorder:
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        **options,
    )
    trainer.fit(recorder, data or Data(), ckpt_path=resume)
    return recorder


def all_batches(first: int, last: int) -> list[tuple[int, int]]:
    return [(epoch, index) for epoch in range(first, last) for index in range(NUM_BATCHES)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_epoch_gives_its_own_batches(tmp_path, num_workers):
    assert fit(tmp_path, 3, data=Data(num_workers)).seen == all_batches(0, 3)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("on_train_end", [True, False], ids=["after-training", "after-validation"])
def test_a_run_resumed_at_epoch_3_goes_on_with_epoch_3(tmp_path, num_workers, on_train_end):
    saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=on_train_end)
    fit(tmp_path, 3, callbacks=[saver])
    assert fit(tmp_path, 5, resume=tmp_path / "last.ckpt", data=Data(num_workers)).seen == all_batches(3, 5)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_run_resumed_within_an_epoch_goes_on_with_the_next_batch(tmp_path, step, num_workers):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    fit(tmp_path, 3, callbacks=[saver])
    resumed = fit(tmp_path, 4, resume=tmp_path / f"step={step}.ckpt", data=Data(num_workers))
    assert resumed.seen == all_batches(0, 4)[step:]


def test_limited_and_overfitted_epochs_keep_their_numbers(tmp_path):
    assert fit(tmp_path, 2, limit_train_batches=2).seen == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {epoch for epoch, _ in fit(tmp_path, 2, overfit_batches=1).seen} <= {0, 1}


def test_outside_of_fitting_a_pass_gives_epoch_0(tmp_path):
    data = Data()
    expected = all_batches(0, 1)
    assert [tuple(b["which"].tolist()) for b in data.train_dataloader()] == expected
    fit(tmp_path, 2, data=data)
    assert [tuple(b["which"].tolist()) for b in data.train_dataloader()] == expected
    assert len(data.train_dataloader()) == NUM_BATCHES


def test_a_key_fixes_the_numbers_and_every_part_of_it_counts():
    def draw(*key) -> list[float]:
        return torch.rand(3, generator=seeded(*key)).tolist()

    assert draw("a", 1, 2) == draw("a", 1, 2)
    assert len({tuple(draw(*key)) for key in (("a", 1, 2), ("a", 2, 1), ("b", 1, 2), ("a", 12), ("a", "1", 2))}) == 5
