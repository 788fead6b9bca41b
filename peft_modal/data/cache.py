"""Tensors that are cheap to make again, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_modal.data.cache_folder import cache_folder
from peft_modal.errors import WriteError
from peft_modal.files import replacing

_LOG = logging.getLogger(__name__)


def cached_tensors(name: str, key: Mapping[str, object], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make()` returns, from the cache if it was made before under this key.

    A file that is damaged or cannot be written costs only the time to make the tensors again, so it is reported in
    the log and not raised.

    Args:
        name: Start of the file's name.
        key: Everything the tensors depend on, the version of their maker included; JSON values.
        make: Makes them.
    """
    text = json.dumps(key, sort_keys=True)
    path = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") == text:
                    return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  not a mapping
        except (OSError, SafetensorError) as error:
            _LOG.warning("cache file '%s' cannot be read (%s): it is made again", path, error)
    tensors = make()
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"key": text})
    except WriteError as error:
        _LOG.warning("%s: the tensors are made again next time", error)
    return tensors
