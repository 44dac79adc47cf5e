"""The error a user's data can cause."""


class DataError(ValueError):
    """A sample, a shard or a media file is not what it must be."""
