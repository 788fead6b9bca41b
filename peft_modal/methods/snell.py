"""SNELL: sparse tuning with kernelised low-rank matrices (NeurIPS 2024, arXiv:2411.01800)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Selector, WeightSite
from peft_modal.attach import Adapter
from peft_modal.attach.dense_update import DenseUpdate
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.base import Method
from peft_modal.ranges import DropRate, PositiveFloat, PositiveInt, Share

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.out")
Threshold = Literal["code", "paper"]
COEFFICIENTS = (0.1, -0.1)
"""Of the kernel's pieces; fixed in the released code, learnable in the paper's text."""


class SNELL(Method):
    """A high-rank sparse update out of two low-rank matrices (NeurIPS 2024, arXiv:2411.01800).

    D[i, j] = sum_k c_k ||A[k, i] - B[k, j]|| for input i and output j, with A (P, in, r/P) and B (P, out, r/P). Of D
    the share `sparsity` of smallest magnitude is set to zero, the rest is D * |D| with |D| held constant: a survivor of
    value D |D| has the gradient |D|. With sparsity 0 the update is D itself. y += DropPath(dropout(x) S). D is computed
    again in backward: nothing dense outlives a site's forward or backward, and the optimiser holds A and B only. The
    update starts small but not at zero. Merges exactly.

    The paper's threshold is soft, D * max(|D| - t, 0); the released code's, which made the numbers, is not.

    Args:
        sites: Linears to update; see `Selector`.
        rank: r; pieces have the width r / P, rounded down.
        sparsity: Share of each update that is zero; the papers search it per task.
        pieces: P.
        coefficients: c of each piece; None for 0.1 and -0.1 in turn.
        norm: The p of the distance.
        dropout: Probability of zeroing an input channel, one draw for q, k and v where they are one linear; none before
            the attention's output.
        drop_path: Probability of leaving a sample's update out.
        threshold: `code` or `paper`.
        train_cls: Train the class token, where there is one.
    """

    identity_at_init = False

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = list(LINEARS),  # noqa: B006 — never changed
        rank: PositiveInt = 8, sparsity: Share = 0.9, pieces: PositiveInt = 2,
        coefficients: list[float] | None = None, norm: PositiveFloat = 2.0, dropout: DropRate = 0.1,
        drop_path: DropRate = 0.1, threshold: Threshold = "code", train_cls: bool = True,
    ) -> None:  # fmt: skip
        check_pieces(rank=rank, pieces=pieces)
        if sparsity >= 1.0:
            raise ConfigError("method.sparsity: 1 leaves nothing to train; use less")
        self.sites = Selector.parse(sites)
        self.rank = rank
        self.sparsity = sparsity
        if coefficients is not None and len(coefficients) != pieces:
            raise ConfigError(f"method.coefficients: {len(coefficients)} numbers for {pieces} pieces")
        self.pieces = pieces
        self.coefficients = coefficients
        self.norm = norm
        self.dropout = dropout
        self.drop_path = drop_path
        self.threshold: Threshold = threshold
        self.train_cls = train_cls

    @classmethod
    def example(cls) -> SNELL:
        """Without dropout, which weights that are read inside a function do not take."""
        return cls(dropout=0.0, drop_path=0.0)

    def build(self, adapter: Adapter) -> None:
        """One kernel per linear."""
        for site in select_linears(adapter, self.sites):
            update = KernelUpdate(
                site.shape[1], site.shape[0], rank=self.rank, pieces=self.pieces, sparsity=self.sparsity,
                threshold=self.threshold, coefficients=self.coefficients, norm=self.norm,
                **drops(site, self.dropout, self.drop_path),
            )  # fmt: skip
            adapter.dense_update(site, update)
        if self.train_cls:
            own_class_token(adapter, self.sites)


class KernelUpdate(DenseUpdate):
    """The sparse update of one linear; factor_in is A, factor_out is B.

    Args:
        inputs: Columns of the weight.
        outputs: Rows of the weight.
        rank: r.
        pieces: P.
        sparsity: Share of zeros.
        threshold: See `SNELL`.
        dropout: See `DenseUpdate`.
        drop_path: See `DenseUpdate`.
        coefficients: c; None for 0.1 and -0.1 in turn.
        norm: The p of the distance.
    """

    sparsity: Tensor
    """Share of zeros, a scalar; part of the file, since a schedule may have set it."""

    def __init__(
        self, inputs: int, outputs: int, *, rank: int, pieces: int = 2, sparsity: float = 0.0,
        threshold: Threshold = "code", dropout: float = 0.0, drop_path: float = 0.0,
        coefficients: Sequence[float] | None = None, norm: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__(dropout=dropout, drop_path=drop_path)
        self.threshold_form: Threshold = threshold
        self.norm = norm
        self.coefficients = tuple(coefficients or (COEFFICIENTS[k % 2] for k in range(pieces)))
        self.factor_in = nn.Parameter(torch.empty(pieces, inputs, rank // pieces))
        self.factor_out = nn.Parameter(torch.empty(pieces, outputs, rank // pieces))
        self.register_buffer("sparsity", torch.tensor(float(sparsity), dtype=torch.float64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming uniform with a = sqrt 5, whose fan-in torch takes for all but the first axis."""
        for factor in (self.factor_in, self.factor_out):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def generators(self) -> tuple[Tensor, ...]:
        """A and B."""
        return self.factor_in, self.factor_out

    def dense(self, *tensors: Tensor) -> Tensor:
        """D (in, out)."""
        distances = torch.cdist(tensors[0], tensors[1], p=self.norm)
        weighted = torch.stack([c * piece for c, piece in zip(self.coefficients, distances, strict=True)])
        return weighted.sum(0)

    def generate(self, *tensors: Tensor) -> Tensor:
        """S (in, out)."""
        dense = self.dense(*tensors)
        return dense if self.is_dense else self.sparsified(dense)

    @property
    def is_dense(self) -> bool:
        """Whether the kernel itself is the update."""
        return float(self.sparsity) == 0.0

    def sparsified(self, dense: Tensor) -> Tensor:
        """D times its magnitude above the threshold, the factor held constant."""
        magnitude = dense.detach().abs()
        limit = self.threshold(magnitude)
        kept = magnitude - limit if self.threshold_form == "paper" else magnitude
        return dense * torch.where(magnitude > limit, kept, 0.0)

    def threshold(self, magnitude: Tensor) -> Tensor:
        """The magnitude below which the share `sparsity` lies, a scalar; the paper's is one of the values."""
        share = float(self.sparsity)
        if self.threshold_form == "paper":
            return magnitude.flatten().kthvalue(max(1, math.ceil(share * magnitude.numel()))).values
        return quantile(magnitude, share)


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of all values, interpolated linearly between two of them; any number of values.

    `torch.quantile` sorts them, and in some versions takes no more than 2^24.
    """
    flat = values.flatten()
    place = share * (flat.numel() - 1)
    below = math.floor(place)
    low = flat.kthvalue(below + 1).values
    if place == below:
        return low
    # The next one is equal where enough values are.
    larger = torch.where(flat > low, flat, torch.inf)
    high = torch.where((flat <= low).sum() > below + 1, low, larger.min())
    return torch.lerp(low, high, place - below)


def select_linears(adapter: Adapter, selector: Selector) -> tuple[WeightSite, ...]:
    """The selected linears; row slices of fused ones on their own.

    Raises:
        AttachError: A site is no linear.
    """
    sites = adapter.backbone.anatomy.select(selector, needs=("call", "weight"))
    for site in sites:
        if site.op != "linear":
            raise AttachError(f"'{site.name}' is no linear; leave it out of method.sites")
    return sites


def drops(site: WeightSite, dropout: float, drop_path: float) -> Mapping[str, Any]:
    """Dropout and drop-path of a site: no dropout before the output of an attention."""
    is_output = site.role.endswith(".out") and "mlp" not in site.role
    return {"dropout": 0.0 if is_output else dropout, "drop_path": drop_path}


def own_class_token(adapter: Adapter, selector: Selector) -> None:
    """Train the class tokens of the stacks that are tuned."""
    stacks = {site.stack for site in select_linears(adapter, selector)}
    for site in adapter.backbone.anatomy.sites:
        if site.role == "cls" and site.stack in stacks:
            adapter.own(site)


def check_pieces(*, rank: int, pieces: int) -> None:
    """Refuse pieces without a column.

    Raises:
        ConfigError: The rank is below the number of pieces.
    """
    if rank < pieces:
        raise ConfigError(f"method.rank: {rank} is below the kernel's {pieces} pieces")
