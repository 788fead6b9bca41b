"""Generators that follow from a key, so that adding a draw in one place changes nothing in another."""

from __future__ import annotations

import hashlib

import torch


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator whose numbers follow from the key alone; different keys give unrelated numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()  # torch uses 32 bits of a CPU seed
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
