"""Looking before training: what a configuration would train, what an adapter file says, how a backbone is built."""
