"""Errors that a user can cause; each message says where, what, expected, and what to do."""


class ZppoError(ValueError):
    """Base class of the package's errors."""


class ConfigError(ZppoError):
    """A configuration key or value is wrong."""


class CheckpointError(ZppoError):
    """A checkpoint is missing, incomplete or does not fit."""


class GradingError(ZppoError):
    """The judge or a reward function fails too often, and the run is not to go on with it."""


class NotFiniteError(ZppoError):
    """The network computes NaN or infinity, and the run is not to go on with it."""


class RolloutServersLostError(ZppoError):
    """No server samples any more, and the run is not to go on without."""


class ModelError(ZppoError):
    """A model folder, weight or layout is not usable."""
