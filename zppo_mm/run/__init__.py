"""From a configuration to the parts of a run, and the folder that a run writes."""
