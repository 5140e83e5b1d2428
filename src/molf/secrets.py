"""Secrets come from the environment; what is shown, logged or recorded holds `***` in their place."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
SHORTEST = 6  # characters of a value that is masked: a shorter one would be found in ordinary words
LINE = 16  # likewise of a line of a value with several, such as a private key, since logs are read line by line
NAMED = "MOLF_SECRETS"  # variable that names further variables whose values are masked, with commas between

# Words of a variable's name, between underscores. What points to a file that holds a secret is none.
_NAME = re.compile(
    r"(?:.*_)?(?:PASS|PASSWD|PASSWORD|PASSPHRASE|PWD?|TOKEN|SECRETS?|KEYS?|APIKEY|AUTH|AUTHORIZATION|CREDENTIALS?|DSN"
    r"|SIGNATURE|SAS|CONNECTION_STRING)(?:_.*)?|.*(?:PASSWORD|SECRET|APIKEY)",
    re.IGNORECASE,
)
_NO_NAME = re.compile(r"PWD|OLDPWD|.*_(?:FILE|PATH|DIR|SOCK|HOME|URL|URI|NAME)|.*KMS_KEY_ID|" + NAMED, re.IGNORECASE)

# The password of a URL, or a token that stands alone before the @; a user's name stays. In `user@host` it is no secret
# unless it is long: git's hosts take a token as the user's name.
_PASSWORD = re.compile(r"(?P<head>\b[a-zA-Z][\w+.-]*://[^\s/:@\"'<>]*:)(?P<secret>[^\s/\"'<>]+)(?=@)")
_ALONE = re.compile(r"(?P<head>\bhttps?://)(?P<secret>[^\s/:@\"'<>]{20,})(?=@)")
_QUERY = re.compile(
    r"(?P<head>[?&](?:[\w.-]*(?:token|secret|password|passwd|signature|credential|api[_-]?key|access[_-]?key)|sig|key)=)"
    r"(?P<secret>[^\s&#\"'<>]+)",
    re.IGNORECASE,
)
# Tokens whose beginning tells what they are: Hugging Face, GitHub, GitLab, AWS's ids of keys, Prefect.
_TOKEN = re.compile(
    r"(?P<head>)(?P<secret>\b(?:hf_\w{20,}|gh[oprsu]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|AKIA[A-Z0-9]{16}"
    r"|pn[ub]_\w{20,}))\b"
)
_SHAPES = (_PASSWORD, _ALONE, _QUERY, _TOKEN)


def concealed(text: object, environment: Mapping[str, str] | None = None) -> str:
    """A text with each secret in it as `***`.

    Secrets are the values of environment variables whose names say so (PASSWORD, TOKEN, SECRET, KEY and the like, and
    those that MOLF_SECRETS names), and, wherever they come from, passwords and signatures in URLs and tokens that are
    known by their beginning. A variable that points to a file that exists is no secret.

    Args:
        text: Anything; taken as `str` says it.
        environment: Where the secrets are; None for this process's own.
    """
    said = str(text)
    for secret in _values(os.environ if environment is None else environment):
        said = said.replace(secret, MASK)
    for shape in _SHAPES:
        said = shape.sub(lambda found: found["head"] + MASK, said)
    return said


def holds_credential(text: str) -> bool:
    """Whether a text has a credential in it: a URL's password or signature, or a token."""
    return any(found["secret"] != MASK for shape in _SHAPES for found in shape.finditer(text))


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is a secret."""
    return _NAME.fullmatch(name) is not None and _NO_NAME.fullmatch(name) is None


_is_secret = cache(is_secret)


def _values(environment: Mapping[str, str]) -> list[str]:
    """Every form in which a secret of the environment may show, the longest first."""
    named = {name.strip() for name in environment.get(NAMED, "").split(",")}
    secrets = {
        secret
        for name, value in environment.items()
        for secret in _of_variable(value, name in named or _is_secret(name))
    }
    return sorted(
        {
            form
            for secret in secrets
            for line in (secret, *(line for line in secret.splitlines() if LINE <= len(line) < len(secret)))
            for form in (line, quote(line, safe=""), json.dumps(line)[1:-1])
            if len(line) >= SHORTEST
        },
        key=lambda form: (-len(form), form),
    )


def _of_variable(value: str, secret: bool) -> Iterator[str]:
    """The secrets that a variable holds: all of it, the password of its URL, the leaves of its JSON."""
    if secret and not os.path.exists(value):
        yield value.strip()
    if value.startswith("{"):  # such as fsspec's options of a file system
        with contextlib.suppress(ValueError):
            yield from _leaves(json.loads(value), secret)
    elif "@" in value and "://" in value:
        for found in _PASSWORD.finditer(value):
            yield from (found["secret"], unquote(found["secret"]))


def _leaves(value: Any, secret: bool) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, secret or _is_secret(key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, secret)
    elif isinstance(value, str) and secret:
        yield value
