"""Names and keys are checked before anything is attached, each mistake in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from peft_modal.errors import ConfigError
from peft_modal.methods.hf import HF


@pytest.mark.parametrize(
    ("tuner", "config", "sentence"),
    [
        ("verra", {}, r"method.tuner: .*did you mean 'vera'"),
        ("prompt_tuning", {}, r"'prompt_tuning' cannot be bridged: .*`vpt`"),
        ("adalora", {}, r"'adalora' cannot be bridged: .*`rank_pattern`"),
        ("lora", {"rank": 3}, r"method.config.rank: peft's 'lora' has no such key; did you mean"),
        ("lora", {"target_modules": ["x"]}, r"method.config.target_modules: is chosen by `sites`; remove it"),
        ("lora", {"task_type": "CAUSAL_LM"}, r"method.config.task_type: is for language models"),
        ("lora", {"bias": "all"}, r"method.config.bias: .*`bitfit`"),
        ("lora", {"r": "eight"}, r"method.config.r: expected int, got 'eight'"),
        ("lora", {"r": True}, r"method.config.r: expected int, got True"),
        ("lora", {"init_lora_weights": "loftq"}, r"'loftq' changes the base weights to a quantised form"),
        ("dora", {"use_dora": False}, r"method.config.use_dora: False contradicts `tuner: dora`"),
        ("corda", {"corda_config": {"cache_file": "x"}}, r"corda_config.cache_file: is a pickle"),
        ("corda", {"corda_config": {"corda_methd": "ipm"}}, r"corda_methd: there is no such key; did you mean"),
        ("corda", {"corda_config": "ipm"}, r"method.config.corda_config: expected a mapping"),
        ("eva", {"eva_config": {"rho": 2.0}}, r"eva_config.rho: 2.0 would give layers other ranks"),
        ("eva", {"eva_config": {"tau": 0.9}}, r"eva_config.tau: is not needed"),
        ("boft", {"boft_n_butterfly_factor": 2}, r"boft_n_butterfly_factor: needs a CUDA extension"),
        ("ia3", {"feedforward_modules": ["x"]}, r"feedforward_modules: follows the roles"),
    ],
)
def test_a_mistake_is_one_sentence(tuner: str, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        HF(tuner=tuner, config=config)
    assert len(caught.value.problems) == 1


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        HF(tuner="lora", config={"rr": 1, "bias": "all", "r": 1.5})
    assert len(caught.value.problems) == 3


def test_identity_is_declared_by_the_initialisation() -> None:
    assert HF(tuner="lora").identity_at_init
    assert HF(tuner="lora", config={"init_lora_weights": "pissa_niter_4"}).identity_at_init
    assert not HF(tuner="lora", config={"init_lora_weights": False}).identity_at_init
    assert not HF(tuner="fourierft").identity_at_init
    assert HF(tuner="fourierft", config={"init_weights": True}).identity_at_init
