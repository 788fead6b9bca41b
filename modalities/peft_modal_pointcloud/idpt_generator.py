"""The networks that make one prompt token from the patch tokens of a cloud (IDPT, ICCV 2023).

`EdgeConv` modules (`edge1`, `edge2`, ...) are called in order; a forward hook on one reads a graph layer's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.errors import ConfigError, nearest

PromptModule = Literal["dgcnn", "dgcnn_light2", "dgcnn_light", "mlp", "transformer"]

GRAPH_LAYERS = {"dgcnn": 3, "dgcnn_light2": 2, "dgcnn_light": 1, "mlp": 0}
"""Number of graph layers of each variant that has a fusion layer."""

NEGATIVE_SLOPE = 0.2


@torch.no_grad()
def feature_knn(tokens: Tensor, k: int) -> Tensor:
    """The `k` tokens of the same cloud nearest in feature space, most similar first, the token itself included.

    Args:
        tokens: Features (B, G, D).
        k: Neighbours per token, at most G.

    Returns:
        Indices (B, G, k), int64; computed in float32.

    Raises:
        ConfigError: `k` is below 1 or above the number of patches G.
    """
    num_patches = tokens.shape[1]
    if not 1 <= k <= num_patches:
        raise ConfigError(
            f"IDPT prompt generator: k is {k}, but the network has {num_patches} patches per cloud; "
            f"use k from 1 to {num_patches}, or a backbone with more patches."
        )
    features = tokens.detach().float()
    with torch.autocast(tokens.device.type, enabled=False):
        # 2<h_i,h_j> - |h_j|^2: the missing -|h_i|^2 is the same for all candidates j of token i.
        similarity = torch.baddbmm(
            -features.square().sum(2)[:, None], features, features.transpose(1, 2), alpha=2
        )  # (B, G, G)
    return similarity.topk(k, dim=2).indices


class EdgeConv(nn.Module):
    """One graph layer: max over neighbours j of LeakyReLU(BN(W [h_j - h_i, h_i])), graph rebuilt from its own input.

    With W = [A, C] the product equals A h_j + (C - A) h_i, two products per token instead of one per edge. The
    activation rises monotonically, so it is applied once behind the maximum; the norm may have negative scales and
    stays in front of it.

    Args:
        dim: Width D.
        k: Neighbours per token.
    """

    def __init__(
        self, dim: int, *, k: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.k = k
        self.weight = nn.Parameter(torch.empty(dim, 2 * dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(2D), PyTorch's default for a convolution."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, tokens: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        """The next features (B, G, D); `norm` sees all B*G*k edges of the batch as its samples.

        Raises:
            ConfigError: There are fewer than `k` patches.
        """
        batch, num_patches, _ = tokens.shape
        neighbours = feature_knn(tokens, self.k)
        difference, centre = self.weight.chunk(2, dim=1)
        near, own = functional.linear(tokens, difference), functional.linear(tokens, centre - difference)
        offset = torch.arange(batch, device=tokens.device)[:, None, None] * num_patches
        # An embedding look-up is the gather whose backward is fastest here (3 times an advanced index on a CPU).
        edges = functional.embedding(neighbours + offset, near.flatten(0, 1)) + own[:, :, None]  # (B, G, k, D)
        edges = norm(edges.flatten(0, 2)).view_as(edges)
        return functional.leaky_relu(edges.max(2).values, NEGATIVE_SLOPE)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"dim={self.weight.shape[0]}, k={self.k}"


class GraphPromptGenerator(nn.Module):
    """Graph layers, a fusion of their outputs, and a max over the tokens: one prompt for one cloud.

    Without graph layers the fusion acts on the tokens themselves (variant `mlp`). The authors' `dgcnn_light` and
    `mlp` also own a second BatchNorm that is never called; it is left out, so they count 2D fewer parameters.

    Args:
        dim: Width D.
        num_layers: Graph layers: 3, 2, 1, or 0 for `mlp`.
        k: Neighbours per token in each graph.
    """

    adds_positions: ClassVar[bool] = False
    """Whether the caller adds the patch positions to the tokens first."""

    def __init__(
        self,
        dim: int,
        *,
        num_layers: int = 3,
        k: int = 20,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        for layer in range(1, num_layers + 1):
            self.add_module(f"edge{layer}", EdgeConv(dim, k=k, device=device, dtype=dtype))
            self.add_module(f"edge{layer}_bn", nn.BatchNorm1d(dim, device=device, dtype=dtype))
        self.fuse = nn.Linear(max(num_layers, 1) * dim, dim, bias=False, device=device, dtype=dtype)
        self.fuse_bn = nn.BatchNorm1d(dim, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """The prompt (B, 1, D) of patch tokens (B, G, D).

        Raises:
            ConfigError: There are fewer than `k` patches.
        """
        features = tokens
        layers = [] if self.num_layers else [tokens]
        for layer in range(1, self.num_layers + 1):
            features = self.get_submodule(f"edge{layer}")(features, self.get_submodule(f"edge{layer}_bn"))
            layers.append(features)
        fused = self.fuse(torch.cat(layers, dim=2))  # (B, G, D)
        fused = self.fuse_bn(fused.flatten(0, 1)).view_as(fused)
        return functional.leaky_relu(fused.max(1, keepdim=True).values, NEGATIVE_SLOPE)


class TransformerPromptGenerator(nn.Module):
    """One more block of the backbone's type over the patch tokens, then a max over them; no BatchNorm.

    Args:
        block: Called as `block(tokens)` on (B, G, D).
    """

    adds_positions: ClassVar[bool] = True
    """Whether the caller adds the patch positions to the tokens first."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor) -> Tensor:
        """The prompt (B, 1, D) of patch tokens (B, G, D), positions already added."""
        return self.block(tokens).max(1, keepdim=True).values


def build_prompt_generator(
    variant: PromptModule,
    *,
    dim: int,
    k: int = 20,
    make_block: Callable[[], nn.Module] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GraphPromptGenerator | TransformerPromptGenerator:
    """The generator of one `prompt_module` setting, freshly drawn with PyTorch's default initialisation.

    Args:
        variant: Which network.
        dim: Width D of the tokens.
        k: Neighbours per token of the graph variants.
        make_block: Makes a block of the backbone's type; for `transformer` only, which takes device and type from it.
        device: Where the parameters are created.
        dtype: Their type.

    Returns:
        A module from tokens (B, G, D) to a prompt (B, 1, D).

    Raises:
        ConfigError: The variant is unknown, `transformer` comes without `make_block`, or `k` is below 1.
    """
    if variant == "transformer":
        if make_block is None:
            raise ConfigError("IDPT: prompt_module 'transformer' needs a block of the backbone; this one offers none.")
        return TransformerPromptGenerator(make_block())
    if variant not in GRAPH_LAYERS:
        known = [*GRAPH_LAYERS, "transformer"]
        raise ConfigError(f"IDPT: prompt_module '{variant}' is unknown, {nearest(variant, known)}")
    if k < 1:
        raise ConfigError(f"IDPT: k is {k}; every token needs at least 1 neighbour.")
    return GraphPromptGenerator(dim, num_layers=GRAPH_LAYERS[variant], k=k, device=device, dtype=dtype)
