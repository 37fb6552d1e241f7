"""One agent examined: copies of its run with and without an intervention, and what they say."""
