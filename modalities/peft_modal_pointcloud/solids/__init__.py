"""Generated solids: 18 families to pre-train on, 12 other ones to fine-tune on, and scan-like point clouds of them."""

from peft_modal_pointcloud.solids.generate import (
    DOWNSTREAM_FAMILIES,
    PRETRAIN_FAMILIES,
    make_solids,
    observe,
    observe_parts,
)
from peft_modal_pointcloud.solids.parts import part_labels, part_names
from peft_modal_pointcloud.solids.primitives import Solids

__all__ = (
    "DOWNSTREAM_FAMILIES",
    "PRETRAIN_FAMILIES",
    "Solids",
    "make_solids",
    "observe",
    "observe_parts",
    "part_labels",
    "part_names",
)
