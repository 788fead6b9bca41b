"""R-AMT: regularised mask tuning (Zheng et al., ICCV 2023, arXiv:2307.15049)."""

from peft_modal.methods.r_amt.mask import Mask
from peft_modal.methods.r_amt.method import RAMT
from peft_modal.methods.r_amt.training import EPSILON, Masks, RegularisedMasks, gate

__all__ = ("EPSILON", "RAMT", "Mask", "Masks", "RegularisedMasks", "gate")
