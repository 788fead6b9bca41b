"""Point-PEFT's frozen encoder, its bank of training features, and the prompts made from it."""

from __future__ import annotations

import copy

import pytest
import torch
from numeric import draw
from torch import Tensor

from peft_modal.attach import Adapter, Run
from peft_modal.errors import FileFormatError, TrainingError
from peft_modal.methods.lora import LoRA
from peft_modal.testing.sandbox import shift
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.point_peft import PointPEFT
from peft_modal_pointcloud.point_peft.frozen import FrozenEncoder
from peft_modal_pointcloud.point_peft.prior import PriorPrompts, prior_tokens


def clouds(count: int = 2, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 96, 3, generator=generator) * 2 - 1


def no_losses(batch: object) -> dict[str, Tensor]:
    pytest.fail(f"the bank needs no loss of {batch}")


def attached(backbone: PointMAEBackbone | None = None, **options: object) -> tuple[PointMAEBackbone, Adapter]:
    backbone = backbone or PointMAEBackbone.tiny()
    return backbone, PointPEFT(**{"top_k": 3, **options}).attach(backbone)


def prompts_of(adapter: Adapter) -> PriorPrompts:
    module = adapter.adapter.get_submodule("prompts")
    assert isinstance(module, PriorPrompts)
    return module


def batches(count: int = 6, size: int = 2) -> list[dict[str, Tensor]]:
    return [{"points": part} for part in clouds(count).split(size)]


def whole_feature(backbone: PointMAEBackbone, points: Tensor) -> Tensor:
    """By the network's own masked pass with nothing masked: no class token."""
    mask = torch.zeros(len(points), backbone.num_group, dtype=torch.bool)
    with torch.no_grad():
        return backbone({"points": points, "mask": mask}).tokens.amax(1)


def test_prior_tokens_are_the_feature_the_mixture_and_the_most_similar_entries():
    feature, bank = draw(2, 6), torch.nn.functional.normalize(draw(6, 9), dim=0)

    found = prior_tokens(feature, bank, 4)

    assert found.shape == (2, 6, 6)
    for f, tokens in zip(feature, found, strict=True):
        similarity = (f / f.norm()) @ bank
        order = similarity.argsort(descending=True)[:4]
        weights = similarity[order].exp() / similarity[order].exp().sum()
        assert torch.equal(tokens[0], f)
        assert torch.allclose(tokens[1], (weights * bank[:, order]).sum(1), atol=1e-6)
        assert torch.equal(tokens[2:], bank[:, order].T)


def test_the_length_of_the_feature_reaches_the_first_token_only():
    feature, bank = draw(2, 6), torch.nn.functional.normalize(draw(6, 9), dim=0)

    one, ten = prior_tokens(feature, bank, 4), prior_tokens(10 * feature, bank, 4)

    assert torch.allclose(ten[:, 0], 10 * one[:, 0])
    assert torch.allclose(ten[:, 1:], one[:, 1:], atol=1e-6)


def test_retrieval_is_that_of_float32_under_autocast():
    feature, bank = draw(2, 6), torch.nn.functional.normalize(draw(6, 9), dim=0)
    plain = prior_tokens(feature, bank, 4)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior_tokens(feature, bank, 4), plain)


def test_the_frozen_encoder_shares_the_tensors_and_sees_no_adapter():
    backbone = PointMAEBackbone.tiny()
    points = clouds()
    wanted = whole_feature(backbone, points)
    early = FrozenEncoder(backbone.network, num_groups=backbone.num_group)
    shift(LoRA(rank=2).attach(backbone, name="lora"), std=0.5)
    peft = PointPEFT(top_k=2).attach(backbone, name="peft")
    shift(peft, std=0.5)
    late = FrozenEncoder(backbone.network, num_groups=backbone.num_group)

    for encoder in (early, late):
        assert torch.allclose(encoder.of_points(points), wanted, atol=1e-6)
        shared, own = encoder.network.state_dict(), backbone.network.state_dict()
        assert all(shared[name].data_ptr() == tensor.data_ptr() for name, tensor in own.items())
    peft.detach()
    assert not torch.allclose(whole_feature(backbone, points), wanted, atol=1e-2)


def test_the_frozen_encoder_stays_still_where_the_frozen_network_drifts():
    backbone = PointMAEBackbone.tiny()
    reference = PointMAEBackbone(**backbone.architecture(), weights="random", drop_path=0.5, frozen_mode="reference")
    reference.network.load_state_dict(backbone.network.state_dict())
    _, adapter = attached(reference)
    wanted = whole_feature(backbone, clouds())
    adapter.events.prepare(batches(), no_losses)
    bank = prompts_of(adapter).bank.clone()

    reference.train()
    adapter.train()
    for _ in range(2):
        reference({"points": clouds(4)})
    adapter.events.prepare(batches(), no_losses)

    assert not torch.equal(adapter.state()["backbone.encoder.first_conv.1.running_mean"],
                           backbone.network.encoder.first_conv[1].running_mean)  # fmt: skip
    assert torch.allclose(prompts_of(adapter).encoder.of_points(clouds()), wanted, atol=1e-6)
    assert torch.equal(prompts_of(adapter).bank, bank)


