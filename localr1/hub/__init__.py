"""Models that others publish: their names, and where they come from."""
