"""A copy of a run's folder in an object store, for a start on a machine that has none."""
