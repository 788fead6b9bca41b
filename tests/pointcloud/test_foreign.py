"""Reading published checkpoint files, written here at tiny size in each source's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from point_checkpoints import LAYOUTS, fine_tuned, junk, point_bert, prefixed, without_cls
from safetensors.torch import save_file

from peft_modal.errors import WeightsError
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.foreign import match_backbone, read_point_checkpoint
from peft_modal_pointcloud.network import PointMAE

SIZES = {"dim": 8, "depth": 2, "num_heads": 2, "num_group": 4, "group_size": 4, "pointnet_dims": (3, 4, 5)}


def network(**changes) -> PointMAE:
    return PointMAE(**{**SIZES, **changes})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_source_fills_the_whole_backbone(tmp_path, layout, zipped):
    sizes = {"encoder_dim": 6} if layout == "point-bert" else {}
    source, target = network(**sizes), network(**sizes)
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)

    match = match_backbone(read_point_checkpoint(tmp_path / "x.pth"), target.state_dict())
    target.load_state_dict(match.filled, strict=not match.missing)

    assert match.missing == (("cls_token", "cls_pos") if layout == "point-mae" else ())
    for name, tensor in without_cls(source.state_dict()).items():
        assert torch.equal(target.state_dict()[name], tensor), name


@pytest.mark.parametrize("layout", ["point-mae", "point-bert", "act", "recon"])
def test_pre_training_parts_are_left_out(tmp_path, layout):
    state = network().state_dict()
    torch.save(LAYOUTS[layout](state), tmp_path / "x.pth")

    assert set(read_point_checkpoint(tmp_path / "x.pth")) <= set(state)


def test_heads_and_generators_of_fine_tuned_files_stay_and_are_reported(tmp_path):
    state = network().state_dict()
    torch.save(fine_tuned(state), tmp_path / "x.pth")

    read = read_point_checkpoint(tmp_path / "x.pth")

    expected = {"blocks.cls.conv1.0.weight", "blocks.cls.bn1.weight", "cls_head_finetune.0.weight", "prompt_pos"}
    assert set(match_backbone(read, state).unexpected) == expected


def test_module_is_dropped_as_a_whole_word_wherever_it_stands(tmp_path):
    state = network().state_dict()
    weights = {name.replace("blocks.blocks", "blocks.module.blocks"): tensor for name, tensor in state.items()}
    torch.save({"base_model": {**prefixed("module.", weights), **junk("submodule.x")}}, tmp_path / "x.pth")

    read = read_point_checkpoint(tmp_path / "x.pth")

    assert set(read) == set(state) | {"submodule.x"}


def test_safetensors_files_are_read_too(tmp_path):
    state = network().state_dict()
    save_file(prefixed("MAE_encoder.", without_cls(state)), tmp_path / "x.safetensors")

    match = match_backbone(read_point_checkpoint(str(tmp_path / "x.safetensors")), state)

    assert match.missing == ("cls_token", "cls_pos")


def test_files_without_batch_counters_load(tmp_path):
    state = {name: t for name, t in network().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "x.pth")

    match = match_backbone(read_point_checkpoint(tmp_path / "x.pth"), network().state_dict())

    assert match.missing == ()


def test_a_made_up_prefix_is_refused_and_named(tmp_path):
    torch.save({"base_model": prefixed("student.", network().state_dict())}, tmp_path / "x.pth")

    with pytest.raises(WeightsError, match=r"unknown prefix 'student\.'.*'MAE_encoder\.'"):
        read_point_checkpoint(tmp_path / "x.pth")


def test_the_momentum_copy_alone_is_not_taken(tmp_path):
    torch.save({"base_model": prefixed("transformer_k.", network().state_dict())}, tmp_path / "x.pth")

    with pytest.raises(WeightsError, match=r"unknown prefix 'transformer_k\.'"):
        read_point_checkpoint(tmp_path / "x.pth")


def test_two_networks_in_one_file_are_refused(tmp_path):
    state = network().state_dict()
    torch.save({**prefixed("MAE_encoder.", state), **prefixed("ACT_encoder.", state)}, tmp_path / "x.pth")

    with pytest.raises(WeightsError, match="several point transformers"):
        read_point_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("part", ["encoder.first_conv.1.running_mean", "pos_embed.2.bias", "norm.weight"])
def test_a_missing_backbone_tensor_is_refused_and_named(part):
    state = network().state_dict()
    del state[part]

    with pytest.raises(WeightsError, match=rf"1 of \d+ tensors are not in the file: {part}"):
        match_backbone(state, network().state_dict())


def test_many_missing_tensors_are_counted(tmp_path):
    with pytest.raises(WeightsError, match=r"11 of \d+ tensors .*blocks\.blocks\.2\.norm1\.weight.* and 7 more"):
        match_backbone(network().state_dict(), network(depth=3).state_dict())


def test_another_size_is_refused_with_both_shapes():
    with pytest.raises(WeightsError, match=r"cls_token is \(1, 1, 8\) and should be \(1, 1, 16\)"):
        match_backbone(network().state_dict(), network(dim=16, device="meta").state_dict())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, zipped, share):
    path = tmp_path / "x.pth"
    torch.save({"base_model": network().state_dict()}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    with pytest.raises(WeightsError, match=r"x\.pth is damaged or not a weights file"):
        read_point_checkpoint(path)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(WeightsError, match="damaged"):
        read_point_checkpoint(path)


def test_an_error_page_saved_as_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "x.pth").write_text("<html>quota exceeded</html>", encoding="utf-8")

    with pytest.raises(WeightsError, match="not a weights file") as caught:
        read_point_checkpoint(tmp_path / "x.pth")
    assert "weights_only" not in str(caught.value)


def test_an_object_that_could_run_code_is_named_and_not_opened(tmp_path):
    torch.save({"base_model": network().state_dict(), "where": Path("a")}, tmp_path / "x.pth")

    with pytest.raises(WeightsError, match=r"an object of pathlib\.\w+, which is not opened"):
        read_point_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"epoch": 3}, "holds no weights"),
        ({"model": junk("fc.weight")}, "no tensor is called 'blocks.blocks.0.attn.qkv.weight'; it holds fc.weight"),
        ([torch.zeros(2)], "holds a list"),
    ],
    ids=["no-weights", "other-network", "list"],
)
def test_other_contents_are_refused(tmp_path, content, sentence):
    torch.save(content, tmp_path / "x.pth")

    with pytest.raises(WeightsError, match=sentence):
        read_point_checkpoint(tmp_path / "x.pth")


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no file .*none\.pth"):
        read_point_checkpoint(tmp_path / "none.pth")


BACKBONE = {**SIZES, "pointnet_dims": [3, 4, 5], "init": "torch", "drop_path": 0.0}


@pytest.mark.parametrize("layout", ["point-mae", "point-bert", "act", "recon", "fine-tuned"])
def test_a_backbone_takes_the_weights_of_every_source(tmp_path, layout):
    sizes = {"encoder_dim": 6} if layout == "point-bert" else {}
    source = PointMAEBackbone(weights="random", **BACKBONE, **sizes, init_seed=1).eval()
    torch.save(LAYOUTS[layout](source.network.state_dict()), tmp_path / "pretrain.pth")

    target = PointMAEBackbone(weights=str(tmp_path / "pretrain.pth"), **BACKBONE, **sizes).eval()
    target.load_weights()

    if layout == "point-mae":  # whose files have none
        for name in ("cls_token", "cls_pos"):
            getattr(target.network, name).data.copy_(getattr(source.network, name))
    batch = source.example_batch()
    assert torch.equal(target(batch).tokens, source(batch).tokens)


@pytest.mark.parametrize("layout", ["point-mae", "point-bert", "act", "recon"])
def test_a_file_that_lacks_a_layer_says_which_of_its_tensors_are_missing(tmp_path, layout):
    sizes = {"encoder_dim": 6} if layout == "point-bert" else {}
    state = network(**sizes).state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(("blocks.blocks.1.mlp", "norm."))}
    torch.save(LAYOUTS[layout](kept), tmp_path / "pretrain.pth")
    backbone = PointMAEBackbone(weights=str(tmp_path / "pretrain.pth"), **BACKBONE, **sizes)

    with pytest.raises(
        WeightsError, match=r"6 of \d+ tensors are not in '.*pretrain\.pth': blocks\.blocks\.1\.mlp\.fc1"
    ):
        backbone.load_weights()


def test_weights_of_point_bert_ask_for_its_width(tmp_path):
    torch.save(point_bert(network(encoder_dim=6).state_dict()), tmp_path / "x.pth")
    backbone = PointMAEBackbone(weights=str(tmp_path / "x.pth"), **BACKBONE)

    with pytest.raises(WeightsError, match=r"'reduce_dim\.weight' \(8, 6\).*set backbone\.encoder_dim to 6\."):
        backbone.load_weights()
