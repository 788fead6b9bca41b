"""Configuration of the documentation: `sphinx-build -W -b html docs docs/_build`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pages import write_pages

from peft_modal import __version__
from peft_modal.registry import default_registry

project = "peft_modal"
release = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"peft_modal {release}"
exclude_patterns = ["_build"]
# Parts of the README stand below other headings here.
suppress_warnings = ["myst.header"]


def setup(app: Any) -> None:  # noqa: ANN401 — Sphinx's application
    """Write the pages of the registry before the sources are read."""
    write_pages(Path(app.srcdir) / "_generated", default_registry())
