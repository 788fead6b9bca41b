"""FacT: factor-tuning (Jie and Deng, AAAI 2023, arXiv:2212.03145)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Selector, WeightSite
from peft_modal.attach import Adapter, LowRankUpdate
from peft_modal.errors import AttachError
from peft_modal.methods.base import Method
from peft_modal.methods.grouped import block_diagonal
from peft_modal.ranges import DropRate, PositiveInt

Form = Literal["tt", "tk"]
LINEARS = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.out")


class FacT(Method):
    """The weights of all blocks as one tensor, whose change is factored (Jie and Deng, AAAI 2023, arXiv:2212.03145).

    y += s * V dropout(S_j U x) with U (rank, C) and V (C, rank) shared by all sites of one width, and one small S_j per
    site. A weight (m C, C) has m of them, whose outputs are put side by side; a weight (C, m C) likewise for its
    inputs. `tt` (tensor train) trains each S_j; `tk` (Tucker) makes them of a core K and a column of P: S_j^T = sum_c
    K[:, :, c] P[c, j]. V starts at zero. Merges exactly.

    Args:
        sites: Linears to update; see `Selector`.
        form: `tt` or `tk`.
        rank: Width between U and V.
        scale: s; the paper searches it per task.
        dropout: Probability of zeroing a channel before V; impossible where a weight is read inside a function.
    """

    identity_at_init = True

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = list(LINEARS),  # noqa: B006 — never changed
        form: Form = "tt", rank: PositiveInt = 16, scale: float = 1.0, dropout: DropRate = 0.1,
    ) -> None:  # fmt: skip
        self.sites = Selector.parse(sites)
        self.form: Form = form
        self.rank = rank
        self.scale = scale
        self.dropout = dropout

    @classmethod
    def example(cls) -> FacT:
        """Without dropout, which weights that are read inside a function do not take."""
        return cls(dropout=0.0)

    def build(self, adapter: Adapter) -> None:
        """Shared factors for every width, and an update of every site.

        Raises:
            AttachError: A site is no linear whose one side is a multiple of the other.
        """
        plans = [
            (site, Plan.of(site)) for site in adapter.backbone.anatomy.select(self.sites, needs=("call", "weight"))
        ]
        widths = sorted({plan.width for _, plan in plans})
        for width in widths:
            mine = [(site, plan) for site, plan in plans if plan.width == width]
            columns = sum(plan.count for _, plan in mine)
            # One width is the rule; networks of several stages or towers have more.
            name = "fact" if len(widths) == 1 else f"fact.{width}"
            shared = SharedFactors(width, self.rank, columns=columns if self.form == "tk" else 0)
            adapter.add(name, shared)
            first = 0
            for site, plan in mine:
                update = FacTUpdate(site.shape, shared, plan, first, scale=self.scale, dropout=self.dropout)
                adapter.low_rank(site, update)
                first += plan.count


@dataclass(frozen=True)
class Plan:
    """How a weight is cut into squares of the common width."""

    width: int
    count: int
    """Squares."""
    along: Literal["rows", "columns"]

    @classmethod
    def of(cls, site: WeightSite) -> Plan:
        """The plan of a site.

        Raises:
            AttachError: It is no linear, or is not made of squares.
        """
        rows, columns = site.shape[0], site.shape[1] if len(site.shape) == 2 else 0
        width = min(rows, columns)
        if site.op != "linear" or not width or max(rows, columns) % width:
            raise AttachError(
                f"'{site.name}' of shape {site.shape} is no linear of which one side is a multiple of the other; leave "
                "it out of method.sites"
            )
        return cls(width, max(rows, columns) // width, "rows" if rows >= columns else "columns")


class SharedFactors(nn.Module):
    """U (rank, C) and V (C, rank) of all sites; for Tucker also the core and a column per square.

    Args:
        width: C.
        rank: Width between them.
        columns: Squares of all sites together; 0 for the tensor train.
    """

    def __init__(self, width: int, rank: int, *, columns: int) -> None:
        super().__init__()
        self.rank = rank
        self.u = nn.Parameter(torch.empty(rank, width))
        self.v = nn.Parameter(torch.empty(width, rank))
        self.core = nn.Parameter(torch.empty(rank, rank, rank)) if columns else None
        self.p = nn.Parameter(torch.empty(rank, columns)) if columns else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U as a linear's default, V zero, core and columns Xavier uniform."""
        bound = self.u.shape[1] ** -0.5
        nn.init.uniform_(self.u, -bound, bound)
        nn.init.zeros_(self.v)
        for tensor in (self.core, self.p):
            if tensor is not None:
                nn.init.xavier_uniform_(tensor)

    def middle(self, first: int, count: int) -> Tensor:
        """Tucker's S of `count` squares as it multiplies U x from the right, (rank, rank * count)."""
        assert self.core is not None
        assert self.p is not None
        # The square's number runs fastest, as in the authors' reshape.
        return torch.einsum("abc,cj->abj", self.core, self.p[:, first : first + count]).reshape(self.rank, -1)


class FacTUpdate(LowRankUpdate):
    """s * V S_j U of one site.

    Args:
        shape: Shape of the weight.
        shared: The factors of all sites.
        plan: How the weight is cut.
        first: Its first column of Tucker's P.
        scale: s.
        dropout: Between S_j and V.
    """

    def __init__(
        self, shape: tuple[int, ...], shared: SharedFactors, plan: Plan, first: int, *, scale: float, dropout: float
    ) -> None:
        self.plan = plan
        self.first = first
        self.inner = shared.rank
        self.is_train = shared.core is None
        super().__init__(shape, rank=shared.rank, scale=scale, hidden_dropout=dropout)
        self.shared = shared

    def make_factors(self, down: tuple[int, ...], up: tuple[int, ...]) -> None:
        """S_j, for the tensor train."""
        del down, up
        r, many = self.inner, self.inner * self.plan.count
        sides = (many, r) if self.plan.along == "rows" else (r, many)
        self.sigma = nn.Parameter(torch.empty(sides)) if self.is_train else None

    def reset_parameters(self) -> None:
        """As a linear's default."""
        if self.sigma is not None:
            bound = self.sigma.shape[1] ** -0.5
            nn.init.uniform_(self.sigma, -bound, bound)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(S_j U, V), with V or U once per square on the side that has several."""
        shared, plan = self.shared, self.plan
        if self.sigma is not None:
            s: Tensor = self.sigma
        else:
            middle = shared.middle(self.first, plan.count)
            s = middle.T if plan.along == "rows" else middle
        if plan.along == "rows":
            return s @ shared.u, block_diagonal(*[shared.v] * plan.count)
        return s @ block_diagonal(*[shared.u] * plan.count), shared.v
