"""Point-PEFT's groupings, inverse distances, neighbourhood attention and geometry-aware adapter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.anatomy import Context
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.point_peft.geometry import GeometryAdapter, NeighbourhoodAttention
from peft_modal_pointcloud.point_peft.grouping import (
    AlignedGrouping,
    ReferenceGrouping,
    TokenGrouping,
    flat_rows,
    inverse_distance_weights,
    neighbourhoods,
)
from peft_modal_pointcloud.sampling import farthest_point_sample, knn

DIM, TOKENS, CENTRES, NEAR, PROMPTS = 12, 16, 6, 4, 3


def cloud(batch: int = 2, count: int = TOKENS) -> Tensor:
    return torch.rand(batch, count, 3) * 2 - 1


def context_of(centres: Tensor, points: Tensor | None = None) -> Context:
    context = Context({} if points is None else {"points": points})
    context.put("centres", centres)
    return context


def attention() -> NeighbourhoodAttention:
    module = NeighbourhoodAttention(DIM, inner_dim=6, num_heads=2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def adapter(grouping: nn.Module, **changes: float) -> GeometryAdapter:
    anatomy = PointMAEBackbone(
        weights="random", dim=DIM, depth=1, num_heads=2, num_group=TOKENS, group_size=4, pointnet_dims=[4, 4, 4]
    ).anatomy
    port = anatomy.port("block.out", stack="blocks", block=0)
    options = {"hidden_dim": 4, "dropout": 0.0, "drop_path": 0.0, **changes}
    return GeometryAdapter(attention(), grouping, port=port, layout=anatomy.layouts["blocks"], **options)


def test_shares_of_the_sub_centres_sum_to_one_and_a_token_on_one_reads_it_alone():
    points = cloud()

    weights = inverse_distance_weights(points, points[:, :CENTRES])

    assert weights.shape == (2, TOKENS, CENTRES)
    assert torch.allclose(weights.sum(2), torch.ones(2, TOKENS))
    assert bool((weights[:, :CENTRES].diagonal(dim1=1, dim2=2) > 0.999).all())


def test_every_sub_centre_has_a_share_not_the_nearest_three():
    assert bool((inverse_distance_weights(cloud(), cloud(count=CENTRES)) > 0).all())


def test_shares_are_those_of_float32_under_autocast():
    points, centres = cloud(), cloud(count=CENTRES)
    plain = inverse_distance_weights(points, centres)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inverse_distance_weights(points, centres), plain)
        assert torch.equal(
            neighbourhoods(points, num_sub_centres=CENTRES, k=NEAR).members,
            knn(points, points.gather(1, farthest_point_sample(points, CENTRES)[..., None].expand(-1, -1, 3)), NEAR),
        )


def test_the_gradient_of_the_shares_is_finite_on_a_sub_centre_and_flows_to_both():
    points = cloud().requires_grad_()
    centres = points[:, :CENTRES].detach().clone().requires_grad_()

    (inverse_distance_weights(points, centres) * torch.randn(2, TOKENS, CENTRES)).sum().backward()

    for tensor in (points, centres):
        assert bool(tensor.grad.isfinite().all())
        assert float(tensor.grad.abs().sum()) > 0


def test_attention_before_gathering_equals_attention_over_gathered_tokens():
    module = attention().double()
    rows = torch.randn(20, DIM, dtype=torch.float64, requires_grad=True)
    members = torch.randint(20, (7, NEAR))

    found = module(rows, members)

    near = module.norm(rows[members])
    expected = torch.zeros(7, NEAR, 6, dtype=torch.float64)
    query, key, value = (near @ module.qkv.weight.T).chunk(3, dim=2)
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        scores = query[..., part] @ key[..., part].transpose(1, 2) * 6**-0.5
        expected[..., part] = scores.softmax(2) @ value[..., part]
    expected = expected @ module.proj.weight.T + module.proj.bias
    assert torch.allclose(found, expected, atol=1e-12)
    probe = torch.randn_like(found)
    ours = torch.autograd.grad((found * probe).sum(), [rows, *module.parameters()])
    theirs = torch.autograd.grad((expected * probe).sum(), [rows, *module.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_adapter_equals_the_formula_cloud_by_cloud(training: bool):
    module = adapter(TokenGrouping(num_sub_centres=CENTRES, k=NEAR)).train(training)
    with torch.no_grad():
        module.bn.weight.copy_(torch.randn(DIM))
        module.bn.running_mean.normal_()
    centres, z = cloud(), torch.randn(2, 1 + TOKENS, DIM)
    mean, variance = module.bn.running_mean.clone(), module.bn.running_var.clone()

    found = module(z, context_of(centres))

    pooled, queries = [], []
    around = neighbourhoods(centres, num_sub_centres=CENTRES, k=NEAR)
    for tokens, members, own in zip(z[:, 1:], around.members, around.centres, strict=True):
        near = tokens[members] + module.attention(tokens, members)
        pooled.append(near.amax(1))
        queries.append(tokens[own])
    samples = torch.cat(pooled)  # (B * S, C): what the norm sees
    if training:
        mean, variance = samples.mean(0), samples.var(0, unbiased=False)
    v = functional.gelu((samples - mean) / (variance + 1e-5).sqrt() * module.bn.weight + module.bn.bias)
    v = (v + 0.3 * torch.cat(queries)).view(2, CENTRES, DIM)
    expected = z.clone()
    for i in range(2):
        for j in range(TOKENS):
            distances = (centres[i, j] - centres[i, around.centres[i]]).square().sum(1)
            shares = 1 / (distances + 1e-8)
            expected[i, 1 + j] += 0.3 * (shares / shares.sum()) @ v[i]
    expected = expected + module.bottleneck(expected)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_bottleneck_behind_the_pooling_changes_the_class_token_too():
    module = adapter(TokenGrouping(num_sub_centres=CENTRES, k=NEAR)).eval()
    z = torch.randn(2, 1 + TOKENS, DIM)

    found = module(z, context_of(cloud()))

    assert torch.allclose(found[:, 0], z[:, 0] + module.bottleneck(z[:, 0]), atol=1e-6)
    assert not torch.allclose(found[:, 0], z[:, 0], atol=1e-3)


def test_left_out_attention_leaves_the_pooling():
    grouping = TokenGrouping(num_sub_centres=CENTRES, k=NEAR)
    module = adapter(grouping, drop_path=0.999999).train()
    z, context = torch.randn(2, 1 + TOKENS, DIM), context_of(cloud())

    found = module(z, context)
    nn.init.zeros_(module.attention.proj.weight)
    nn.init.zeros_(module.attention.proj.bias)

    assert torch.allclose(found, module(z, context), atol=1e-6)


def test_aligned_nodes_are_prompts_and_own_centres_row_by_row():
    grouping = AlignedGrouping(num_prompts=PROMPTS, num_sub_centres=CENTRES, k=NEAR)
    centres = cloud()
    nodes = torch.cat([grouping.prompt_coords.expand(2, -1, -1), centres], dim=1)

    found = grouping(context_of(centres))

    expected = neighbourhoods(nodes, num_sub_centres=CENTRES, k=NEAR)
    assert torch.equal(found.members, torch.cat([expected.members[0], expected.members[1] + PROMPTS + TOKENS]))
    assert torch.equal(found.centres, torch.cat([expected.centres[0], expected.centres[1] + PROMPTS + TOKENS]))
    b = nodes[torch.arange(2)[:, None], expected.centres]
    assert torch.allclose(found.weights, inverse_distance_weights(centres, b))


def test_reference_indices_run_in_steps_of_the_tokens_although_rows_do_not():
    grouping = ReferenceGrouping(num_prompts=PROMPTS, num_sub_centres=CENTRES, k=NEAR)
    points = cloud(count=60)
    centres = points[:, :TOKENS]

    found = grouping(context_of(centres, points))

    nodes = torch.cat([grouping.prompt_coords.expand(2, -1, -1), points], dim=1)
    prompted = nodes[torch.arange(2)[:, None], farthest_point_sample(nodes, TOKENS)]
    expected = neighbourhoods(prompted, num_sub_centres=CENTRES, k=NEAR)
    assert torch.equal(found.members, flat_rows(expected.members, TOKENS).flatten(0, 1))
    assert int(found.members[CENTRES:].min()) >= TOKENS
    assert int(found.members[CENTRES:].min()) < PROMPTS + TOKENS


@pytest.mark.parametrize("kind", [AlignedGrouping, ReferenceGrouping])
def test_prompt_coordinates_learn_through_the_shares_alone(kind: type[AlignedGrouping | ReferenceGrouping]):
    grouping = kind(num_prompts=PROMPTS, num_sub_centres=CENTRES, k=NEAR)
    points = cloud(count=60)

    found = grouping(context_of(points[:, :TOKENS], points))
    (found.weights * torch.randn_like(found.weights)).sum().backward()

    assert not found.members.is_floating_point()
    assert float(grouping.prompt_coords.grad.abs().sum()) > 0


def test_indices_are_computed_once_for_all_blocks_of_a_pass(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(
        "peft_modal_pointcloud.point_peft.grouping.farthest_point_sample",
        lambda points, num: calls.append(num) or farthest_point_sample(points, num),
    )
    points = cloud(count=60)
    for grouping, expected in (
        (TokenGrouping(num_sub_centres=CENTRES, k=NEAR), 1),
        (AlignedGrouping(num_prompts=PROMPTS, num_sub_centres=CENTRES, k=NEAR), 1),
        (ReferenceGrouping(num_prompts=PROMPTS, num_sub_centres=CENTRES, k=NEAR), 2),
    ):
        calls.clear()
        context = context_of(points[:, :TOKENS], points)
        for _ in range(3):
            grouping(context)
        assert len(calls) == expected
