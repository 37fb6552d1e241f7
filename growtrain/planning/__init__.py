"""What a run will cost, before it is begun: arithmetic, memory, time."""
