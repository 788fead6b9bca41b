"""A workspace of its own for every test, and a finished run."""

import pytest
from point_cloud_runs import IDPT

from peft_modal.cli.main import main


@pytest.fixture(autouse=True)
def _workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path):
    assert main(["fit", *IDPT, "--out", "run"]) == 0
    return tmp_path / "run"
