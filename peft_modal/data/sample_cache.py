"""What a frozen network makes of each sample, kept on disk: one small file per sample, checked whenever it is read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from peft_modal.data.cache_folder import cache_folder
from peft_modal.errors import FileFormatError
from peft_modal.files import read_tensors, write_tensors

_LOG = logging.getLogger(__name__)


class SampleCache:
    """Tensors of samples in a folder of the cache; runs and processes with the same key share it.

    A sample is named by what it is (a hash of its content), never by its place in an epoch. Each file carries a
    checksum and is written whole or not at all, so that a full disk or a killed process costs the samples that are
    not yet in, and nothing else.

    Args:
        name: Start of the folder's name.
        key: Everything that the tensors of a sample depend on beside the sample: the network, its precision, the
            version of their maker; JSON values.
    """

    def __init__(self, name: str, key: Mapping[str, object]) -> None:
        text = json.dumps(key, sort_keys=True)
        self.folder: Path = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._key = json.loads(text)

    def get(self, sample: str) -> dict[str, Tensor] | None:
        """The tensors of a sample; None where they are not there, or damaged, which the log tells.

        Args:
            sample: Its name, made of letters, digits and `-`.
        """
        path = self._path(sample)
        if not path.is_file():
            return None
        try:
            tensors, document = read_tensors(path)
        except FileFormatError as error:
            _LOG.warning("%s: it is made again", error)
            return None
        return tensors if (document.get("key"), document.get("sample")) == (self._key, sample) else None

    def put(self, sample: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a sample.

        Raises:
            WriteError: The disk is full, the folder is not writable, and the like.
        """
        write_tensors(self._path(sample), tensors, {"key": self._key, "sample": sample})

    def _path(self, sample: str) -> Path:
        return self.folder / f"{sample}.safetensors"
