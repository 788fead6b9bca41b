"""What authors of methods and backbones test their plugins with; importing it needs torch, but no test runner."""

from peft_modal.testing.anatomy_checker import assert_anatomy, check_anatomy
from peft_modal.testing.contract import (
    CONTRACTS,
    check_attach_leaves_rng_alone,
    check_bf16,
    check_compile,
    check_copy_and_pickle,
    check_detach_restores_every_bit,
    check_enable_disable,
    check_gradient_checkpointing,
    check_gradients_only_in_adapter,
    check_identity_at_init,
    check_merge_equals_unmerged,
    check_save_load_round_trip,
    check_stacking_with_lora,
    run_contract,
)
from peft_modal.testing.matrix import MatrixRow, example_methods, matrix_table, method_matrix

__all__ = [
    "CONTRACTS",
    "MatrixRow",
    "assert_anatomy",
    "check_anatomy",
    "check_attach_leaves_rng_alone",
    "check_bf16",
    "check_compile",
    "check_copy_and_pickle",
    "check_detach_restores_every_bit",
    "check_enable_disable",
    "check_gradient_checkpointing",
    "check_gradients_only_in_adapter",
    "check_identity_at_init",
    "check_merge_equals_unmerged",
    "check_save_load_round_trip",
    "check_stacking_with_lora",
    "example_methods",
    "matrix_table",
    "method_matrix",
    "run_contract",
]
