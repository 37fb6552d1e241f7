"""What a run is set to: every setting with its default and bounds, presets, schedules, counts as text."""
