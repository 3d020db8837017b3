"""The user's jobs: train a supernet, rank its subnets, export a student, retrain it. Values with a `run`."""
