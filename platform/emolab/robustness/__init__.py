"""Robustness: what is done to a session (corruptions), which of it is evaluated (suites), how, and what is reported."""
