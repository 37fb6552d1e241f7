"""Growth: when to inject (schedules), what an injection does to anyone's network (interventions), and how a live learner survives it."""
