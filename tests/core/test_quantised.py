"""Matrices of few bits: levels, packing, what a file holds of them, and the 1-bit head."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_backbones import TinyViT

from peft_modal.anatomy import FeatureSpec
from peft_modal.attach.merge import merge_
from peft_modal.errors import FileFormatError, MergeError
from peft_modal.methods.base import Method
from peft_modal.methods.bi_adaptformer import BiAdaptFormer
from peft_modal.methods.bi_lora import BiLoRA
from peft_modal.methods.quantised import (
    QuantisedMatrix,
    from_authors_bytes,
    levels_of,
    pack,
    packed_size,
    to_authors_bytes,
    unpack,
)
from peft_modal.tasks.tensors import load_tensors, tensors_of
from peft_modal_heads.bi_linear import BiLinearHead
from peft_modal_vision.backbone import ViT

BITS = (1, 2, 4, 8)


def matrix(rows: int = 6, columns: int = 16, bits: int = 1, seed: int = 0) -> QuantisedMatrix:
    made = QuantisedMatrix(rows, columns, bits)
    with torch.no_grad():
        made.weight.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    return made


def test_levels_are_those_of_the_paper() -> None:
    assert levels_of(1)[0].tolist() == pytest.approx([-0.6744898, 0.6744898], abs=1e-6)
    assert levels_of(2)[0].tolist() == pytest.approx([-1.2657204, -0.3777542, 0.3777542, 1.2657204], abs=1e-6)
    assert levels_of(2)[1].tolist() == pytest.approx([-0.8217372, 0.0, 0.8217372], abs=1e-6)
    positive = [0.1056, 0.3190, 0.5401, 0.7752, 1.0340, 1.3331, 1.7077, 2.2655]
    assert levels_of(4)[0][8:].tolist() == pytest.approx(positive, abs=1e-4)
    # Not converged, and therefore part of the format.
    assert float(levels_of(8)[0][-1]) == pytest.approx(2.8095, abs=1e-4)
    assert float(levels_of(8, 5000)[0][-1]) == pytest.approx(3.435, abs=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_is_the_one_written_down(bits: int) -> None:
    made = matrix(bits=bits)
    effective = made()
    g = torch.randn(6, 16, generator=torch.Generator().manual_seed(9))
    effective.backward(g)
    w = made.weight.detach()
    mean, std = w.mean(), w.std()
    d, count = w - mean, w.numel()
    normal, t = d / (std + 1e-5), std / (std + 1e-5)
    q = (effective.detach() - mean) / std
    closed = t * (g - g.mean()) + g.mean() + ((g * q).sum() - (g * normal).sum() * t) * d / ((count - 1) * std)
    torch.testing.assert_close(made.weight.grad, closed, rtol=1e-4, atol=1e-5)


def test_exactly_on_a_threshold_lies_the_middle_of_two_levels() -> None:
    made = QuantisedMatrix(1, 4, 1)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[-1.0, 0.0, 0.0, 1.0]]))
    assert made()[0, 1:3].tolist() == [0.0, 0.0]


@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(0, 2**31))
def test_codes_survive_packing(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert len(packed) == packed_size(count, bits)
    assert torch.equal(unpack(packed, bits, count), codes)


def test_the_first_code_lies_in_the_least_significant_bits() -> None:
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1]), 1).tolist() == [0b10000001, 1]
    assert pack(torch.tensor([3, 0, 1, 2]), 2).tolist() == [0b10010011]
    assert pack(torch.tensor([0xA, 0x5]), 4).tolist() == [0x5A]


@pytest.mark.parametrize("bits", BITS)
def test_a_loaded_matrix_acts_as_the_saved_one(bits: int) -> None:
    made = matrix(bits=bits).eval()
    loaded = matrix(bits=bits, seed=5).eval()
    loaded.unpack(made.packed())
    assert torch.equal(loaded(), made())
    again = loaded.packed()
    assert all(torch.equal(again[name], tensor) for name, tensor in made.packed().items())
    assert torch.equal(copy.deepcopy(loaded)(), made())
    # Trained on, it is latent again.
    loaded.train()
    assert not torch.equal(loaded(), made())


def test_the_authors_bytes_round_trip() -> None:
    made = [matrix(4, 8, seed=1), matrix(8, 4, 2, seed=2)]
    content = to_authors_bytes(made)
    assert len(content) == (32 // 8 + 8) + (64 // 8 + 8)
    loaded = [matrix(4, 8, seed=3), matrix(8, 4, 2, seed=4)]
    assert from_authors_bytes(content + b"head", loaded) == len(content)
    for one, other in zip(made, loaded, strict=True):
        assert torch.equal(one.eval()(), other.eval()())
    with pytest.raises(FileFormatError, match="ends after 11 bytes"):
        from_authors_bytes(content[:11], loaded)
    with pytest.raises(ValueError, match="do not fill whole bytes"):
        to_authors_bytes([matrix(3, 3)])


def vit_b() -> ViT:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return ViT(model="custom", weights="random", sizes=sizes)


@pytest.mark.parametrize(
    ("method", "size"),
    [
        (BiAdaptFormer(hidden_dim=32), 73_920),
        (BiAdaptFormer(hidden_dim=1), 2_496),
        (BiLoRA(hidden_dim=32), 147_840),
        (BiLoRA(hidden_dim=1), 4_992),
    ],
)
def test_a_file_holds_as_many_bytes_as_the_paper_counts(method: Method, size: int) -> None:
    state = method.attach(vit_b()).state()
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) == size


def test_a_1_bit_head_adds_96_bytes_a_class() -> None:
    head = BiLinearHead(FeatureSpec(width=768, layout=None, own={"pooled": 768}, default_pool=("pooled",)), 4)
    adapter = BiAdaptFormer(hidden_dim=32).attach(vit_b())
    tensors = tensors_of(adapter, head)
    # The released file of Bi-AdaptFormer-32 with Bi-Head on KITTI.
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == 74_312
    assert set(tensors_of(adapter, head, training_only=True)) >= {"head.matrix.weight"}
    other = BiLinearHead(FeatureSpec(width=768, layout=None, own={"pooled": 768}, default_pool=("pooled",)), 4)
    again = BiAdaptFormer(hidden_dim=32).attach(vit_b())
    load_tensors(again, other, tensors)
    assert torch.equal(other.eval().matrix(), head.eval().matrix())
    wrong = {**tensors, "head.matrix.codes": tensors["head.matrix.codes"][:-1]}
    with pytest.raises(FileFormatError, match=r"384 bytes|shape"):
        load_tensors(again, other, wrong)


def test_a_checkpoint_holds_the_latent_weights() -> None:
    adapter = BiLoRA(hidden_dim=4).attach(TinyViT())
    names = adapter.state(training_only=True)
    assert all(name.endswith(".weight") for name in names)
    fresh = BiLoRA(hidden_dim=4).attach(TinyViT(), generator=torch.Generator().manual_seed(7))
    fresh.load(names, training_only=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), adapter.parameters(), strict=True))


def test_what_merges_and_what_does_not() -> None:
    backbone = TinyViT()
    BiLoRA(hidden_dim=4, scale=10.0).attach(backbone).eval()
    batch = backbone.example_batch()
    before = backbone(batch).tokens
    merge_(backbone)
    torch.testing.assert_close(backbone(batch).tokens, before, rtol=1e-4, atol=1e-4)
    bottleneck = TinyViT()
    BiAdaptFormer(hidden_dim=4).attach(bottleneck)
    with pytest.raises(MergeError, match="no equivalent in plain weights"):
        merge_(bottleneck)


def test_one_entry_has_no_deviation() -> None:
    with pytest.raises(ValueError, match="no standard deviation"):
        QuantisedMatrix(1, 1, 1)
