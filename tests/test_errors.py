"""What a person reads of an error."""

import pytest

from molf.errors import Passing, RunError, UserError, main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError(["first", "a\x1b[2J\n  b\x9b"]), 2),
        (RunError("a\x1b[2J\n  b\x9b"), 1),
        (Passing("a\x1b[2J\n  b\x9b"), 75),
    ],
)
def test_what_a_message_quotes_does_not_drive_the_terminal(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def body() -> None:
        raise error

    assert main(body) == code
    assert "a\\x1b[2J\n  b\\x9b\n" in capsys.readouterr().err
