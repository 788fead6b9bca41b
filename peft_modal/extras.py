"""Optional packages: whether they are there, and the command that brings them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from types import MappingProxyType, ModuleType
from typing import Final

from peft_modal.errors import MissingExtraError

_DISTRIBUTIONS: Final = MappingProxyType(
    {
        "cv2": "opencv-python",
        "open_clip": "open_clip_torch",
        "PIL": "pillow",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
    }
)
"""Import names whose distribution is called differently."""


def require(import_name: str, *, extra: str, distribution: str = "peft-modal") -> ModuleType:
    """Import an optional package, or say which command installs it.

    Args:
        import_name: What to import, `trimesh`.
        extra: The extra that brings it.
        distribution: Whose extra that is; a third-party plugin gives its own distribution.

    Raises:
        MissingExtraError: The package is not installed.
    """
    if missing_packages([import_name]):
        command = install_command([import_name], extra=extra, distribution=distribution)
        alone = install_command([import_name])
        raise MissingExtraError(f"'{import_name}' is not installed; run: {command} (or only: {alone})")
    return importlib.import_module(import_name)


def missing_packages(import_names: Iterable[str]) -> list[str]:
    """Those of `import_names` whose top-level package is not installed; imports nothing."""
    # `find_spec` of a submodule would import its parents.
    return [name for name in import_names if importlib.util.find_spec(name.partition(".")[0]) is None]


def absent_package(error: BaseException) -> str | None:
    """The top-level package whose absence caused `error`, None for any other failure."""
    if isinstance(error, ModuleNotFoundError) and error.name and missing_packages([error.name]):
        return error.name.partition(".")[0]
    return None


def install_command(import_names: Iterable[str], *, extra: str = "", distribution: str = "peft-modal") -> str:
    """The command that installs an extra, or the packages themselves where there is no extra."""
    if extra:
        return f'pip install "{distribution}[{extra}]"'
    roots = (name.partition(".")[0] for name in import_names)
    return "pip install " + " ".join(_DISTRIBUTIONS.get(root, root) for root in roots)
