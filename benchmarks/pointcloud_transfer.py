"""What pre-training is worth on the generated solids: linear probe and IDPT, from the nano and from random weights.

Every run is the shipped configuration with another backbone or seed; results are added to a JSON file as they come, and
runs that are in it are not made again.

    python benchmarks/pointcloud_transfer.py --seeds 3 --out benchmarks/results/pointcloud_transfer.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from peft_modal.compose import compose
from peft_modal.files import write_text
from peft_modal.running.fit import fit
from peft_modal.running.folder import RunFolder

METHODS = {"linear_probe": "pointcloud_linear_probe.yaml", "idpt": "pointcloud_idpt.yaml"}
NANO_SIZES = [
    "backbone.dim=128", "backbone.depth=4", "backbone.num_heads=4", "backbone.num_group=32", "backbone.group_size=16",
    "backbone.pointnet_dims=[32,64,128]",
]  # fmt: skip
STARTS = {
    "nano": ["backbone.weights=nano"],
    # The two usual initialisations; the bar holds against the better of them.
    "random_card": ["backbone.weights=random", "backbone.init=card", *NANO_SIZES],
    "random_torch": ["backbone.weights=random", "backbone.init=torch", *NANO_SIZES],
}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pointcloud_transfer.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", default=",".join(STARTS))
    arguments = parser.parse_args()
    results: dict[str, float] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for start in arguments.starts.split(","):
        for method, config in METHODS.items():
            for seed in range(arguments.seeds):
                key = f"{method}/{start}/{seed}"
                if key in results:
                    continue
                overrides = [*STARTS[start], f"seed={seed}", f"data.seed={seed}", f"backbone.init_seed={seed}"]
                composed = compose(config, overrides=overrides)
                with tempfile.TemporaryDirectory() as folder:
                    figures = fit(composed, RunFolder(Path(folder) / "run"))
                results[key] = figures["test/accuracy"]
                write_text(arguments.out, json.dumps(results, indent=2) + "\n")
                sys.stderr.write(f"{key}: {100 * results[key]:.1f} %, {figures['time/total_s']:.0f} s\n")
    print("| method | start | test accuracy | sd |\n|---|---|---|---|")
    for method in METHODS:
        for start in STARTS:
            found = [100 * v for k, v in results.items() if k.startswith(f"{method}/{start}/")]
            if found:
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                print(f"| {method} | {start} | {statistics.mean(found):.1f} | {spread:.1f} |")


if __name__ == "__main__":
    main()
