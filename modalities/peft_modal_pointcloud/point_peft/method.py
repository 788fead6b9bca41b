"""Point-PEFT's configuration, and what goes where."""

from __future__ import annotations

from typing import Final

from peft_modal.anatomy import Anatomy
from peft_modal.attach import Adapter
from peft_modal.attach.prompts import PromptAttachment
from peft_modal.errors import AttachError, ConfigError
from peft_modal.methods.base import Method
from peft_modal.ranges import DropRate, PositiveInt
from peft_modal_pointcloud.network import PointMAE
from peft_modal_pointcloud.point_peft.bottleneck import QuickBottleneck
from peft_modal_pointcloud.point_peft.frozen import FrozenEncoder
from peft_modal_pointcloud.point_peft.geometry import GeometryAdapter, NeighbourhoodAttention
from peft_modal_pointcloud.point_peft.grouping import GROUPINGS, Grouping, Indexing, TokenGrouping
from peft_modal_pointcloud.point_peft.prior import BankBuilding, PriorPrompts

STACK: Final = "blocks"
FFN_SCALE: Final = 0.7
"""Of the bottleneck on the MLP's output; a constant as those of the geometry-aware adapter."""
HEAD_DIM: Final = 3
"""Channels of a head of the neighbourhood attention, as published: 18 for 6 heads."""
BIASES: Final = frozenset({"bias.attn.out", "bias.mlp.in", "bias.mlp.out", "norm.shift"})


