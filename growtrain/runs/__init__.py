"""One run: its loop, its parts, and everything it does beside learning."""
