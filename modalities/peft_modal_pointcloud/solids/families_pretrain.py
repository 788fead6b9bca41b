"""The 18 families to pre-train on, in the order of their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peft_modal_pointcloud.solids import pretrain_built, pretrain_things
from peft_modal_pointcloud.solids.assembly import Assembly

FAMILIES: Mapping[str, Callable[[Assembly], None]] = {
    "table": pretrain_built.table,
    "mug": pretrain_things.mug,
    "lamp": pretrain_built.lamp,
    "bench": pretrain_built.bench,
    "aeroplane": pretrain_things.aeroplane,
    "bottle": pretrain_things.bottle,
    "car": pretrain_things.car,
    "stairs": pretrain_built.stairs,
    "ring": pretrain_things.ring,
    "dumbbell": pretrain_things.dumbbell,
    "hammer": pretrain_things.hammer,
    "tree": pretrain_things.tree,
    "ladder": pretrain_built.ladder,
    "bed": pretrain_built.bed,
    "arch": pretrain_built.arch,
    "snowman": pretrain_things.snowman,
    "fence": pretrain_built.fence,
    "random_assembly": pretrain_things.random_assembly,
}
