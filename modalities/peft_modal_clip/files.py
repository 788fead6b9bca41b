"""Pictures in files, as CLIP's image tower sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from peft_modal.data.epochs import Batch
from peft_modal.data.folder import list_files
from peft_modal.data.images import SUFFIXES, read_image
from peft_modal_clip.data import Normalize, normalized
from peft_modal_clip.transforms import evaluation_view


class PictureFiles(Dataset[Batch]):
    """Pictures on disk, each read when it is needed.

    Args:
        files: Their paths.
        side: Of the square in pixels.
        normalize: See `normalized`.
    """

    def __init__(self, files: Sequence[Path], side: int, normalize: Normalize) -> None:
        self.files = files
        self.side = side
        self.normalize: Normalize = normalize

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        square = evaluation_view(read_image(self.files[index]), self.side)
        return {"image": normalized(square[None], self.normalize)[0]}


def picture_batches(
    path: str | Path, *, side: int, normalize: Normalize, batch_size: int, num_workers: int
) -> tuple[Sequence[Path], Iterable[Batch]]:
    """The pictures under a path, and batches of them in the same order.

    Raises:
        DataError: There is no such file. A damaged one is reported when its batch is read.
    """
    files = list_files(path, SUFFIXES)
    return files, DataLoader(PictureFiles(files, side, normalize), batch_size=batch_size, num_workers=num_workers)
