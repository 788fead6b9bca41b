"""Virtual environments into which plugins are truly installed, by pip and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
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

    @property
    def packages(self) -> Path:
        return self.root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

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
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """Makes environments, empty or with all of another's; nothing is copied."""

    def make(*parents: Environment) -> Environment:
        root = tmp_path_factory.mktemp("environment")
        venv.EnvBuilder(symlinks=True).create(root)
        environment = Environment(root, {"PEFT_MODAL_CACHE": str(root / "cache"), "PYTHONDONTWRITEBYTECODE": "1"})
        folders = [*(parent.packages for parent in parents), Path(sysconfig.get_path("purelib"))]
        # Not a plain path: the .pth files there count, too, so an editable peft-modal stays visible.
        lines = [f"import site; site.addsitedir({str(folder)!r})" for folder in folders]
        (environment.packages / "parents.pth").write_text("\n".join(lines) + "\n")
        return environment

    return make


@pytest.fixture(scope="session")
def example(make_environment: Callable[..., Environment]) -> Environment:
    """An environment with the example distribution."""
    environment = make_environment()
    environment.install(EXAMPLE)
    return environment
