"""The levels of the point transformer, feature propagation, and the head of part segmentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from peft_modal.errors import ConfigError, DataError, TrainingError
from peft_modal.methods.full import Full
from peft_modal.testing import check_anatomy
from peft_modal_heads.dense_linear import DenseLinear
from peft_modal_heads.parts import PartOutput, PartTable
from peft_modal_heads.pointcloud_parts import PointCloudParts
from peft_modal_heads.propagation import FeaturePropagation, interpolation
from peft_modal_pointcloud.backbone import PointMAEBackbone, spread_levels
from peft_modal_pointcloud.idpt_parts import IDPTParts
from peft_modal_vision.backbone import ViT

TINY = {
    "weights": "random", "dim": 24, "depth": 3, "num_heads": 3, "num_group": 12, "group_size": 6,
    "pointnet_dims": [8, 16, 16], "drop_path": 0.0, "init": "torch",
}  # fmt: skip
NAMES = ("cup/body", "cup/handle", "table/top", "table/leg", "table/shelf")


def backbone(**options: Any) -> PointMAEBackbone:
    return PointMAEBackbone(**{**TINY, "has_cls": False, "levels": 2, **options})


def batch(size: int = 2, points: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "points": torch.randn(size, points, 3, generator=generator),
        "category": torch.arange(size) % 2,
    }


def head(network: PointMAEBackbone, **options: Any) -> PointCloudParts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PointCloudParts(network.feature_spec(), len(NAMES), NAMES, **options)


@pytest.mark.parametrize(
    ("wanted", "depth", "expected"),
    [(3, 12, (3, 7, 11)), (3, 4, (0, 2, 3)), (1, 12, (11,)), (0, 12, ()), ([1, 2, 3], 4, (1, 2, 3))],
)
def test_levels_are_spread_over_the_depth(wanted: Any, depth: int, expected: tuple[int, ...]) -> None:
    assert spread_levels(wanted, depth) == expected


@pytest.mark.parametrize("wanted", [4, [2, 1], [0, 0], [0, 3]])
def test_levels_that_are_not_there_are_refused(wanted: Any) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.levels"):
        backbone(levels=wanted)


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("levels", [0, 2])
def test_the_anatomy_holds_with_and_without_class_token_and_levels(has_cls: bool, levels: int) -> None:
    assert not check_anatomy(backbone(has_cls=has_cls, levels=levels))


def test_levels_are_patch_tokens_behind_their_blocks_through_the_final_norm() -> None:
    for has_cls in (True, False):
        network = backbone(has_cls=has_cls, levels=[0, 2])
        seen: dict[int, torch.Tensor] = {}
        for i, block in enumerate(network.network.blocks.blocks):
            block.register_forward_hook(lambda _m, _a, out, i=i, seen=seen: seen.update({i: out}))
        features = network(batch())
        for number, block in enumerate((0, 2)):
            expected = network.network.norm(seen[block][:, int(has_cls) :])
            torch.testing.assert_close(features.extras[f"level.{number}"], expected)
        torch.testing.assert_close(features.tokens[:, int(has_cls) :], features.extras["level.1"])
        assert features.tokens.shape[1] == 12 + has_cls


def test_levels_leave_the_tokens_as_they_are() -> None:
    plain, levelled = backbone(has_cls=True, levels=0), backbone(has_cls=True, levels=3)
    assert torch.equal(plain(batch()).tokens, levelled(batch()).tokens)


def test_without_class_token_there_is_none_to_load_or_train() -> None:
    network = PointMAEBackbone(has_cls=False, levels=3)
    network.load_weights()
    assert not [name for name in network.network.state_dict() if "cls" in name]
    assert not network.anatomy.always_trained
    with_cls = PointMAEBackbone()
    with_cls.load_weights()
    assert torch.equal(with_cls.network.norm.weight, network.network.norm.weight)


def test_the_published_network_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = PointMAEBackbone(weights="random", num_group=128, has_cls=False, levels=3)
        names = tuple(f"{i % 16}/{i}" for i in range(50))
        made = PointCloudParts(network.feature_spec(), 50, names)
        assert count(network.network) == 21_825_024
        assert {name: count(getattr(made, name)) for name, _ in made.named_children() if name != "dropout"} == {
            "label_conv": 1_152, "propagation_0": 3_354_624, "convs1": 1_737_216, "bns1": 1_024, "convs2": 131_328,
            "bns2": 512, "convs3": 12_850,
        }  # fmt: skip
        assert count(network.network) + count(made) == 27_063_730
        adapter = IDPTParts().attach(network)
        prompted = PointCloudParts(network.feature_spec(), 50, names)
    assert count(prompted) == count(made)
    # The authors' 5,686,066 less 2,304 of BatchNorms that are never called.
    assert sum(p.numel() for p in adapter.named_trained().values()) + count(prompted) == 5_683_762


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_interpolation_weighs_the_three_nearest_by_inverse_squared_distance() -> None:
    centres = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 9]]])
    places = torch.tensor([[[0.25, 0, 0], [1, 0, 0]]])
    weights = interpolation(places, centres)
    squared = torch.tensor([0.25**2, 0.75**2, 0.25**2 + 4])
    expected = (1 / squared) / (1 / squared).sum()
    torch.testing.assert_close(weights[0, 0], torch.cat([expected, torch.zeros(1)]))
    torch.testing.assert_close(weights[0, 1], torch.tensor([0.0, 1, 0, 0]), atol=1e-6, rtol=0)


def test_interpolation_takes_fewer_centres_and_half_precision() -> None:
    places, centres = torch.randn(2, 5, 3), torch.randn(2, 2, 3)
    assert torch.allclose(interpolation(places, centres).sum(2), torch.ones(2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert interpolation(places.bfloat16(), centres.bfloat16()).dtype == torch.float32


def test_interpolation_passes_the_gradient_of_coordinates() -> None:
    places = torch.randn(1, 4, 3, dtype=torch.float32).requires_grad_()
    centres = torch.randn(1, 6, 3)
    (interpolation(places, centres) * torch.randn(1, 4, 6)).sum().backward()
    assert places.grad is not None
    assert float(places.grad.abs().min()) > 0


def test_propagation_is_the_convolutions_of_coordinates_and_interpolated_features() -> None:
    module = FeaturePropagation(7, [9, 5]).train()
    places, centres, features = torch.randn(2, 11, 3), torch.randn(2, 6, 3), torch.randn(2, 6, 7)
    found = module(places, centres, features)
    x = torch.cat([places, interpolation(places, centres) @ features], dim=2).transpose(1, 2)
    for conv, norm in zip(module.mlp_convs, module.mlp_bns, strict=True):
        x = functional.batch_norm(conv(x), None, None, norm.weight, norm.bias, training=True).relu()
    torch.testing.assert_close(found, x.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_the_head_is_the_published_formula() -> None:
    network = backbone()
    made = head(network, propagation_dims=(10, 8), hidden_dims=(9, 6), category_dim=5).eval()
    features = network(batch())
    output = made(features)
    assert output.log_probs.shape == (2, 40, 5)
    torch.testing.assert_close(output.log_probs.exp().sum(2), torch.ones(2, 40))
    assert torch.equal(output.category, batch()["category"])

    tokens = torch.cat([features.extras["level.0"], features.extras["level.1"]], dim=2)
    one_hot = functional.one_hot(batch()["category"], 2)[:, :, None].float()
    shape = torch.cat([tokens.amax(1), tokens.mean(1), made.label_conv(one_hot)[:, :, 0]], dim=1)
    local = made.propagation_0(features.extras["queries"], features.extras["centres"], tokens).transpose(1, 2)
    x = torch.cat([local, shape[:, :, None].expand(-1, -1, 40)], dim=1)
    x = made.convs3(made.bns2(made.convs2(made.bns1(made.convs1(x)).relu())).relu())
    torch.testing.assert_close(output.log_probs, x.transpose(1, 2).log_softmax(2), atol=1e-5, rtol=1e-5)


def test_places_that_are_asked_for_are_classified_instead_of_the_points() -> None:
    network = backbone()
    made = head(network).eval()
    points = batch()
    whole = made(network(points)).log_probs
    some = made(network({**points, "queries": points["points"][:, 5:9]})).log_probs
    torch.testing.assert_close(some, whole[:, 5:9])


def test_the_category_matters_and_must_be_there() -> None:
    network = backbone()
    made = head(network).eval()
    points = batch()
    other = made(network({**points, "category": 1 - points["category"]})).log_probs
    assert not torch.allclose(made(network(points)).log_probs, other)
    with pytest.raises(DataError, match="needs the category of every cloud"):
        made(network({"points": points["points"]}))
    with pytest.raises(IndexError, match="out of range"):
        made(network({**points, "category": torch.tensor([0, 2])}))


def test_a_batch_of_one_cannot_be_trained_on() -> None:
    network = backbone()
    with pytest.raises(TrainingError, match="needs two samples"):
        head(network).train()(network(batch(1)))


def test_shape_features_are_those_that_are_named() -> None:
    network = backbone()
    assert head(network).pool == ("max", "mean")
    assert head(network, pool=["max"]).convs1.in_channels == 1024 + 48 + 64
    with pytest.raises(ConfigError, match=r"head\.pool: there is no shape feature 'cls' here; known: max, mean"):
        head(network, pool=["cls"])
    IDPTParts().attach(network)
    prompted = head(network)
    assert prompted.pool == ("prompt",)
    assert prompted.convs1.in_channels == head(backbone()).convs1.in_channels


def test_heads_and_backbones_that_do_not_go_together_say_so() -> None:
    with pytest.raises(ConfigError, match=r"set backbone\.levels=3"):
        head(backbone(levels=0))
    with pytest.raises(ConfigError, match="this backbone gives none"):
        PointCloudParts(ViT.tiny().feature_spec(), 5, NAMES)
    with pytest.raises(ConfigError, match="the backbone gives points; use pointcloud_parts"):
        DenseLinear(backbone().feature_spec(), 5)


def test_gradients_reach_backbone_and_head() -> None:
    network = backbone()
    adapter = Full().attach(network)
    made = head(network).train()
    made(network(batch())).log_probs[..., 0].sum().backward()
    for name, parameter in {**adapter.named_trained(), **dict(made.named_parameters())}.items():
        assert parameter.grad is not None, name


def test_parts_belong_to_the_category_in_front_of_their_name() -> None:
    table = PartTable(NAMES)
    assert table.categories == ("cup", "table")
    assert table.parts_of(0) == [0, 1]
    assert table.parts_of(1) == [2, 3, 4]
    log_probs = torch.tensor([[[0.0, -3, -1, -2, -9]], [[0.0, -3, -1, -2, -9]]])
    assert table.found(PartOutput(log_probs, torch.tensor([0, 1]))).tolist() == [[0], [2]]
    assert PartTable(("a", "b")).num_categories == 1
