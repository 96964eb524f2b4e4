"""The command line: thin commands, one place that turns errors into exit codes."""

from cbpt_guard.cli.app import main

__all__ = ["main"]
