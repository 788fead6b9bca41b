"""Peak memory of a training step on a ViT-B/16: SNELL and SPT beside sparse tuning with masked gradients, and full.

Masked gradients are what sparse tuning costs without a kernel (GPS and the like): every weight has a gradient, a mask
and AdamW's two moments, although most entries stay. Each row is a process of its own, whose allocator gives freed
memory back at once. SPT looks at the gradients of all weights before training; that peak stands by itself. Bytes of a
Bi-AdaptFormer file on the same network stand below, with and without a head.

    python benchmarks/sparse_memory.py
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.files import write_text
from peft_modal.methods import Method
from peft_modal.methods.bi_adaptformer import BiAdaptFormer
from peft_modal.methods.full import Full
from peft_modal.methods.lora import LoRA
from peft_modal.methods.snell import SNELL
from peft_modal.methods.snella import SNELLA
from peft_modal.methods.spt import SPT
from peft_modal_vision.backbone import ViT

ROOT = Path(__file__).parent.parent
CLASSES = 100
BATCH = 8
MATRICES = ["attn.q", "attn.k", "attn.v", "attn.out", "mlp"]
SPARSITY = 0.9
# Large tensors go back to the system as soon as they are freed, so that the resident size is what is in use.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class MaskedGradients(Method):
    """Trains chosen entries of every linear through the gradient of the whole, as sparse tuning without a kernel does.

    The entries are drawn, since which they are costs nothing.
    """

    identity_at_init = True

    def build(self, adapter: Adapter) -> None:
        """Each linear's weight, with a mask over its gradient."""
        paths = dict.fromkeys(
            site.path for site in adapter.backbone.anatomy.sites if site.block is not None and site.op == "linear"
        )
        generator = torch.Generator().manual_seed(0)
        for path in paths:
            weight = adapter.own_tensor(path)
            mask = torch.rand(weight.shape, generator=generator) >= SPARSITY
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)


METHODS: Mapping[str, Callable[[], Method]] = {
    "full": Full,
    "masked gradients": MaskedGradients,
    "snell": lambda: SNELL(rank=32, sparsity=SPARSITY),
    "snella": lambda: SNELLA(rank=32, target_sparsity=SPARSITY),
    "spt": SPT,
    "spt, adapter form": lambda: SPT(form="adapter"),
    "lora": lambda: LoRA(rank=8, sites=MATRICES),
}


def measured(name: str) -> dict[str, float]:
    """MiB at most above what the network alone takes, while calibrating and while training."""
    torch.manual_seed(0)
    backbone: Backbone = ViT(model="vit_base_patch16_224", weights="random")
    images = torch.randn(BATCH, 3, 224, 224)
    labels = torch.randint(0, CLASSES, (BATCH,))
    head = nn.Linear(backbone.feature_width, CLASSES)

    def loss(batch: Tensor) -> dict[str, Tensor]:
        logits = head(backbone({"image": batch}).extras["pooled"])
        return {"loss": nn.functional.cross_entropy(logits, labels)}

    empty = resident("VmRSS")
    adapter = METHODS[name]().attach(backbone)
    figures: dict[str, float] = {}
    if adapter.events.calibration_batches:
        forget_peak()
        adapter.events.prepare([images], loss)
        figures["calibration_mb"] = resident("VmHWM") - empty
    backbone.train()
    trained = [*adapter.named_trained().values(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    forget_peak()
    for _ in range(2):
        optimizer.zero_grad()
        loss(images)["loss"].backward()
        optimizer.step()
    figures["step_mb"] = resident("VmHWM") - empty
    figures["trained"] = float(sum(parameter.numel() for parameter in trained))
    return figures


def resident(field: str) -> float:
    """MiB of this process: now (`VmRSS`), or at most since `forget_peak` (`VmHWM`)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) / 2**10


def forget_peak() -> None:
    """Start counting the peak anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def stored_bytes() -> dict[str, dict[str, int]]:
    """What a Bi-AdaptFormer-32 with 1-bit codes stores on a ViT-B: its tensors, and the whole file."""
    from peft_modal.files import Header, save_adapter

    backbone = ViT(model="vit_base_patch16_224", weights="random")
    adapter = BiAdaptFormer(hidden_dim=32).attach(backbone)
    adapter.events.finalise()
    tensors = {f"adapter.{name}": value for name, value in adapter.state().items()}
    head = nn.Linear(backbone.feature_width, CLASSES)
    with_head = {**tensors, **{f"head.{name}": value for name, value in head.state_dict().items()}}
    found: dict[str, dict[str, int]] = {}
    for name, held in (("without a head", tensors), (f"with a linear head of {CLASSES} classes", with_head)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            save_adapter(path, held, Header(config={}, fingerprint="", class_names=(), preprocessing={}))
            found[name] = {
                "tensors": sum(value.numel() * value.element_size() for value in held.values()),
                "file": path.stat().st_size,
            }
    return found


def main() -> None:
    """Measure everything, or be one of the processes that do."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measured(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sparse_memory.json")
    out: Path = parser.parse_args().out
    rows: dict[str, Any] = {}
    for name in METHODS:
        sys.stderr.write(f"{name}\n")
        done = subprocess.run(  # noqa: S603
            [sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True,
            env={**os.environ, **GIVE_BACK},
        )  # fmt: skip
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        rows[name]["ratio"] = rows[name]["step_mb"] / rows["full"]["step_mb"]
    result = {"batch": BATCH, "sparsity": SPARSITY, "torch": torch.__version__, "rows": rows, "bytes": stored_bytes()}
    write_text(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
