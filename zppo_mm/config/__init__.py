"""The configuration of a run: its keys, what they may be, and how files and options are read."""
