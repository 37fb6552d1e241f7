"""What ends a run through no fault of the program's."""


class RunFailed(RuntimeError):
    """A run cannot go on, and its checkpoints are whole; the message says what happened and, where it is known, what to try."""
