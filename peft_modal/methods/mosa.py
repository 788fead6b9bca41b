"""MoSA: mixture of sparse adapters (arXiv:2312.02923)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from peft_modal.anatomy import Anatomy, Port, Selector
from peft_modal.attach import Adapter, LifeCycle, Run
from peft_modal.attach.lifecycle import Batch, Output
from peft_modal.attach.packing import PacksItself
from peft_modal.errors import AttachError, ConfigError, FileFormatError
from peft_modal.methods.base import Method, beside_mlp, select_blocks
from peft_modal.methods.bottleneck import Activation, must_be_channels_last
from peft_modal.ranges import DropRate, NonNegativeFloat, PositiveInt, Range

Style = Literal["adaptformer", "pfeiffer", "houlsby"]
Shared = Literal["down", "up", "none"]
Split = Literal["entry", "row", "column"]
MOST_EXPERTS: Final = 255
"""An entry's owner is kept in one byte."""
Experts: TypeAlias = Annotated[int, Range(1, MOST_EXPERTS)]
_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}


class _Defaults(NamedTuple):
    """What a style has where nothing else is asked for."""

    activation: Activation
    scale: float
    dropout: float
    has_norm: bool


_STYLES: Mapping[Style, _Defaults] = {
    "adaptformer": _Defaults("gelu", 0.1, 0.1, has_norm=True),
    "pfeiffer": _Defaults("relu", 1.0, 0.0, has_norm=True),
    "houlsby": _Defaults("silu", 1.0, 0.0, has_norm=False),
}


