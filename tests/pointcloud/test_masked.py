"""Masked pre-training: masks, Chamfer distances, decoder."""

from __future__ import annotations

import pytest
import torch

from peft_modal.errors import ConfigError
from peft_modal_pointcloud.masked import (
    MaskedDecoder,
    block_mask,
    chamfer_l1,
    chamfer_l2,
    masked_patches,
    random_mask,
)
from peft_modal_pointcloud.network import PointMAE


def test_random_mask_hides_the_same_number_in_every_cloud_at_different_places():
    mask = random_mask(50, 64, 0.6)

    assert mask.dtype == torch.bool
    assert mask.sum(1).unique().tolist() == [38]
    assert (mask[0] != mask[1]).any()
    assert mask.float().mean(0).std() < 0.15


def test_random_mask_repeats_with_its_generator_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    masks = [random_mask(4, 16, 0.6, generator=torch.Generator().manual_seed(1)) for _ in range(2)]

    assert torch.equal(*masks)
    assert torch.equal(torch.get_rng_state(), before)


def test_block_mask_hides_the_patches_nearest_to_one_centre():
    centres = torch.randn(6, 16, 3)

    mask = block_mask(centres, 0.4, generator=torch.Generator().manual_seed(0))

    assert mask.sum(1).tolist() == [6] * 6
    for cloud, hidden in zip(centres, mask, strict=True):
        nearest = torch.cdist(cloud, cloud).argsort(1)[:, :6].sort(1).values
        assert hidden.nonzero().flatten().tolist() in nearest.tolist()


@pytest.mark.parametrize("ratio", [0.0, 0.05, 1.0, -0.5])
def test_a_ratio_that_hides_nothing_or_all_is_refused(ratio):
    with pytest.raises(ConfigError, match="at least one must be hidden"):
        random_mask(2, 16, ratio)


def test_chamfer_distances_equal_the_naive_formula():
    a, b = torch.randn(4, 7, 3), torch.randn(4, 5, 3)

    squared = torch.tensor([[[float(((p - q) ** 2).sum()) for q in y] for p in x] for x, y in zip(a, b, strict=True)])
    forth, back = squared.amin(2), squared.amin(1)

    assert chamfer_l2(a, b) == pytest.approx(float(forth.mean() + back.mean()), rel=1e-5)
    assert chamfer_l1(a, b) == pytest.approx(float(forth.sqrt().mean() + back.sqrt().mean()) / 2, rel=1e-5)


@pytest.mark.parametrize("distance", [chamfer_l2, chamfer_l1])
def test_chamfer_gradients_are_those_of_the_formula(distance):
    a = torch.randn(2, 6, 3, requires_grad=True)
    b = torch.randn(2, 6, 3, requires_grad=True)
    squared = (a[:, :, None] - b[:, None]).square().sum(-1)
    forth, back = squared.amin(2), squared.amin(1)
    naive = forth.mean() + back.mean() if distance is chamfer_l2 else (forth.sqrt().mean() + back.sqrt().mean()) / 2

    ours, theirs = torch.autograd.grad(distance(a, b), (a, b)), torch.autograd.grad(naive, (a, b))

    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_chamfer_l1_of_equal_sets_has_finite_gradients():
    points = torch.randn(1, 5, 3)
    rebuilt = points.clone().requires_grad_()

    chamfer_l1(rebuilt, points).backward()

    assert torch.equal(rebuilt.grad, torch.zeros_like(points))


def test_chamfer_works_in_float32_under_autocast():
    a, b = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    plain = chamfer_l2(a, b)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chamfer_l2(a, b), plain)


def test_parameter_count_of_pre_training_is_the_published_one():
    encoder = sum(p.numel() for n, p in PointMAE(device="meta").named_parameters() if not n.startswith("cls"))
    decoder = sum(p.numel() for p in MaskedDecoder(device="meta").parameters())

    assert encoder + decoder == 29_006_432


