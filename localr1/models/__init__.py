"""Model architectures: config.json read once, weights loaded, one forward step at a time."""
