"""`doctor` through the command line, on installations that are whole and on broken ones."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_modal
from peft_modal.cli.main import main
from peft_modal.diagnosis import machine, packages
from peft_modal.diagnosis.finding import Finding
from peft_modal.diagnosis.machine import check_folders, check_machine, check_torch
from peft_modal.diagnosis.packages import check_dependencies, check_extras, check_shadowing

REPOSITORY = Path(peft_modal.__file__).parents[1]
OWN = ["rich>=14", "torch<2.15,>=2.11", "typing-extensions>=4; python_version < '3'", 'trimesh>=5; extra == "mesh"',
       'optuna>=5; extra == "search"', 'peft-modal[search]; extra == "database"', 'psycopg>=3; extra == "database"',
       'pytest>=9; extra == "dev"']  # fmt: skip


class Metadata(dict):
    def get_all(self, name: str) -> list[str]:
        return self[name]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Distributions and versions that seem to be installed; ours is there with `OWN` as its requirements."""
    found = {"rich": "15.0", "torch": "2.14.1+cu130", "trimesh": "5.2", "optuna": "5.0", "psycopg": "3.3"}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    extras_of = Metadata({"Provides-Extra": ["mesh", "search", "database", "dev", "all"]})
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: OWN if name == "peft-modal" else ["numpy", "torch==2.14.1"]
    )
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _name: extras_of)
    return found


def run_doctor(folder: Path, *path: Path, code: str = "", arguments: str = "['doctor', '--json']"):
    places = [REPOSITORY, REPOSITORY / "modalities", REPOSITORY / "heads"]
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nfrom peft_modal.cli.main import main\nraise SystemExit(main({arguments}))"],
        check=False, capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, *places))),
             "PEFT_MODAL_CACHE": str(folder / "cache")},
    )  # fmt: skip


def of(findings: list[dict] | list[Finding], name: str):
    return next(f for f in findings if (f["name"] if isinstance(f, dict) else f.name) == name)


# The whole


def test_the_exit_code_says_whether_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft_modal.cli import doctor

    good = Finding("packages", "rich", "ok", "15.0")
    warning = Finding("extras", "[mesh]", "warning", "trimesh is not installed", 'pip install "peft-modal[mesh]"')
    bad = Finding("packages", "torch", "problem", "torch is not installed", 'pip install "torch<2.15"')

    monkeypatch.setattr(doctor, "diagnose", lambda: [good, warning])
    assert main(["doctor"]) == 0
    assert "0 problems, 1 warnings, 1 ok" in capsys.readouterr().out

    monkeypatch.setattr(doctor, "diagnose", lambda: [good, bad])
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert 'PROBLEM torch: mend: pip install "torch<2.15"' in text
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert of(report["findings"], "torch")["mend"] == 'pip install "torch<2.15"'


def test_it_works_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "stub" / "torch").mkdir(parents=True)
    (tmp_path / "stub" / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    done = run_doctor(tmp_path, tmp_path / "stub")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    finding = of(report["findings"], "import")
    assert finding["status"] == "problem"
    assert "libcudart.so.13: cannot open" in finding["text"]
    assert "pip install --force-reinstall" in finding["mend"]


def test_it_starts_without_any_package_but_the_standard_library(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'torch', 'yaml', 'rich', 'numpy', 'packaging', 'lightning',"
        " 'jsonargparse', 'safetensors', 'typing_extensions'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
    )
    done = run_doctor(tmp_path, code=code)
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert of(findings, "import")["text"].startswith("torch cannot be imported: ModuleNotFoundError")
    assert "this check itself failed: ModuleNotFoundError" in of(findings, "check_dependencies")["text"]
    assert of(findings, "python")["status"] == "ok"


def test_a_broken_plugin_is_named_with_its_distribution_and_reason(tmp_path: Path) -> None:
    (tmp_path / "sounds.py").write_text("import surely_not_there\n")
    info = tmp_path / "sounds_dist-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sounds-dist\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[peft_modal.modalities]\nsounds = sounds:PLUGIN\n")
    done = run_doctor(tmp_path, tmp_path)
    finding = of(json.loads(done.stdout)["findings"], "sounds")
    assert done.returncode == 1
    assert finding["status"] == "problem"
    assert (
        "from sounds-dist (sounds) is broken: ModuleNotFoundError: No module named 'surely_not_there'"
        in finding["text"]
    )
    assert "pip uninstall sounds-dist" in finding["mend"]


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from peft_modal import diagnosis

    def broken() -> list[Finding]:
        raise ValueError("metadata is garbage")

    monkeypatch.setattr(diagnosis, "_CHECKS", (broken, check_machine))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "this check itself failed: ValueError: metadata is garbage" in text
    assert "python" in text


# Packages


