"""What `predict` hands to a task that does more than read files and classify them.

A task that makes a file for each file read, such as a mask, has `write_predictions(output, files, names, out)`: it
writes below the folder `out`, by `names`, each once, and gives for each file what its row shall say, such as the path.
A task that reads files in the usual way but has options of its own has `take_flags(flags)`, called once before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PredictRequest:
    """What was asked for; a task with a method `predict_with(request)` answers with one JSON row for each result.

    Such a task writes its files into `out` itself. What is missing or does not belong it says in a `ConfigError`, best
    in a class method `check_request(request)`, which is called before weights are loaded.
    """

    out: Path
    input: Path | None
    """File or folder to read, if one was named."""
    flags: Mapping[str, Any]
    """Values of the modality's own options (`Plugin.predict_flags`) that were given."""
    seed: int
    """Of everything random."""
    adapters: tuple[tuple[str, float], ...]
    """Adapter files as typed, with their weights; for what the results say of their origin."""
