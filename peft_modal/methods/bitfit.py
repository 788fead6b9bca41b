"""BitFit: only biases learn (Ben Zaken et al., ACL 2022, arXiv:2106.10199)."""

from __future__ import annotations

from typing import Any

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.errors import AttachError
from peft_modal.methods.base import Method


class BitFit(Method):
    """Train every bias of the backbone, norm shifts included (Ben Zaken et al., ACL 2022, arXiv:2106.10199).

    Merges exactly: it is an overwrite.

    Args:
        sites: Which biases; the default is all of them.
    """

    identity_at_init = True

    def __init__(self, *, sites: str | list[str] | dict[str, Any] = ["bias", "norm"]) -> None:  # noqa: B006 — never changed
        self.sites = Selector.parse(sites)

    def build(self, adapter: Adapter) -> None:
        """One leaf per bias.

        Raises:
            AttachError: No selected site is a bias.
        """
        selected = adapter.backbone.anatomy.select(self.sites, needs="leaf")
        biases = [site for site in selected if site.role.startswith("bias.") or site.role.endswith(".shift")]
        if not biases:
            raise AttachError(f"none of the {len(selected)} selected sites is a bias")
        for site in biases:
            adapter.own(site)
