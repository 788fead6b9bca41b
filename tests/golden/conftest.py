"""Makes one test of every folder with a `case.json` below the folder that `--golden-dir` names."""

from __future__ import annotations

from pathlib import Path

import pytest

COMMITTED = Path(__file__).parent / "cases"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise whatever asks for `case_folder`."""
    if "case_folder" not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption("golden_dir")
    root = metafunc.config.invocation_params.dir / given if given else COMMITTED
    folders = sorted(path.parent for path in root.glob("*/case.json"))
    if not folders:
        raise pytest.UsageError(f"--golden-dir: '{root}' has no sub-folder with a case.json")
    metafunc.parametrize("case_folder", folders, ids=[folder.name for folder in folders])
