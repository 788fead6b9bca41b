"""The dispatcher: reads the verb, imports what it needs, and turns errors into sentences."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from peft_modal._version import __version__
from peft_modal.cli.options import PROGRAM, VERBS, Options, handler_of, parse, program_help, requested_help
from peft_modal.cli.output import write
from peft_modal.errors import ConfigError, PeftModalError, nearest
from peft_modal.registry import default_registry


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        0 when it worked, 2 for a mistake of the user, 1 for a bug, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _spoken_warnings({"peft_modal"}):
        return _answered(arguments)


def _answered(arguments: list[str]) -> int:
    """The exit code, with errors said as sentences."""
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # here and not at exit, so that a reader that has gone is noticed below
    except SystemExit as stop:  # argparse's `--help`
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; without this Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PeftModalError as error:
        _show_traceback()
        for problem in error.problems if isinstance(error, ConfigError) else str(error).splitlines():
            _complain(f"error: {problem}")
        return 2
    except Exception as error:  # noqa: BLE001 - the last line of defence: nobody is served by a page of traceback
        _show_traceback()
        _complain(
            f"error: this is a bug in peft_modal or in a plugin: {type(error).__name__}: {error} "
            "(PEFT_MODAL_DEBUG=1 shows the traceback)"
        )
        return 1
    return code


class _Spoken(logging.Handler):
    """Says what packages warn of like errors, without their exit code."""

    # Without `@override`, since `doctor` has to start where typing_extensions is missing.
    def emit(self, record: logging.LogRecord) -> None:
        _complain(f"warning: {record.getMessage()}")


@contextmanager
def _spoken_warnings(packages: Iterable[str]) -> Iterator[None]:
    """Say what these packages warn of for the time of a command: they stay silent where another program uses them."""
    loggers, handler = [logging.getLogger(package) for package in packages], _Spoken(logging.WARNING)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _dispatch(arguments: list[str]) -> int:
    wanted = requested_help(arguments)
    if wanted is not None:
        from peft_modal.cli.node_help import print_node_help

        print_node_help(default_registry(), *wanted)
        return 0
    if not arguments or arguments[0] in {"-h", "--help"}:
        write(program_help())
        return 0
    verb, *rest = arguments
    if verb == "--version":
        write(f"{PROGRAM} {__version__}")
        return 0
    if verb.startswith("-"):
        known = ["--help", "--version"]
        raise ConfigError(f"a verb must come first ({', '.join(VERBS)}), got '{verb}'; {nearest(verb, known)}")
    return _run(parse(verb, rest, plugins=default_registry))


def _run(options: Options) -> int:
    if options.print_config:
        from peft_modal.compose import compose

        write(compose(*options.config, overrides=options.overrides, registry=default_registry()).to_yaml())
        return 0
    module, _, function = handler_of(options.verb).partition(":")
    handler: Callable[[Options], int] = getattr(importlib.import_module(module), function)
    with _spoken_warnings(default_registry().packages - {"peft_modal"}):
        return handler(options)


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")


def _show_traceback() -> None:
    if os.environ.get("PEFT_MODAL_DEBUG") == "1":
        traceback.print_exc()
