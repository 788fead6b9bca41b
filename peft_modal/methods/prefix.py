"""Prefix tuning: learned keys and values in every attention (Li and Liang, ACL 2021, arXiv:2101.00190)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Anatomy, Port, Selector, WeightSite
from peft_modal.attach import Adapter
from peft_modal.errors import AttachError, SelectionError
from peft_modal.methods.base import Method, select_blocks
from peft_modal.methods.vpt import xavier_bound
from peft_modal.ranges import PositiveInt

_PARTS = ("attn.q", "attn.k", "attn.v")


class Prefix(Method):
    """Vectors beside the projected keys and values of every block's attention (Li and Liang, ACL 2021).

    Attn(q, [k_0, P_k, k_1 ...], [v_0, P_v, v_1 ...]): the queries stay as they are, and so does the sequence outside of
    attention. The vectors are trained as they are, without the network in front of them that the paper trains with, as
    in Cappellazzo et al. (MLSP 2024, arXiv:2312.03694), where 24 tokens are 12 keys and 12 values.

    Place holders go through the attention with the tokens; the rows of their keys and values are the vectors, and what
    their queries give is dropped before the output projection.

    Args:
        num_tokens: Keys of a block, and values: half of what the paper on audio counts.
        blocks: Blocks to adapt; see `Selector`; None for all.
        patch_size: Patch size in the bound of the uniform draw, sqrt(6 / (3 * patch_size^2 + width)), as released.
    """

    identity_at_init = False

    def __init__(
        self, *, num_tokens: PositiveInt = 12, blocks: str | list[int] | dict[str, Any] | None = None,
        patch_size: PositiveInt = 16,
    ) -> None:  # fmt: skip
        self.num_tokens = num_tokens
        self.where = Selector.parse({"blocks": blocks})
        self.patch_size = patch_size

    def build(self, adapter: Adapter) -> None:
        """Place holders in, vectors over their rows, place holders out, in every block.

        Raises:
            AttachError: No attention has room for them; says why.
        """
        anatomy = adapter.backbone.anatomy
        refused = []
        found = False
        for out in select_blocks(anatomy, self.where, role="attn.out"):
            layout = anatomy.layouts.get(out.stack)
            if layout is None or layout.prompt_index is None:
                reason = layout.reason if layout is not None else "it carries no token sequence"
                refused.append(f"'{out.stack}' takes no prefix: {reason}")
                continue
            self._attach(adapter, anatomy, out, layout.prompt_index, layout.token_dim)
            found = True
        if not found:
            raise AttachError(refused[0])

    def _attach(self, adapter: Adapter, anatomy: Anatomy, out: Port, index: int, token_dim: int) -> None:
        # What attention reads, and what its output projection reads, enclose it.
        opening = replace(out, name=f"{out.name}.in", side="in")
        sites = {site.role: site for site in anatomy.sites if (site.stack, site.block) == (out.stack, out.block)}
        try:
            inner = anatomy.output_port(sites["attn.v"])
            closing = anatomy.input_port(sites["attn.out"], width=inner.width)
        except (KeyError, SelectionError) as error:
            raise AttachError(
                f"the attention of '{out.name}' computes keys and values inside a function, where they cannot be "
                "extended; use vpt or lora"
            ) from error
        vectors = PrefixVectors(self.num_tokens, sites["attn.v"].shape[0], patch_size=self.patch_size)
        name = f"{out.name.removesuffix('.out')}.prefix"
        adapter.add(name, vectors)
        place = (index, self.num_tokens, token_dim)
        adapter.branch(opening, opening, _Insert(*place), name="", mode="apply")
        for site, parts in _projections(sites):
            port = anatomy.output_port(site)
            adapter.branch(port, port, _Overwrite(vectors, parts, *place), name="", mode="apply")
        adapter.branch(closing, closing, _Remove(*place), name="", mode="apply")


def _projections(sites: dict[str, WeightSite]) -> list[tuple[WeightSite, tuple[str, ...]]]:
    """The operations that make keys and values, each with what the slices of its output are."""
    if "attn.qkv" in sites:
        return [(sites["attn.qkv"], _PARTS)]
    return [(sites[part], (part,)) for part in _PARTS[1:]]


class PrefixVectors(nn.Module):
    """`key` and `value`, (1, T, D) each, behind the projections: not projected again.

    Args:
        num_tokens: T.
        width: D.
        patch_size: See `Prefix`.
    """

    def __init__(self, num_tokens: int, width: int, *, patch_size: int) -> None:
        super().__init__()
        self.bound = xavier_bound(width, patch_size)
        self.key = nn.Parameter(torch.empty(1, num_tokens, width))
        self.value = nn.Parameter(torch.empty(1, num_tokens, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both uniformly."""
        for tensor in (self.key, self.value):
            nn.init.uniform_(tensor, -self.bound, self.bound)


class _Rows(nn.Module):
    """What happens to `count` rows at `index` of a sequence's axis `dim`."""

    def __init__(self, index: int, count: int, dim: int) -> None:
        super().__init__()
        self.index, self.count, self.dim = index, count, dim

    def split(self, x: Tensor, *, without: int) -> tuple[Tensor, Tensor]:
        """What lies before the rows, and behind so many of them."""
        behind = self.index + without
        return x.narrow(self.dim, 0, self.index), x.narrow(self.dim, behind, x.shape[self.dim] - behind)


class _Insert(_Rows):
    def forward(self, x: Tensor) -> Tensor:
        """With rows of zeros."""
        before, after = self.split(x, without=0)
        shape = [*x.shape]
        shape[self.dim] = self.count
        return torch.cat([before, x.new_zeros(shape), after], dim=self.dim)


class _Overwrite(_Rows):
    """Replaces the rows of keys and values by the vectors, those of queries by zeros.

    Args:
        vectors: The prefix.
        parts: What the equal slices of the last axis are.
        place: See `_Rows`.
    """

    def __init__(self, vectors: PrefixVectors, parts: tuple[str, ...], *place: int) -> None:
        super().__init__(*place)
        self.vectors = vectors
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape."""
        before, after = self.split(x, without=self.count)
        rows = {"attn.q": torch.zeros_like(self.vectors.key), "attn.k": self.vectors.key, "attn.v": self.vectors.value}
        row = torch.cat([rows[part] for part in self.parts], dim=-1).to(x.dtype)
        if self.dim == 0:
            row = row.transpose(0, 1)
        shape = [*x.shape]
        shape[self.dim] = self.count
        return torch.cat([before, row.expand(shape), after], dim=self.dim)


class _Remove(_Rows):
    def forward(self, x: Tensor) -> Tensor:
        """Without the rows."""
        return torch.cat(self.split(x, without=self.count), dim=self.dim)
