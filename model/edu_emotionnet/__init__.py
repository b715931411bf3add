"""Edu-EmotionNet in PyTorch: the network, its losses and its baselines. Knows neither Ray nor MLflow."""
