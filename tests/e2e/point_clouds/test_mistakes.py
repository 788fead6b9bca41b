"""A mistake ends in one sentence."""

from pathlib import Path

import pytest
from point_cloud_runs import IDPT

from peft_modal.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["test", "--adapter", "broken.safetensors"], "no readable safetensors file"),
        (["test", "--adapter", "none.safetensors"], "does not exist"),
        (["fit", *IDPT, "--method.k=17"], "17 neighbours are more than the 16 patches"),
        (
            ["fit", "--config", "pointcloud_idpt.yaml", "--data=folder", "--data.root=nowhere"],
            "neither a folder nor a CSV",
        ),
        (["fit", *IDPT, "--backbone.weights=nowhere.pth"], "nor an existing file"),
        (["fit", *IDPT, "--head.pool=[cls,foo]"], "no feature 'foo'"),
        (["fit", *IDPT, "--task.lr=1e30"], "the loss is not finite"),
        (["fit", *IDPT, "--data.batch_size=1"], "BatchNorm needs two samples"),
    ],
    ids=["corrupt", "missing", "neighbours", "folder", "weights", "pool", "nan", "batch"],
)
def test_a_mistake_ends_in_one_sentence_and_code_two(arguments, sentence, capsys):
    Path("broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")

    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
