"""The page about a finished or running run."""
