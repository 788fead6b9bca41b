"""Arguments with which each bridged tuner of peft fits a network of width 32."""

from __future__ import annotations

from typing import Any

TUNER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4},
    "pissa": {"r": 4, "lora_alpha": 2},
    "olora": {"r": 4},
    "mica": {"r": 4},
    "boft": {},
    "c3a": {"block_size": 16},
    "deft": {},
    "delora": {"r": 4, "delora_lambda": 2},
    "fourierft": {"n_frequency": 50, "scaling": 5.0},
    "frod": {},
    "glora": {"r": 4},
    "gralora": {"r": 8},
    "hira": {"r": 4},
    "hra": {"r": 4},
    "ia3": {},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 8},
    "peanut": {"r": 4},
    "psoft": {"r": 8},
    "randlora": {"r": 8, "randlora_alpha": 16},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "supertuning": {"sparsity": 0.9},
    "tinylora": {"u": 8},
    "unilora": {},
    "vblora": {"vector_length": 16, "num_vectors": 20, "topk": 2},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 50},
}
