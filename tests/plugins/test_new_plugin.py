"""`new-plugin`: what it writes runs as written, what it cannot write is refused in one sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from plugins.conftest import REPOSITORY

from peft_modal.cli.main import main


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_writes_a_complete_distribution_under_the_name(tmp_path: Path) -> None:
    assert main(["new-plugin", "sleep_eeg"]) == 0
    package = ("__init__", "backbone", "data", "head", "method", "plugin", "rendering")
    assert files_of(tmp_path / "sleep_eeg") == {
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "tests/test_sleep_eeg.py",
        "sleep_eeg/py.typed",
        "sleep_eeg/configs/__init__.py",
        "sleep_eeg/configs/sleep_eeg.yaml",
        *(f"sleep_eeg/{name}.py" for name in package),
    }


def test_no_placeholder_is_left(tmp_path: Path) -> None:
    main(["new-plugin", "sleep_eeg", "--out", "elsewhere/here"])
    folder = tmp_path / "elsewhere" / "here"
    texts = {name: (folder / name).read_text() for name in files_of(folder)}
    assert not [name for name, text in texts.items() if re.search(r"new.?plugin", name + text, re.IGNORECASE)]
    assert 'name = "sleep-eeg"' in texts["pyproject.toml"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Sleep", "is no name of a package"),
        ("sleep-eeg", "is no name of a package"),
        ("2nd", "is no name of a package"),
        ("../up", "is no name of a package"),
        ("a" * 41, "is no name of a package"),
        ("lambda", "is Python's own"),
        ("json", "is Python's own"),
        ("pointcloud", "is a modality already"),
        ("core", "is a modality already"),
        ("torch", "is an installed package already"),
    ],
)
def test_a_name_that_cannot_serve_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, sentence: str
) -> None:
    assert main(["new-plugin", name]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sleep_eeg").mkdir()
    assert main(["new-plugin", "sleep_eeg"]) == 2
    assert "'sleep_eeg' exists already" in capsys.readouterr().err
    assert not list((tmp_path / "sleep_eeg").iterdir())


def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []
    write_text = Path.write_text

    def full(self: Path, *arguments: object, **named: object) -> int:
        written.append(self)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return write_text(self, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["new-plugin", "sleep_eeg"]) == 2
    assert "'sleep_eeg' cannot be written: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_name_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-plugin"]) == 2
    assert "required: NAME" in capsys.readouterr().err


# Line breaks depend on the name's length; the second name is as long as the placeholder.
@pytest.mark.parametrize(("name", "command"), [("sleep_eeg", ["check"]), ("wearable_motion", ["format", "--check"])])
def test_the_code_is_clean_for_ruff(tmp_path: Path, name: str, command: list[str]) -> None:
    main(["new-plugin", name])
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", "."],
        cwd=tmp_path / name, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_the_code_is_clean_for_mypy(tmp_path: Path) -> None:
    main(["new-plugin", "sleep_eeg"])
    # With the repository's settings, which are stricter than mypy's own and have a warm cache.
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "-p", "sleep_eeg"],
        cwd=REPOSITORY, env={**os.environ, "MYPYPATH": str(tmp_path / "sleep_eeg")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
