"""Comparing methods: one plan of runs, taken by any number of workers, and one table made of what they left."""
