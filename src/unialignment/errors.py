"""Errors a user can act on. The command line prints their message on one line, without a traceback.

Knows nothing of where they are raised; each subclass also derives from the builtin that callers would expect to catch.
"""

from __future__ import annotations


class UniAlignmentError(Exception):
    """Base of every error whose message says what was given, what was expected and how to fix it."""


class InputError(UniAlignmentError, ValueError):
    """An argument (prompt, image, number) is unusable."""


class ConfigError(UniAlignmentError, ValueError):
    """A configuration file or override is unusable."""


class CheckpointError(UniAlignmentError, ValueError):
    """A checkpoint or weights folder is missing, damaged, unsafe or of the wrong architecture."""


class AssetError(UniAlignmentError, RuntimeError):
    """Artwork, a teacher or a data file is missing, or a tool needed to obtain it."""


class StorageError(UniAlignmentError, OSError):
    """Something could not be written; nothing was left half-written."""
