"""Training: one recipe, one loop, in one process or under Ray Train."""
