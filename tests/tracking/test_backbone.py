"""The one-stream tracker: embedding, weights, counts, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from peft_modal.attach import merge_
from peft_modal.errors import ConfigError, DataError, WeightsError
from peft_modal.files import write_tensors
from peft_modal.methods.lora import LoRA
from peft_modal.testing import assert_anatomy
from peft_modal_heads.tracking_mlp import TrackingMLP
from peft_modal_tracking.backbone import LoRAT
from peft_modal_tracking.network import SubsetDropPath, grid_positions, strip
from peft_modal_vision.backbone import ViT

SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0}


def small(**options: Any) -> LoRAT:
    given = {"model": "custom", "weights": "random", "sizes": SIZES, "template_size": 8, "search_size": 16}
    return LoRAT(**{**given, **options})


def test_there_is_no_class_token() -> None:
    backbone = small()
    features = backbone(backbone.example_batch(3))
    assert features.tokens.shape == (3, 4 + 16, 16)
    assert features.extras["level.0"].shape == (3, 16, 4, 4)
    assert not [name for name in backbone.network.state_dict() if "cls" in name]


def test_the_map_holds_the_search_tokens_row_by_row() -> None:
    backbone = small(search_size=[8, 16])
    features = backbone(backbone.example_batch())
    assert torch.equal(features.extras["level.0"][:, :, 1, 3], features.tokens[:, 4 + 1 * 4 + 3])


def test_positions_are_resized_without_antialiasing_and_keep_rows_and_columns_apart() -> None:
    vit: Any = ViT(model="custom", weights="random", sizes=SIZES).network
    own = vit.pos_embed[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    wanted = functional.interpolate(own, (3, 5), mode="bicubic", align_corners=False)
    found = grid_positions(vit, (3, 5), "interpolate")
    assert torch.equal(found.unflatten(1, (3, 5)).permute(0, 3, 1, 2), wanted)
    assert not torch.allclose(
        found,
        functional.interpolate(own, (3, 5), mode="bicubic", antialias=True).flatten(2).transpose(1, 2),
        atol=1e-4,
    )


def test_slicing_takes_the_top_left_corner() -> None:
    vit: Any = ViT(model="custom", weights="random", sizes=SIZES).network
    own = vit.pos_embed[:, 1:].unflatten(1, (6, 6))
    assert torch.equal(grid_positions(vit, (4, 2), "slice").unflatten(1, (4, 2)), own[:, :4, :2])
    with pytest.raises(ConfigError, match=r"backbone\.positions: 'slice' takes 7 x 7 positions"):
        small(positions="slice", search_size=28)


def test_a_template_token_carries_its_own_place_of_the_search_picture_and_its_kind() -> None:
    network: Any = small(search_size=[12, 16]).network
    torch.nn.init.normal_(network.token_type_embed)
    template, search = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 12, 16)
    mask = torch.tensor([[[0, 1], [0, 0]]])
    tokens = network.embed(template, search, mask)[0] - network.patch_embed.proj.bias
    places = network.pos_embed[0].unflatten(0, (3, 4))
    background, target, sought = network.token_type_embed
    torch.testing.assert_close(tokens[1], places[0, 1] + target)
    torch.testing.assert_close(tokens[2], places[1, 0] + background)
    torch.testing.assert_close(tokens[4 + 6], places[1, 2] + sought)


def test_patches_stand_side_by_side_in_rows() -> None:
    image = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    cut = strip(image, (2, 3))
    assert cut.shape == (2, 3, 2, 4 * 3)
    assert torch.equal(cut[..., 3:6], image[..., :2, 3:])
    assert torch.equal(cut[..., 6:9], image[..., 2:, :3])


def test_the_nano_is_the_vision_modalitys() -> None:
    backbone, vit = LoRAT(), ViT()
    backbone.load_weights()
    vit.load_weights()
    theirs = vit.network.state_dict()
    ours = backbone.network.state_dict()
    assert {name for name in ours if name not in theirs} == {"token_type_embed"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name in theirs and name != "pos_embed")
    assert torch.equal(ours["pos_embed"], grid_positions(vit.network, (8, 8), "interpolate"))
    assert float(ours["token_type_embed"].std()) == pytest.approx(0.02, rel=0.2)


def test_a_merged_tracker_is_loaded_again(tmp_path: Path) -> None:
    backbone = small()
    adapter = LoRA(sites=["attn", "mlp"], rank=2, init="trunc_normal").attach(backbone)
    batch = backbone.example_batch()
    with torch.no_grad():
        for parameter in adapter.named_trained().values():
            parameter.add_(0.1)
        unmerged = backbone(batch).tokens
        merge_(backbone)
        merged = backbone(batch).tokens
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-6 * float(unmerged.abs().max()) * 4)
    write_tensors(tmp_path / "merged.safetensors", backbone.network.state_dict(), {})

    again = small(weights=str(tmp_path / "merged.safetensors"), init_seed=5)
    again.load_weights()
    assert torch.equal(again(batch).tokens, merged)

    other = small(weights=str(tmp_path / "merged.safetensors"), search_size=24)
    with pytest.raises(WeightsError, match="'pos_embed' of shape"):
        other.load_weights()


def test_a_file_of_a_plain_vit_is_loaded(tmp_path: Path) -> None:
    vit = ViT(model="custom", weights="random", sizes=SIZES, init_seed=3)
    write_tensors(tmp_path / "vit.safetensors", vit.network.state_dict(), {})
    backbone = small(weights=str(tmp_path / "vit.safetensors"))
    backbone.load_weights()
    state: Any = backbone.network
    assert torch.equal(state.blocks[1].mlp.fc1.weight, vit.network.get_parameter("blocks.1.mlp.fc1.weight"))
    assert torch.equal(state.pos_embed, grid_positions(vit.network, (4, 4), "interpolate"))


def test_what_trains_is_what_the_card_counts() -> None:
    rank, width, depth = 3, 16, 2
    backbone = small()
    adapter = LoRA(sites=["attn", "mlp"], rank=rank, init="trunc_normal").attach(backbone)
    assert adapter.counts() == {"adapter": 18 * rank * width * depth, "backbone": 3 * width, "training_only": 0}
    head = TrackingMLP(backbone.feature_spec())
    assert sum(p.numel() for p in head.parameters()) == 4 * width**2 + 9 * width + 5


def test_the_published_size_is_the_cards() -> None:
    with torch.device("meta"):
        backbone = LoRAT(model="vit_base_patch14_dinov2", weights="random")
        head = TrackingMLP(backbone.feature_spec())
    assert (backbone.template_size, backbone.search_size) == ((112, 112), (224, 224))
    assert sum(p.numel() for p in head.parameters()) == 2_366_213
    # Counted with the type embedding and without the mask token, which no tracker holds.
    assert sum(p.numel() for m in (backbone.network, head) for p in m.parameters()) == 88_091_909


def test_every_anatomy_is_right() -> None:
    assert_anatomy(small(search_size=[8, 12]))
    assert_anatomy(LoRAT(model="vit_tiny_patch16_224", weights="random", template_size=32, search_size=64))


def test_drop_path_is_uniform_and_of_a_fixed_number_above_a_tenth() -> None:
    gentle, strong = small(drop_path=0.1), small(drop_path=0.4)
    rates = {block.drop_path1.drop_prob for block in gentle.network.blocks}  # type: ignore[union-attr]
    assert rates == {0.1}
    assert {type(block.drop_path2) for block in strong.network.blocks} == {SubsetDropPath}  # type: ignore[union-attr]
    module = SubsetDropPath(0.4).train()
    kept = module(torch.ones(8, 2, 3))[:, 0, 0]
    assert sorted(kept.tolist()) == [0.0] * 4 + [2.0] * 4
    assert torch.equal(module.eval()(torch.ones(8, 2)), torch.ones(8, 2))


def test_drop_path_sleeps_in_the_frozen_network() -> None:
    backbone = small(drop_path=0.5).train()
    batch = backbone.example_batch()
    assert torch.equal(backbone(batch).tokens, backbone(batch).tokens)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"search_size": 18}, r"backbone\.search_size: 18 x 18 pixels are no multiple"),
        ({"template_size": [8, 8, 8]}, r"one number or \[height, width\]"),
        ({"template_size": 20}, r"backbone\.template_size: 5 x 5 patches do not fit"),
        (
            {"model": "eva02_tiny_patch14_224", "sizes": None, "template_size": 14, "search_size": 28},
            "learned positions",
        ),
        ({"model": "resnet18", "sizes": None}, "'resnet18' is a ResNet"),
        ({"weights": "nano"}, "'nano' is of model 'nano'"),
    ],
)
def test_what_cannot_be_built_is_refused(options: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        small(**options)


def test_pictures_of_another_size_are_refused() -> None:
    backbone = small()
    batch = {**backbone.example_batch(), "search": torch.zeros(2, 3, 20, 20)}
    with pytest.raises(DataError, match=r"the search has 20 x 20 pixels, the network takes 16 x 16"):
        backbone(batch)
