"""Corruptions, one module per family; a module that registers one is found by itself (see ``catalog``)."""
