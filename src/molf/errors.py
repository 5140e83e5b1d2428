"""Errors that a person reads, and the one place where they become exit codes."""

import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

from molf.paths import keep_private
from molf.secrets import concealed


class UserError(Exception):
    """A mistake in what was given (params, files, arguments): every problem found, exit code 2.

    Args:
        problems: One message or several; each says what was given, what is allowed and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunError(Exception):
    """A run that was set up correctly and failed all the same (a loss of NaN, a full disk): exit code 1."""


class Diverged(RunError):
    """A training whose loss, gradients or answers are no numbers any more: its learning rate may be too high."""


class Passing(RunError):
    """A failed run that may succeed at another try, for something around it failed (a host is gone): exit code 75."""


PASSING = 75  # EX_TEMPFAIL of sysexits.h


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop and did so in good order; its message says how to go on. Exit code 1."""


def plain(text: object) -> str:
    """A text whose characters all show: controls, marks of direction and the like as escapes, line breaks too.

    What comes from a file must not drive the terminal.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in str(text)
    )


def _lines(text: object) -> str:
    return "\n".join(map(plain, concealed(text).split("\n")))


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _show_defect(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """A traceback without secrets: other libraries' errors tell addresses as they were given."""
    sys.stderr.write(concealed("".join(traceback.format_exception(kind, error, where))))


def main(function: Callable[[], None]) -> int:
    """Runs a command's body and turns the two errors above into a message and an exit code.

    Libraries that it imports report nothing of their users, and no error shows a secret.

    Args:
        function: The body; anything that it raises beside these and `OSError` is a defect of ours and keeps its
            traceback.

    Returns:
        0, or 2 after a `UserError`, or 1 after a `RunError`, a disk or file that fails, or an interrupt; 75 after
        what may pass.
    """
    keep_private()
    sys.excepthook = _show_defect
    try:
        function()
    except UserError as error:
        count = len(error.problems)
        print(f"error: {count} problem{'s' if count > 1 else ''}", file=sys.stderr)
        for problem in error.problems:
            print(f"  - {_lines(problem)}", file=sys.stderr)
        return 2
    except (RunError, OSError) as error:
        print(f"failed: {_lines(error)}", file=sys.stderr)
        return PASSING if isinstance(error, Passing) else 1
    except KeyboardInterrupt as error:
        print(f"interrupted: {_lines(error)}" if str(error) else "interrupted", file=sys.stderr)
        return 1
    return 0
