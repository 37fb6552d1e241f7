"""Sweeps: many runs, each once, whatever happens to the processes and machines that run them."""
