"""The supervised plasticity probe: which interventions give a network back its ability to learn."""
