"""From finished and unfinished runs to a report: statistics, curves, figures, one page."""