class PointPEFT(Method):
    """Point-prior prompts, geometry-aware adapters and bias tuning (Tang et al., AAAI 2024, arXiv:2310.03059).

    Prompts p = dropout(E) + prior + bott(prior) enter each of the first blocks and are dropped at its end; `prior`
    holds the cloud's feature by the pre-trained network and what is most similar to it in a bank of training features
    (see `prior_tokens`). The bank is built before training and belongs to the adapter's file. The MLP's output m
    becomes m + 0.7 bott(m). At the end of every block tokens are pooled around farthest centres and spread back by
    inverse distance (see `GeometryAdapter`). Biases of attention's output, MLP and norms are trained, and the final
    norm.

    The released code reads the neighbours of prompted blocks from other tokens and other clouds than it computed, so
    that logits change with the order of a batch: `indexing: reference`. With `aligned`, the default, neighbours are
    what they are meant to be.

    Args:
        prior_prompts: Use the prompts.
        prompt_blocks: Blocks with prompts, from the first; None for half of all (6 of 12, as published).
        top_k: Bank entries retrieved for a cloud; there are two more prompts than that.
        bank_size: Clouds in the bank, at most, evenly spaced in the training set; None for all.
        feature_groups: Patches that the cloud's feature is computed of (the released code takes 64 of 128); None for
            all.
        geometry: Use the geometry-aware adapters.
        num_sub_centres: Centres to pool around; None for half of the patches.
        k: Neighbours pooled around each; None for half of the points of a patch.
        attention_dim: Inner width of the attention within neighbourhoods; None for 3 per head of the backbone.
        indexing: Which tokens neighbours in prompted blocks are; see above.
        ffn_adapter: Use the bottleneck on the MLP's output.
        tune_biases: Train biases and the final norm.
        hidden_dim: Width of the bottlenecks in blocks.
        prior_hidden_dim: Width of the prompts' bottlenecks.
        dropout: Probability of zeroing a hidden channel of a bottleneck, and an entry of E.
        drop_path: Probability of leaving the attention out of a neighbourhood in the last block, growing linearly
            from 0.

    Raises:
        ConfigError: Everything is switched off.
    """

    identity_at_init = False

    def __init__(
        self, *, prior_prompts: bool = True, prompt_blocks: PositiveInt | None = None, top_k: PositiveInt = 8,
        bank_size: PositiveInt | None = None, feature_groups: PositiveInt | None = None, geometry: bool = True,
        num_sub_centres: PositiveInt | None = None, k: PositiveInt | None = None,
        attention_dim: PositiveInt | None = None, indexing: Indexing = "aligned", ffn_adapter: bool = True,
        tune_biases: bool = True, hidden_dim: PositiveInt = 16, prior_hidden_dim: PositiveInt = 8,
        dropout: DropRate = 0.1, drop_path: DropRate = 0.1,
    ) -> None:  # fmt: skip
        if not (prior_prompts or geometry or ffn_adapter or tune_biases):
            raise ConfigError(
                "method.prior_prompts, geometry, ffn_adapter and tune_biases are all off; switch one on, or use the "
                "method linear_probe"
            )
        if indexing not in GROUPINGS:
            raise ConfigError(f"method.indexing is '{indexing}'; use 'aligned' or 'reference'")
        self.prior_prompts = prior_prompts
        self.prompt_blocks = prompt_blocks
        self.top_k = top_k
        self.bank_size = bank_size
        self.feature_groups = feature_groups
        self.geometry = geometry
        self.num_sub_centres = num_sub_centres
        self.k = k
        self.attention_dim = attention_dim
        self.indexing: Indexing = indexing
        self.ffn_adapter = ffn_adapter
        self.tune_biases = tune_biases
        self.hidden_dim = hidden_dim
        self.prior_hidden_dim = prior_hidden_dim
        self.dropout = dropout
        self.drop_path = drop_path
        # Bias tuning alone starts where the backbone is.
        self.identity_at_init = not (prior_prompts or geometry or ffn_adapter)  # type: ignore[misc]  # of one start

    @classmethod
    def example(cls) -> PointPEFT:
        """A bank of two clouds will do."""
        return cls(top_k=2, hidden_dim=4, prior_hidden_dim=4)

    def build(self, adapter: Adapter) -> None:
        """Biases, prompts, then the branches at the end of each block and on the MLP's output.

        Raises:
            AttachError: The backbone is no point transformer, is too small for the configuration, or another adapter
                has prompts in the way.
        """
        backbone = adapter.backbone
        if not isinstance(backbone.network, PointMAE):
            raise AttachError("it reads the parts of the Point-MAE network, and this backbone has another")
        depth = backbone.anatomy.depth[STACK]
        num_prompted = self._num_prompted(depth) if self.prior_prompts else 0
        if self.tune_biases:
            self._own_biases(adapter)
        if num_prompted:
            self._add_prompts(adapter, backbone.network, num_prompted)
        if self.geometry:
            self._add_geometry(adapter, backbone.network, num_prompted)
        if self.ffn_adapter:
            for block in range(depth):
                port = backbone.anatomy.port("mlp.branch", stack=STACK, block=block)
                module = QuickBottleneck(port.width, hidden_dim=self.hidden_dim, dropout=self.dropout, scale=FFN_SCALE)
                adapter.branch(port, port, module, name=f"{STACK}.{block}.ffn_adapter")

    def _num_prompted(self, depth: int) -> int:
        if self.prompt_blocks is None:
            return max(depth // 2, 1)
        if self.prompt_blocks > depth:
            raise AttachError(f"prompt_blocks: {self.prompt_blocks} is more than the backbone's {depth} blocks")
        return self.prompt_blocks

    def _own_biases(self, adapter: Adapter) -> None:
        anatomy = adapter.backbone.anatomy
        final = anatomy.port("final.norm.in", stack=STACK, block=None).module
        for site in anatomy.sites:
            if site.holder == final or (site.stack == STACK and site.block is not None and site.role in BIASES):
                adapter.own(site)

    def _add_prompts(self, adapter: Adapter, network: PointMAE, num_prompted: int) -> None:
        _refuse_other_prompts(adapter, num_prompted)
        num_patches = network.group_divider.num_group
        num_groups = self.feature_groups or num_patches
        if num_groups > num_patches:
            raise AttachError(f"feature_groups: {num_groups} is more than the backbone's {num_patches} patches")
        prompts = PriorPrompts(
            FrozenEncoder(network, num_groups=num_groups), num_blocks=num_prompted, width=network.dim,
            top_k=self.top_k, hidden_dim=self.prior_hidden_dim, dropout=self.dropout,
        )  # fmt: skip
        adapter.prompts(STACK, range(num_prompted), prompts, num_tokens=self.top_k + 2, survives=False, name="prompts")
        adapter.listen(BankBuilding(prompts, bank_size=self.bank_size), name="bank_building")

    def _add_geometry(self, adapter: Adapter, network: PointMAE, num_prompted: int) -> None:
        anatomy = adapter.backbone.anatomy
        depth = anatomy.depth[STACK]
        divider = network.group_divider
        num_sub_centres = self.num_sub_centres or max(divider.num_group // 2, 1)
        k = self.k or max(divider.group_size // 2, 1)
        for name, value in (("num_sub_centres", num_sub_centres), ("k", k)):
            if value > divider.num_group:
                raise AttachError(
                    f"{name}: {value} is more than the {divider.num_group} patches of a cloud; use "
                    f"method.{name}={divider.num_group} or less"
                )
        attention = self._attention(anatomy, network.dim)
        # Before the blocks that share it, so that its tensors bear this name.
        adapter.add("geometry.attention", attention)
        late = TokenGrouping(num_sub_centres=num_sub_centres, k=k)
        early: Grouping = late
        if num_prompted:
            early = GROUPINGS[self.indexing](num_prompts=self.top_k + 2, num_sub_centres=num_sub_centres, k=k)
            adapter.add("geometry.prompted", early)
        for block in range(depth):
            port = anatomy.port("block.out", stack=STACK, block=block)
            module = GeometryAdapter(
                attention, early if block < num_prompted else late, port=port, layout=anatomy.layouts[STACK],
                hidden_dim=self.hidden_dim, dropout=self.dropout, drop_path=self.drop_path * block / max(depth - 1, 1),
            )  # fmt: skip
            adapter.branch(port, port, module, name=f"{STACK}.{block}.geometry", mode="apply")

    def _attention(self, anatomy: Anatomy, width: int) -> NeighbourhoodAttention:
        num_heads = next(site.heads for site in anatomy.sites if site.role == "attn.qkv") or 1
        inner_dim = self.attention_dim or HEAD_DIM * num_heads
        if inner_dim % num_heads:
            raise AttachError(
                f"attention_dim: {inner_dim} is no multiple of the backbone's {num_heads} heads; use "
                f"method.attention_dim={HEAD_DIM * num_heads} or another multiple"
            )
        return NeighbourhoodAttention(width, inner_dim=inner_dim, num_heads=num_heads)


def _refuse_other_prompts(adapter: Adapter, num_prompted: int) -> None:
    """Own prompts must be next to the tokens, so no others may be attached there before, switched on or not.

    Raises:
        AttachError: Others are.
    """
    for name, other in adapter.backbone.adapters.items():
        for attachment in other.attachments:
            if not isinstance(attachment, PromptAttachment) or attachment.prompts.place != "prefix":
                continue
            blocks = [port.block for port in attachment.where() if port.stack == STACK]
            if blocks and min(b for b in blocks if b is not None) < num_prompted:
                whose = "this adapter's other method" if other is adapter else f"adapter '{name}'"
                raise AttachError(f"{whose} has prompts in its blocks already; attach point_peft before it")
