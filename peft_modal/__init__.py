"""Parameter-efficient fine-tuning that works the same way for every modality.

`peft_modal.load(file)` rebuilds a fine-tuned model from its adapter file; everything else is reached by the command
line (`python -m peft_modal --help`) or by the submodules. Importing this package imports neither torch nor a plugin.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from peft_modal._version import __version__
from peft_modal.errors import PeftModalError

if TYPE_CHECKING:
    from peft_modal.api import load

__all__ = ["PeftModalError", "__version__", "load"]

logging.getLogger("peft_modal").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    """Import the public functions that need torch on first use (PEP 562).

    Raises:
        AttributeError: There is no such public name.
    """
    if name == "load":
        from peft_modal.api import load

        return load
    raise AttributeError(f"module 'peft_modal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
