"""Full fine-tuning: the reference that every other method is measured against."""

from __future__ import annotations

from peft_modal.attach import Adapter
from peft_modal.methods.base import Method


class Full(Method):
    """Train every parameter of the backbone, as copies: the backbone itself stays as loaded.

    Parameters that no port or site names are trained too; tied parameters are trained once.
    """

    identity_at_init = True

    def build(self, adapter: Adapter) -> None:
        """One leaf per stored parameter."""
        undecayed = {site.path for site in adapter.backbone.anatomy.sites if not site.decay}
        for path, _ in adapter.backbone.network.named_parameters():
            adapter.own_tensor(path, decay=path not in undecayed)
