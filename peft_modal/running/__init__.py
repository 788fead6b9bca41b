"""Runs: from a configuration to a folder with an adapter file and its metrics."""
