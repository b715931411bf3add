"""The model registry: versions and aliases. The only package that knows MLflow's registry and model format."""
