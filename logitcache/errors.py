"""Errors that a user can act on: what, where, expected and found, next command; and their exit
code."""

from __future__ import annotations


class LogitCacheError(ValueError):
    """Base of all user errors. The message says what, where, expected and found; hint says what to
    do."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class UsageError(LogitCacheError):
    """A flag, a setting or a combination of them."""

    exit_code = 2


class InputError(LogitCacheError):
    """The data that was given to read."""

    exit_code = 3


class StoreError(LogitCacheError):
    """A store or a checkpoint that is damaged, incomplete or does not fit."""

    exit_code = 4


class LockedError(LogitCacheError):
    """Another process writes here."""

    exit_code = 5


class ResourceError(LogitCacheError):
    """Disk, memory, permission."""

    exit_code = 6


class NonFiniteError(LogitCacheError):
    """NaN or infinity where a number was due."""

    exit_code = 7


class Interrupted(LogitCacheError):
    """Stopped by a signal, with everything finished so far saved."""

    exit_code = 75
