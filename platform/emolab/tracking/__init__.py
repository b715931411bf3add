"""Tracking: every number in every report names the run it came from."""
