"""Step time of mask tuning over LoRA's on the same matrices: the vision tower's attention of a CLIP ViT-B/16.

One process takes turns: a step of LoRA, one of masks, one of LoRA; a ratio is over the mean of both neighbours, and the
median over rounds. AMT (`gate_strength: 0`) takes one gradient, R-AMT two, and a forward of the untouched model. Text
features are constants, as in training with a frozen text tower. Fused Adam, float32, a batch in memory.

    python benchmarks/mask_cost.py --rounds 7
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from step_cost import in_turns, now
from torch import Tensor
from torch.nn import functional

from peft_modal.attach import Run
from peft_modal.files import write_text
from peft_modal.methods import Method
from peft_modal.methods.lora import LoRA
from peft_modal.methods.r_amt import RAMT
from peft_modal_clip.backbone import OpenCLIPBackbone
from peft_modal_clip.classification import ClassNames
from peft_modal_heads.identity import Identity

ROOT = Path(__file__).parent.parent
CLASSES = 100
MATRICES = {"roles": ["attn"], "stacks": ["visual"]}
METHODS: dict[str, Method] = {
    "lora": LoRA(sites=MATRICES, rank=4),
    "amt": RAMT(sites=MATRICES, gate_strength=0.0),
    "r_amt": RAMT(sites=MATRICES, gate_strength=0.3),
}


class Step:
    """One training step of a method.

    Args:
        method: What is attached.
        batch_size: Pictures.
        device: Where.
    """

    def __init__(self, method: Method, batch_size: int, device: str) -> None:
        torch.manual_seed(0)
        # The text tower takes no part; it is as small as may be.
        backbone = OpenCLIPBackbone(
            weights="random", embed_dim=512, image_size=224, patch_size=16, vision_width=768, vision_layers=12,
            vision_heads=12, vision_mlp_ratio=4.0, context_length=4, vocab_size=8, text_width=8, text_layers=1,
            text_heads=1, quick_gelu=True, tokenizer="clip",
        ).to(device)  # fmt: skip
        self.device = torch.device(device)
        self.adapter = method.attach(backbone).to(device)
        names = tuple(str(label) for label in range(CLASSES))
        self.task = ClassNames(
            backbone, self.adapter, Identity(spec=backbone.feature_spec(), num_outputs=CLASSES), names
        ).train()
        texts = functional.normalize(torch.randn(CLASSES, 512, device=device), dim=-1)
        self.task.class_embeddings = lambda: texts  # type: ignore[method-assign]
        self.batch = {
            "image": torch.randn(batch_size, 3, 224, 224, device=device),
            "label": torch.randint(CLASSES, (batch_size,), device=device),
        }
        trained = self.adapter.named_trained()
        self.optimizer = torch.optim.Adam(trained.values(), lr=1e-5, fused=True)
        run = Run(1000, [self.optimizer], torch.Generator(), trained, forward=self.task, gives_logits=True)
        self.adapter.events.on_fit_start(run)

    def losses(self) -> dict[str, Tensor]:
        """Of the batch."""
        logits = self.task(self.batch)
        return {**self.task.losses(self.batch, logits), **self.adapter.events.penalty(self.batch, logits)}

    def __call__(self) -> float:
        """Seconds that the step takes."""
        started = now(self.device)
        self.optimizer.zero_grad()
        self.adapter.events.compute_gradients(self.losses(), self.losses, lambda loss: loss.backward())  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return now(self.device) - started


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mask_cost.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = Step(METHODS["lora"], arguments.batch_size, arguments.device)
    rows = {}
    for name in ("amt", "r_amt"):
        own = Step(METHODS[name], arguments.batch_size, arguments.device)
        found = in_turns(base, own, arguments.rounds, warmup=1)
        rows[name] = {"step_ms": 1000 * found.pop("step"), "lora_ms": 1000 * found.pop("base"), **found}
        sys.stderr.write(f"{name} {rows[name]['ratio']:.3f}\n")
    cpu = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {arguments.threads} thread(s)"
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu
    results = {
        "machine": machine, "torch": torch.__version__, "batch": arguments.batch_size, "rounds": arguments.rounds,
        "rows": rows,
    }  # fmt: skip
    write_text(arguments.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
