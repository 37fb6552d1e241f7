"""Learners: everything that turns batches into better networks. They own the networks, the optimizer, and the target."""
