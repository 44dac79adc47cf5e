"""Model families: how each one's config.json reads. One file a family, one line in `table`."""
