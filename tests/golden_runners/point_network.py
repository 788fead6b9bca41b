"""Point-cloud classifiers: the plain network, with static prompts (VPT), and with a dynamic prompt (IDPT)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from golden_runners.golden_case import GoldenCase
from golden_runners.reading import input_of, output_of
from peft_modal.attach import Adapter
from peft_modal.methods.full import Full
from peft_modal.methods.vpt import VPT
from peft_modal_heads.linear import LinearHead
from peft_modal_heads.pointcloud_mlp import PointCloudMLP
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.idpt import IDPT
from peft_modal_pointcloud.sampling import farthest_point_sample, knn

CLS_TYPES = {
    "all": ["cls", "prompt", "max"],
    "promptcls": ["cls", "prompt"],
    "pointcls": ["cls", "max"],
    "promptonly": ["prompt"],
}
PROMPT_MODULES = {name: name for name in ("dgcnn", "dgcnn_light2", "dgcnn_light", "mlp", "transformer")}


def plain(case: GoldenCase) -> None:
    """The whole classifier with gradients of every parameter, and one train-mode pass of the mini-PointNet."""
    backbone = point_backbone(case)
    adapter = Full().attach(backbone)
    head = classifier(case, backbone, ["cls", "max"])
    network = backbone.network
    points = case.tensors["in.points"]
    indices = farthest_point_sample(points, backbone.num_group)
    case.compare("out.fps_idx", indices)
    embedded = output_of(network.encoder)
    reduced = output_of(network.reduce_dim)
    positions = output_of(network.pos_embed)
    features, _ = run(case, backbone, head, adapter, rename=lambda name: name.removeprefix("backbone."))
    centres, neighbourhood = features["centres"], features["neighbourhood"]
    case.compare("out.center", centres)
    case.compare("out.neighborhood", neighbourhood)
    case.compare("out.knn_idx", knn(points, centres, backbone.group_size))
    tokens = (embedded, reduced)[is_reduced(case, "out.tokens")]
    case.compare("out.tokens", tokens[0])
    case.compare("out.pos", positions[0])

    # The reference mode lets the frozen mini-PointNet use batch statistics, as the authors' code does.
    drifting = point_backbone(case, frozen_mode="reference").train()
    trained = drifting.network.encoder(neighbourhood.detach())
    if is_reduced(case, "out.tokens_train"):
        trained = drifting.network.reduce_dim(trained)
    case.compare("out.tokens_train", trained)
    state = drifting.network.state_dict()
    for name in case.names("out.after_train."):
        case.compare(f"out.after_train.{name}", state.get(name))


def static_prompts(case: GoldenCase) -> None:
    """VPT as wired for point clouds: prompts behind the last token, with positions of their own."""
    backbone = point_backbone(case)
    deep = case.choice("deep", {True: True, False: False}, default=True)
    adapter = VPT(num_tokens=case.setting("num_prompts"), deep=deep, place="end").attach(backbone)

    def rename(name: str) -> str:
        return name.removeprefix("backbone.").removeprefix("adapter.blocks.")

    adapter.load(case.state(adapter.state(), lambda name: f"param.{rename(name)}"))
    head = classifier(case, backbone, ["cls", "max"])
    run(case, backbone, head, adapter, rename=rename)


def dynamic_prompt(case: GoldenCase) -> None:
    """IDPT: the generator's prompt enters one block and stays to the end."""
    backbone = point_backbone(case)
    zero_based = case.choice("prompt_layer_is_zero_based", {True: True, False: False}, default=True)
    layer = case.setting("prompt_layer") - (0 if zero_based else 1)
    module = case.choice("prompt_module", PROMPT_MODULES)
    adapter = IDPT(
        prompt_layer=layer, prompt_module=module, k=case.setting("k", 20), train_prompt_pos="grad.prompt_pos" in case
    ).attach(backbone)

    def rename(name: str) -> str:
        name = name.removeprefix("backbone.").removeprefix("adapter.idpt.")
        if f"param.{name}" not in case:
            name = name.replace("generator.block.", "generator.")
        return name

    adapter.load(case.state(adapter.state(), lambda name: f"param.{rename(name)}"))
    head = classifier(case, backbone, case.choice("cls_type", CLS_TYPES))
    generator = adapter.adapter.get_submodule("idpt.generator")
    entering, prompt = input_of(generator), output_of(generator)
    run(case, backbone, head, adapter, rename=rename)
    case.compare("out.generator_input", entering[0])
    case.compare("out.prompt", prompt[0])


