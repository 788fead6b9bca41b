"""PointGST: order, graphs and the adapter's traps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from peft_modal.errors import AttachError
from peft_modal.methods.vpt import VPT
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.pointgst import PointGST
from peft_modal_pointcloud.spectral import adjacency, laplacian, morton_order, spectral_basis, spectral_transform


def centres(batch: int = 2, count: int = 24) -> torch.Tensor:
    return torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_negative_coordinates_come_last_and_are_truncated() -> None:
    points = torch.tensor([[[-0.05, 0, 0], [0.9, 0.9, 0.9], [-0.005, 0, 0], [0, 0, 0.01]]])
    order, inverse = morton_order(points)
    assert order.tolist() == [[2, 3, 1, 0]]
    assert order.gather(1, inverse).tolist() == [[0, 1, 2, 3]]


def test_laplacian_has_the_trace_and_the_null_vector_of_its_degrees() -> None:
    weights, _ = adjacency(centres())
    degrees = weights.sum(2)
    found = laplacian(weights)
    trace = 24 - (weights.diagonal(dim1=1, dim2=2) / degrees).sum(1)
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2).sum(1), trace, rtol=1e-4, atol=1e-4)
    lowest = spectral_basis(centres())[:, :, 0]
    torch.testing.assert_close(lowest, functional.normalize(degrees.sqrt(), dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("basis", ["exact", "reference"])
def test_duplicates_and_autocast_leave_a_finite_orthogonal_float32_basis(basis) -> None:
    points = centres()
    points[0, 1] = points[0, 0]
    points[1] = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = spectral_basis(points, basis=basis)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found @ found.mT, torch.eye(24).expand(2, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("transform", ["reference", "paper"])
def test_spectral_branches_take_what_enters_the_activation_and_only_patches(prefix: int, transform) -> None:
    adapter = PointGST(local=8, transform=transform).attach(PointMAEBackbone.tiny())
    module = adapter.adapter.get_submodule("blocks.0.mlp.branch")
    torch.nn.init.normal_(module.up.weight)
    x = torch.randn(2, prefix + 24, 24)
    hidden = module.down(x)
    expected = functional.silu(hidden)
    expected[:, prefix:] += 2 * hidden[:, prefix:]
    matrix = spectral_transform(centres(), local=8, basis="exact", transform=transform)
    found = module.adapt(x, matrix, slice(prefix, prefix + 24))
    torch.testing.assert_close(found, module.up(expected), rtol=1e-4, atol=1e-4)


def test_counts_are_the_published_ones() -> None:
    adapter = PointGST().attach(PointMAEBackbone(weights="random"))
    sizes = {name: p.numel() for name, p in adapter.named_trained().items()}
    assert sum(size for name, size in sizes.items() if "cls" not in name) == 354_528
    assert sum(sizes.values()) == 354_528 + 768


def test_sub_graphs_must_divide_the_patches() -> None:
    with pytest.raises(AttachError, match=r"method\.local: 24 patches cannot be cut into sub-graphs of 7"):
        PointGST(local=7).attach(PointMAEBackbone.tiny())


def test_every_tensor_learns_from_the_third_step_and_both_norms_lie_behind_two_zero_factors() -> None:
    torch.manual_seed(0)
    backbone = PointMAEBackbone.tiny()
    bare = backbone(backbone.example_batch()).tokens.detach()
    adapter = PointGST(local=8).attach(backbone)
    trained = adapter.named_trained()
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    silent = []
    for step in range(3):
        tokens = backbone(backbone.example_batch()).tokens
        if step == 0:
            torch.testing.assert_close(tokens, bare, rtol=0, atol=0)
        optimizer.zero_grad()
        tokens.square().sin().sum().backward()
        silent.append({name for name, p in trained.items() if p.grad is None or not p.grad.any()})
        optimizer.step()
    norms = {name for name in trained if ".norm_" in name}
    assert len(norms) == 4 * 3
    assert norms <= silent[1]
    assert not silent[2]


def filled(transform="reference", **arguments):
    """A backbone with a PointGST whose every tensor is away from its initial value."""
    backbone = PointMAEBackbone.tiny()
    adapter = PointGST(local=8, transform=transform, **arguments).attach(backbone)
    with torch.no_grad():
        for parameter in adapter.named_trained().values():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return backbone, adapter


def test_the_papers_transform_follows_a_permutation_of_the_tokens() -> None:
    _, adapter = filled("paper")
    module = adapter.adapter.get_submodule("blocks.0.mlp.branch")
    points = centres()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 25, 24)
    moved = torch.cat([x[:, :1], x[:, 1:][:, order]], 1)
    patches = slice(1, 25)

    def matrix(places):
        return spectral_transform(places, local=8, basis="exact", transform="paper")

    found = module.adapt(x, matrix(points), patches)
    permuted = module.adapt(moved, matrix(points[:, order]), patches)

    torch.testing.assert_close(permuted[:, 1:], found[:, 1:][:, order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(permuted[:, :1], found[:, :1])


def test_both_branches_give_their_gradient_to_the_one_spectral_layer() -> None:
    _, adapter = filled()
    module = adapter.adapter.get_submodule("blocks.0.mlp.branch")
    matrix = spectral_transform(centres(), local=8, basis="exact", transform="reference")
    x = torch.randn(2, 25, 24)

    def gradient(matrix: torch.Tensor) -> torch.Tensor:
        out = module.adapt(x, matrix, slice(1, 25))
        return torch.autograd.grad(out.sum(), module.spectral.weight)[0]

    # A branch whose coefficients come from zeros still passes W; what is left of it does not reach the tokens.
    over_all, over_parts = matrix.clone(), matrix.clone()
    over_all[:, 24:] = 0
    over_parts[:, :24] = 0
    torch.testing.assert_close(gradient(matrix), gradient(over_all) + gradient(over_parts), rtol=1e-4, atol=1e-4)


def test_bases_are_made_once_for_all_blocks_of_a_pass(monkeypatch) -> None:
    from peft_modal_pointcloud import pointgst

    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return spectral_transform(*args, **kwargs)

    monkeypatch.setattr(pointgst, "spectral_transform", counted)
    backbone, _ = filled()
    for _ in range(2):
        backbone(backbone.example_batch())
    assert len(calls) == 2


@pytest.mark.parametrize(("place", "patches"), [("prefix", slice(4, 28)), ("end", slice(1, 25))])
def test_prompts_of_another_method_are_no_nodes_of_the_graph(place, patches, monkeypatch) -> None:
    backbone, adapter = filled()
    VPT(num_tokens=3, place=place, stacks="blocks").attach(backbone, name="prompts")
    module = adapter.adapter.get_submodule("blocks.1.mlp.branch")
    seen = []
    monkeypatch.setattr(module, "adapt", lambda x, matrix, patches: seen.append((x.shape, patches)) or x)

    backbone(backbone.example_batch())

    assert seen == [((2, 28, 24), patches)]
