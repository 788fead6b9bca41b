"""Every command of the tutorial runs, in its order; one of them is the new plugin's own tests, as written."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from plugins.conftest import PIP, REPOSITORY, Environment

TUTORIAL = REPOSITORY / "docs" / "tutorial_plugin.md"


# A dozen processes that import torch, one after the other.
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_tutorial_runs_as_printed(tmp_path: Path, make_environment: Callable[..., Environment]) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", TUTORIAL.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    environment = make_environment()
    # No network here: what a plugin depends on is there already.
    offline = f'pip() {{ python -m pip "$1" {" ".join(PIP)} "${{@:2}}"; }}\n'

    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", offline + "\n".join(blocks)],
        cwd=tmp_path,
        env={
            **os.environ,
            **environment.variables,
            "PATH": f"{environment.root / 'bin'}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    written = {path.name for path in (tmp_path / "wearables" / "predictions").iterdir()}
    assert written == {"predictions.csv", "predictions.json"}
