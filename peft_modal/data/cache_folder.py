"""Where caches live; needs the standard library only, so that `doctor` works without torch."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`PEFT_MODAL_CACHE` if set, else `peft_modal` in the user's cache folder; it need not exist yet."""
    own = os.environ.get("PEFT_MODAL_CACHE")
    if own:
        return Path(own).expanduser()
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "peft_modal"
