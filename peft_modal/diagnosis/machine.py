"""The machine: Python, cores, memory, disk, folders, torch's build and the GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from peft_modal._version import __version__
from peft_modal.data.cache_folder import cache_folder
from peft_modal.diagnosis.finding import Finding

_PYTHON: Final = (3, 11)
_LITTLE_DISK: Final = 2 * 10**9
"""Bytes; a run with checkpoints of a large backbone takes about that."""


def check_machine() -> Iterator[Finding]:
    """Versions of Python and of ourselves, operating system, cores, memory.

    Yields:
        One finding for each.
    """
    yield Finding("machine", "peft_modal", "ok", f"{__version__} in {Path(__file__).parents[1]}")
    found = platform.python_version()
    if sys.version_info[:2] < _PYTHON:
        wanted = ".".join(map(str, _PYTHON))
        yield Finding(
            "machine", "python", "problem", f"{found}, {wanted} or newer is needed", f"install Python {wanted}"
        )
    else:
        yield Finding("machine", "python", "ok", f"{found} at {sys.executable}")
    yield Finding("machine", "system", "ok", f"{platform.system()} {platform.release()} on {platform.machine()}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding(
        "machine",
        "cores",
        "ok",
        f"{usable} usable of {os.cpu_count()}" + (f", OMP_NUM_THREADS={threads}" if threads else ""),
    )
    yield _memory()


def check_folders() -> Iterator[Finding]:
    """Whether the cache and the working folder can be written to, and how much room they have.

    Yields:
        One finding for each.
    """
    for name, folder, mend in (
        ("cache folder", cache_folder(), "set PEFT_MODAL_CACHE to a folder that you may write to"),
        ("working folder", Path.cwd(), "go to a folder that you may write to, or give --out"),
    ):
        existing = next((p for p in (folder, *folder.parents) if p.exists()), folder)
        where = str(folder) if existing == folder else f"{folder} (not there yet)"
        reason = _not_writable(existing)
        if reason:
            yield Finding("folders", name, "problem", f"{where} cannot be written to ({reason})", mend)
            continue
        free = shutil.disk_usage(existing).free
        text = f"{where}, {free / 1e9:,.1f} GB free"
        if free < _LITTLE_DISK:
            yield Finding("folders", name, "warning", text, "make room: a run with checkpoints may take 2 GB")
        else:
            yield Finding("folders", name, "ok", text)


def check_torch() -> Iterator[Finding]:
    """Whether torch can be imported, for what it was built, and whether that fits the GPU and its driver.

    Yields:
        One finding for each.
    """
    reinstall = 'pip install --force-reinstall "torch>=2.11,<2.15"'
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken build raises anything, OSError for a missing library too
        yield Finding(
            "torch", "import", "problem", f"torch cannot be imported: {type(error).__name__}: {error}", reinstall
        )
        yield from _driver(built=None)
        return
    built: str | None = torch.version.cuda
    kind = f"CUDA {built}" if built else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"
    yield Finding("torch", "build", "ok", f"{torch.__version__}, {kind}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _device(torch, index)
    else:
        yield from _driver(built=built)


def _device(torch: Any, index: int) -> Finding:  # noqa: ANN401 — the module, imported by the caller
    properties = torch.cuda.get_device_properties(index)
    name = f"GPU {index}"
    memory = f"{properties.total_memory / 1e9:.0f} GB"
    text = f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}"
    try:
        torch.ones(8, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return Finding(
            "torch", name, "problem", f"{text}: a sum on it fails ({reason})",
            "install a torch build for this GPU: https://pytorch.org/get-started/locally",
        )  # fmt: skip
    return Finding("torch", name, "ok", text)


def _driver(*, built: str | None) -> Iterator[Finding]:
    """Without a usable GPU: whether there is one after all.

    Yields:
        One finding for each.
    """
    driver = _nvidia_driver()
    if driver is None:
        yield Finding("torch", "GPU", "ok", "none; everything runs on the CPU")
    elif driver == "":
        yield Finding(
            "torch", "GPU", "warning", "nvidia-smi is there but cannot reach a driver",
            "install the driver of the GPU, or start the container with access to it (docker run --gpus all)",
        )  # fmt: skip
    elif built is None:
        yield Finding(
            "torch", "GPU", "warning", f"there is a GPU (driver {driver}), but torch is not built for it or not there",
            "install a CUDA build of torch: https://pytorch.org/get-started/locally",
        )  # fmt: skip
    else:
        yield Finding(
            "torch", "GPU", "problem", f"torch is built for CUDA {built}, which driver {driver} does not serve",
            f"update the driver, or install a torch build for an older CUDA than {built}",
        )  # fmt: skip


def _nvidia_driver() -> str | None:
    """Version of the driver; "" where the tool fails, None where there is no tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 — a fixed command, found on the path
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"], check=False, capture_output=True, text=True,
            timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Finding("machine", "memory", "ok", "unknown on this system")
    text = f"{total / 1e9:,.1f} GB"
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        text = f"{limit / 1e9:,.1f} GB for this container, of {text}"
    return Finding("machine", "memory", "ok", text)


def _cgroup_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _not_writable(folder: Path) -> str:
    """Why no file can be made in a folder, "" if one can: permissions alone do not tell of a read-only disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__
