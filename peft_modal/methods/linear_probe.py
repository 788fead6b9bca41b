"""Linear probe: only the head learns."""

from __future__ import annotations

from peft_modal.attach import Adapter
from peft_modal.methods.base import Method


class LinearProbe(Method):
    """Train the head on the frozen backbone, plus what the anatomy says is always trained (Point-MAE's class token).

    Whether the probe is linear is the head's business: with a three-layer head this is the `head_only` row that
    tables of point-cloud papers call linear probing.
    """

    identity_at_init = True

    def build(self, adapter: Adapter) -> None:
        """Nothing to attach."""