def test_the_frozen_encoder_follows_what_is_loaded_and_moved():
    backbone, adapter = attached()
    encoder = prompts_of(adapter).encoder
    other = PointMAEBackbone(**backbone.architecture(), weights="random", init_seed=3)

    backbone.network.load_state_dict(other.network.state_dict())
    assert torch.allclose(encoder.of_points(clouds()), whole_feature(other, clouds()), atol=1e-6)
    backbone.double()
    assert {tensor.dtype for tensor in encoder.network.state_dict().values()} <= {torch.float64, torch.int64}


def test_the_feature_may_be_of_the_first_patches_only():
    backbone, adapter = attached(feature_groups=10)
    fewer = PointMAEBackbone(**{**backbone.architecture(), "num_group": 10}, weights="random")
    fewer.network.load_state_dict(backbone.network.state_dict())

    # Farthest points do not depend on how many are asked for.
    assert torch.allclose(prompts_of(adapter).encoder.of_points(clouds()), whole_feature(fewer, clouds()), atol=1e-6)


def test_the_bank_has_unit_columns_in_the_order_of_the_data_whatever_the_adapter_has_learnt():
    backbone, adapter = attached()
    features = whole_feature(PointMAEBackbone.tiny(), clouds(6))
    shift(adapter, std=0.5)

    adapter.events.prepare(iter(batches()), no_losses)

    bank = prompts_of(adapter).bank
    assert bank.shape == (24, 6)
    assert not bank.requires_grad
    assert torch.allclose(bank.T, features / features.norm(dim=1, keepdim=True), atol=1e-6)
    assert "bank" not in "".join(adapter.named_trained())
    assert backbone.training is False


def test_a_smaller_bank_is_spread_over_the_data():
    _, adapter = attached(bank_size=3)
    _, whole = attached()

    adapter.events.prepare(batches(), no_losses)
    whole.events.prepare(batches(), no_losses)

    assert torch.equal(prompts_of(adapter).bank, prompts_of(whole).bank[:, [0, 2, 4]])


def test_a_training_cloud_retrieves_itself():
    backbone, adapter = attached()
    adapter.events.prepare(batches(), no_losses)
    prompts = prompts_of(adapter)

    backbone({"points": clouds(6)})
    prior = prompts.prior(backbone.contexts.current())

    assert torch.allclose(prior[:, 2], prompts.bank.T, atol=1e-6)
    assert not prior.requires_grad


def test_too_few_clouds_end_in_a_sentence():
    _, adapter = attached(top_k=8)
    with pytest.raises(TrainingError, match=r"retrieves 8 training clouds, but its bank holds 6; use method.top_k=6"):
        adapter.events.prepare(batches(), no_losses)


def test_training_without_a_bank_is_refused():
    _, adapter = attached()
    run = Run(total_steps=1, optimizers=[], generator=torch.Generator(), named_parameters={})
    with pytest.raises(TrainingError, match="no bank of training features"):
        adapter.events.on_fit_start(run)


def test_the_bank_is_stored_and_restored_with_its_size():
    backbone, adapter = attached()
    adapter.events.prepare(batches(), no_losses)
    shift(adapter)
    with torch.no_grad():
        wanted = backbone({"points": clouds()}).tokens
    other, fresh = attached(copy.deepcopy(PointMAEBackbone.tiny()))

    fresh.rebuild(adapter.facts())
    fresh.load(adapter.state())

    assert adapter.facts() == {"bank_building": {"bank_size": 6}}
    assert torch.equal(fresh.state()["adapter.prompts.bank"], prompts_of(adapter).bank)
    with torch.no_grad():
        assert torch.equal(other({"points": clouds()}).tokens, wanted)
    assert fresh.facts() == adapter.facts()


@pytest.mark.parametrize("size", [2, "many", None])
def test_a_file_whose_bank_cannot_be_is_refused(size: object):
    _, adapter = attached()
    with pytest.raises(FileFormatError, match="of which this method would retrieve 3"):
        adapter.rebuild({"bank_building": {"bank_size": size}})


def test_the_prior_is_computed_once_per_pass_and_shared_by_the_blocks(monkeypatch: pytest.MonkeyPatch):
    backbone, adapter = attached(prompt_blocks=3)
    calls = []
    encode = FrozenEncoder.__call__
    monkeypatch.setattr(FrozenEncoder, "__call__", lambda *args: calls.append(1) or encode(*args))

    backbone.blocks_for_checkpointing(enabled=True)
    backbone({"points": clouds()}).tokens.sum().backward()

    assert len(calls) == 1
    assert all(p.grad is not None for p in prompts_of(adapter).parameters())
