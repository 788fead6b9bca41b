"""Tasks: Lightning modules that hold backbone, adapter and head, and drive the adapter's life cycle."""
