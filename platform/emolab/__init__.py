"""emolab: distributed experiments on multimodal affect models, from session shards to the model registry."""

__version__ = "0.1.0"
