"""Other people's files, made into shards or read as benchmarks."""
