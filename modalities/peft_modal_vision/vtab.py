"""VTAB-1k: nineteen tasks of a thousand training pictures each, in the layout that PyTorch code bases share.

Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark, 2019,
arXiv:1910.04867
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, Final, Literal

from peft_modal.data.folder import FolderIndex
from peft_modal.data.splits import Part
from peft_modal.errors import ConfigError
from peft_modal_vision.lists import find_folder, numbered, read_list, row_named
from peft_modal_vision.pictures import PictureData
from peft_modal_vision.transforms import Augmentation, Resize

Group = Literal["natural", "specialized", "structured"]


@dataclass(frozen=True)
class VtabTask:
    """One of the nineteen."""

    name: str
    """Canonical, as most code bases call its folder."""
    group: Group
    classes: int
    aliases: tuple[str, ...] = ()
    """What others call its folder."""


VTAB_TASKS: Final = (
    VtabTask("cifar", "natural", 100, ("cifar100",)),
    VtabTask("caltech101", "natural", 102),
    VtabTask("dtd", "natural", 47),
    VtabTask("oxford_flowers102", "natural", 102, ("flowers102",)),
    VtabTask("oxford_iiit_pet", "natural", 37, ("pets",)),
    VtabTask("svhn", "natural", 10),
    VtabTask("sun397", "natural", 397),
    VtabTask("patch_camelyon", "specialized", 2),
    VtabTask("eurosat", "specialized", 10),
    VtabTask("resisc45", "specialized", 45),
    VtabTask("diabetic_retinopathy", "specialized", 5),
    VtabTask("clevr_count", "structured", 8),
    VtabTask("clevr_dist", "structured", 6),
    VtabTask("dmlab", "structured", 6),
    VtabTask("kitti", "structured", 4),
    VtabTask("dsprites_loc", "structured", 16),
    VtabTask("dsprites_ori", "structured", 16),
    VtabTask("smallnorb_azi", "structured", 18),
    VtabTask("smallnorb_ele", "structured", 9),
)
"""In the order of the papers' tables."""
_BY_NAME: Final[Mapping[str, VtabTask]] = MappingProxyType(
    {name: task for task in VTAB_TASKS for name in (task.name, *task.aliases)}
)


@dataclass(frozen=True)
class VtabMeans:
    """Means of the nineteen scores."""

    natural: float
    """Of seven tasks."""
    specialized: float
    """Of four."""
    structured: float
    """Of eight."""
    of_groups: float
    """Of the three group means: what most papers call the mean."""
    of_tasks: float
    """Of the nineteen scores: what V-PETL Bench calls so, some points lower."""


def vtab_means(scores: Mapping[str, float]) -> VtabMeans:
    """Both means that papers call VTAB-1k's, and those of the groups.

    Args:
        scores: Top-1 accuracy of each of the nineteen tasks, by its name or an alias.

    Raises:
        ConfigError: A name is unknown, a task is missing or given twice.
    """
    by_task: dict[str, float] = {}
    for name, score in scores.items():
        task = row_named(_BY_NAME, name, "task")
        if task.name in by_task:
            raise ConfigError(f"VTAB-1k: there are two scores of '{task.name}', one of them as '{name}'.")
        by_task[task.name] = score
    missing = [task.name for task in VTAB_TASKS if task.name not in by_task]
    if missing:
        raise ConfigError(f"VTAB-1k: a mean needs all {len(VTAB_TASKS)} tasks, there is no {', '.join(missing)}.")
    groups: dict[Group, list[float]] = {"natural": [], "specialized": [], "structured": []}
    for task in VTAB_TASKS:
        groups[task.group].append(by_task[task.name])
    means = {group: fmean(of_group) for group, of_group in groups.items()}
    return VtabMeans(
        means["natural"], means["specialized"], means["structured"], fmean(means.values()), fmean(by_task.values())
    )


class Vtab(PictureData):
    """A task of VTAB-1k: `DIR/<task>/{train800,val200,train800val200,test}.txt`, lines `images/.../000000.jpg 7`.

    Settings are chosen by training on `train800` and looking at `val200`; what is reported is trained on all thousand
    pictures. Both are tested on the full test list. Published means differ in `normalize`: ImageNet's in most, 0.5 in
    SSF's, none in Bi-Adapter's; none of them augments.

    Args:
        root: The folder that holds the tasks' folders.
        task: Which of the nineteen: `cifar`, `caltech101`, `dtd`, `oxford_flowers102`, `oxford_iiit_pet`, `svhn`,
            `sun397`, `patch_camelyon`, `eurosat`, `resisc45`, `diabetic_retinopathy`, `clevr_count`, `clevr_dist`,
            `dmlab`, `kitti`, `dsprites_loc`, `dsprites_ori`, `smallnorb_azi`, `smallnorb_ele`. Its folder may be called
            `cifar100`, `flowers102` or `pets` as well.
        train: `train800` is validated on `val200`; `train800val200` leaves nothing to validate on.
        options: Arguments of `PictureData`.

    Raises:
        ConfigError: There is no such task.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        task: str,
        train: Literal["train800", "train800val200"] = "train800",
        resize: Resize = "square",
        augment: list[Augmentation] = [],  # noqa: B006 — never changed
        **options: Any,  # noqa: ANN401 — typed by `PictureData`
    ) -> None:
        super().__init__(root=root, resize=resize, augment=augment, **options)
        self.task = row_named(_BY_NAME, task, "task")
        self.train = train
        self.class_names = numbered(self.task.classes)

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The numbered classes of a task; see `peft_modal.inspection.classes.NamesClasses`."""
        return numbered(row_named(_BY_NAME, arguments["task"], "task").classes)

    def find(self) -> FolderIndex:
        """The pictures of the lists."""
        folder = find_folder(self.root, (self.task.name, *self.task.aliases))
        lists = {"train": self.train, "val": "val200", "test": "test"}
        if self.train == "train800val200":
            del lists["val"]
        found = {part: read_list(folder / f"{name}.txt", folder, self.task.classes) for part, name in lists.items()}
        return FolderIndex(self.class_names, found["train"], found.get("val", ()), found["test"])

    def no_samples(self, part: Part) -> str:
        """Only the thousand leave nothing to validate on."""
        return f"data.train is {self.train}, which leaves no {part} pictures; set it to train800."
