"""Bi-LoRA: LoRA with weights of few bits (Jie et al., ICCV 2023, arXiv:2307.16867)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter, LowRankUpdate
from peft_modal.errors import AttachError
from peft_modal.methods.base import Method
from peft_modal.methods.bi_adaptformer import draw_factors
from peft_modal.methods.quantised import Bits, QuantisedMatrix
from peft_modal.ranges import DropRate, PositiveInt


class BiLoRA(Method):
    """Low-rank updates whose factors have 1-bit weights (Jie et al., ICCV 2023, arXiv:2307.16867).

    y = W x + s * U dropout(D x), with D and U acting through their quantised form, see `QuantisedMatrix`. The adapter
    file holds `bits` per entry; training is in full precision. U starts near zero, not at zero: a fresh adapter does
    not compute the pre-trained function. Merges exactly (the released code does not merge).

    Args:
        sites: Linears to update; see `Selector`.
        hidden_dim: Rank of every update.
        bits: Bits per entry.
        scale: s; the paper searches it per task.
        dropout: Probability of zeroing a channel between the factors; impossible where a weight is read inside a
            function (MultiheadAttention).
    """

    identity_at_init = False

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = ["attn.q", "attn.v"],  # noqa: B006 — never changed
        hidden_dim: PositiveInt = 32, bits: Bits = 1, scale: float = 1.0, dropout: DropRate = 0.1,
    ) -> None:  # fmt: skip
        self.sites = Selector.parse(sites)
        self.hidden_dim = hidden_dim
        self.bits: Bits = bits
        self.scale = scale
        self.dropout = dropout

    @classmethod
    def example(cls) -> BiLoRA:
        """Without dropout, which weights that are read inside a function do not take."""
        return cls(dropout=0.0)

    def build(self, adapter: Adapter) -> None:
        """One update per selected site.

        Raises:
            AttachError: A site is no linear.
        """
        for site in adapter.backbone.anatomy.select(self.sites, needs=("call", "weight")):
            if site.op != "linear":
                raise AttachError(f"'{site.name}' is no linear; leave it out of method.sites")
            update = QuantisedUpdate(
                site.shape, self.hidden_dim, bits=self.bits, scale=self.scale, dropout=self.dropout
            )
            adapter.low_rank(site, update)


class QuantisedUpdate(LowRankUpdate):
    """s * U D with quantised factors.

    Args:
        shape: Shape of the weight.
        rank: Rows of D.
        bits: Bits per entry.
        scale: s.
        dropout: Probability of zeroing a channel between the factors.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, *, bits: Bits, scale: float, dropout: float) -> None:
        self.bits: Bits = bits
        super().__init__(shape, rank=rank, scale=scale, hidden_dropout=dropout)

    def make_factors(self, down: tuple[int, ...], up: tuple[int, ...]) -> None:
        """D and U."""
        self.down = QuantisedMatrix(down[0], down[1], self.bits)
        self.up = QuantisedMatrix(up[0], up[1], self.bits)

    def reset_parameters(self) -> None:
        """D as a linear's default; U normal with deviation 1e-3, cut at two of them."""
        draw_factors(self.down, self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Their effective forms."""
        return self.down(), self.up()
