"""Where a run ran: packages, machine, threads."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from pathlib import Path

import torch

from peft_modal.files import versions
from peft_modal.report import Fact


def environment() -> tuple[Fact, ...]:
    """Versions and machine, as facts of a report."""
    facts = [Fact(name, version) for name, version in versions().items()]
    facts.append(Fact("System", f"{platform.system()} {platform.release()} {platform.machine()}"))
    facts.append(Fact("Processor", processor()))
    facts.append(Fact("Cores", os.cpu_count(), "count"))
    facts.append(Fact("Threads of torch", torch.get_num_threads(), "count"))
    if torch.cuda.is_available():
        facts.append(Fact("GPU", torch.cuda.get_device_name()))
        facts.append(Fact("CUDA", torch.version.cuda))
    facts.append(Fact("Written", datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")))
    return tuple(facts)


def processor() -> str:
    """Name of the processor; where the system does not tell, its architecture."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