def point_backbone(
    case: GoldenCase, *, prefix: str = "", frozen_mode: str = "eval", has_cls: bool = True, levels: int | list[int] = 0
) -> PointMAEBackbone:
    """The backbone of a case, filled with its `param.*`; masked pre-training stores no class token."""
    batch, num_points, _ = case.shape("in.points")
    case.require("batch", batch)
    case.require("num_points", num_points)
    path = f"param.{prefix}"
    dim, encoder_dim = case.setting("trans_dim"), case.setting("encoder_dims", case.setting("trans_dim"))
    backbone = PointMAEBackbone(
        weights="random",
        frozen_mode=frozen_mode,
        dim=dim,
        depth=case.setting("depth"),
        num_heads=case.setting("num_heads"),
        num_group=case.setting("num_group"),
        group_size=case.setting("group_size"),
        drop_path=case.setting("drop_path_rate", 0.0),
        mlp_ratio=case.setting("mlp_ratio", case.shape(f"{path}blocks.blocks.0.mlp.fc1.weight")[0] / dim),
        encoder_dim=None if encoder_dim == dim else encoder_dim,
        pointnet_dims=[
            case.shape(f"{path}encoder.{conv}.weight")[0] for conv in ("first_conv.0", "first_conv.3", "second_conv.0")
        ],
        has_cls=has_cls,
        levels=levels,
    )
    network = backbone.network
    case.require("qkv_bias", network.blocks.blocks[0].attn.qkv.bias is not None)
    case.require("layernorm_eps", network.norm.eps)
    case.require("batchnorm_eps", network.encoder.first_conv[1].eps)
    case.require("batchnorm_momentum", network.encoder.first_conv[1].momentum)
    keep = frozenset(name for name in ("cls_token", "cls_pos") if prefix and path + name not in case)
    case.fill(network, lambda name: path + name, keep=keep)
    return backbone


def classifier(case: GoldenCase, backbone: PointMAEBackbone, pool: list[str]) -> PointCloudMLP | LinearHead:
    """The head of a case in eval mode: three layers, or one where there are no more."""
    spec, num_outputs = backbone.feature_spec(), case.setting("cls_dim")
    if "param.cls_head_finetune.4.weight" in case:
        hidden_dim = case.shape("param.cls_head_finetune.0.weight")[0]
        head: PointCloudMLP | LinearHead = PointCloudMLP(spec, num_outputs, pool=pool, hidden_dim=hidden_dim)
    else:
        head = LinearHead(spec, num_outputs, pool=pool)
    case.fill(head, lambda name: f"param.{head_name(name)}")
    return head.eval()


def head_name(name: str) -> str:
    """The case's name of a head's tensor."""
    return name.replace("linear.", "cls_head_finetune.0.")


def run(
    case: GoldenCase, backbone: PointMAEBackbone, head: PointCloudMLP | LinearHead, adapter: Adapter, *, rename
) -> tuple[Mapping[str, Tensor], Tensor]:
    """One pass and the gradients of sum(logits * probe); returns the features' extras and the logits."""
    case.choice("mode", {"eval": False}, default="eval")
    blocks = backbone.network.blocks.blocks
    entering = {i: input_of(block) for i, block in enumerate(blocks)}
    leaving = {i: output_of(block) for i, block in enumerate(blocks)}
    points = case.take("in.points").requires_grad_()
    features = backbone({"points": points})
    logits = head(features)
    for i in entering:
        case.compare(f"out.block{i}_input", entering[i][0])
        case.compare(f"out.block{i}", leaving[i][0])
    case.compare("out.norm", features.tokens)
    case.compare("out.feature", head.pool(features))
    case.compare("out.logits", logits)
    logits.backward(case.take("in.logits_probe"))
    case.compare_gradient("points", points.grad)
    trained = {rename(name): parameter for name, parameter in adapter.named_trained().items()}
    trained |= {head_name(name): parameter for name, parameter in head.named_parameters()}
    compare_gradients(case, trained)
    if "trained_in_reference" in case.json:
        ours, theirs = set(trained), set(case.json["trained_in_reference"])
        assert ours == theirs, f"{case.name}: trained here or by the authors only: {sorted(ours ^ theirs)}"
    return features.extras, logits


def compare_gradients(case: GoldenCase, trained: Mapping[str, nn.Parameter]) -> None:
    """Compare the gradients of parameters by the case's names."""
    for name, parameter in trained.items():
        case.compare_gradient(name, parameter.grad)


def is_reduced(case: GoldenCase, name: str) -> bool:
    """Whether the case's tokens of the mini-PointNet have passed `reduce_dim`; the width tells."""
    return name in case and case.shape(name)[-1] != case.setting("encoder_dims", case.setting("trans_dim"))
