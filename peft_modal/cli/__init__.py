"""The light command line: torch is imported inside the verbs that need it."""
