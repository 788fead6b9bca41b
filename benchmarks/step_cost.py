"""Step time and peak memory of every method over full fine-tuning's, on a ViT-S, a Point-MAE and a 97 M U-Net.

For each method a fresh process takes turns: one step of full fine-tuning, one of the method, one of full fine-tuning,
and so on; a ratio is over the mean of both neighbours, so that a busy machine slows both, and the median over rounds.
Rows called `over` compare with another row in the same way.
glibc is told to keep freed memory: a virtual machine may take 10 us to hand out a page again, more than to fill it.
Another fresh process gives the peak memory of the method alone. Steps hold forward, loss, backward and AdamW on a batch
in memory, in float32. Results are added to a JSON file as they come; what is in it is not measured again.

    python benchmarks/step_cost.py --device cpu --threads 1 --rounds 15
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.files import write_text
from peft_modal.methods import Method
from peft_modal.methods.lora import LoRA
from peft_modal.registry import default_registry
from peft_modal.testing.matrix import load_entry

ROOT = Path(__file__).parent.parent
WARMUP = 2
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
CLASSES = 100
ALL_LINEARS = "lora, all linears"
PEFT = "Hugging Face peft's LoRA, the same"
FLOOR = "one norm shift (the floor)"
EXTRA = (ALL_LINEARS, PEFT, FLOOR)
NO_UPDATE = "full, without its optimiser"
OVER = "sara, over the row above"
GST = "pointgst as published, over lora"
BASES = {OVER: NO_UPDATE, GST: "lora"}
"""What a row is compared with, where it is not full fine-tuning."""
MODALITIES = {"vit_s": "", "point_mae": "pointcloud", "unet": "diffusion"}


class OneShift(Method):
    """Trains the first norm's shift: gradients flow through all frozen weights, and no weight gradient is made."""

    identity_at_init = True

    def build(self, adapter: Adapter) -> None:
        """One leaf."""
        site = next(site for site in adapter.backbone.anatomy.sites if site.block == 0 and site.op == "norm")
        adapter.own_tensor(f"{site.holder}.bias")


def vit_s() -> Backbone:
    """A timm ViT-S/16 at 224 px; the vision plugin's anatomy will stand here once there is one."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    from tiny_backbones import TinyViT

    return TinyViT(depth=12, width=384, num_heads=6, img_size=224, patch_size=16, mlp_ratio=4.0)


def point_mae() -> Backbone:
    """The published size: 12 blocks of width 384, 64 patches of 32 points."""
    from peft_modal_pointcloud.backbone import PointMAEBackbone

    return PointMAEBackbone(weights="random")


def unet() -> Backbone:
    """A denoiser of Stable Diffusion's kind with 97 M parameters, on latents of 16 x 16."""
    from peft_modal_diffusion.backbone import StableDiffusion

    sizes: dict[str, Any] = {
        "block_out_channels": [160, 320, 576], "layers_per_block": 2, "sample_size": 16, "cross_attention_dim": 256,
        "attention_head_dim": 8, "norm_num_groups": 32,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }  # fmt: skip
    return StableDiffusion(weights="random", architecture="toy", denoiser=sizes)


BACKBONES: Mapping[str, Callable[[], Backbone]] = {"vit_s": vit_s, "point_mae": point_mae, "unet": unet}
BATCH = {"vit_s": 4, "point_mae": 8, "unet": 4}


def batch_of(name: str) -> dict[str, Tensor]:
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    count = BATCH[name]
    label = torch.randint(0, CLASSES, (count,), generator=generator)
    if name == "vit_s":
        return {"image": torch.randn(count, 3, 224, 224, generator=generator), "label": label}
    return {"points": torch.rand(count, 1024, 3, generator=generator) * 2 - 1, "label": label}


def method_names(backbone: str) -> list[str]:
    """Registered methods that may act on a backbone, after the rows to compare with."""
    fitting = {"", MODALITIES[backbone]}
    registered = [entry.name for entry in default_registry().entries("method") if entry.modality in fitting]
    left_out = {"compose", "hf", "full"}
    if backbone == "unet":
        # A step takes seconds there: only what the memory of chosen entries is compared with.
        return ["full", NO_UPDATE, OVER, *EXTRA, "lora", "sara"]
    own = (GST,) if backbone == "point_mae" else ()
    return ["full", *EXTRA, *own, *(name for name in registered if name not in left_out)]


