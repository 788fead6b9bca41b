"""Keys of a batch whose samples are mixtures of two."""

from __future__ import annotations

from typing import Final

PARTNER_LABEL: Final = "partner_label"
"""The label (B,) of what each sample was mixed with."""
OWN_SHARE: Final = "own_share"
"""How much of each sample is its own, (B,) in 0..1; its `label` counts for as much, the partner's for the rest."""
