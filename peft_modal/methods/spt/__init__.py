"""SPT: sensitivity-aware allocation (He et al., ICCV 2023, arXiv:2303.08566)."""

from peft_modal.methods.spt.allocation import Allocation, Target, allocate
from peft_modal.methods.spt.method import SPT

__all__ = ("SPT", "Allocation", "Target", "allocate")
