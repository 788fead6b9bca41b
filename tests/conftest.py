"""What every test runs under: one thread, and a check that it leaves the process as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

# pytest names the running test and its phase; torch, open_clip and scikit-learn fill the others on first use.
_SET_BY_OTHERS = {
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "CUDA_MODULE_LOADING",
    "TOKENIZERS_PARALLELISM",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
}


def _global_state() -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if name not in _SET_BY_OTHERS}
    return {
        "the default dtype": torch.get_default_dtype(),
        "the default device": str(torch.get_default_device()),
        "the number of threads": torch.get_num_threads(),
        "the grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn-only determinism": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cuDNN's deterministic flag": torch.backends.cudnn.deterministic,
        "cuDNN's benchmark flag": torch.backends.cudnn.benchmark,
        "MultiheadAttention's fast path": torch.backends.mha.get_fastpath_enabled(),
        "the working directory": os.getcwd(),  # noqa: PTH109 — Path.cwd() says the same
        "the environment": environment,
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suite; pytest reads them from this file only, so they cannot lie beside the tests they serve."""
    parser.addoption(
        "--golden-dir", metavar="DIR", default=None, help="folder of golden cases (default: the committed ones)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what takes minutes to the night."""
    if os.environ.get("PEFT_MODAL_NIGHTLY"):
        return
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.skip(reason="runs at night, with PEFT_MODAL_NIGHTLY=1"))


@pytest.fixture(autouse=True)
def nothing_global_leaks() -> Iterator[None]:
    """Fail a test that leaves a process-wide switch changed; the next test would run under it."""
    before = _global_state()
    yield
    after = _global_state()
    changed = [what for what, value in before.items() if after[what] != value]
    if "the environment" in changed:
        old, new = before["the environment"], after["the environment"]
        assert isinstance(old, dict)
        assert isinstance(new, dict)
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        changed[changed.index("the environment")] = f"the environment ({', '.join(names)})"
    assert not changed, f"the test leaves changed: {', '.join(changed)}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same global random numbers, in whatever order tests run."""
    torch.manual_seed(0)
