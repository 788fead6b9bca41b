"""Point-PEFT: point-prior prompts and a geometry-aware adapter (Tang et al., AAAI 2024, arXiv:2310.03059)."""

from peft_modal_pointcloud.point_peft.method import PointPEFT

__all__ = ("PointPEFT",)
