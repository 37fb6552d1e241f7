"""Replay memories: what was lived through, kept so that learning can draw from it again."""
