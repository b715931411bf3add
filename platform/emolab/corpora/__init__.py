"""Corpora, one file each, all yielding the same sessions."""
