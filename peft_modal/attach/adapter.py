"""The adapter: everything one method trains and remembers, attached to one backbone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Backbone, Port, WeightSite, registrations
from peft_modal.attach.attachment import Attachment
from peft_modal.attach.branch import BranchAttachment, BranchMode
from peft_modal.attach.dense_update import DenseUpdate
from peft_modal.attach.lifecycle import LifeCycle
from peft_modal.attach.listeners import Listeners
from peft_modal.attach.namespace import Namespace
from peft_modal.attach.operations import Operation, OperationAttachment, OperationWeight
from peft_modal.attach.packing import PacksItself, packing_modules
from peft_modal.attach.prompts import PromptAttachment, PromptPlace, PromptSet, PromptSource, refuse_blocks
from peft_modal.attach.sparse import SparseEntries, part_of
from peft_modal.attach.sparse_attachment import CHECKPOINT_NAMES, FILE_NAMES, SparseAttachment
from peft_modal.attach.taps import TapAttachment
from peft_modal.attach.updates import LowRankUpdate, can_update
from peft_modal.attach.weights import (
    LeafAttachment,
    LowRankTransform,
    ReplaceSlice,
    TransformAttachment,
    UpdateAttachment,
)
from peft_modal.errors import AttachError, FileFormatError

Part = Literal["adapter", "backbone", "training_only"]


class Adapter(nn.Module):
    """What `Method.attach` returns; a method's `build` fills it through the verbs below.

    Three parts own all tensors: `adapter` what the method adds, `backbone_tensors` its copies of the backbone's own
    tensors, and `training_only` what is trained but folded away before saving. The backbone is referred to, never
    registered.

    Args:
        backbone: The backbone to attach to.
        name: Unique among the adapters of the backbone.
        propagates: Whether gradients flow through the backbone; if not, only taps are allowed, and they cut the
            gradient.
    """

    def __init__(self, backbone: Backbone, name: str, *, propagates: bool = True) -> None:
        super().__init__()
        self.__dict__["_backbone"] = backbone
        self.name = name
        self.propagates = propagates
        self.adapter = Namespace()
        self.backbone_tensors = Namespace()
        self.training_only = Namespace()
        self.attachments: list[Attachment] = []
        self.events = Listeners(self.attachments)
        self.is_enabled = True
        self.decay: dict[str, bool] = {}
        """Whether weight decay acts on a trained tensor, by name; on others by their number of axes."""
        self.lr: dict[str, float] = {}
        """Learning rate of a trained tensor, by name, where the method has its own; of others the task's."""
        self._weight = 1.0
        self._scope = ""

    @property
    def backbone(self) -> Backbone:
        """The backbone it is attached to."""
        return self.__dict__["_backbone"]

    # Verbs, used inside `Method.build`.

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of what is added inside."""
        before, self._scope = self._scope, f"{self._scope}{name}."
        try:
            yield
        finally:
            self._scope = before

    def add(self, name: str, module: nn.Module, *, training_only: bool = False) -> nn.Module:
        """Own a module under a dotted name.

        Args:
            name: Its name; the scope is put in front.
            module: The module.
            training_only: It is trained but not saved: `LifeCycle.finalise` folds what it has learnt into saved tensors
                (the network that re-parametrises prompts, for instance). Checkpoints of an unfinished run hold it.
        """
        reference = next(self.backbone.network.parameters())
        part = self.training_only if training_only else self.adapter
        part.place(self._scope + name, module.to(reference.device))
        return module

    def optimise(self, name: str, *, lr: float | None = None, decay: bool | None = None) -> None:
        """Let a tensor that was added be optimised in another way than the task does.

        Args:
            name: Dotted name of the tensor; the scope is put in front.
            lr: Its learning rate.
            decay: Whether weight decay acts on it.
        """
        key = f"adapter.{self._scope}{name}"
        if lr is not None:
            self.lr[key] = lr
        if decay is not None:
            self.decay[key] = decay

    def low_rank(self, site: WeightSite, update: LowRankUpdate) -> None:
        """Add a low-rank update to a site: beside the call where there is one, else in the weight.

        Raises:
            AttachError: The site is no linear or ungrouped convolution, or dropout is asked for where there is no call.
        """
        module = self.backbone.network.get_submodule(site.holder)
        reason = can_update(site, groups=getattr(module, "groups", 1))
        if reason:
            raise AttachError(f"'{site.name}' takes no low-rank update: {reason}")
        self._update(site, update)

    def dense_update(self, site: WeightSite, update: DenseUpdate) -> None:
        """Add an update that is generated in each pass: beside the call where there is one, else in the weight.

        Raises:
            AttachError: The site is no linear, or dropout is asked for where there is no call.
        """
        if site.op != "linear":
            raise AttachError(f"'{site.name}' takes no generated update: its operation is '{site.op}', not a linear")
        self._update(site, update)

    def _update(self, site: WeightSite, update: LowRankUpdate | DenseUpdate) -> None:
        self.add(site.name, update)
        if "call" in site.reach:
            self._hang(UpdateAttachment(self._order(), site, update))
            return
        if update.dropout or update.hidden_dropout or getattr(update, "drop_path", 0.0):
            raise AttachError(
                f"'{site.name}' is read inside a function, where inputs cannot be dropped; set dropout to 0 or leave "
                "that site out"
            )
        self._hang(TransformAttachment(self._order(), site, LowRankTransform(update)))

    def operate(self, site: WeightSite, operation: Operation) -> None:
        """Let an operation stand in for a whole site's: in its call where there is one, else in the weight.

        Raises:
            AttachError: The site is a slice, or has neither; or dropout or another bias is asked for where there is no
                call.
        """
        if site.rows is not None:
            raise AttachError(f"'{site.name}' is a slice of '{site.path}'; an operation acts on whole tensors only")
        self.add(site.name, operation)
        if "call" in site.reach and site.op in {"linear", "conv"}:
            self._hang(OperationAttachment(self._order(), site, operation))
            return
        if operation.has_dropout:
            raise AttachError(
                f"'{site.name}' is read inside a function, where inputs cannot be dropped; set dropout to 0 or leave "
                "that site out"
            )
        if operation.changes_bias:
            raise AttachError(
                f"'{site.name}' is read inside a function, where only its weight can be replaced, and this operation "
                "changes the bias too; leave that site out"
            )
        self.reparametrise(site, OperationWeight(operation), name="")

    def reparametrise(self, site: WeightSite, f: nn.Module, *, name: str | None = None, bias: bool = False) -> None:
        """Let `f(W)` stand in for the site's slice at each call; with `bias`, for its operation's bias.

        `f` gets None for a bias that does not exist. Pass `name=""` for a module that is owned already.

        Raises:
            AttachError: The tensor cannot be computed per call there.
        """
        if "weight" not in site.reach:
            raise AttachError(
                f"'{site.name}' is read outside its module's call, so a computed tensor would not be seen"
            )
        if bias and site.bias is None:
            raise AttachError(f"'{site.name}' has no bias slot")
        if name != "":
            self.add(name or site.name, f)
        self._hang(TransformAttachment(self._order(), site, f, tensor=site.bias if bias else None))

    def sparse(self, site: WeightSite, index: Tensor, *, decay: bool | None = None) -> SparseEntries:
        """Train the entries at flat row-major positions `index` of the site's slice; the change they make adds up.

        Any tensor will do. One that no module's own forward reads is written for the length of the backbone's call; a
        tied one is written wherever it stands.

        Args:
            site: The site.
            index: Positions (k,), each once; may be empty.
            decay: Whether weight decay pulls the values to zero; None where it would the whole tensor.

        Raises:
            AttachError: The tensor is not stored as real numbers, its entries are trained already, or it is tied to one
                that the anatomy does not list.
        """
        self._must_propagate("a trained tensor")
        weight = self.backbone.tensor(site.path)
        if not weight.is_floating_point():
            raise AttachError(f"'{site.path}' is stored as {weight.dtype} and cannot be trained")
        sites = self._tied_sites(site, weight)
        for attachment in self.attachments:
            if isinstance(attachment, SparseAttachment) and set(attachment.sites) & set(sites):
                raise AttachError(f"entries of '{site.name}' are trained twice by one adapter")
        entries = SparseEntries(part_of(weight, site.rows), index)
        # A whole tensor is called by its path: a weight and its bias must not stand in one another's name.
        name = site.path if site.rows is None else site.name
        self.add(name, entries)
        decays = (len(site.shape) >= 2 and site.decay) if decay is None else decay
        self.optimise(f"{name}.values", decay=decays)
        self._hang(SparseAttachment(self._order(), sites, entries))
        return entries

    def branch(
        self, tap: Port, inject: Port, module: nn.Module, *, name: str | None = None, mode: BranchMode = "add",
        folds_into: WeightSite | None = None,
    ) -> None:  # fmt: skip
        """Read at `tap`, add (or apply, or join) the module at `inject`; both ports lie in one block.

        Raises:
            AttachError: A port does not allow it, or the method does not back-propagate through the backbone.
        """
        self._must_propagate("a branch")
        needs = "add" if mode == "add" else "replace"
        for port, need in ((tap, "read"), (inject, needs)):
            if need not in port.allows:
                raise AttachError(
                    f"port '{port.name}' allows {', '.join(sorted(port.allows)) or 'nothing'}, not '{need}'"
                )
        if (tap.stack, tap.block) != (inject.stack, inject.block):
            raise AttachError(
                f"'{tap.name}' and '{inject.name}' lie in different blocks; use a tap to carry tensors across"
            )
        if mode == "apply" and tap != inject:
            raise AttachError("a module is applied where it reads: tap and inject must be the same port")
        if name != "":
            self.add(name or inject.name, module)
        self._hang(BranchAttachment(self._order(), tap, inject, module, mode, folds_into))

    def prompts(
        self, stack: str, blocks: Iterable[int], source: PromptSource, *, num_tokens: int, survives: bool,
        name: str = "prompts", place: PromptPlace = "prefix", export: str | None = None,
    ) -> None:  # fmt: skip
        """Insert prompts at the input of `blocks`; see `PromptSet`. Pass `name=""` for a source that is owned already.

        Raises:
            AttachError: The stack takes no prompts, the blocks do not suit, or the export's name is taken.
        """
        self._must_propagate("a prompt")
        anatomy = self.backbone.anatomy
        layout = anatomy.layouts.get(stack)
        if layout is None or layout.prompt_index is None:
            reason = "it carries no token sequence" if layout is None else layout.reason
            raise AttachError(f"'{stack}' takes no prompts: {reason}")
        if export is not None and export in self.backbone.exports:
            raise AttachError(f"another adapter already hands '{export}' to the head")
        chosen = tuple(sorted(set(blocks)))
        refused = refuse_blocks(chosen, depth=anatomy.depth[stack], survives=survives, exported=export is not None)
        if refused:
            raise AttachError(f"prompts in '{stack}': {refused}")
        ports = tuple(
            (b, anatomy.port("block.in", stack=stack, block=b), anatomy.port("block.out", stack=stack, block=b))
            for b in chosen
        )
        for _, before, after in ports:
            if "tokens" not in before.allows & after.allows:
                raise AttachError(f"'{before.name}' takes no prompts")
        final = None
        if export is not None:
            final = (
                anatomy.port("final.norm.in", stack=stack, block=None),
                anatomy.port("final.norm.out", stack=stack, block=None),
            )
        if name != "":
            self.add(name, source)
        order = self._order()
        prompts = PromptSet(
            f"{self.name}/{self._scope}{name}#{order}", source, blocks=chosen, num_tokens=num_tokens,
            survives=survives, place=place, export=export,
        )  # fmt: skip
        self._hang(PromptAttachment(order, prompts, ports, layout, final))

    def tap(self, port: Port, key: str) -> None:
        """Read a port into the context and `Features.extras[key]`.

        Raises:
            AttachError: The port cannot be read, or the key is taken.
        """
        if "read" not in port.allows:
            raise AttachError(f"port '{port.name}' cannot be read")
        attached = (a for other in self.backbone.adapters.values() for a in other.attachments)
        if any(isinstance(a, TapAttachment) and a.key == key for a in attached):
            raise AttachError(f"another tap already reads into '{key}'; choose another key")
        self._hang(TapAttachment(self._order(), port, key, detach=not self.propagates))

    def own(self, site: WeightSite) -> nn.Parameter:
        """Train a site itself: a leaf copy stands in, the backbone's tensor stays as loaded."""
        if site.rows is None:
            return self.own_tensor(site.path, decay=site.decay)
        self._must_propagate("a trained tensor")
        whole = self.backbone.tensor(site.path)
        leaf = ReplaceSlice(whole[site.rows[0] : site.rows[1]])
        self.backbone_tensors.place(self._scope + site.name, leaf)
        self._hang(TransformAttachment(self._order(), site, leaf))
        return leaf.value

    def own_tensor(self, path: str, *, decay: bool = True, trained: bool = True) -> nn.Parameter:
        """Own a copy of any parameter or buffer of the network by its state-dict name; tied tensors share one copy.

        Raises:
            AttachError: It is owned already, or cannot be trained.
        """
        original = self.backbone.tensor(path)
        places = registrations(self.backbone.network, original)
        holder, _, tensor = path.rpartition(".")
        for attachment in self.attachments:
            if isinstance(attachment, LeafAttachment) and attachment.places == places:
                if attachment.path == path:
                    raise AttachError(f"'{path}' is trained twice by one adapter")
                return getattr(attachment.source, attachment.attribute)
        level = self.backbone_tensors.descend((self._scope + holder).rstrip("."))
        copy = original.detach().clone()
        if not trained:
            level.register_buffer(tensor, copy)
        else:
            self._must_propagate("a trained tensor")
            if not copy.is_floating_point():
                raise AttachError(f"'{path}' is stored as {copy.dtype} and cannot be trained")
            level.register_parameter(tensor, nn.Parameter(copy))
            if not decay:
                self.decay[f"backbone.{self._scope}{path}"] = False
        self._hang(LeafAttachment(self._order(), places, level, tensor, path=path))
        return getattr(level, tensor)

    def owns(self, path: str) -> bool:
        """Whether the stored tensor of that name is trained by this adapter."""
        return any(
            isinstance(a, LeafAttachment) and path in {f"{h}.{t}" if h else t for h, t in a.places}
            for a in self.attachments
        )

    def listen(self, listener: LifeCycle, *, name: str = "life_cycle", training_only: bool = False) -> None:
        """Take part in the run; the task forwards the trainer's hooks to `events`.

        Args:
            listener: Who takes part.
            name: Of its tensors, and of what it says in the adapter file's header.
            training_only: See `add`.
        """
        self.events.add(listener, name=self._scope + name)
        self.add(name, listener, training_only=training_only)

    # Use.

    def enable(self, on: bool = True) -> None:
        """Switch the adapter's effect; hooks are removed and hung again, so forward passes carry no branch for it."""
        if on != self.is_enabled:
            for attachment in self.attachments:
                (attachment.hang if on else attachment.unhang)(self.backbone)
            self.is_enabled = on
            forget_compiled()

    @property
    def weight(self) -> float:
        """Factor of the adapter's effect."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        """Scale the effect.

        Raises:
            AttachError: Part of the adapter has no defined scaling.
        """
        reasons = [attachment.set_weight(value) for attachment in self.attachments]
        refused = next((reason for reason in reasons if reason), None)
        if refused:
            for attachment in self.attachments:
                attachment.set_weight(self._weight)
            raise AttachError(f"{refused}; switch the adapter with enable() instead")
        self._weight = value
        if self.is_enabled:
            self.enable(on=False)
            self.enable(on=True)

    def detach(self) -> None:
        """Leave the backbone exactly as it was before `attach`."""
        if self.is_enabled:
            for attachment in reversed(self.attachments):
                attachment.unhang(self.backbone)
            self.is_enabled = False
        self.backbone.adapters.pop(self.name, None)
        forget_compiled()

    def state(self, *, training_only: bool = False) -> dict[str, Tensor]:
        """Every tensor the adapter owns, by ownership and never by `requires_grad`; shared tensors once.

        Of trained entries the file holds positions and changes, a checkpoint positions and values; what packs itself
        is packed in the file only.

        Args:
            training_only: With what only training needs, for a checkpoint that goes on.
        """
        seen: set[int] = set()
        state = {}
        sparse = {} if training_only else self._sparse()
        packs = {} if training_only else self._packs()
        for prefix, part in self._parts(training_only=training_only):
            for key, value in part.state_dict(keep_vars=True).items():
                module = f"{prefix}.{key}".rpartition(".")[0]
                if module in sparse:
                    packed = sparse[module].packed(self.backbone)
                    state.update({f"{module}.{name}": packed[name] for name in FILE_NAMES})
                elif module in packs:
                    if id(packs[module]) not in seen:
                        seen.add(id(packs[module]))
                        state.update({f"{module}.{name}": part for name, part in packs[module].packed().items()})
                elif id(value) not in seen:
                    seen.add(id(value))
                    state[f"{prefix}.{key}"] = value.detach()
        return state

    def load(self, state: Mapping[str, Tensor], *, training_only: bool = False) -> None:
        """Fill the adapter strictly; trained entries take over whatever number of them there is.

        Args:
            state: What `state` with the same `training_only` gave.
            training_only: See `state`.

        Raises:
            FileFormatError: A tensor is missing, left over, or of another shape.
        """
        own = self.state(training_only=training_only)
        missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        if missing or extra:
            parts = [f"{len(names)} tensors are {what} (first: '{names[0]}')"
                     for names, what in ((missing, "missing"), (extra, "unknown")) if names]  # fmt: skip
            raise FileFormatError(f"the adapter's tensors do not fit this method: {', '.join(parts)}")
        names = CHECKPOINT_NAMES if training_only else FILE_NAMES
        sparse = {
            module: (attachment, {name: state[f"{module}.{name}"] for name in names})
            for module, attachment in self._sparse().items()
        }
        for module, (attachment, tensors) in sparse.items():
            attachment.refuse(module, tensors)
        packs = {} if training_only else self._packs()
        packed = {
            module: {name: state[f"{module}.{name}"] for name in part.file_names}
            for module, part in packs.items()
            if f"{module}.{part.file_names[0]}" in own
        }
        for module, tensors in packed.items():
            packs[module].refuse(module, tensors)
        others = {*sparse, *packs}
        plain = {name: target for name, target in own.items() if name.rpartition(".")[0] not in others}
        for name, target in plain.items():
            if target.shape != state[name].shape:
                raise FileFormatError(
                    f"tensor '{name}' has shape {tuple(state[name].shape)}, this method has {tuple(target.shape)}"
                )
        with torch.no_grad():
            for name, target in plain.items():
                target.copy_(state[name])
            for attachment, tensors in sparse.values():
                if training_only:
                    attachment.entries.fill(**tensors)
                else:
                    attachment.unpack(self.backbone, tensors)
        for module, tensors in packed.items():
            packs[module].unpack(tensors)

    def facts(self) -> dict[str, dict[str, Any]]:
        """What an adapter file's header says of the method beside its configuration, by listener: JSON values."""
        return self.events.facts()

    def rebuild(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Make again what calibration made, from the `facts` of a file, before its tensors are loaded.

        Raises:
            FileFormatError: They do not fit this network.
        """
        self.events.rebuild(facts)

    def adopt(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Act on the `facts` of a file, after its tensors were loaded.

        Raises:
            BackboneMismatchError: It was made on other weights.
            FileFormatError: It is of another format.
        """
        self.events.adopt(facts)

    def named_trained(self) -> dict[str, nn.Parameter]:
        """Every trainable tensor by its name, which is the one in the file if it is saved; each once."""
        named = {}
        for prefix, part in self._parts(training_only=True):
            named.update({f"{prefix}.{name}": parameter for name, parameter in part.named_parameters()})
        return named

    def counts(self) -> dict[Part, int]:
        """Trained parameters that the method adds, that are the backbone's own, and that are not saved."""
        counts: dict[Part, int] = {
            part: sum(p.numel() for p in module.parameters()) for part, module in self._parts(training_only=True)
        }
        for _, packs in packing_modules(self.adapter):
            saved, left_out = packs.counts()
            counts["adapter"] += saved - sum(p.numel() for p in packs.parameters())
            counts["training_only"] += left_out
        return counts

    def _parts(self, *, training_only: bool) -> tuple[tuple[Part, Namespace], ...]:
        saved: tuple[tuple[Part, Namespace], ...] = (("adapter", self.adapter), ("backbone", self.backbone_tensors))
        return (*saved, ("training_only", self.training_only)) if training_only else saved

    def _hang(self, attachment: Attachment) -> None:
        attachment.hang(self.backbone)
        self.attachments.append(attachment)

    def _order(self) -> int:
        self.backbone.shared["order"] = self.backbone.shared.get("order", 0) + 1
        return self.backbone.shared["order"]

    def _must_propagate(self, what: str) -> None:
        if not self.propagates:
            raise AttachError(
                f"the method does not back-propagate through the backbone, so {what} in it would get no gradient"
            )

    def _sparse(self) -> dict[str, SparseAttachment]:
        """By the name of the entries in a state."""
        names = {id(module): f"adapter.{name}" for name, module in self.adapter.named_modules()}
        return {names[id(a.entries)]: a for a in self.attachments if isinstance(a, SparseAttachment)}

    def _packs(self) -> dict[str, PacksItself]:
        """By their names in a state."""
        return {f"adapter.{name}": part for name, part in packing_modules(self.adapter)}

    def _tied_sites(self, site: WeightSite, weight: Tensor) -> tuple[WeightSite, ...]:
        """The sites that are this tensor, or this slice of it.

        Raises:
            AttachError: The network registers it where the anatomy lists no site.
        """
        sites = []
        for holder, tensor in registrations(self.backbone.network, weight):
            here = [
                other
                for other in self.backbone.anatomy.sites
                if (other.holder, other.tensor, other.rows) == (holder, tensor, site.rows)
            ]
            if not here:
                raise AttachError(
                    f"'{site.name}' is tied to '{holder}.{tensor}', which the anatomy does not list; leave it out"
                )
            sites.append(here[0])
        return (site, *(other for other in sites if other.path != site.path))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        # Moving a module replaces its buffers (and may replace parameters): what stands in must follow.
        leaves = [a for a in self.attachments if isinstance(a, LeafAttachment)] if self.is_enabled else []
        for attachment in leaves:
            attachment.unhang(self.backbone)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for attachment in leaves:
            attachment.hang(self.backbone)
        return self


def forget_compiled() -> None:
    """Let `torch.compile` trace again."""
    # Compiled code does not see hooks that come or go; importing the compiler only to reset it would be slow.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
