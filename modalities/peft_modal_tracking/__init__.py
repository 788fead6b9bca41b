"""The tracking modality: LoRAT, generated videos, the field's formats and metrics."""