def test_versions_are_held_against_the_bounds_of_our_metadata(installed: dict[str, str]) -> None:
    assert {f.name: f.status for f in check_dependencies()} == {"rich": "ok", "torch": "ok"}
    installed["torch"] = "2.15.0"
    del installed["rich"]
    found = list(check_dependencies())
    assert of(found, "torch").text == "torch 2.15.0 is installed, <2.15,>=2.11 is needed"
    assert of(found, "torch").mend == 'pip install "torch<2.15,>=2.11"'
    assert of(found, "rich").text == "rich is not installed"
    assert {f.status for f in found} == {"problem"}


def test_an_extra_is_complete_or_says_what_it_lacks(installed: dict[str, str]) -> None:
    assert {f.name: f.status for f in check_extras()} == {"[mesh]": "ok", "[search]": "ok", "[database]": "ok"}
    assert of(list(check_extras()), "[database]").text == "optuna 5.0, psycopg 3.3"
    del installed["trimesh"]
    installed["optuna"] = "4.2"
    found = list(check_extras())
    assert of(found, "[mesh]") == Finding(
        "extras", "[mesh]", "warning", "trimesh is not installed", 'pip install "peft-modal[mesh]"'
    )
    for name in ("[search]", "[database]"):
        assert of(found, name).status == "problem"
        assert "optuna 4.2 is installed, >=5 is needed" in of(found, name).text


def test_ourselves_uninstalled_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    (finding,) = check_dependencies()
    assert finding.status == "problem"
    assert finding.mend.startswith("pip install -e .")
    assert list(check_extras()) == []


def test_a_file_of_ones_own_that_hides_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(check_shadowing()) == []
    (tmp_path / "torch.py").write_text("")
    (finding,) = check_shadowing()
    assert finding.status == "problem"
    assert f"'{tmp_path / 'torch.py'}' hides the installed package" in finding.text


def test_a_folder_that_hides_a_package_of_ours_is_found(tmp_path: Path) -> None:
    (tmp_path / "peft_modal_heads").mkdir()
    (tmp_path / "peft_modal_heads" / "__init__.py").write_text("")
    done = run_doctor(tmp_path, tmp_path)
    found = [f for f in json.loads(done.stdout)["findings"] if "hides ours" in f["text"]]
    assert [f["name"] for f in found] == ["peft_modal_heads"]
    assert done.returncode == 1


# Combinations that no metadata tells of


@pytest.mark.parametrize(
    ("versions", "name", "text"),
    [
        ({"torch": "2.15.0", "torchaudio": "2.11.0"}, "torchaudio", "refuses to import"),
        ({"torch": "2.13.0", "torchvision": "0.29.1"}, "torchvision", "it is built for torch==2.14.1"),
        ({"lightning": "2.6.3"}, "lightning", "malicious upload"),
    ],
    ids=["torchaudio", "torchvision", "lightning"],
)
def test_known_bad_combinations_are_problems(
    installed: dict[str, str], versions: dict[str, str], name: str, text: str
) -> None:
    from peft_modal.diagnosis.combinations import check_combinations

    assert all(f.status == "ok" for f in check_combinations())
    installed.update(versions)
    finding = of(list(check_combinations()), name)
    assert finding.status == "problem"
    assert text in finding.text
    assert "pip install" in finding.mend


def test_matching_companions_of_torch_are_fine_whatever_the_build(installed: dict[str, str]) -> None:
    from peft_modal.diagnosis.combinations import check_combinations

    installed |= {"torchvision": "0.29.1+cpu", "torchaudio": "2.11.0", "lightning": "2.6.6"}
    assert {f.name: f.status for f in check_combinations()} == {
        "torchaudio": "ok", "torchvision": "ok", "pytorch3d": "ok",
    }  # fmt: skip


# The machine


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "file"))
    cache, working = check_folders()
    assert cache.status == "problem"
    assert "PEFT_MODAL_CACHE" in cache.mend
    assert working.status == "ok"


def test_a_folder_to_come_is_looked_for_above_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(tmp_path / "a" / "b"))
    cache, _ = check_folders()
    assert cache.status == "ok"
    assert "not there yet" in cache.text
    assert not (tmp_path / "a").exists()


def test_little_room_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _path: machine.shutil._ntuple_diskusage(10, 9, 10**8))
    assert {f.status for f in check_folders()} == {"warning"}


@pytest.mark.parametrize(
    ("driver", "built", "status"),
    [(None, "13.0", "ok"), ("", "13.0", "warning"), ("550.54", None, "warning"), ("470.82", "13.0", "problem")],
    ids=["no_gpu", "no_driver", "cpu_build", "old_driver"],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_its_reason(
    driver: str | None, built: str | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: driver)
    finding = of(list(check_torch()), "GPU")
    assert finding.status == status
    assert bool(finding.mend) == (status != "ok")


def test_the_packages_that_are_looked_at_are_those_of_this_distribution() -> None:
    assert packages.OWN == "peft-modal"
    assert {f.status for f in check_dependencies()} == {"ok"}
