"""The 12 families for downstream tasks, named after ScanObjectNN's classes where possible; none is pre-trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peft_modal_pointcloud.solids import downstream_fittings, downstream_furniture
from peft_modal_pointcloud.solids.assembly import Assembly

FAMILIES: Mapping[str, Callable[[Assembly], None]] = {
    "chair": downstream_furniture.chair,
    "stool": downstream_furniture.stool,
    "sofa": downstream_furniture.sofa,
    "desk": downstream_furniture.desk,
    "display": downstream_fittings.display,
    "bin": downstream_fittings.waste_bin,
    "bag": downstream_fittings.bag,
    "shelf": downstream_furniture.shelf,
    "sink": downstream_fittings.sink,
    "toilet": downstream_fittings.toilet,
    "pedestal_table": downstream_furniture.pedestal_table,
    "cabinet": downstream_furniture.cabinet,
}