class MoSA(Method):
    """Copies of an adapter that each train a part of its weights, and are averaged (arXiv:2312.02923).

    a(x) = s * U_v dropout(act(D_u LNa(x))), with experts u and v drawn for each training pass and bottleneck:

        adaptformer: x2 = x1 + MLP(LN x1) + a(x1)
        pfeiffer:    m = MLP(LN x1); x2 = x1 + m + a(m)
        houlsby:     x1 = h + a(h) of h = x + Attn(LN x), and the same behind the MLP's sum; without LNa

    Every expert has all weights of its side of the bottleneck, and owns a part of them: the entries whose random scores
    rank among its share, floor(N e / E) < rank <= floor(N (e + 1) / E). The active expert's whole matrix acts, and its
    gradient is kept where it owns; the others have none, so that the optimiser leaves them alone. Each step has two
    passes with routes of their own:

        loss = CE(logits1) + consistency * (KL(sg p2 || p1) + KL(sg p1 || p2)) / 2

    Experts start alike, so that their mean W = 1/E sum_e W_e, which is what evaluates and what a file holds, has of
    each entry 1/E of what its owner learnt. When training is over the mean takes the experts' place; a loaded file has
    it from the start, and cannot train on as a mixture.

    Where the released code and this differ: its merge mode `joint` divides an adapter that is complete already by E,
    and is not offered; it draws routes from Python's numbers, this from torch's global ones, so that a block that is
    computed again takes the same route. As there, decay of an active expert also shrinks entries that it does not own.

    The divergence needs class logits: tasks that give something else (denoised latents, embeddings) are refused at the
    start of the run unless `consistency` is 0. In several processes each step trains other tensors, which needs
    `trainer.strategy=ddp_find_unused_parameters_true`.

    Args:
        hidden_dim: Width of the bottleneck; 64 for FGVC, 16 for VTAB-1k.
        experts: Copies, E.
        share: The side that is one dense linear; all published runs share `down`.
        style: `adaptformer`: GELU, scale 0.1, dropout 0.1, parallel to the MLP; `pfeiffer`: ReLU, scale 1, behind the
            MLP; both with a LayerNorm (eps 1e-6) of their own; `houlsby`: SiLU, scale 1, behind either residual sum,
            without one.
        split: What is owned: single entries, rows, or columns. Biases belong to every expert.
        activation: Nonlinearity; null for the style's.
        scale: s; null for the style's.
        dropout: Probability of zeroing a hidden channel; null for the style's, which is 0 but for `adaptformer`.
        consistency: Factor of the divergence; 0 saves the second pass.
        deep_consistency: Factor, times `consistency` over the number of blocks, of the summed mean squared differences
            between the passes' outputs of the first half of the blocks; 0.01 in the published run on Stanford Cars.
        blocks: Blocks to adapt; see `Selector`; None for all.

    Raises:
        ConfigError: A name is unknown, or `deep_consistency` lacks its second pass.
    """

    identity_at_init = True

    def __init__(
        self, *, hidden_dim: PositiveInt = 64, experts: Experts = 4, share: Shared = "down",
        style: Style = "adaptformer", split: Split = "entry", activation: Activation | None = None,
        scale: float | None = None, dropout: DropRate | None = None, consistency: NonNegativeFloat = 1.0,
        deep_consistency: NonNegativeFloat = 0.0, blocks: str | list[int] | dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        _refuse_unknown(share=(share, Shared), style=(style, Style), split=(split, Split))
        own = _STYLES[style]
        if deep_consistency and not consistency:
            raise ConfigError("method.deep_consistency: it needs the second pass; set method.consistency, too")
        self.hidden_dim = hidden_dim
        self.experts = experts
        self.share: Shared = share
        self.style: Style = style
        self.split: Split = split
        self.activation: Activation = own.activation if activation is None else activation
        self.scale = own.scale if scale is None else scale
        self.dropout = own.dropout if dropout is None else dropout
        self.consistency = consistency
        self.deep_consistency = deep_consistency
        self.where = Selector.parse({"blocks": blocks})

    def build(self, adapter: Adapter) -> None:
        """Adapters of experts where the style has them, and what happens in a step."""
        anatomy = adapter.backbone.anatomy
        place = {"adaptformer": self._parallel, "pfeiffer": self._behind_mlp, "houlsby": self._behind_sums}[self.style]
        place(adapter, anatomy)
        deep = self._tap(adapter, anatomy) if self.deep_consistency else {}
        adapter.listen(
            MixtureRun(adapter, consistency=self.consistency, deep=deep, deep_weight=self.deep_consistency),
            name="mosa", training_only=True,
        )  # fmt: skip

    def _parallel(self, adapter: Adapter, anatomy: Anatomy) -> None:
        for tap in select_blocks(anatomy, self.where, role="mlp.norm.in"):
            must_be_channels_last(tap.channel_dim, tap.name)
            adapter.branch(tap, beside_mlp(anatomy, tap), self._bottleneck(tap.width))

    def _behind_mlp(self, adapter: Adapter, anatomy: Anatomy) -> None:
        for port in select_blocks(anatomy, self.where, role="mlp.out"):
            must_be_channels_last(port.channel_dim, port.name)
            adapter.branch(port, port, Residual(self._bottleneck(port.width)), mode="apply")

    def _behind_sums(self, adapter: Adapter, anatomy: Anatomy) -> None:
        for out in select_blocks(anatomy, self.where, role="block.out"):
            must_be_channels_last(out.channel_dim, out.name)
            before, branch = (
                anatomy.port(role, stack=out.stack, block=out.block) for role in ("block.in", "attn.branch")
            )
            adapter.branch(before, branch, BehindSum(self._bottleneck(out.width)), mode="join")
            adapter.branch(out, out, Residual(self._bottleneck(out.width)), mode="apply")

    def _bottleneck(self, width: int) -> MixtureBottleneck:
        return MixtureBottleneck(
            width, self.hidden_dim, experts=self.experts, share=self.share, split=self.split,
            activation=self.activation, scale=self.scale, has_norm=_STYLES[self.style].has_norm, dropout=self.dropout,
        )  # fmt: skip

    def _tap(self, adapter: Adapter, anatomy: Anatomy) -> dict[str, int]:
        """Read the outputs of the first half of the blocks; their keys, with the number of blocks.

        Raises:
            AttachError: None of them is adapted, so that both passes have the same.
        """

        def first_half(selector: Selector) -> list[Port]:
            ports = select_blocks(anatomy, selector, role="block.out")
            return [port for port in ports if port.block is not None and port.block < anatomy.depth[port.stack] // 2]

        stacks = {port.stack for port in first_half(self.where)}
        if not stacks:
            raise AttachError(
                "no block in the first half is adapted, so there is nothing that 'deep_consistency' could compare; "
                "adapt earlier blocks, or set it to 0"
            )
        keys = {}
        for port in first_half(Selector(stacks=tuple(sorted(stacks)))):
            key = f"{adapter.name}.{port.name}"
            adapter.tap(port, key)
            keys[key] = anatomy.depth[port.stack]
        return keys


def _refuse_unknown(**options: tuple[str, Any]) -> None:
    for option, (value, literal) in options.items():
        if value not in get_args(literal):
            raise ConfigError(f"method.{option}: '{value}' is none of {', '.join(get_args(literal))}")


class ExpertLinear(PacksItself):
    """A linear of several experts; evaluation and a file have their mean, which takes their place when it is folded.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        experts: Copies; 1 for a plain linear.
        split: See `MoSA`.
        scores: What ranks the entries (rows, columns); None for even random numbers. Of `split` row or column the first
            column or row.

    Raises:
        AttachError: There is less to split than there are experts.
    """

    file_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    owner: Tensor
    """The expert that owns each entry, (outputs, inputs) uint8."""

    def __init__(
        self, inputs: int, outputs: int, *, experts: int, split: Split = "entry", scores: Tensor | None = None
    ) -> None:
        super().__init__()
        units = {"entry": outputs * inputs, "row": outputs, "column": inputs}[split]
        if units < experts:
            raise AttachError(
                f"{experts} experts cannot each own a {split} of a linear from {inputs} to {outputs} channels; lower "
                "'experts', or split otherwise"
            )
        self.experts = experts
        self.trained_experts = experts
        """As many as there were before folding."""
        for e in range(experts):
            self.register_parameter(f"weight_{e}", nn.Parameter(torch.empty(outputs, inputs)))
            self.register_parameter(f"bias_{e}", nn.Parameter(torch.zeros(outputs)))
        if experts > 1:
            drawn = torch.rand(outputs, inputs) if scores is None else scores
            self.register_buffer("owner", owners(drawn, experts, split))
        self.fixed: int | None = None
        """An expert that is active in every training pass, instead of a drawn one; numbers are drawn all the same."""

    def fill(self, weight: Tensor) -> None:
        """Give every expert the same weight."""
        with torch.no_grad():
            for e in range(self.experts):
                self.get_parameter(f"weight_{e}").copy_(weight)

    def draw(self) -> int:
        """The expert of the next training pass."""
        drawn = int(torch.randint(self.experts, ()))
        return drawn if self.fixed is None else self.fixed

    def run(self, x: Tensor, expert: int | None) -> Tensor:
        """The linear of one expert, or of their mean."""
        weight, bias = self.mean() if expert is None else self._of(expert)
        return functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    def mean(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the merged linear."""
        if self.experts == 1:
            return self._of(0)
        parts = [self._of(e) for e in range(self.experts)]
        return torch.stack([w for w, _ in parts]).mean(0), torch.stack([b for _, b in parts]).mean(0)

    def masks(self) -> Tensor:
        """What each expert owns, (experts, outputs, inputs) bool."""
        return torch.stack([self.owner == e for e in range(self.experts)])

    def mask_gradients(self) -> None:
        """Keep each expert's gradient where it owns."""
        for e in range(self.experts) if self.experts > 1 else ():
            gradient = self.get_parameter(f"weight_{e}").grad
            if gradient is not None:
                gradient.mul_(self.owner == e)

    def fold(self) -> None:
        """Let the mean take the experts' place."""
        if self.experts == 1:
            return
        weight, bias = (tensor.detach().clone() for tensor in self.mean())
        for e in range(self.experts):
            delattr(self, f"weight_{e}")
            delattr(self, f"bias_{e}")
        del self.owner
        self.experts, self.fixed = 1, None
        self.weight_0, self.bias_0 = nn.Parameter(weight), nn.Parameter(bias)

    @property
    def is_folded(self) -> bool:
        """Whether there were several experts once."""
        return self.experts < self.trained_experts

    @override
    def counts(self) -> tuple[int, int]:
        one = sum(tensor.numel() for tensor in self._of(0))
        return one, (self.trained_experts - 1) * one

    @override
    def packed(self) -> dict[str, Tensor]:
        weight, bias = (tensor.detach() for tensor in self.mean())
        return {"weight": weight.clone(), "bias": bias.clone()}

    @override
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        self.fill(tensors["weight"])
        with torch.no_grad():
            for e in range(self.experts):
                self.get_parameter(f"bias_{e}").copy_(tensors["bias"])

    @override
    def refuse(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        for key, own in zip(self.file_names, self._of(0), strict=True):
            if tensors[key].shape != own.shape:
                raise FileFormatError(
                    f"tensor '{name}.{key}' has shape {tuple(tensors[key].shape)}, this method has {tuple(own.shape)}"
                )

    def _of(self, expert: int) -> tuple[Tensor, Tensor]:
        return self.get_parameter(f"weight_{expert}"), self.get_parameter(f"bias_{expert}")


def owners(scores: Tensor, experts: int, split: Split) -> Tensor:
    """The expert of each entry by the rank of its score: disjoint and complete even where scores are equal.

    Expert e has the ranks from floor(N e / E) + 1 to floor(N (e + 1) / E), lowest scores first, in whole numbers:
    products of 1/E in floats fall short of some of the limits.

    Args:
        scores: (rows, columns).
        experts: E.
        split: See `MoSA`; of rows the first column is ranked, of columns the first row.
    """
    if split == "row":
        return owners(scores[:, :1], experts, "entry").expand(scores.shape).contiguous()
    if split == "column":
        return owners(scores[:1], experts, "entry").expand(scores.shape).contiguous()
    count = scores.numel()
    rank = scores.flatten().argsort(stable=True).argsort(stable=True)
    ends = torch.tensor([count * (e + 1) // experts for e in range(experts - 1)], device=scores.device)
    return torch.bucketize(rank, ends, right=True).view(scores.shape).to(torch.uint8)


class MixtureBottleneck(nn.Module):
    """scale * U dropout(act(D norm(x))) with a drawn expert of each side while training, else with their means.

    Args:
        width: Channels in and out.
        hidden_dim: Channels between.
        experts: See `MoSA`.
        share: See `MoSA`.
        split: See `MoSA`.
        activation: See `MoSA`.
        scale: Factor of the output.
        has_norm: LayerNorm with eps 1e-6 before D.
        dropout: Probability of zeroing a hidden channel.
    """

    def __init__(
        self, width: int, hidden_dim: int, *, experts: int, share: Shared, split: Split, activation: Activation,
        scale: float, has_norm: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation: Activation = activation
        self.scale = scale
        self.dropout = dropout
        self.norm = nn.LayerNorm(width, eps=1e-6) if has_norm else nn.Identity()
        self.down = ExpertLinear(width, hidden_dim, experts=1 if share == "down" else experts, split=split)
        self.up = ExpertLinear(hidden_dim, width, experts=1 if share == "up" else experts, split=split)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D Kaiming uniform with a = sqrt 5, U zero; all experts alike."""
        weight = torch.empty_like(self.down.get_parameter("weight_0"))
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.down.fill(weight)
        self.up.fill(torch.zeros_like(self.up.get_parameter("weight_0")))

    def forward(self, x: Tensor) -> Tensor:
        """The branch, of the input's shape."""
        # Both are drawn, D's first, even where one side is shared.
        route = (self.down.draw(), self.up.draw()) if self.training else (None, None)
        hidden = _ACTIVATIONS[self.activation](self.down.run(self.norm(x), route[0]))
        hidden = functional.dropout(hidden, self.dropout, training=self.training)
        return self.scale * self.up.run(hidden, route[1])


class Residual(nn.Module):
    """X plus the bottleneck of x.

    Args:
        bottleneck: What is added.
    """

    def __init__(self, bottleneck: MixtureBottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        return x + self.bottleneck(x)


class BehindSum(nn.Module):
    """What a sub-layer adds, plus the bottleneck of the residual sum.

    Args:
        bottleneck: What reads the sum.
    """

    def __init__(self, bottleneck: MixtureBottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        """What is added to `stream`, of the shape of `branch`."""
        return branch + self.bottleneck(stream.reshape(branch.shape) + branch)


class MixtureRun(LifeCycle):
    """The second pass of a step, and the masks of its gradients.

    Args:
        adapter: Whose experts.
        consistency: Factor of the divergence.
        deep: Keys of tapped block outputs, with the number of blocks of their stack.
        deep_weight: Factor of their differences.
    """

    def __init__(self, adapter: Adapter, *, consistency: float, deep: Mapping[str, int], deep_weight: float) -> None:
        super().__init__()
        self.__dict__["_adapter"] = adapter  # no submodule: it is the parent
        self.consistency = consistency
        self.deep = dict(deep)
        self.deep_weight = deep_weight
        self._run: Run | None = None

    @override
    def on_fit_start(self, run: Run) -> None:
        """Learn how to make the second pass.

        Raises:
            ConfigError: The task gives no class logits, or there is no mixture any more.
        """
        if self.consistency and run.forward is not None and not run.gives_logits:
            raise ConfigError("method.consistency: this task has no class logits that could agree; set it to 0")
        if any(linear.is_folded for linear in self._linears()):
            raise ConfigError(
                "method: the experts of this adapter were averaged when its training ended, so there is no mixture "
                "left to train; attach the method anew"
            )
        self._run = run

    @override
    def penalty(self, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Divergence of a second pass of the same batch; none where the run has no model around the backbone."""
        if not self.consistency or self._run is None or self._run.forward is None:
            return {}
        contexts = self._own.backbone.contexts
        first = {key: contexts.current().taps[key] for key in self.deep}
        other = self._run.forward(batch)
        found = {"consistency": self.consistency * symmetric_divergence(output, other)}
        if self.deep:
            second = contexts.current().taps
            parts = [functional.mse_loss(first[key], second[key]) / depth for key, depth in self.deep.items()]
            found["deep_consistency"] = self.consistency * self.deep_weight * torch.stack(parts).sum()
        return found

    @override
    def after_backward(self, micro_batch: int) -> None:
        for linear in self._linears():
            linear.mask_gradients()

    @override
    def finalise(self) -> None:
        """Leave one plain adapter."""
        for linear in self._linears():
            linear.fold()
        self._run = None

    @override
    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Leave one plain adapter: a file has nothing else."""
        del facts
        self.finalise()

    def _linears(self) -> list[ExpertLinear]:
        return [module for module in self._own.modules() if isinstance(module, ExpertLinear)]

    @property
    def _own(self) -> Adapter:
        return self.__dict__["_adapter"]


def symmetric_divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Half the sum of KL(p2 || p1) and KL(p1 || p2), the first of each held constant; mean over all but the classes.

    Args:
        logits: (B, C) or (B, C, ...).
        others: Of the same shape.
    """
    first, second = (x.float().movedim(1, -1).flatten(0, -2).log_softmax(-1) for x in (logits, others))
    one = functional.kl_div(first, second.detach(), reduction="batchmean", log_target=True)
    other = functional.kl_div(second, first.detach(), reduction="batchmean", log_target=True)
    return 0.5 * (one + other)
