"""Session shards, the data contract between preparation and everything after it."""
