"""Point-prior prompts: tokens enriched, without learnt attention, from a bank of training features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from peft_modal.anatomy import Context
from peft_modal.attach import LifeCycle, PromptSource, Run
from peft_modal.attach.lifecycle import Batch, Losses
from peft_modal.errors import FileFormatError, TrainingError
from peft_modal_pointcloud.point_peft.bottleneck import QuickBottleneck
from peft_modal_pointcloud.point_peft.frozen import FrozenEncoder

INIT_STD: Final = 0.02
EVERY_BATCH: Final = 2**31
"""More batches than any training set has."""


def prior_tokens(feature: Tensor, bank: Tensor, top_k: int) -> Tensor:
    """What a bank tells of a cloud: its feature f, a mixture of the K most similar entries, and these.

    s = (f / |f|) R; w = softmax over the K largest of s, not over all M; f itself stays as it is.

    Args:
        feature: f (B, C).
        bank: R (C, M), one column for each training cloud.
        top_k: K, at most M.

    Returns:
        (B, K + 2, C): f, the mixture, the K columns in descending similarity; computed in float32.
    """
    with torch.autocast(feature.device.type, enabled=False):
        similarity = functional.normalize(feature, dim=1) @ bank  # (B, M)
        nearest = similarity.topk(top_k, dim=1)
        found = bank.T[nearest.indices]  # (B, K, C)
        mixture = nearest.values.softmax(1)[:, None] @ found  # (B, 1, C)
    return torch.cat([feature[:, None], mixture, found], dim=1)


class PriorPrompt(nn.Module):
    """Dropout(E) + prior + bott(prior) of one block, E (P, C) learnt.

    Args:
        num_tokens: P.
        width: C.
        hidden_dim: Width of the bottleneck.
        dropout: Probability of zeroing an entry of E, and a hidden channel.
    """

    def __init__(self, *, num_tokens: int, width: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(num_tokens, width))
        self.dropout = nn.Dropout(dropout)
        self.prior_adapter = QuickBottleneck(width, hidden_dim=hidden_dim, dropout=dropout)
        nn.init.trunc_normal_(self.embeddings, std=INIT_STD)

    def forward(self, prior: Tensor) -> Tensor:
        """The prompts (B, P, C) of prior tokens (B, P, C)."""
        return self.dropout(self.embeddings) + prior + self.prior_adapter(prior)


class PriorPrompts(PromptSource):
    """The prompts of the first blocks, from one look into the bank per pass; see `prior_tokens`.

    Before calibration the bank holds K zero vectors, which are as good as none.

    Args:
        encoder: Makes the feature of a cloud.
        num_blocks: Blocks with prompts.
        width: C.
        top_k: K.
        hidden_dim: See `PriorPrompt`.
        dropout: See `PriorPrompt`.
    """

    def __init__(
        self, encoder: FrozenEncoder, *, num_blocks: int, width: int, top_k: int, hidden_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.top_k = top_k
        self.register_buffer("bank", torch.zeros(width, top_k))
        self.blocks = nn.ModuleList(
            PriorPrompt(num_tokens=top_k + 2, width=width, hidden_dim=hidden_dim, dropout=dropout)
            for _ in range(num_blocks)
        )

    bank: Tensor

    @property
    def key(self) -> str:
        """Under which a pass keeps its prior tokens."""
        return f"point_peft.prior.{id(self)}"

    def prior(self, context: Context) -> Tensor:
        """The prior tokens (B, P, C) of the pass, computed once and without gradients."""

        def compute() -> Tensor:
            feature = self.encoder(context.get("neighbourhood"), context.get("centres"))
            return prior_tokens(feature, self.bank, self.top_k)

        return context.once(self.key, compute)

    def tokens(self, context: Context, block: int) -> Tensor:
        """(B, P, C); they have no positions."""
        return self.blocks[block](self.prior(context))


class BankBuilding(LifeCycle):
    """Fills the bank with features of the training clouds as they are, in the data's order, columns of length 1.

    Args:
        prompts: Whose bank.
        bank_size: Clouds in the bank, at most; of more, evenly spaced ones. None for all.
    """

    calibration_batches = EVERY_BATCH
    calibrates_on_plain_samples = True

    def __init__(self, prompts: PriorPrompts, *, bank_size: int | None) -> None:
        super().__init__()
        self.__dict__["_prompts"] = prompts  # no submodule: its tensors have a name already
        self.bank_size = bank_size
        self.is_built = False

    @override
    def prepare(self, batches: Iterable[Batch], loss: Losses) -> None:
        """Encode the clouds.

        Raises:
            TrainingError: There are fewer than are retrieved for each cloud.
        """
        del loss
        prompts: PriorPrompts = self.__dict__["_prompts"]
        device = prompts.bank.device
        found = [prompts.encoder.of_points(batch["points"].to(device)) for batch in batches]
        count = sum(len(features) for features in found)
        kept = min(count, self.bank_size or count)
        if kept < prompts.top_k:
            raise TrainingError(
                f"method point_peft retrieves {prompts.top_k} training clouds, but its bank holds {kept}; use "
                f"method.top_k={max(kept, 1)} or less, more training data, or a larger method.bank_size"
            )
        chosen = torch.arange(kept, device=device) * count // kept
        prompts.bank = functional.normalize(torch.cat(found)[chosen], dim=1).T.contiguous()
        self.is_built = True

    @override
    def on_fit_start(self, run: Run) -> None:
        """Refuse to train without a bank.

        Raises:
            TrainingError: There is none.
        """
        if not self.is_built:
            raise TrainingError(
                "point_peft has no bank of training features; call adapter.events.prepare(batches, loss) before "
                "training"
            )

    @override
    def facts(self) -> Mapping[str, Any]:
        prompts: PriorPrompts = self.__dict__["_prompts"]
        return {"bank_size": prompts.bank.shape[1]} if self.is_built else {}

    @override
    def rebuild(self, facts: Mapping[str, Any]) -> None:
        """Make room for a file's bank.

        Raises:
            FileFormatError: The file tells no usable size.
        """
        if not facts:
            return
        prompts: PriorPrompts = self.__dict__["_prompts"]
        size = facts.get("bank_size")
        if not isinstance(size, int) or size < prompts.top_k:
            raise FileFormatError(
                f"the file's bank has {size!r} clouds, of which this method would retrieve {prompts.top_k}"
            )
        prompts.bank = prompts.bank.new_zeros(prompts.bank.shape[0], size)
        self.is_built = True
