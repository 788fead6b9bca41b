"""A builder that turns module paths into sites and ports, so that an anatomy reads like a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from peft_modal.anatomy.anatomy import Anatomy
from peft_modal.anatomy.layout import TokenLayout
from peft_modal.anatomy.registered import has_parameter_slot, registered
from peft_modal.anatomy.sites import Access, Operation, Port, Reach, Side, WeightSite

_CALLED: frozenset[Reach] = frozenset({"call", "weight", "leaf"})
_READ: frozenset[Reach] = frozenset({"weight", "leaf"})
_LEAF: frozenset[Reach] = frozenset({"leaf"})
_ALL: frozenset[Access] = frozenset({"read", "add", "replace"})


class AnatomyBuilder:
    """Collects sites and ports of a network in order of execution.

    Shapes, operations, biases and channel axes are read off the modules; the author says only roles.

    Args:
        network: The network that paths refer to.
        stack: Stack of what is added next; see `enter`.
    """

    def __init__(self, network: nn.Module, *, stack: str = "blocks") -> None:
        self.network = network
        self.stack = stack
        self.block: int | None = None
        self.sites: list[WeightSite] = []
        self.ports: list[Port] = []
        self.depth: dict[str, int] = {}

    def enter(self, stack: str, block: int | None = None) -> None:
        """Say where the following sites and ports lie."""
        self.stack, self.block = stack, block
        if block is not None:
            self.depth[stack] = max(self.depth.get(stack, 0), block + 1)

    def op(
        self, role: str, path: str, *, name: str | None = None, heads: int | None = None, out_dim: int | None = None
    ) -> None:
        """A linear, convolution, norm or embedding that is a module called once; its bias becomes a site too.

        Args:
            role: Its role.
            path: The module.
            name: Name of the site; None for the path.
            heads: Attention heads among its outputs.
            out_dim: Channel axis of its output where its class does not tell (a LayerNorm over channels of pictures).

        Raises:
            TypeError: The module is of another kind.
        """
        module = self.network.get_submodule(path)
        name = name or path
        op, usual = _operation(module)
        out_dim = usual if out_dim is None else out_dim
        if op == "norm":
            self._norm(role, path, module, name, out_dim)
            return
        weight = module.get_parameter("weight")
        reach = _READ if op == "embedding" else _CALLED
        bias = "bias" if has_parameter_slot(module, "bias") else None
        self.sites.append(
            WeightSite(
                name=name, role=role, stack=self.stack, block=self.block, holder=path, tensor="weight", owner=path,
                op=op, shape=tuple(weight.shape), reach=reach, bias=bias, out_dim=out_dim, heads=heads,
            )
        )  # fmt: skip
        self._bias(role, path, "bias", owner=path, name=name, out_dim=out_dim)

    def fused(
        self, role: str, path: str, parts: Mapping[str, str], *, tensor: str = "weight", bias: str | None = "bias",
        name: str | None = None, heads: int | None = None, called: bool = True, owner: str | None = None,
    ) -> None:  # fmt: skip
        """One tensor whose equal row slices are separate sites, e.g. timm's `qkv` or MultiheadAttention's packed input.

        Args:
            role: Role of the whole tensor, e.g. `attn.qkv`; chosen by this exact role only.
            path: Module that holds and reads the tensor.
            parts: Role to name of each slice, in row order.
            tensor: Attribute name of the weight.
            bias: Attribute name of the bias; None where none would be read.
            name: Name of the whole site.
            heads: Attention heads of each slice.
            called: Whether the module's call *is* the operation (a linear), or only reads the tensor.
            owner: Module whose forward reads the tensor, where that is not `path`.
        """
        holder = self.network.get_submodule(path)
        weight = holder.get_parameter(tensor)
        name = name or path
        rows = weight.shape[0] // len(parts)
        reach = _CALLED if called else _READ
        common = {
            "stack": self.stack, "block": self.block, "holder": path, "tensor": tensor, "owner": owner or path,
            "reach": reach,
            "bias": bias, "heads": heads,
        }  # fmt: skip
        whole = WeightSite(
            name=name, role=role, op="linear", shape=tuple(weight.shape), parts=tuple(parts.values()),
            **common,  # type: ignore[arg-type]
        )  # fmt: skip
        self.sites.append(whole)
        for index, (part_role, part_name) in enumerate(parts.items()):
            self.sites.append(
                WeightSite(
                    name=part_name,
                    role=part_role,
                    op="linear",
                    shape=(rows, *weight.shape[1:]),
                    rows=(index * rows, (index + 1) * rows),
                    **common,  # type: ignore[arg-type]
                )
            )
        self._bias(role, path, bias, owner=owner or path, name=name)

    def read(self, role: str, path: str, *, owner: str, name: str | None = None) -> None:
        """A linear whose weight is read by `owner` without calling it (MultiheadAttention's `out_proj`)."""
        module = self.network.get_submodule(path)
        weight = module.get_parameter("weight")
        self.sites.append(
            WeightSite(
                name=name or path, role=role, stack=self.stack, block=self.block, holder=path, tensor="weight",
                owner=owner, op="linear", shape=tuple(weight.shape), reach=_READ, bias="bias",
            )
        )  # fmt: skip
        self._bias(role, path, "bias", owner=owner, name=name or path)

    def raw(self, role: str, path: str, *, owner: str = "", called_owner: bool = False, decay: bool = True) -> None:
        """A bare parameter such as a class token; `called_owner` allows a tensor computed per call to stand in."""
        holder, _, tensor = path.rpartition(".")
        parameter = self.network.get_parameter(path)
        self.sites.append(
            WeightSite(
                name=path, role=role, stack=self.stack, block=self.block, holder=holder, tensor=tensor, owner=owner,
                op="raw", shape=tuple(parameter.shape), reach=_READ if called_owner else _LEAF, decay=decay,
            )
        )  # fmt: skip

    def port(
        self, role: str, module: str, side: Side, *, width: int, allows: Sequence[Access] | None = None,
        item: int | str = 0, channel_dim: int = -1,
    ) -> None:  # fmt: skip
        """A port; its name is made of stack, block and role."""
        where = self.stack if self.block is None else f"{self.stack}.{self.block}"
        self.ports.append(
            Port(
                name=f"{where}.{role}", role=role, stack=self.stack, block=self.block, module=module, side=side,
                width=width, allows=_ALL if allows is None else frozenset(allows), item=item, channel_dim=channel_dim,
            )
        )  # fmt: skip

    def build(self, *, layouts: Mapping[str, TokenLayout], always_trained: Sequence[str] = ()) -> Anatomy:
        """The finished anatomy."""
        return Anatomy(
            sites=self.sites, ports=self.ports, layouts=layouts, depth=self.depth, always_trained=always_trained
        )

    def _norm(self, role: str, path: str, module: nn.Module, name: str, out_dim: int) -> None:
        slot = "bias" if has_parameter_slot(module, "bias") else None  # RMSNorm has none
        for tensor, part in (("weight", "scale"), ("bias", "shift")):
            if registered(module, tensor) is None:  # norms without affine parameters have no site
                continue
            shape = tuple(module.get_parameter(tensor).shape)
            self.sites.append(
                WeightSite(
                    name=name if part == "scale" else f"{name}.shift", role=f"{role}.{part}", stack=self.stack,
                    block=self.block, holder=path, tensor=tensor, owner=path, op="norm", shape=shape,
                    reach=_CALLED, bias=slot if part == "scale" else None, out_dim=out_dim,
                )
            )  # fmt: skip

    def _bias(self, role: str, path: str, tensor: str | None, *, owner: str, name: str, out_dim: int = -1) -> None:
        holder = self.network.get_submodule(path)
        if tensor is None or registered(holder, tensor) is None:
            return
        self.sites.append(
            WeightSite(
                name=f"{name}.bias", role=f"bias.{role}", stack=self.stack, block=self.block, holder=path,
                tensor=tensor, owner=owner, op="raw", shape=tuple(holder.get_parameter(tensor).shape), reach=_READ,
                out_dim=out_dim,
            )
        )  # fmt: skip


def _operation(module: nn.Module) -> tuple[Operation, int]:
    if isinstance(module, nn.Linear):
        return "linear", -1
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv", 1
    if isinstance(module, nn.Embedding):
        return "embedding", -1
    if isinstance(module, _BatchNorm | nn.GroupNorm):
        return "norm", 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "norm", -1
    raise TypeError(
        f"{type(module).__name__} is no linear, convolution, norm or embedding; add it with raw() or read()"
    )
