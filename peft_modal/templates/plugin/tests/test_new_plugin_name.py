"""The plugin as a user meets it; install it first: pip install -e ."""

import json

import numpy as np
import pytest
import torch
from peft_modal.cli.main import main
from peft_modal.errors import AttachError, DataError
from peft_modal.registry import default_registry
from peft_modal.testing import assert_anatomy, example_methods, run_contract

from new_plugin_name.backbone import Encoder
from new_plugin_name.data import Folder, read_sequence

MODALITY = "new_plugin_name"
METHODS = sorted(
    entry.name
    for entry in default_registry().entries("method")
    if entry.modality in {"", MODALITY}
)
REFUSED = {"convpass": "none of its blocks works on a grid of patches"}
"""Methods that cannot work on a sequence, with what they say."""


def write_folder(root):
    generator = np.random.default_rng(0)
    for name, height in (("flat", 0.1), ("tall", 3.0)):
        (root / name).mkdir(parents=True)
        for index in range(6):
            np.save(
                root / name / f"{index}.npy", height * generator.normal(size=(30, 2))
            )
    return root


def test_the_plugin_is_installed():
    assert MODALITY in default_registry().modalities, "run: pip install -e ."


def test_the_anatomy_describes_the_network():
    assert_anatomy(Encoder.tiny())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_its_contracts(name):
    methods = example_methods(default_registry(), modality=MODALITY)
    if name not in methods:
        pytest.skip("its optional packages are not installed")

    if name in REFUSED:
        with pytest.raises(AttachError, match=REFUSED[name]):
            methods[name].attach(Encoder.tiny())
        return

    results = run_contract(Encoder.tiny, methods[name], leave_out=["compile"])

    assert not {
        contract: text
        for contract, text in results.items()
        if text.startswith("failed")
    }


def test_weights_come_back_from_a_merged_file(tmp_path):
    from peft_modal.files import write_tensors

    one = Encoder(init_seed=1)
    write_tensors(tmp_path / "weights.safetensors", one.network.state_dict(), {})
    other = Encoder(weights=str(tmp_path / "weights.safetensors"), init_seed=2)
    other.load_weights()
    assert torch.equal(other.network.pos, one.network.pos)


def test_a_folder_is_read(tmp_path):
    data = Folder(root=write_folder(tmp_path / "own"))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert data.class_names == ("flat", "tall")
    assert batch["sequence"].shape[1:] == (48, 2)


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "damaged.npy"
    file.write_bytes(b"no array")
    with pytest.raises(DataError, match=r"damaged\.npy"):
        read_sequence(file)


def test_the_configuration_trains_tests_and_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))
    root = write_folder(tmp_path / "own")
    short = ["--trainer.max_epochs=1", "--data.per_class=8"]

    assert (
        main(["fit", "--config", "new_plugin_name.yaml", *short, "--out", "run"]) == 0
    )
    adapter = ["--adapter", "run/adapter.safetensors"]
    assert main(["test", *adapter]) == 0
    assert (
        main(["predict", *adapter, "--input", str(root), "--out", "predictions"]) == 0
    )

    rows = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert len(rows) == 12
