"""Stand-in tensors: what a module reads in place of a registered tensor, and how several adapters share one.

Python finds `module.__dict__[name]` before `nn.Module.__getattr__` looks into parameters and buffers. A tensor put
there hides the registered one from the module's forward and leaves keys, order and values of the state dict, classes,
deepcopy and pickle alone.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_modal.anatomy import Backbone, registered
from peft_modal.errors import AttachError


class Transform(Protocol):
    """Computes an effective tensor from the one below it; None stands for a missing bias."""

    def __call__(self, tensor: Tensor | None, /) -> Tensor:
        """The effective tensor."""
        ...


class TensorChain:
    """All that stands in for one tensor: a stack of persistent leaves, then transforms evaluated at each call."""

    def __init__(self, holder: nn.Module, tensor: str, path: str) -> None:
        self.holder = holder
        self.tensor = tensor
        self.path = path
        self.leaves: list[tuple[int, Tensor]] = []
        self.transforms: list[tuple[int, Transform]] = []

    def base(self) -> Tensor | None:
        """The uppermost leaf, else the registered tensor (None for a bias that does not exist)."""
        if self.leaves:
            return self.leaves[-1][1]
        return registered(self.holder, self.tensor)

    def show(self) -> None:
        """Compute the effective tensor and let it stand in."""
        effective = self.base()
        for _, transform in self.transforms:
            effective = transform(effective)
        self.holder.__dict__[self.tensor] = effective

    def rest(self) -> None:
        """Leave only what stands in between calls: the uppermost leaf, or nothing."""
        if self.leaves:
            self.holder.__dict__[self.tensor] = self.leaves[-1][1]
        else:
            self.holder.__dict__.pop(self.tensor, None)

    def verify(self) -> None:
        """Check that nobody has replaced the tensor behind our back.

        Raises:
            AttachError: Other code assigned the attribute while a leaf stood in for it.
        """
        if self.leaves and self.holder.__dict__.get(self.tensor) is not self.leaves[-1][1]:
            raise AttachError(f"'{self.path}' was assigned by other code while an adapter trained it; detach first")

    @property
    def is_idle(self) -> bool:
        """Whether nothing stands in."""
        return not self.leaves and not self.transforms


class OwnerHooks:
    """Shows the effective tensors during the call of the module that reads them."""

    def __init__(self, owner: nn.Module) -> None:
        self.chains: list[TensorChain] = []
        self.handles: tuple[RemovableHandle, RemovableHandle] = (
            owner.register_forward_pre_hook(self.before),
            # always_call: an exception, or the early stop of a checkpoint's recomputation, leaves nothing behind.
            owner.register_forward_hook(self.after, always_call=True),
        )

    def before(self, _module: nn.Module, _args: object) -> None:
        """Forward pre-hook of the owner."""
        for chain in self.chains:
            chain.show()

    def after(self, _module: nn.Module, _args: object, _output: object) -> None:
        """Forward hook of the owner."""
        for chain in self.chains:
            chain.rest()


def chain_of(backbone: Backbone, holder: str, tensor: str) -> TensorChain:
    """The chain of one stored tensor, made on first use."""
    key = ("chain", holder, tensor)
    if key not in backbone.shared:
        path = f"{holder}.{tensor}" if holder else tensor
        backbone.shared[key] = TensorChain(backbone.network.get_submodule(holder), tensor, path)
    return backbone.shared[key]


def push_leaf(backbone: Backbone, holder: str, tensor: str, leaf: Tensor, order: int) -> None:
    """Let a leaf stand in until it is removed."""
    chain = chain_of(backbone, holder, tensor)
    chain.leaves.append((order, leaf))
    chain.leaves.sort(key=lambda entry: entry[0])
    chain.rest()


def drop_leaf(backbone: Backbone, holder: str, tensor: str, order: int) -> None:
    """Take a leaf away."""
    chain = chain_of(backbone, holder, tensor)
    chain.verify()
    chain.leaves = [entry for entry in chain.leaves if entry[0] != order]
    chain.rest()
    _forget(backbone, holder, tensor)


def push_transform(
    backbone: Backbone, holder: str, tensor: str, owner: str | None, transform: Transform, order: int
) -> None:
    """Let a tensor computed at each call of `owner` stand in; None for the backbone itself, not its network."""
    chain = chain_of(backbone, holder, tensor)
    chain.transforms.append((order, transform))
    chain.transforms.sort(key=lambda entry: entry[0])
    key = ("owner", owner)
    if key not in backbone.shared:
        backbone.shared[key] = OwnerHooks(backbone if owner is None else backbone.network.get_submodule(owner))
    hooks: OwnerHooks = backbone.shared[key]
    if chain not in hooks.chains:
        hooks.chains.append(chain)


def drop_transform(backbone: Backbone, holder: str, tensor: str, owner: str | None, transform: Transform) -> None:
    """Take a computed tensor away, and the owner's hooks with the last one."""
    chain = chain_of(backbone, holder, tensor)
    chain.transforms = [entry for entry in chain.transforms if entry[1] is not transform]
    if not chain.transforms:
        key = ("owner", owner)
        hooks: OwnerHooks = backbone.shared[key]
        hooks.chains.remove(chain)
        if not hooks.chains:
            for handle in hooks.handles:
                handle.remove()
            del backbone.shared[key]
    _forget(backbone, holder, tensor)


def _forget(backbone: Backbone, holder: str, tensor: str) -> None:
    key = ("chain", holder, tensor)
    if backbone.shared[key].is_idle:
        del backbone.shared[key]
