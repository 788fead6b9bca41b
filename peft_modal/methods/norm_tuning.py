"""Norm tuning: only the affine parameters of normalisation layers learn."""

from __future__ import annotations

from typing import Any

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.methods.base import Method


class NormTuning(Method):
    """Train scale and shift of every normalisation layer, the final one included.

    The LayerNorm row of the vision tables (e.g. Xin et al., V-PETL Bench, NeurIPS 2024). Merges exactly.

    Args:
        sites: Which norms.
    """

    identity_at_init = True

    def __init__(self, *, sites: str | list[str] | dict[str, Any] = "norm") -> None:
        self.sites = Selector.parse(sites)

    def build(self, adapter: Adapter) -> None:
        """One leaf per scale and shift."""
        for site in adapter.backbone.anatomy.select(self.sites, needs="leaf"):
            adapter.own(site)
