"""Point-PEFT as a whole: what is trained, switches, isolation of clouds, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_modal.attach import Adapter
from peft_modal.errors import AttachError, ConfigError, DataError
from peft_modal.inspection.building import on_meta
from peft_modal.methods.base import Method
from peft_modal.methods.vpt import VPT
from peft_modal.testing import check_compile, run_contract
from peft_modal.testing.sandbox import shift
from peft_modal_heads.pointcloud_mlp import PointCloudMLP
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.point_peft import PointPEFT
from peft_modal_pointcloud.point_peft.geometry import NeighbourhoodAttention

OFF = {"prior_prompts": False, "geometry": False, "ffn_adapter": False, "tune_biases": False}
COUNTS = {
    "prior_prompts": 23_040 + 39_216,
    "geometry": 152_256 + 38_016,
    "ffn_adapter": 152_256,
    "tune_biases": 36_864 + 768,
}
"""Of the published sizes; the prompts' 30 coordinates need the geometry as well."""


def clouds(count: int = 2) -> Tensor:
    return torch.rand(count, 96, 3, generator=torch.Generator().manual_seed(count)) * 2 - 1


def ready(**options: object) -> tuple[PointMAEBackbone, Adapter]:
    """Attached with a bank, every trained tensor moved."""
    backbone = PointMAEBackbone.tiny()
    adapter = PointPEFT(**{"top_k": 3, **options}).attach(backbone)
    adapter.events.prepare([{"points": clouds(8)}], lambda batch: {})
    shift(adapter)
    return backbone, adapter


def tokens(backbone: PointMAEBackbone, points: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone({"points": points}).tokens


def published(**options: object) -> tuple[PointMAEBackbone, Adapter]:
    with on_meta():
        backbone = PointMAEBackbone(weights="random", num_group=128)
        return backbone, PointPEFT(**options).attach(backbone)


def test_the_published_sizes_are_counted_exactly():
    backbone, adapter = published()
    with on_meta():
        head = PointCloudMLP(backbone.feature_spec(), 15, pool=["cls", "max"])
    counts = adapter.counts()

    assert counts["adapter"] == 304_512 + 38_016 + 62_286
    assert counts["backbone"] == 768 + 768 + 36_864
    assert sum(counts.values()) + sum(p.numel() for p in head.parameters()) == 710_749


@pytest.mark.parametrize("part", COUNTS)
def test_each_part_alone_has_its_own_count(part: str):
    _, adapter = published(**{**OFF, part: True})

    assert sum(adapter.counts().values()) == COUNTS[part] + 768


def test_published_defaults_are_those_of_the_paper():
    _, adapter = published()
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.state().items()}

    assert shapes["adapter.geometry.attention.qkv.weight"] == (54, 384)
    assert shapes["adapter.geometry.prompted.prompt_coords"] == (10, 3)
    assert shapes["adapter.prompts.blocks.5.embeddings"] == (10, 384)
    assert not [name for name in shapes if name.startswith("adapter.prompts.blocks.6")]
    grouping = adapter.adapter.get_submodule("blocks.11.geometry.grouping")
    assert (grouping.num_sub_centres, grouping.k, grouping.num_prompts) == (64, 16, 0)
    rates = [getattr(adapter.adapter.get_submodule(f"blocks.{i}.geometry.drop_path"), "rate", 0.0) for i in range(12)]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])


@pytest.mark.parametrize("indexing", ["aligned", "reference"])
def test_a_cloud_depends_on_its_batch_mates_in_reference_mode_only(indexing: str):
    backbone, _ = ready(indexing=indexing, prompt_blocks=2)
    points = clouds(4)

    order = torch.tensor([2, 0, 3, 1])
    difference = float((tokens(backbone, points[order]) - tokens(backbone, points)[order]).abs().max())

    assert difference < 1e-5 if indexing == "aligned" else difference > 1e-3


def test_the_first_cloud_is_the_same_in_reference_mode():
    backbone, _ = ready(indexing="reference")

    # Its rows are read from its own slot.
    assert torch.allclose(tokens(backbone, clouds(4))[:1], tokens(backbone, clouds(4)[:1]), atol=1e-5)


def test_zero_bottlenecks_on_the_mlp_give_the_plain_network():
    bare = tokens(PointMAEBackbone.tiny(), clouds())
    backbone = PointMAEBackbone.tiny()
    adapter = PointPEFT(**{**OFF, "ffn_adapter": True, "tune_biases": True}).attach(backbone)
    assert not torch.allclose(tokens(backbone, clouds()), bare, atol=1e-3)

    for block in range(3):
        up = adapter.adapter.get_submodule(f"blocks.{block}.ffn_adapter.up")
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)

    assert torch.allclose(tokens(backbone, clouds()), bare, atol=1e-6)


def test_the_bottleneck_reads_the_mlp_s_output_and_counts_for_seven_tenths():
    backbone = PointMAEBackbone.tiny()
    adapter = PointPEFT(**{**OFF, "ffn_adapter": True}).attach(backbone).eval()
    block = backbone.network.blocks.blocks[1]
    module = adapter.adapter.get_submodule("blocks.1.ffn_adapter")
    z = torch.randn(2, 5, 24)

    found = block(z)

    with torch.no_grad():
        middle = z + block.attn(block.norm1(z))
        m = block.mlp(block.norm2(middle))
        hidden = module.down(m)
        expected = middle + m + 0.7 * module.up(hidden * torch.sigmoid(1.702 * hidden))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("indexing", ["aligned", "reference"])
