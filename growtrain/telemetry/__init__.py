"""Telemetry: what a run costs (phase timers, GPU monitor) and where its records go (sinks). Measuring never intervenes."""
