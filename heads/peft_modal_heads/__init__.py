"""Heads that any modality may use: features in, predictions out."""
