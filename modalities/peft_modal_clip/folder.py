"""Photos of one's own by class, for a classifier that reads the names of the classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_modal.data.folder import FolderIndex, Item, scan_folder
from peft_modal.data.images import SUFFIXES
from peft_modal.data.splits import Part
from peft_modal.ranges import PositiveInt, Share
from peft_modal_clip.class_names import label_order, names_in_csv, read_names, spoken
from peft_modal_clip.few_pictures import FewPictures, Source
from peft_modal_clip.splits import Entry, Split, checksum_of


class Folder(FewPictures):
    """Pictures in `DIR/[train|val|test/]<class>/...`, or those that a CSV `path,label[,classname][,split]` names.

    The name of a class is that of its folder (`_` is read as a space), or its `classname` in the CSV, or its label.
    Labels that are all whole numbers are in the order of the numbers, everything else in that of the alphabet.

    Args:
        root: The folder or the CSV file.
        shots: Training pictures per class, drawn by the seed, and as many to validate on, at most four; a class with
            fewer gives all. null takes everything.
        names: A text file with a line for each class, the folder's name (or the label), a space, and the name that is
            read, as in ImageNet's `classnames.txt`.
        val_share: Share of each class held out for validation where there is no `val`.
        test_share: Share of each class held out for testing where there are no splits.
        seed: Of the held-out files, of `shots`, and of order and augmentation.
        options: Arguments of `FewPictures`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        shots: PositiveInt | None = None,
        names: str | Path | None = None,
        val_share: Share = 0.1,
        test_share: Share = 0.2,
        seed: int = 0,
        **options: Any,  # noqa: ANN401 — typed by `FewPictures`
    ) -> None:
        super().__init__(root=root, shots=shots, seed=seed, **options)
        self.names = None if names is None else Path(names)
        self.val_share = val_share
        self.test_share = test_share

    def source(self) -> Source:
        """The files of the folder or the CSV, held-out ones among them."""
        index = scan_folder(
            self.root, suffixes=SUFFIXES, val_share=self.val_share, test_share=self.test_share, seed=self.seed
        )
        is_folder = self.root.is_dir()
        images = self.root if is_folder else self.root.parent
        order = index.class_names if is_folder else label_order(index.class_names)
        named = {} if is_folder else names_in_csv(self.root)
        if self.names is not None:
            named = read_names(self.names, index.class_names)
        where = f"'{self.root}'" if self.names is None else f"data.names: '{self.names}'"
        names = spoken({label: named.get(label, label) for label in order}, where)
        split = _split_of(index, names, images)
        facts = {"root": str(self.root), "split_sha256": checksum_of(split)}
        return Source(split, tuple(names.values()), images, facts)

    def no_samples(self, part: Part) -> str:
        """Where files of a split come from."""
        return f"'{self.root}' has no {part} files: add '{part}/<class>/', or set a {part}_share."


def _split_of(index: FolderIndex, names: Mapping[str, str], images: Path) -> Split:
    """The files of an index, labelled by the order of `names`."""
    places = {label: place for place, label in enumerate(names)}

    def entry(item: Item) -> Entry:
        label = index.class_names[item.label]
        path = item.path.relative_to(images) if item.path.is_relative_to(images) else item.path.absolute()
        return Entry(path.as_posix(), places[label], names[label])

    return Split(*(tuple(map(entry, part)) for part in (index.train, index.val, index.test)))
