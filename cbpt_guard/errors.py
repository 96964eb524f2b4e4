"""The whole error tree: raised low with what was found and what to do, caught once in the CLI.

Each class carries the exit code that the command line answers with:

====  =====================================================================
1     a gate or a check failed; also: a bundle that differs from its manifest
2     wrong usage, malformed input, or an environment that cannot do the work
3     unsafe input was refused
====  =====================================================================
"""


class CbptGuardError(Exception):
    """Any error that cbpt-guard raises on purpose."""

    exit_code = 2


class InputError(CbptGuardError):
    """An input is missing, malformed or does not fit the others."""


class CheckpointError(InputError):
    """A checkpoint is malformed or fits no known architecture."""


class ImageError(InputError):
    """An image cannot be decoded, or exceeds a limit."""


class SetupError(CbptGuardError):
    """The environment cannot do the work: disk, permission, lock, missing extra or provider."""


class UnsafeError(CbptGuardError):
    """An input asks for more than data: it would run code, or hides what it is."""

    exit_code = 3


class CheckError(CbptGuardError):
    """A gate or a check did not pass."""

    exit_code = 1


class BundleError(CheckError):
    """A bundle differs from its manifest, or is none."""