def test_everything_learns_in_one_step(indexing: str):
    backbone, adapter = ready(indexing=indexing)
    backbone.train()
    adapter.train()

    features = backbone({"points": clouds(4)})
    (features.tokens * torch.randn_like(features.tokens)).sum().backward()

    assert not [name for name, p in adapter.named_trained().items() if p.grad is None or not float(p.grad.abs().sum())]


def test_statistics_move_once_per_step_with_checkpointing():
    found = []
    for enabled in (False, True):
        backbone, adapter = ready()
        backbone.blocks_for_checkpointing(enabled=enabled)
        adapter.train()
        torch.manual_seed(1)
        backbone({"points": clouds(4)}).tokens.square().sum().backward()
        found.append({n: t for n, t in adapter.state().items() if "running" in n or "tracked" in n})

    assert any("geometry.bn.running_mean" in name for name in found[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    "options",
    [
        {"indexing": "reference"},
        {"prior_prompts": False},
        {"geometry": False},
        {**OFF, "prior_prompts": True},
        {**OFF, "geometry": True},
        {**OFF, "ffn_adapter": True},
        {**OFF, "tune_biases": True},
    ],
    ids=["reference", "without prompts", "without geometry", "prompts", "geometry", "ffn", "biases"],
)
def test_every_choice_of_parts_keeps_the_contracts(options: dict[str, object]):
    method = PointPEFT(**{"top_k": 2, "hidden_dim": 4, "prior_hidden_dim": 4, **options})

    results = run_contract(PointMAEBackbone.tiny, method, leave_out=["compile"])

    assert {result for result in results.values() if result != "ok"} == set()


@pytest.mark.slow
def test_compiled_blocks_give_the_same():
    check_compile(PointMAEBackbone.tiny, PointPEFT.example())


@pytest.mark.parametrize("place", ["prefix", "end"])
def test_prompts_of_another_adapter_stay_out_of_the_geometry(place: str):
    backbone, adapter = ready()
    VPT(num_tokens=5, place=place).attach(backbone, name="vpt")
    attention = adapter.adapter.get_submodule("geometry.attention")
    assert isinstance(attention, NeighbourhoodAttention)
    rows, leaving = [], []
    attention.register_forward_pre_hook(lambda _module, args: rows.append(args[0]))
    block = backbone.network.blocks.blocks[0]
    block.register_forward_hook(lambda _module, _args, output: leaving.append(output), prepend=True)

    tokens(backbone, clouds())

    assert leaving[0].shape[1] == 1 + 5 + 5 + 24
    own = leaving[0][:, 6:] if place == "prefix" else leaving[0][:, 1:-5]
    assert torch.equal(rows[0], own.flatten(0, 1))
    assert rows[-1].shape == (2 * 24, 24)


def test_prompts_that_are_in_the_way_are_refused():
    backbone = PointMAEBackbone.tiny()
    other = VPT(num_tokens=2).attach(backbone, name="vpt")
    other.enable(on=False)

    with pytest.raises(AttachError, match="adapter 'vpt' has prompts in its blocks already; attach point_peft before"):
        PointPEFT(top_k=2).attach(backbone)
    PointPEFT(prior_prompts=False).attach(backbone)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt_blocks": 4}, r"prompt_blocks: 4 is more than the backbone's 3 blocks"),
        ({"num_sub_centres": 25}, r"num_sub_centres: 25 is more than the 24 patches of a cloud"),
        ({"k": 25}, r"use method.k=24 or less"),
        ({"feature_groups": 25}, r"feature_groups: 25 is more than the backbone's 24 patches"),
        (
            {"attention_dim": 10},
            r"attention_dim: 10 is no multiple of the backbone's 3 heads; use method.attention_dim=9",
        ),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused_with_a_sentence(options: dict[str, int], sentence: str):
    with pytest.raises(AttachError, match=sentence):
        PointPEFT(**options).attach(PointMAEBackbone.tiny())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (OFF, "are all off"),
        ({"dropout": 1.0}, "method.dropout: expected a number from 0 to below 1, got 1.0"),
        ({"drop_path": 1.0}, "method.drop_path: expected a number from 0 to below 1, got 1.0"),
        ({"indexing": "right"}, "method.indexing is 'right'; use 'aligned' or 'reference'"),
    ],
)
def test_wrong_settings_end_in_one_sentence(options: dict[str, object], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        PointPEFT(**options)


def test_masked_clouds_are_refused():
    backbone, _ = ready(prior_prompts=False)
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, :8] = True

    with pytest.raises(DataError, match="needs all 24 patches of a cloud, this pass has"):
        backbone({"points": clouds(), "mask": mask})


def test_bias_tuning_alone_starts_where_the_backbone_is():
    method: Method = PointPEFT(**{**OFF, "tune_biases": True})

    assert method.identity_at_init
    assert not PointPEFT().identity_at_init
