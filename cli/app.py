"""The commands by name, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from cbpt_guard.cli import bench_suite, bundles, demo, evaluate, predict, purify, scan
from cbpt_guard.cli.show import note, one_line, plain, refused
from cbpt_guard.errors import CbptGuardError

_BUG = 70
_NEEDS_EXTRA = {
    "matplotlib": "bench",
    "onnxruntime": "cpu",
    **dict.fromkeys(("torch", "torchvision", "open_clip", "onnx", "onnxscript", "safetensors", "sklearn"), "purify"),
    **dict.fromkeys(("cyclonedx", "packageurl", "packaging"), "purify"),
}


class _Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C, so that locks are released and the work so far stays resumable."""


_STOPS: dict[int, tuple[type[BaseException], str]] = {
    signal.SIGINT: (KeyboardInterrupt, "interrupted"),
    signal.SIGTERM: (_Terminated, "terminated"),
}
# What asked this process to stop. The exception alone does not tell: a library may wrap it in an error of its own.
_received: list[int] = []


class Commands(TyperGroup):
    """A group whose commands may raise any error of the tree."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; every error ends as one message on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt, _Terminated) as error:
            if hasattr(error, "exit_code") and not isinstance(error, CbptGuardError):  # typer's own: usage, typer.Exit
                raise
            raise typer.Exit(_told(error)) from error


def _told(error: BaseException) -> int:
    """Say what ended a command, and answer its exit code."""
    stops = [number for number, (kind, _) in _STOPS.items() if isinstance(error, kind)] or _received
    if stops:
        note("; ".join([_STOPS[stops[0]][1], *getattr(error, "__notes__", ())]))  # notes: what is kept, by who keeps it
        return 128 + stops[0]
    if isinstance(error, CbptGuardError):
        return refused(error)
    if isinstance(error, BrokenPipeError):
        # the reader of stdout went away; python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.filename is not None:  # what no check foresaw: a folder without rights, ...
        note(f"error: {one_line(str(error.filename))}: {error.strerror}")
        return 2
    return _explained(error)


def _explained(error: BaseException) -> int:
    """Say what an error outside the tree means, and answer its exit code: a missing extra, or a bug."""
    module = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    extra = _NEEDS_EXTRA.get(module.partition(".")[0])
    if extra is not None:
        note(f"error: this command needs {module}: pip install 'cbpt-guard[{extra}]'")
        return 2
    note(traceback.format_exc())
    note(f"this is a bug of cbpt-guard ({type(error).__name__}); please report it with the lines above")
    return _BUG


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Purify a backdoored CLIP zero-shot classifier, export it to ONNX, serve it without torch.",
)
app.command("scan")(scan.scan)
app.command("purify")(purify.purify)
app.command("export")(bundles.export)
app.command("sign")(bundles.sign)
app.command("verify")(bundles.verify)
app.command("inspect")(bundles.inspect)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("demo")(demo.demo)
app.add_typer(bench_suite.app, name="bench")


def _version(show: bool) -> None:
    if show:
        from cbpt_guard import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line; `cbpt-guard` calls this."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell's background ignores it
        signal.signal(signal.SIGINT, _stop)
    app()


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise _STOPS[number][0]


__all__ = ["app", "main", "plain"]
