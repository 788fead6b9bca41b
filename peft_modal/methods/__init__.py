"""Methods that work on any backbone; methods of one modality live in its plugin."""

from peft_modal.methods.base import Method, select_blocks

__all__ = ["Method", "select_blocks"]