class Step:
    """One training step of a method on a backbone."""

    def __init__(self, backbone_name: str, method_name: str, device: str) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.backbone = BACKBONES[backbone_name]().to(self.device)
        self.denoises = backbone_name == "unet"
        found = self.backbone.example_batch(BATCH["unet"]) if self.denoises else batch_of(backbone_name)
        self.batch = {key: value.to(self.device) for key, value in found.items()}
        self.updates = method_name != NO_UPDATE
        attached = {NO_UPDATE: "full", OVER: "sara"}.get(method_name, method_name)
        trained, self.adapter = self._attach(backbone_name, attached)
        self.backbone.train()
        self.head = nn.Identity() if self.denoises else nn.LazyLinear(CLASSES, device=self.device)
        self.loss()
        self.optimizer = torch.optim.AdamW([*trained, *self.head.parameters()], lr=1e-4, fused=True)

    def _attach(self, backbone_name: str, name: str) -> tuple[list[nn.Parameter], Adapter | None]:
        if name == PEFT:
            from peft import LoraConfig, inject_adapter_in_model

            linears = {
                site.holder for site in self.backbone.anatomy.sites if site.block is not None and site.op == "linear"
            }
            inject_adapter_in_model(
                LoraConfig(r=8, lora_alpha=8, target_modules=sorted(linears)), self.backbone.network
            )
            return [p for p in self.backbone.network.parameters() if p.requires_grad], None
        if name == ALL_LINEARS:
            method: Method = LoRA(rank=8, sites=["attn.q", "attn.k", "attn.v", "attn.out", "mlp"])
        elif name == FLOOR:
            method = OneShift()
        elif name == GST:
            from peft_modal_pointcloud.pointgst import PointGST

            method = PointGST()
        else:
            registry = default_registry()
            fitting = {"", MODALITIES[backbone_name]}
            listed = next(e for e in registry.entries("method") if e.name == name and e.modality in fitting)
            cls: Any = load_entry(registry, listed)
            method = cls.example() if hasattr(cls, "example") else cls()
        adapter = method.attach(self.backbone)
        return list(adapter.named_trained().values()), adapter

    def loss(self) -> Tensor:
        """Of the batch: against fixed noise, or of a classifier."""
        features = self.backbone(self.batch)
        if self.denoises:
            return nn.functional.mse_loss(features.tokens, self.batch["sample"])
        exported = [tokens.mean(1) for tokens in features.extras.values() if tokens.dim() == 3]
        pooled = torch.cat([features.tokens[:, 0], features.tokens[:, 1:].amax(1), *exported], dim=1)
        return nn.functional.cross_entropy(self.head(pooled), self.batch["label"])

    def __call__(self) -> float:
        """Seconds that the step takes."""
        started = self._now()
        self.optimizer.zero_grad()
        self.loss().backward()
        if self.updates:
            self.optimizer.step()
        return self._now() - started

    def _now(self) -> float:
        return now(self.device)


def now(device: torch.device) -> float:
    """Seconds of a clock, after all that a device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(base: Callable[[], float], own: Callable[[], float], rounds: int, *, warmup: int) -> dict[str, float]:
    """Seconds of two steps taken in turns: medians, and quartiles of the ratio over the mean of both neighbours."""
    times = [(base(), own(), base()) for _ in range(warmup + rounds)][warmup:]
    ratios = sorted(2 * b / (before + after) for before, b, after in times)
    cut = rounds // 4
    return {
        "step": statistics.median(b for _, b, _ in times),
        "base": statistics.median(t for before, _, after in times for t in (before, after)),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[cut],
        "ratio_high": ratios[-1 - cut],
    }


def pair(backbone: str, method: str, device: str, rounds: int) -> dict[str, float]:
    """Step times in turns with full fine-tuning's."""
    base, own = Step(backbone, BASES.get(method, "full"), device), Step(backbone, method, device)
    found = in_turns(base, own, rounds, warmup=WARMUP)
    return {
        "step_ms": 1000 * found.pop("step"),
        "full_ms": 1000 * found.pop("base"),
        **found,
        "trained": float(sum(p.numel() for group in own.optimizer.param_groups for p in group["params"])),
    }


def peak(backbone: str, method: str, device: str) -> dict[str, float]:
    """MiB at most above what the libraries take (CPU), or of the GPU's allocator."""
    before = _resident()
    step = Step(backbone, method, device)
    for _ in range(2):
        step()
    if device == "cuda":
        return {"peak_mb": torch.cuda.max_memory_allocated() / 2**20}
    return {"peak_mb": _resident() - before}


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _child(kind: str, *arguments: str) -> dict[str, float] | str:
    command = [sys.executable, __file__, "--child", kind, *arguments]
    environment = {**os.environ, **(KEEP_FREED if kind == "pair" else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> None:
    """Measure what is missing and write after each method."""
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    device, rounds, threads = arguments.device, str(arguments.rounds), str(arguments.threads)
    found = results.setdefault(device, {"machines": {}, "backbones": {}})
    cpu = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {threads} thread(s)"
    for backbone in BACKBONES:
        found["machines"].setdefault(
            backbone,
            {
                "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
                "torch": torch.__version__,
                "optimizer": "AdamW, fused",
                "batch": BATCH[backbone],
                "rounds": arguments.rounds,
            },
        )
        rows = found["backbones"].setdefault(backbone, {})
        full_peak = rows.get("full", {}).get("peak_mb")
        for method in method_names(backbone):
            if method in rows:
                continue
            sys.stderr.write(f"{device} {backbone} {method}\n")
            row = _child("pair", backbone, method, device, rounds, threads)
            if isinstance(row, dict):
                alone = _child("peak", backbone, method, device, rounds, threads)
                if isinstance(alone, dict):
                    full_peak = full_peak or alone["peak_mb"]
                    row |= {**alone, "peak_ratio": alone["peak_mb"] / full_peak}
            rows[method] = row if isinstance(row, dict) else {"refused": row}
            write_text(arguments.out, json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Measure everything, or be one of the processes that do."""
    if sys.argv[1:2] == ["--child"]:
        kind, backbone, method, device, rounds, threads = sys.argv[2:]
        torch.set_num_threads(int(threads))
        figures = pair(backbone, method, device, int(rounds)) if kind == "pair" else peak(backbone, method, device)
        print(json.dumps(figures))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/step_cost.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
