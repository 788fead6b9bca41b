"""Every method that a point cloud can be asked for trains on part segmentation, or is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.cases import registry
from torch.nn import functional

from peft_modal.__main__ import main
from peft_modal.errors import AttachError, PeftModalError
from peft_modal.testing.matrix import example_methods
from peft_modal_heads.pointcloud_parts import PointCloudParts
from peft_modal_pointcloud.backbone import PointMAEBackbone
from peft_modal_pointcloud.idpt import IDPT
from peft_modal_pointcloud.idpt_parts import IDPTParts

NAMES = ("cup/body", "cup/handle", "table/top", "table/leg")
REFUSED = {"convpass": "none of its blocks works on a grid of patches"}
EXAMPLES = {
    "mosa": ["method.consistency=0.0"],
    "snell": ["method.rank=2"],
    "snella": ["method.rank=2"],
    "spt": ["method.rank=2", "method.unit=1000.0"],
}
"""Arguments beyond the defaults where a whole run is needed; MoSA's consistency wants class logits."""
BY_TURNS = {"loca", "mosa"}
"""They train one half, or one expert by chance, at a time; those that wait for a run's events are found."""
METHODS = sorted(example_methods(registry(), modality="pointcloud"))


def backbone(**options: Any) -> PointMAEBackbone:
    sizes = {
        "weights": "random", "dim": 24, "depth": 3, "num_heads": 3, "num_group": 24, "group_size": 6,
        "pointnet_dims": [8, 16, 16], "drop_path": 0.0, "init": "torch", "has_cls": False, "levels": 2,
    }  # fmt: skip
    return PointMAEBackbone(**{**sizes, **options})


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "points": torch.randn(4, 64, 3, generator=generator),
        "parts": torch.randint(4, (4, 64), generator=generator),
        "category": torch.tensor([0, 1, 0, 1]),
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_everything_that_it_has_or_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, network = example_methods(registry(), modality="pointcloud")[name], backbone()
    if name in REFUSED:
        with pytest.raises(PeftModalError, match=REFUSED[name]):
            method.attach(network)
        return
    before = {key: level for key, level in network(batch()).extras.items() if key.startswith("level")}
    adapter = method.attach(network)
    if method.identity_at_init:
        after = network(batch()).extras
        for key, level in before.items():
            torch.testing.assert_close(after[key], level, atol=1e-5, rtol=1e-5)
    waits = any(adapter.events.wants(event) for event in ("prepare", "step_begin", "before_step"))
    if waits or name in BY_TURNS:
        run(name, tmp_path, monkeypatch)
        return
    torch.manual_seed(0)
    head = PointCloudParts(
        network.feature_spec(), 4, NAMES, propagation_dims=(16, 16), hidden_dims=(16, 8), category_dim=8, dropout=0.0
    )
    trained = adapter.named_trained()
    optimizer = torch.optim.AdamW([*trained.values(), *head.parameters()], lr=3e-3)
    for module in (network, adapter, head):
        module.train()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = functional.nll_loss(head(network(batch())).log_probs.flatten(0, 1), batch()["parts"].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # In the last step: an update that starts at zero holds the gradient of its first factor back in the first.
    unmoved = [path for path, p in trained.items() if p.numel() and (p.grad is None or not bool(p.grad.any()))]
    assert not unmoved
    assert losses[-1] < losses[0]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of the task through the command line."""
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(folder / "cache"))
    method = [f"--{key}" for key in EXAMPLES.get(name, ())]
    network = [
        "name=point_mae", "weights=random", "init=torch", "dim=24", "depth=3", "num_heads=3", "num_group=8",
        "group_size=4", "pointnet_dims=[8,16,16]", "has_cls=false", "levels=2",
    ]  # fmt: skip
    data = [
        "name=part_solids", "categories=[chair,stool]", "shots=4", "val_per_category=1", "test_per_category=1",
        "num_points=32", "pool_points=40", "batch_size=4",
    ]  # fmt: skip
    head = ["name=pointcloud_parts", "propagation_dims=[16,16]", "hidden_dims=[16,8]"]
    nouns = {"backbone": network, "head": head, "task": ["name=part_segmentation"], "data": data}
    arguments = [f"--{noun}.{argument}" for noun, given in nouns.items() for argument in given]
    trainer = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(["fit", f"--method={name}", *method, *arguments, *trainer, "--out", str(folder / "run")]) == 0
    figures = json.loads((folder / "run" / "metrics.json").read_text())
    assert 0 <= figures["test/instance_miou"] <= 1


def test_prompts_of_each_level_leave_behind_their_block() -> None:
    network = backbone(levels=[0, 2])
    adapter = IDPTParts().attach(network)
    lengths = {}
    for i, block in enumerate(network.network.blocks.blocks):
        block.register_forward_pre_hook(lambda _m, args, i=i: lengths.update({i: args[0].shape[1]}))
    features = network(batch())
    assert lengths == {0: 25, 1: 24, 2: 25}
    assert features.extras["prompt"].shape == (4, 4, 24)
    assert features.extras["level.0"].shape == (4, 24, 24)
    names = {name.removeprefix("adapter.idpt.") for name in adapter.named_trained()}
    assert names == {"prompt_pos", *(f"generator.{b}.{part}" for b in (0, 2) for part in
                     ("fuse.weight", "fuse_bn.weight", "fuse_bn.bias"))}  # fmt: skip
    # Decayed, unlike a token.
    assert adapter.decay.get("adapter.idpt.prompt_pos", True)


def test_the_position_of_the_prompts_may_stay_as_drawn() -> None:
    adapter = IDPTParts(train_prompt_pos=False).attach(backbone())
    assert not any(name.endswith("prompt_pos") for name in adapter.named_trained())
    assert any(name.endswith("prompt_pos") for name in adapter.state())


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (IDPTParts(), {"levels": 0}, r"set backbone\.levels=3, or name method\.blocks"),
        (IDPTParts(blocks=[0, 3]), {}, r"blocks: \[0, 3\] are not ascending numbers in 0\.\.2"),
        (IDPTParts(blocks=[1, 0]), {}, r"blocks: \[1, 0\] are not ascending"),
        (IDPTParts(prompt_module="dgcnn", k=25), {}, "k: 25 neighbours are more than the 24 patches"),
    ],
)
def test_prompts_that_do_not_suit_are_refused(method: IDPTParts, options: Any, sentence: str) -> None:
    with pytest.raises(AttachError, match=sentence):
        method.attach(backbone(**options))


def test_the_prompt_of_classification_serves_as_shape_feature_too() -> None:
    network = backbone()
    IDPT(k=5).attach(network)
    head = PointCloudParts(network.feature_spec(), 4, NAMES)
    assert head.pool == ("prompt",)
    assert head.eval()(network(batch())).log_probs.shape == (4, 64, 4)
