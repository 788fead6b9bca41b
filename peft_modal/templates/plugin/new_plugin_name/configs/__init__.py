"""Configurations that `--config` finds by name."""
