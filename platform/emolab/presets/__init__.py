"""Ready sets of values for --preset, one YAML file each."""
