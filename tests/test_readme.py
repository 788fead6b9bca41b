"""The README's generated parts are those of the registry and of the results."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_generated_parts_of_the_readme_are_up_to_date():
    spec = importlib.util.spec_from_file_location("readme_parts", ROOT / "docs/readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.filled(text) == text, "run python docs/readme.py"
