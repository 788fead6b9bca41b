"""Virtual environments into which plugins are truly installed, by pip and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "peft_modal_timeseries"
PIP = ["-q", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees everything this one does, and what is installed into it."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    def install(self, *arguments: str | Path) -> None:
        self.run("-m", "pip", "install", *PIP, *map(str, arguments)).check_returncode()

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd or self.root,
            env={**os.environ, **self.variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def program(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "peft_modal", *arguments, cwd=cwd)


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Environment]]:
    """Makes empty environments; each costs a fraction of a second, since nothing is copied."""

    def make() -> Environment:
        root = tmp_path_factory.mktemp("environment")
        venv.EnvBuilder(symlinks=True).create(root)
        paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), sysconfig.get_path("purelib")]
        # `site.addsitedir` reads the .pth files there, too: an editable peft-modal stays visible.
        lines = [*paths, *(f"import site; site.addsitedir({path!r})" for path in paths[-1:])]
        packages = root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (packages / "parent.pth").write_text("\n".join(lines) + "\n")
        return Environment(root, {"PEFT_MODAL_CACHE": str(root / "cache"), "PYTHONDONTWRITEBYTECODE": "1"})

    yield make
