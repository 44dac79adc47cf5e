"""Where questions lie: shards, JSON lines, Parquet and Arrow files, read in place."""
