"""Every error that Rootward raises on purpose.

    RootwardError
    ├── InputError        what the user gave: an option, a config file, a document     (exit code 2)
    ├── ArtefactError     a model, index or run that is missing, damaged or of another kind   (4)
    │   └── LayoutMismatch    two sets of parameters that differ                               (4)
    ├── NumericalError    a loss or gradient that is not finite                                (1)
    ├── StorageError      the disk refused; what was finished stays, the same command resumes  (5)
    └── DependencyError   an optional package is missing; the message holds the install line   (1)

A message says what was expected, what came, where, and what to do.
"""


class RootwardError(Exception):
    """Root of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(RootwardError):
    """An option, a config key or a document that cannot be used as given."""

    exit_code = 2


class ArtefactError(RootwardError):
    """A model folder, index or run that is missing, damaged, or made from something else."""

    exit_code = 4


class LayoutMismatch(ArtefactError):
    """Two parameter vectors with different names, shapes or order were about to be combined."""


class NumericalError(RootwardError):
    """A loss, gradient or score that is not finite."""


class StorageError(RootwardError):
    """The disk is full or refuses to write; finished shards are kept and the same command resumes."""

    exit_code = 5


class DependencyError(RootwardError):
    """An optional package is needed and not installed."""
