"""Attaching: the seven primitives, the adapter that owns what they train, and its life cycle."""

from peft_modal.attach.adapter import Adapter
from peft_modal.attach.lifecycle import LifeCycle, ParameterService, Run
from peft_modal.attach.merge import merge_
from peft_modal.attach.operations import Operation
from peft_modal.attach.prompts import PromptSource
from peft_modal.attach.sparse import SparseEntries
from peft_modal.attach.updates import LowRankUpdate

__all__ = [
    "Adapter",
    "LifeCycle",
    "LowRankUpdate",
    "Operation",
    "ParameterService",
    "PromptSource",
    "Run",
    "SparseEntries",
    "merge_",
]
