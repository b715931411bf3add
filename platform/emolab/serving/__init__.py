"""Predictions from a trained model: over stored sessions in bulk, over a live session step by step, on a device."""
