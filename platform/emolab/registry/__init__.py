"""The model registry: versions and aliases. The only package that knows MLflow's registry and model format."""

# It sets MLflow's environment, and must do so before anything here imports MLflow.
import emolab.tracking  # noqa: F401  # pyright: ignore[reportUnusedImport]
