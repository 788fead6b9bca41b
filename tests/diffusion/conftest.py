"""Toy pipelines, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from toy_pipeline import save_toy_pipeline


@pytest.fixture(scope="session")
def toy_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a toy pipeline by the name of its size; read only."""
    root = tmp_path_factory.mktemp("toy_pipelines")
    return cache(lambda size: save_toy_pipeline(root / size, size))
