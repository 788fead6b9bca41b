"""IDPT's prompt generators against the formula over explicit edges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_modal.errors import ConfigError
from peft_modal_pointcloud.idpt_generator import (
    EdgeConv,
    GraphPromptGenerator,
    build_prompt_generator,
    feature_knn,
)
from peft_modal_pointcloud.network import Block


def naive_neighbours(h: Tensor, k: int) -> Tensor:
    distance = (h[:, :, None] - h[:, None]).double().square().sum(-1)
    return distance.argsort(dim=-1, stable=True)[..., :k]


def naive_edge(h: Tensor, weight: Tensor, norm: nn.BatchNorm2d, k: int) -> Tensor:
    """BN2d and activation on every explicit edge [h_j - h_i, h_i], maximum last."""
    neighbours = naive_neighbours(h, k)
    near = torch.stack([cloud[index] for cloud, index in zip(h, neighbours, strict=True)])  # (B, G, k, D)
    own = h[:, :, None].expand_as(near)
    edges = torch.cat([near - own, own], dim=-1) @ weight.T
    edges = functional.leaky_relu(norm(edges.permute(0, 3, 1, 2)), 0.2)
    return edges.amax(-1).transpose(1, 2)


def generator(variant: str = "dgcnn", *, dim: int = 8, k: int = 5) -> GraphPromptGenerator:
    module = build_prompt_generator(variant, dim=dim, k=k).double()
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if "_bn" in name:  # negative scales tell a maximum before the norm from one behind it
                tensor.copy_(torch.randn_like(tensor))
        for name, tensor in module.named_buffers():
            if "running" in name:
                tensor.copy_(torch.rand_like(tensor) + 0.3)
    return module


def as_2d(norm: nn.BatchNorm1d) -> nn.BatchNorm2d:
    other = nn.BatchNorm2d(norm.num_features).double()
    other.load_state_dict(norm.state_dict())
    return other.train(norm.training)


def tokens(batch: int = 3, patches: int = 12, dim: int = 8) -> Tensor:
    return torch.randn(batch, patches, dim, dtype=torch.float64)


def test_neighbours_are_the_nearest_in_feature_space_with_the_token_itself_first():
    h = tokens()

    found = feature_knn(h, 5)

    assert torch.equal(found, naive_neighbours(h, 5))
    assert torch.equal(found[..., 0], torch.arange(12).expand(3, -1))


def test_neighbours_are_found_in_float32_under_autocast():
    h = tokens(patches=40).float()
    plain = feature_knn(h, 10)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feature_knn(h, 10), plain)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("variant", "layers"), [("dgcnn", 3), ("dgcnn_light2", 2), ("dgcnn_light", 1), ("mlp", 0)])
def test_split_form_equals_the_formula_over_edges(variant, layers, training):
    module = generator(variant).train(training)
    reference = copy.deepcopy(module)
    h = tokens().requires_grad_()
    edges = []
    for r in range(1, layers + 1):
        module.get_submodule(f"edge{r}").register_forward_hook(lambda _m, _args, out: edges.append(out))

    prompt = module(h)
    outputs, norms = [], {}
    features = h
    for r in range(1, layers + 1):
        norms[f"edge{r}_bn"] = as_2d(reference.get_submodule(f"edge{r}_bn"))
        features = naive_edge(features, reference.get_parameter(f"edge{r}.weight"), norms[f"edge{r}_bn"], 5)
        outputs.append(features)
    fused = torch.cat(outputs or [h], dim=-1) @ reference.fuse.weight.T
    fused = functional.leaky_relu(reference.fuse_bn(fused.transpose(1, 2)), 0.2)
    expected = fused.amax(2)[:, None]

    assert prompt.shape == (3, 1, 8)
    assert torch.allclose(prompt, expected, atol=1e-10)
    assert len(edges) == layers
    for ours, theirs in zip(edges, outputs, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)
    for name, norm in norms.items():
        for statistic in ("running_mean", "running_var"):
            assert torch.allclose(getattr(norm, statistic), module.get_submodule(name).get_buffer(statistic))

    weight = torch.randn_like(prompt)
    ours = torch.autograd.grad((prompt * weight).sum(), [h, *module.parameters()])
    named = [
        norms[name.split(".")[0]].get_parameter(name.split(".")[1]) if name.split(".")[0] in norms else parameter
        for name, parameter in reference.named_parameters()
    ]
    theirs = torch.autograd.grad((expected * weight).sum(), [h, *named])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_the_graph_is_rebuilt_from_each_layer_s_own_input():
    module = generator().eval()
    h = tokens()
    inputs = []
    for r in (1, 2, 3):
        module.get_submodule(f"edge{r}").register_forward_hook(lambda _m, args, out: inputs.append((args[0], out)))

    module(h)

    graphs = [feature_knn(before, 5) for before, _ in inputs]
    assert torch.equal(inputs[1][0], inputs[0][1])
    assert not torch.equal(graphs[0].sort(-1).values, graphs[1].sort(-1).values)


def test_the_prompt_does_not_depend_on_the_order_of_the_tokens():
    module = generator().eval()
    h = tokens()

    assert torch.allclose(module(h), module(h[:, torch.randperm(12)]), atol=1e-10)


def test_one_cloud_s_prompt_does_not_depend_on_the_others_in_eval_mode():
    module = generator().eval()
    h = tokens()

    assert torch.allclose(module(h)[1:2], module(h[1:2]), atol=1e-12)


@pytest.mark.parametrize(
    ("variant", "count"),
    [("dgcnn", 1_330_176), ("dgcnn_light2", 887_040), ("dgcnn_light", 443_904), ("mlp", 148_224)],
)
def test_parameter_counts_are_the_published_ones_without_the_dead_norm(variant, count):
    module = build_prompt_generator(variant, dim=384, device="meta")

    assert sum(p.numel() for p in module.parameters()) == count


def test_names_are_those_of_the_saved_format():
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"edge{r}.weight" for r in (1, 2, 3)} | {"fuse.weight"}
    expected |= {f"{norm}.{n}" for norm in ("edge1_bn", "edge2_bn", "edge3_bn", "fuse_bn") for n in statistics}

    assert set(build_prompt_generator("dgcnn", dim=4).state_dict()) == expected


def test_init_is_torch_s_convolution_default():
    module = build_prompt_generator("dgcnn", dim=64)

    assert module.edge1.weight.abs().max().item() == pytest.approx(128**-0.5, rel=0.01)
    assert module.fuse.weight.abs().max().item() == pytest.approx(192**-0.5, rel=0.01)
    assert torch.equal(module.edge1_bn.weight, torch.ones(64))


def test_the_transformer_variant_runs_one_block_and_pools():
    made = []

    def make_block() -> nn.Module:
        made.append(Block(8, num_heads=2).double())
        return made[-1]

    module = build_prompt_generator("transformer", dim=8, make_block=make_block)
    h = tokens()

    assert module.adds_positions
    assert not GraphPromptGenerator.adds_positions
    assert torch.equal(module(h), made[0](h).amax(1, keepdim=True))
    assert all(name.startswith("block.") for name in module.state_dict())


def test_more_neighbours_than_patches_is_refused_with_the_patch_count():
    with pytest.raises(ConfigError, match=r"k is 20, but the network has 16 patches"):
        build_prompt_generator("dgcnn", dim=8)(torch.randn(2, 16, 8))


def test_the_fusion_only_variant_needs_no_neighbours():
    assert build_prompt_generator("mlp", dim=8, k=20)(torch.randn(2, 16, 8)).shape == (2, 1, 8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"variant": "dgcn"}, "did you mean 'dgcnn'"),
        ({"variant": "dgcnn", "k": 0}, "k is 0"),
        ({"variant": "transformer"}, "needs a block of the backbone"),
    ],
    ids=["unknown", "k", "no-block"],
)
def test_wrong_settings_end_in_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_prompt_generator(**arguments, dim=8)


def test_an_edge_layer_prints_its_sizes():
    assert repr(EdgeConv(8, k=5)) == "EdgeConv(dim=8, k=5)"
