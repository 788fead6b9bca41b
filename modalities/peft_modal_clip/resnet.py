"""Where things lie in open_clip's ResNet: its three-fold stem, its bottlenecks, and the attention that pools.

He et al., CVPR 2016, arXiv:1512.03385, as CLIP changed it: Radford et al., ICML 2021, arXiv:2103.00020
"""

from __future__ import annotations

from typing import Any

from peft_modal.anatomy import AnatomyBuilder


def resnet_sites(b: AnatomyBuilder, tower: Any) -> None:  # noqa: ANN401 — open_clip's ModifiedResNet
    """Sites and ports of the tower `visual`, in order of execution; blocks are numbered through its stages.

    The residual stream is (B, C, H, W) and gets wider at each stage, so that a stage's first block, whose shortcut has
    a convolution of its own, has no `block.in`. Activations work in place, so that nothing within a block is a port.
    The pooling attention reads its linears inside a function.
    """
    for number in (1, 2, 3):
        b.op("embed", f"visual.conv{number}")
        b.op("norm", f"visual.bn{number}")
    index = 0
    for stage in (1, 2, 3, 4):
        for number, block in enumerate(getattr(tower, f"layer{stage}")):
            _bottleneck(b, index, f"visual.layer{stage}.{number}", block)
            index += 1
    b.enter("visual")
    pool = "visual.attnpool"
    b.raw("pos", f"{pool}.positional_embedding", owner=pool, called_owner=True)
    for role, name in (("attn.q", "q_proj"), ("attn.k", "k_proj"), ("attn.v", "v_proj"), ("attn.out", "c_proj")):
        b.read(role, f"{pool}.{name}", owner=pool)


def _bottleneck(b: AnatomyBuilder, index: int, path: str, block: Any) -> None:  # noqa: ANN401
    b.enter("visual", index)
    width = int(block.conv3.out_channels)
    if block.downsample is None:
        b.port("block.in", path, "in", width=width, channel_dim=1)
    for number in (1, 2, 3):
        b.op("conv", f"{path}.conv{number}")
        b.op("norm", f"{path}.bn{number}")
    if block.downsample is not None:
        b.op("conv.downsample", f"{path}.downsample.0")
        b.op("norm.downsample", f"{path}.downsample.1")
    b.port("block.out", path, "out", width=width, channel_dim=1)
