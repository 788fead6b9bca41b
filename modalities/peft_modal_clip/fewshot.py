"""Data module of the sets that CLIP's tuning is measured on.

Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_modal.data.splits import Part
from peft_modal.errors import ConfigError, DataError
from peft_modal.ranges import PositiveInt
from peft_modal_clip.few_pictures import FewPictures, Source
from peft_modal_clip.sets import SETS
from peft_modal_clip.splits import SplitFile, checksum_of, read_split, write_split
from peft_modal_vision.lists import numbered, row_named

_LOG = logging.getLogger(__name__)


class FewShotSet(FewPictures):
    """One of the eleven sets of CoOp, in its folders, or one of four more test sets of ImageNet.

    `DIR/<folder of the set>/split_zhou_<Name>.json` is the split wherever it is published. Where that file is missing,
    the split is made from the set's own lists and written there: figures are then not those of papers. Aircraft and
    ImageNet have lists of their own. ImageNet is tested on what it calls validation, and has nothing to validate on.

    Args:
        root: The folder that holds the sets' folders.
        dataset: `imagenet`, `caltech101`, `oxford_pets`, `stanford_cars`, `oxford_flowers`, `food101`,
            `fgvc_aircraft`, `sun397`, `dtd`, `eurosat` or `ucf101`; `imagenet_v2`, `imagenet_sketch`, `imagenet_a` and
            `imagenet_r` are for `test` alone.
        shots: Training pictures per class, drawn by the seed, and as many to validate on, at most four; the papers have
            1, 2, 4, 8 and 16. null takes everything.
        split_file: A split of the same form elsewhere; where there is no such file, it is made and written.
        allow_pickle: Take the authors' shots where `split_fewshot/shot_<K>-seed_<S>.pkl` in the set's folder has them,
            and open pickles that `shots_file` names; the reader does nothing but give what they list.
        seed: Of the shots (1, 2 and 3 in the papers, the mean of which is reported), and of order and augmentation.
        options: Arguments of `FewPictures`.

    Raises:
        ConfigError: There is no such set, or it has no split file.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        dataset: str,
        shots: PositiveInt | None = 16,
        split_file: str | Path | None = None,
        allow_pickle: bool = False,
        seed: int = 1,
        **options: Any,  # noqa: ANN401 — typed by `FewPictures`
    ) -> None:
        super().__init__(root=root, shots=shots, allow_pickle=allow_pickle, seed=seed, **options)
        self.dataset = dataset
        self.of = row_named(SETS, dataset, "dataset")
        if split_file is not None and self.of.split is None:
            raise ConfigError(f"data.split_file: '{dataset}' is split by its own lists; leave it out.")
        self.split_file = None if split_file is None else Path(split_file)

    @classmethod
    def class_names_without_data(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """As many as the set has; see `peft_modal.inspection.classes.NamesClasses`."""
        count = row_named(SETS, arguments["dataset"], "dataset").classes
        return numbered(count // 2 if arguments["classes"] == "new" else count)

    @property
    def folder(self) -> Path:
        """Of the set."""
        return self.root / self.of.folder

    @property
    def preprocessing(self) -> dict[str, object]:
        """Size, how it comes about, normalisation, and the prompt of the set."""
        return {**super().preprocessing, "templates": [self.of.template]}

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures.

        Raises:
            ConfigError: A set that is for tests alone shall be trained on.
            DataError: Files cannot serve.
        """
        if self.of.is_test_only and stage in {"fit", "validate"}:
            raise ConfigError(
                f"data.dataset: '{self.dataset}' is for tests alone: train on 'imagenet', then "
                f"`test --adapter FILE --data.dataset={self.dataset}`."
            )
        super().setup(stage)

    def source(self) -> Source:
        """The split by its file, by the set's own lists, or newly made.

        Raises:
            DataError: The set is not where it should be, or its files cannot serve.
        """
        if not self.folder.is_dir():
            raise DataError(
                f"'{self.root}' has no folder '{self.of.folder}'; set data.root to the folder that holds it."
            )
        images = next((self.folder / name for name in self.of.images if (self.folder / name).is_dir()), None)
        if images is None:
            raise DataError(f"'{self.folder}' has no folder '{self.of.images[0]}' with the pictures of the set.")
        facts: dict[str, Any] = {"dataset": self.dataset}
        if self.of.split is None:
            split = self.of.make(self.folder, images)
            facts["split_sha256"] = checksum_of(split)
        else:
            path = self.folder / self.of.split if self.split_file is None else self.split_file
            file = self._split(path, images)
            split = file.split
            facts |= {"split_file": str(path), "split_sha256": file.sha256, "published": file.is_published}
        split = split.renamed(self.of.names)
        class_names = split.class_names(f"'{self.folder}'")
        self._tell_what_is_odd(class_names)
        return Source(split, class_names, images, facts)

    def published_shots(self) -> Path | None:
        """The authors' pickle, where it is there and may be opened."""
        path = self.folder / "split_fewshot" / f"shot_{self.shots}-seed_{self.seed}.pkl"
        return path if self.allow_pickle and path.is_file() else None

    def no_samples(self, part: Part) -> str:
        """Only ImageNet has nothing to validate on."""
        return f"'{self.dataset}' has no {part} pictures: what it calls validation is what it is tested on."

    def _split(self, path: Path, images: Path) -> SplitFile:
        """The split in a file, which is made where there is none."""
        if not path.is_file():
            write_split(path, self.of.make(self.folder, images))
        found = read_split(path)
        if not found.is_published:
            _LOG.warning(
                "'%s' was made here, since %s was not there: its division into training, validation and test is NOT "
                "the published one, and figures cannot be compared with those of papers. Put the published file in its "
                "place.",
                path, self.of.split,
            )  # fmt: skip
        return found

    def _tell_what_is_odd(self, class_names: tuple[str, ...]) -> None:
        if len(class_names) != self.of.classes:
            _LOG.warning("'%s' has %d classes, the published set %d", self.folder, len(class_names), self.of.classes)
        twice = [name for name, count in Counter(class_names).items() if count > 1]
        if twice:
            _LOG.warning("'%s': %d names are those of several classes, such as '%s'", self.folder, len(twice), twice[0])
