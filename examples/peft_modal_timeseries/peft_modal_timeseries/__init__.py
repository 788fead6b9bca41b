"""Time series: a complete modality for peft_modal, in a distribution of its own."""
