"""Consolidator: grouped connections beside every linear (Hao et al., ICLR 2023, arXiv:2305.00603)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Selector
from peft_modal.attach import Adapter
from peft_modal.attach.operations import Operation
from peft_modal.attach.updates import drop_samples
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.base import Method
from peft_modal.methods.grouped import block_diagonal
from peft_modal.ranges import DropRate, NonNegativeFloat, PositiveInt

LINEARS = ("attn.qkv", "attn.q", "attn.k", "attn.v", "attn.out", "mlp")


class Consolidator(Method):
    """Grouped linears parallel to every linear (Hao et al., ICLR 2023, arXiv:2305.00603).

    y = W x + b + DP(sum_i (G_i x + b_i)), where each G_i is block-diagonal with `groups[i]` blocks. Weights and biases
    start uniform within 1e-3, so a fresh adapter does not compute the pre-trained function. Merges exactly, shuffled
    or not.

    Args:
        sites: Linears to widen; see `Selector`. A fused q, k and v is taken whole.
        groups: Blocks of each parallel linear; they must divide both sides of every weight.
        shuffle: Deal the input channels out over the groups, so that each sees some of all: channel c of g groups of
            size n goes to place (c mod n) g + c div n.
        drop_path: Probability of leaving a sample's sum out.
        init_bound: Weights and biases start within.

    Raises:
        ConfigError: No group is given.
    """

    identity_at_init = False

    def __init__(
        self, *, sites: str | list[str] | dict[str, Any] = list(LINEARS),  # noqa: B006 — never changed
        groups: list[PositiveInt] = [384], shuffle: bool = False,  # noqa: B006
        drop_path: DropRate = 0.0, init_bound: NonNegativeFloat = 1e-3,
    ) -> None:  # fmt: skip
        if not groups:
            raise ConfigError("method.groups: the list is empty; name at least one number of groups")
        self.sites = Selector.parse(sites)
        self.groups = tuple(groups)
        self.shuffle = shuffle
        self.drop_path = drop_path
        self.init_bound = init_bound

    @classmethod
    def example(cls) -> Consolidator:
        """Few groups, which divide the widths of small networks."""
        return cls(groups=[2])

    def build(self, adapter: Adapter) -> None:
        """One sum of grouped linears per site.

        Raises:
            AttachError: A site is no linear, or a number of groups does not divide its sides.
        """
        for site in adapter.backbone.anatomy.select(self.sites, needs=("call", "weight"), fused=True):
            if site.op != "linear" or site.rows is not None:
                raise AttachError(f"'{site.name}' is no whole linear; leave it out of method.sites")
            rows, columns = site.shape
            wrong = [g for g in self.groups if rows % g or columns % g]
            if wrong:
                raise AttachError(
                    f"method.groups: {wrong[0]} does not divide both sides of '{site.name}', {rows} and {columns}"
                )
            grouped = GroupedLinears(
                rows, columns, self.groups, shuffle=self.shuffle, drop_path=self.drop_path, bound=self.init_bound
            )
            adapter.operate(site, grouped)


class GroupedLinears(Operation):
    """W x + b plus grouped linears of x.

    Args:
        rows: Outputs.
        columns: Inputs.
        groups: Groups of each.
        shuffle: See `Consolidator`.
        drop_path: Probability of leaving a sample out.
        bound: Values start within.
    """

    changes_bias = True

    def __init__(
        self, rows: int, columns: int, groups: Sequence[int], *, shuffle: bool, drop_path: float, bound: float
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.shuffle = shuffle
        self.drop_path = drop_path
        self.bound = bound
        self.has_dropout = drop_path > 0
        self.weights = nn.ParameterList([torch.empty(rows, columns // g) for g in groups])
        self.biases = nn.ParameterList([torch.empty(rows) for _ in groups])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within the bound."""
        for tensor in (*self.weights, *self.biases):
            nn.init.uniform_(tensor, -self.bound, self.bound)

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operation's output and the sum, which a sample may lose."""
        y = functional.linear(x, weight, bias)
        added = torch.zeros_like(y)
        for g, own, shift in zip(self.groups, self.weights, self.biases, strict=True):
            parts = self._dealt(x, g).reshape(*x.shape[:-1], g, -1)  # (..., g, columns / g)
            blocks = own.view(g, -1, own.shape[1]).to(x.dtype)  # (g, rows / g, columns / g)
            added = added + torch.einsum("...gi,goi->...go", parts, blocks).flatten(-2) + shift.to(x.dtype)
        if self.training and self.drop_path:
            added = drop_samples(added, self.drop_path)
        return y + added

    def fold_weight(self, weight: Tensor) -> Tensor:
        """W plus the blocks on their diagonals, their columns where the unshuffled channels are."""
        out = weight
        for g, own in zip(self.groups, self.weights, strict=True):
            dense = block_diagonal(*own.to(weight.dtype).chunk(g))
            if self.shuffle:
                columns = torch.arange(dense.shape[1], device=dense.device)
                dense = torch.zeros_like(dense).index_copy(1, self._dealt(columns, g), dense)
            out = out + dense
        return out

    def fold_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The sum of all biases."""
        added = torch.stack([shift.to(weight.dtype) for shift in self.biases]).sum(0)
        return added if bias is None else bias + added

    def _dealt(self, x: Tensor, g: int) -> Tensor:
        """Channels in the order in which the groups see them."""
        return x.reshape(*x.shape[:-1], g, -1).transpose(-1, -2).flatten(-2) if self.shuffle else x
