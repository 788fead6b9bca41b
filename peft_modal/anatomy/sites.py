"""Weight sites and ports: the named places of a network that a method can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reach = Literal["call", "weight", "leaf"]
Operation = Literal["linear", "conv", "norm", "embedding", "raw"]
Access = Literal["read", "add", "replace", "tokens"]
Side = Literal["in", "out"]


@dataclass(frozen=True)
class WeightSite:
    """One tensor of a network with a role; a row slice of a fused tensor is a site of its own.

    `reach` says how the site can be acted on: `call`, its operation is a module that is called once and may be
    extended; `weight`, its owner's forward reads the tensor, so a computed tensor may stand in for it during the call;
    `leaf`, a persistent tensor may stand in for it. An empty set lists a site that cannot be adapted.
    """

    name: str
    """Unique and stable, goes into files: `blocks.3.attn.q`."""
    role: str
    """What the tensor does, e.g. `attn.q`; a selector `attn` matches it."""
    stack: str
    """The sequence of blocks it belongs to, e.g. `blocks`, `visual`, `unet.down`."""
    block: int | None
    """Index of the block in execution order inside its stack, or None outside every block."""
    holder: str
    """Path of the module that registers the tensor."""
    tensor: str
    """Attribute name in the holder, e.g. `weight`, `in_proj_weight`, `cls_token`."""
    owner: str
    """Path of the module whose forward reads the tensor; differs from the holder for MultiheadAttention.out_proj."""
    op: Operation
    shape: tuple[int, ...]
    """Logical shape, of the slice; never read from the stored tensor, which may be packed."""
    reach: frozenset[Reach]
    rows: tuple[int, int] | None = None
    """Row slice of a fused tensor, or None for the whole tensor."""
    parts: tuple[str, ...] = ()
    """Names of the row slices where this site is a whole fused tensor; it is then selected by its exact role only."""
    bias: str | None = None
    """Attribute of the holder that is this operation's bias (its value may be None); None where there is no slot."""
    out_dim: int = -1
    """Channel axis of the operation's output: 1 for convolutions, BatchNorm and GroupNorm."""
    heads: int | None = None
    """Number of attention heads among the rows."""
    coupled: tuple[str, ...] = ()
    """Sites whose columns follow these rows (structured pruning and selection)."""
    decay: bool = True
    """Whether weight decay may act on the tensor when it is trained itself."""

    @property
    def path(self) -> str:
        """Name of the stored tensor in the network's state dict."""
        return f"{self.holder}.{self.tensor}" if self.holder else self.tensor

    def __deepcopy__(self, memo: object) -> WeightSite:
        # A backbone has hundreds, and none ever changes.
        return self


@dataclass(frozen=True)
class Port:
    """A point on the data path: one input or output of a submodule that is called exactly once per forward.

    `block.in` and `block.out` are the residual stream, `attn.branch` and `mlp.branch` what is added to it, after layer
    scale and drop-path; `attn.out` and `mlp.out` lie before those.
    """

    name: str
    role: str
    stack: str
    block: int | None
    module: str
    """Path of the submodule."""
    side: Side
    width: int
    """Number of channels; differs between ports of one network, so it is never a method's argument."""
    allows: frozenset[Access]
    item: int | str = 0
    """Argument index or keyword of an input; index into a tuple output (ignored for a plain tensor)."""
    channel_dim: int = -1

    def __deepcopy__(self, memo: object) -> Port:
        return self
