"""The point transformer: structure, names, places to attach, checkpointing."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from peft_modal.errors import ConfigError
from peft_modal_pointcloud.network import Block, DropPath, MiniPointNet, PointMAE

TINY = {
    "dim": 24, "depth": 3, "num_heads": 3, "num_group": 8, "group_size": 6, "pointnet_dims": (8, 12, 16),
}  # fmt: skip


def tiny(**changes) -> PointMAE:
    network = PointMAE(**{**TINY, "drop_path": 0.0, "init": "torch", **changes})
    with torch.no_grad():  # norms that are not the identity
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@pytest.fixture
def points():
    return torch.randn(2, 40, 3) * 0.5


def test_parameter_counts_are_the_published_ones():
    def count(**sizes):
        return sum(p.numel() for p in PointMAE(**sizes, device="meta").parameters())

    head_c15 = 267_535
    assert count() + head_c15 == 22_093_327
    nano = {"dim": 128, "depth": 4, "num_heads": 4, "num_group": 32, "group_size": 16, "pointnet_dims": (32, 64, 128)}
    assert count(**nano) == 844_672


def test_state_dict_names_are_those_of_released_files():
    pair = ("weight", "bias")
    norm = (*pair, "running_mean", "running_var", "num_batches_tracked")
    expected = {"cls_token", "cls_pos", *(f"norm.{n}" for n in pair)}
    expected |= {f"pos_embed.{i}.{n}" for i in (0, 2) for n in pair}
    for stage in ("first_conv", "second_conv"):
        expected |= {f"encoder.{stage}.{i}.{n}" for i in (0, 3) for n in pair}
        expected |= {f"encoder.{stage}.1.{n}" for n in norm}
    for i in range(3):
        for layer in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            expected |= {f"blocks.blocks.{i}.{layer}.{n}" for n in pair}
        expected.add(f"blocks.blocks.{i}.attn.qkv.weight")

    assert set(tiny().state_dict()) == expected
    assert set(tiny(encoder_dim=16).state_dict()) == expected | {"reduce_dim.weight", "reduce_dim.bias"}


def test_forward_equals_the_formula_written_out(points):
    network = tiny().eval()
    out = network(points)
    state = network.state_dict()

    def linear(x, name):
        return x @ state[f"{name}.weight"].squeeze(-1).T + state.get(f"{name}.bias", 0.0)

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def batch_norm(x, name):
        x = (x - state[f"{name}.running_mean"]) / (state[f"{name}.running_var"] + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    f = linear(out.neighbourhood, "encoder.first_conv.0")
    f = linear(batch_norm(f, "encoder.first_conv.1").relu(), "encoder.first_conv.3")
    f = torch.cat([f.amax(2, keepdim=True).expand_as(f), f], dim=-1)  # pooled first
    f = linear(batch_norm(linear(f, "encoder.second_conv.0"), "encoder.second_conv.1").relu(), "encoder.second_conv.3")
    x = torch.cat([state["cls_token"].expand(2, 1, -1), f.amax(2)], dim=1)
    p = linear(gelu(linear(out.centres, "pos_embed.0")), "pos_embed.2")
    p = torch.cat([state["cls_pos"].expand(2, 1, -1), p], dim=1)
    for i in range(3):
        name = f"blocks.blocks.{i}"
        x = x + p
        q, k, v = linear(layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv").reshape(2, 9, 3, 3, 8).unbind(2)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5
        mixed = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).reshape(2, 9, 24)
        x = x + linear(mixed, f"{name}.attn.proj")
        x = x + linear(gelu(linear(layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    assert torch.allclose(out.tokens, layer_norm(x, "norm"), atol=1e-5)
    assert torch.allclose(out.patch_tokens, f.amax(2), atol=1e-6)
    assert torch.allclose(out.positions, p[:, 1:], atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_every_module_is_called_exactly_once(points, masked):
    network = tiny(drop_path=0.3)
    calls: Counter[str] = Counter()
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))

    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :3] = True
    network(points, mask=mask if masked else None)

    uncalled = {name for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    assert set(calls) == {name for name, _ in network.named_modules()} - uncalled
    assert set(calls.values()) == {1}


def test_ports_carry_what_adapters_expect(points):
    network = tiny(drop_path=0.3).eval()
    seen = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _m, args, out, name=name: seen.update({name: (args, out)}))

    out = network(points)

    block = "blocks.blocks.1"
    assert seen["embed"][1].shape == (2, 9, 24)
    assert torch.equal(seen["embed"][1][:, 1:], out.patch_tokens)
    stream = seen["blocks.blocks.0"][1]
    assert len(seen[block][0]) == 1
    assert torch.equal(seen[block][0][0], stream + seen["embed_positions"][1])
    attended = seen[block][0][0] + seen[f"{block}.drop_path1"][1]
    assert torch.equal(seen[f"{block}.norm2"][0][0], attended)
    assert torch.equal(seen[block][1], attended + seen[f"{block}.drop_path2"][1])
    assert torch.equal(seen[f"{block}.drop_path2"][0][0], seen[f"{block}.mlp"][1])
    assert torch.equal(seen["norm"][1], out.tokens)
    assert seen["encoder.second_conv.0"][0][0].shape == (2, 24, 48)  # (B, 2C, G*M)


def test_a_block_may_see_more_tokens_when_its_hooks_take_them_away_again(points):
    network = tiny().eval()
    prompt = torch.randn(2, 4, 24, requires_grad=True)
    block = network.blocks.blocks[1]
    plain = network(points).tokens

    block.register_forward_pre_hook(lambda _m, args: torch.cat([args[0], prompt], dim=1))
    block.register_forward_hook(lambda _m, _args, out: out[:, :-4])
    prompted = network(points).tokens

    assert prompted.shape == plain.shape
    assert not torch.allclose(prompted, plain)


def test_what_a_hook_reads_at_a_norm_stays_as_it_was(points):
    network = tiny()
    seen = []
    network.encoder.first_conv[1].register_forward_hook(lambda _m, _args, out: seen.append((out, out.clone())))

    network(points)

    assert torch.equal(*seen[0])


def test_patches_as_one_axis_give_the_statistics_of_one_patch_per_row():
    encoder = MiniPointNet(10, widths=(4, 6, 8))
    reference = copy.deepcopy(encoder)
    patches = torch.randn(3, 5, 7, 3)

    tokens = encoder(patches)
    f = reference.first_conv(patches.reshape(15, 7, 3).transpose(1, 2))
    f = torch.cat([f.max(2, keepdim=True).values.expand(-1, -1, 7), f], dim=1)
    expected = reference.second_conv(f).max(2).values.reshape(3, 5, 10)

    assert torch.allclose(tokens, expected, atol=1e-6)
    for name, buffer in encoder.named_buffers():
        assert torch.allclose(buffer, dict(reference.named_buffers())[name], atol=1e-6), name


def test_pointwise_convolution_has_the_numbers_and_gradients_of_a_convolution():
    conv = MiniPointNet(10, widths=(4, 6, 8)).double().first_conv[3]
    x = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 9, dtype=torch.float64)
    inputs = (x, conv.weight, conv.bias)

    ours = torch.autograd.grad((conv(x) * weight).sum(), inputs)
    theirs = torch.autograd.grad((nn.functional.conv1d(*inputs) * weight).sum(), inputs)

    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_order_of_points_changes_patches_not_their_embedding():
    encoder = MiniPointNet(10, widths=(4, 6, 8)).eval()
    patches = torch.randn(2, 3, 7, 3)

    assert torch.allclose(encoder(patches), encoder(patches[:, :, torch.randperm(7)]), atol=1e-6)


def test_masked_pass_sees_visible_patches_only_and_no_class_token(points):
    network = tiny().eval()
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, [0, 2, 5]] = True
    mask[1, [1, 6, 7]] = True

    out = network(points, mask=mask)
    whole = network(points)
    x, p = whole.patch_tokens[~mask].reshape(2, 5, 24), whole.positions[~mask].reshape(2, 5, 24)
    expected = network.norm(network.blocks(x, p)[0])

    assert torch.allclose(out.tokens, expected, atol=1e-6)
    assert out.positions.shape == (2, 5, 24)
    assert out.centres.shape == (2, 8, 3)
    assert torch.allclose(network(points, mask=mask, embed_masked=False).tokens, expected, atol=1e-6)


def test_batch_statistics_of_a_masked_pass_cover_masked_patches_unless_told_otherwise(points):
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :4] = True
    network = tiny()
    whole, masked, visible = (copy.deepcopy(network) for _ in range(3))

    whole(points)
    masked(points, mask=mask)
    visible(points, mask=mask, embed_masked=False)

    statistics = [n.encoder.second_conv[1].running_mean for n in (whole, masked, visible)]
    assert torch.allclose(statistics[0], statistics[1], atol=1e-7)
    assert not torch.allclose(statistics[1], statistics[2], atol=1e-5)


def test_a_mask_that_does_not_fit_is_refused(points):
    with pytest.raises(ConfigError, match=r"boolean tensor \(2, 8\)"):
        tiny()(points, mask=torch.zeros(2, 9, dtype=torch.bool))


def test_gradient_checkpointing_gives_the_same_gradients_and_runs_block_hooks_again(points):
    network = tiny(drop_path=0.4)
    calls = []
    network.blocks.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    weight = torch.randn(2, 9, 24)
    gradients = []
    for on in (False, True):
        network.set_grad_checkpointing(on)
        torch.manual_seed(7)
        loss = (network(points).tokens * weight).sum()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))

    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)
    assert len(calls) == 3


def test_checkpointing_reaches_a_hook_s_parameter_when_the_network_is_frozen(points):
    network = tiny().requires_grad_(False)
    network.set_grad_checkpointing(True)
    shift = nn.Parameter(torch.zeros(24))
    network.blocks.blocks[0].register_forward_hook(lambda _m, _args, out: out + shift)

    (network(points).tokens * torch.randn(2, 9, 24)).sum().backward()

    assert shift.grad is not None
    assert shift.grad.abs().max() > 0


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    layer = DropPath(0.25)
    out = layer(torch.ones(4000, 2, 3))

    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(out.amin((1, 2)), out.amax((1, 2)))
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(layer.eval()(torch.ones(3, 2)), torch.ones(3, 2))


def test_drop_path_rates_rise_linearly_and_the_first_block_has_none():
    blocks = tiny(depth=5, drop_path=0.1).blocks.blocks

    assert isinstance(blocks[0].drop_path1, nn.Identity)
    assert [b.drop_path2.rate for b in blocks[1:]] == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_the_two_branches_of_a_block_are_dropped_independently():
    block = Block(8, num_heads=2, drop_path=0.5)
    kept = {"drop_path1": [], "drop_path2": []}
    for name, seen in kept.items():
        block.get_submodule(name).register_forward_hook(
            lambda _m, _args, out, seen=seen: seen.append(out.abs().sum((1, 2)) > 0)
        )

    block(torch.randn(64, 3, 8))

    assert not torch.equal(kept["drop_path1"][0], kept["drop_path2"][0])


def test_scratch_init_is_normal_with_zero_biases_and_the_other_is_torch_s():
    card, default = PointMAE(dim=96, depth=2), PointMAE(dim=96, depth=2, init="torch")

    assert card.blocks.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert card.encoder.second_conv[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert card.pos_embed[0].bias.abs().max() == 0
    assert default.blocks.blocks[0].mlp.fc1.weight.abs().max() <= 96**-0.5
    assert default.blocks.blocks[0].mlp.fc1.weight.std().item() == pytest.approx((3 * 96) ** -0.5, rel=0.05)
    assert default.pos_embed[0].bias.abs().max() > 0
    for network in (card, default):
        assert network.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
        assert network.cls_pos.std().item() == pytest.approx(0.02, rel=0.3)


def test_reset_parameters_repeats_with_the_seed_and_clears_statistics(points):
    network = PointMAE(**TINY)
    torch.manual_seed(3)
    network.reset_parameters()
    first = copy.deepcopy(network.state_dict())
    network(points)
    torch.manual_seed(3)
    network.reset_parameters()

    assert all(torch.equal(first[name], tensor) for name, tensor in network.state_dict().items())


def test_half_precision_weights_take_float32_points(points):
    network = tiny().to(torch.bfloat16).eval()

    out = network(points)

    assert out.tokens.dtype == torch.bfloat16
    assert out.centres.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_heads": 5}, "num_heads is 5, which does not divide the width 24"),
        ({"depth": 0}, "depth is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"num_group": 0}, "num_group is 0"),
        ({"pointnet_dims": (8, 16)}, "pointnet_dims needs 3 widths"),
        ({"init": "xavier"}, "init is 'xavier'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_sizes_end_in_one_sentence(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        PointMAE(**{**TINY, **changes})


def test_fewer_points_than_a_patch_is_refused():
    with pytest.raises(ConfigError, match="k is 6, but every cloud has 5 points"):
        tiny()(torch.randn(2, 5, 3))
