"""A method: the configuration of one PEFT technique."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from peft_modal.anatomy import Anatomy, Backbone, Port, Selector
from peft_modal.attach import Adapter
from peft_modal.attach.adapter import forget_compiled
from peft_modal.errors import AttachError, SelectionError
from peft_modal.ranges import ranged
from peft_modal.registry import default_registry


class Method(ABC):
    """Base of every method: constructor arguments are the configuration, `build` tells where what goes.

    A method holds no tensors; one instance can be attached to any number of backbones. Numbers outside the ranges that
    its constructor's annotations name are refused also where it is called from Python; see `peft_modal.ranges`.
    """

    identity_at_init: ClassVar[bool]
    """Whether a freshly attached adapter leaves every output of the backbone as it was."""
    needs_backward_through_backbone: ClassVar[bool] = True
    """False for side networks on taps: tapped tensors are cut, and branches, prompts and leaves are refused."""
    is_bound_to_classes: ClassVar[bool] = False
    """True where what is trained belongs to the classes trained on, so that no others can be measured."""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = ranged(cls.__init__, where="method")  # type: ignore[method-assign, assignment]

    @abstractmethod
    def build(self, adapter: Adapter) -> None:
        """Select places on `adapter.backbone`, create modules, and call the adapter's verbs.

        Global random numbers drawn inside come from the attachment's own generator and leave the global state alone.
        """

    def attach(self, backbone: Backbone, *, name: str = "default", generator: torch.Generator | None = None) -> Adapter:
        """Attach to a backbone: all of it, or nothing when one step fails.

        Besides what `build` does, the adapter trains the tensors that the backbone's anatomy declares `always_trained`,
        and owns the BatchNorm statistics that drift where the frozen mode is `reference`.

        Args:
            backbone: Where to attach.
            name: Unique among the adapters of the backbone.
            generator: Source of every initial value; None for one seeded with 0.

        Raises:
            AttachError: The method cannot work on this backbone; says why.
            SelectionError: A selection matches nothing.
        """
        self._refuse(backbone, name)
        generator = generator or torch.Generator().manual_seed(0)
        adapter = Adapter(backbone, name, propagates=self.needs_backward_through_backbone)
        backbone.adapters[name] = adapter
        # The device is named so that a network on the meta device draws a seed, too.
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                self.build(adapter)
            self._own_common(adapter)
        except BaseException as error:
            adapter.detach()
            if isinstance(error, AttachError | SelectionError):
                raise type(error)(f"method '{self.describe()}' cannot be attached: {error}") from error
            if isinstance(error, MemoryError | RuntimeError) and "allocate memory" in str(error):
                raise AttachError(
                    f"method '{self.describe()}' needs more memory than there is; lower its sizes"
                ) from error
            raise
        forget_compiled()
        adapter.train(backbone.training)
        return adapter

    def describe(self) -> str:
        """The method's name in sentences and in names of stacked methods: the registered one, else its class's."""
        name = default_registry().short_name_of(type(self))
        return type(self).__name__.lower() if ":" in name else name.rpartition(".")[2]

    def _own_common(self, adapter: Adapter) -> None:
        backbone = adapter.backbone
        taken = {path for other in backbone.adapters.values() for path in _leaf_paths(other)}
        if self.needs_backward_through_backbone:
            for site in backbone.anatomy.always_trained:
                if site.path not in taken:
                    adapter.own(site)
        if backbone.frozen_mode == "reference":
            for path, module in backbone.network.named_modules():
                if isinstance(module, _BatchNorm) and module.track_running_stats:
                    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                        if f"{path}.{buffer}" not in taken:
                            adapter.own_tensor(f"{path}.{buffer}", trained=False)

    def _refuse(self, backbone: Backbone, name: str) -> None:
        if not isinstance(backbone, Backbone):
            kind = type(backbone).__name__
            hint = " (attach before torch.compile: hooks added later are ignored)" if kind == "OptimizedModule" else ""
            raise AttachError(f"a method attaches to a Backbone, not to {kind}{hint}")
        if name in backbone.adapters:
            raise AttachError(f"an adapter named '{name}' is attached already; choose another name, or detach it first")


def _leaf_paths(adapter: Adapter) -> set[str]:
    paths = set()
    for attachment in adapter.attachments:
        for holder, tensor in getattr(attachment, "places", ()):
            paths.add(f"{holder}.{tensor}" if holder else tensor)
    return paths


def beside_mlp(anatomy: Anatomy, tap: Port) -> Port:
    """Where a branch parallel to the MLP adds to the residual stream: where the MLP's own output does.

    Args:
        anatomy: Of the backbone.
        tap: Where the branch reads.

    Raises:
        AttachError: The stream has its channels on another axis there.
    """
    roles = {port.role for port in anatomy.ports if (port.stack, port.block) == (tap.stack, tap.block)}
    role = "mlp.branch" if "mlp.branch" in roles else "block.out"
    inject = anatomy.port(role, stack=tap.stack, block=tap.block)
    if inject.channel_dim != tap.channel_dim:
        raise AttachError(
            f"'{tap.name}' has its channels on axis {tap.channel_dim}, '{inject.name}' on axis {inject.channel_dim}; "
            "a branch between them would have to turn them, use a method that acts on weights"
        )
    return inject


def select_blocks(anatomy: Anatomy, selector: Selector, *, role: str) -> list[Port]:
    """The ports of one role in the blocks that `selector` names, in order of execution.

    Raises:
        SelectionError: No block has such a port.
    """
    wanted = Selector(roles=(role,), blocks=selector.blocks, stacks=selector.stacks, path=selector.path)
    return [port for port in anatomy.select_ports(wanted, needs="read") if port.block is not None]
