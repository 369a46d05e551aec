"""Typed errors. Each says what was wrong, where, and how to mend it; the command line prints it as one line.

``code`` is stable and machine-readable (it is what summary.json shows as ``failure.code``), ``exit_code`` is what
the process ends with.
"""

from __future__ import annotations

from collections.abc import Iterator


class AvrtError(Exception):
    """An error that the user can act on.

    Args:
        message: one or two sentences: what is wrong, where (file, row or key), and the mend.
    """

    code = "error"
    exit_code = 1


class UsageError(AvrtError):
    """Arguments or options that do not fit together."""

    code = "usage"
    exit_code = 2


class ConfigError(AvrtError):
    """A configuration that is not valid; the message names the key."""

    code = "config_invalid"
    exit_code = 3


class DataError(AvrtError):
    """Input data that cannot be used; the message names the file or row."""

    code = "data_invalid"
    exit_code = 4


class MediaError(DataError):
    """A clip that cannot be decoded. Ingest turns it into a dropped row; elsewhere it ends the step."""

    code = "media_invalid"


class NothingKeptError(AvrtError):
    """The filter kept no sample, so there is nothing to train on."""

    code = "nothing_kept"
    exit_code = 5


class ValidationFailedError(AvrtError):
    """The data gate refused the merged traces; the message names the expectation and the rows."""

    code = "validation_failed"
    exit_code = 6


class EnvironmentProblem(AvrtError):
    """Something that the machine lacks: disk, memory, a port, a compiler, a package."""

    code = "environment"
    exit_code = 7


class PortInUseError(EnvironmentProblem):
    """A port that somebody else listens on."""

    code = "port_in_use"


class DiskFullError(EnvironmentProblem):
    """No space left where a step writes."""

    code = "disk_full"


class EngineError(AvrtError):
    """A model could not be loaded, or an endpoint stopped answering."""

    code = "engine_failed"
    exit_code = 8


class NothingAnsweredError(EngineError):
    """Every request of a step, or of one kind in it, was refused: that tells of a setting, and not of the model."""


class TrainingError(AvrtError):
    """Training that went wrong in a way that must not pass: no steps, changed frozen weights, no finite loss."""

    code = "training_failed"
    exit_code = 9


class InterruptedStep(AvrtError):
    """SIGTERM arrived: the step ended early, and goes on from what it has saved when it is started again."""

    code = "interrupted"
    exit_code = 75


class StoreError(AvrtError):
    """The object store refused or lost something."""

    code = "store_failed"
    exit_code = 10


class ServingError(AvrtError):
    """The endpoint did not come up, or its answers failed the check."""

    code = "serving_failed"
    exit_code = 11


class OutputMissingError(AvrtError):
    """A step ended without one of the outputs that the next step needs."""

    code = "output_missing"
    exit_code = 12


def of_code(code: str) -> type[AvrtError]:
    """The class of errors with this ``failure.code``; ``AvrtError`` itself where there is none."""
    return next((kind for kind in _kinds(AvrtError) if kind.code == code), AvrtError)


def of_exit_code(exit_code: int) -> type[AvrtError]:
    """The most general class of errors that end a process so; ``AvrtError`` itself where there is none."""
    return next((kind for kind in _kinds(AvrtError) if kind.exit_code == exit_code), AvrtError)


def _kinds(kind: type[AvrtError]) -> Iterator[type[AvrtError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)