def test_decoder_names_are_those_of_released_files():
    names = set(MaskedDecoder(dim=12, depth=1, num_heads=2, group_size=4).state_dict())
    pair = ("weight", "bias")
    expected = {"mask_token", "MAE_decoder.blocks.0.attn.qkv.weight"}
    layers = ("decoder_pos_embed.0", "decoder_pos_embed.2", "MAE_decoder.norm", "increase_dim.0")
    parts = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    expected |= {f"{layer}.{n}" for layer in (*layers, *(f"MAE_decoder.blocks.0.{p}" for p in parts)) for n in pair}

    assert names == expected


def test_decoder_gets_visible_tokens_first_and_positions_in_the_same_order():
    decoder = MaskedDecoder(dim=12, depth=2, num_heads=2, group_size=4, drop_path=0.0)
    centres, mask = torch.randn(2, 6, 3), random_mask(2, 6, 0.5)
    visible = torch.randn(2, 3, 12)
    seen = {}
    decoder.MAE_decoder.register_forward_hook(lambda _m, args, out: seen.update(args=args, out=out))

    rebuilt = decoder(visible, centres, mask)

    x, positions, num_masked = seen["args"]
    assert num_masked == 3
    assert torch.equal(x[:, :3], visible)
    assert torch.equal(x[:, 3:], decoder.mask_token.expand(2, 3, -1))
    for cloud in range(2):
        ordered = torch.cat([centres[cloud][~mask[cloud]], centres[cloud][mask[cloud]]])
        assert torch.allclose(positions[cloud], decoder.decoder_pos_embed(ordered), atol=1e-6)
    assert rebuilt.shape == (2, 3, 4, 3)
    weight, bias = decoder.increase_dim[0].weight.squeeze(-1), decoder.increase_dim[0].bias
    assert torch.allclose(rebuilt.flatten(2), seen["out"] @ weight.T + bias, atol=1e-6)


def test_decoder_init_is_xavier_in_the_blocks_and_normal_elsewhere():
    decoder = MaskedDecoder(dim=96, depth=1, num_heads=4, group_size=16)
    block = decoder.MAE_decoder.blocks[0]

    bound = (6 / (96 + 4 * 96)) ** 0.5
    assert block.mlp.fc1.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert block.mlp.fc1.bias.abs().max() == 0
    assert decoder.decoder_pos_embed[2].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert decoder.increase_dim[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_targets_are_the_hidden_patches_in_patch_order():
    patches = torch.arange(2 * 4 * 3 * 3.0).reshape(2, 4, 3, 3)
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])

    assert torch.equal(masked_patches(patches, mask)[0], patches[0, [0, 2]])
    assert torch.equal(masked_patches(patches, mask)[1], patches[1, [2, 3]])


def test_another_mask_than_the_encoder_s_is_refused():
    decoder = MaskedDecoder(dim=12, depth=1, num_heads=2, group_size=4)

    with pytest.raises(ConfigError, match="leaves 3 patches visible, but 2 were encoded"):
        decoder(torch.randn(2, 2, 12), torch.randn(2, 6, 3), random_mask(2, 6, 0.5))


def test_a_few_steps_of_pre_training_lower_the_loss():
    network = PointMAE(
        dim=24, depth=1, num_heads=2, num_group=8, group_size=8, pointnet_dims=(8, 12, 16), drop_path=0.0
    )
    decoder = MaskedDecoder(dim=24, depth=1, num_heads=2, group_size=8, drop_path=0.0)
    points = torch.rand(8, 64, 3) - 0.5
    optimizer = torch.optim.AdamW([*network.parameters(), *decoder.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        mask = random_mask(8, 8, 0.5)
        encoded = network(points, mask=mask)
        loss = chamfer_l2(decoder(encoded.tokens, encoded.centres, mask), masked_patches(encoded.neighbourhood, mask))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), losses
