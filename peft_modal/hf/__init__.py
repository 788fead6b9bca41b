"""The bridge to Hugging Face peft: its weight-space tuners as a method, and its LoRA files."""
