"""What is shown, logged and recorded holds no secret, and params.yaml takes none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from molf import tracking
from molf.cli import run as molf
from molf.commands import remote_credentials
from molf.config import check_params, read_yaml
from molf.errors import RunError, UserError, main
from molf.secrets import concealed, holds_credential, is_secret
from tests.conftest import ROOT

SECRET = "correct-horse-7f3a9c"


@pytest.mark.parametrize(
    "name",
    "AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SESSION_TOKEN HF_TOKEN MLFLOW_TRACKING_PASSWORD PGPASSWORD "
    "PREFECT_API_KEY PREFECT_API_AUTH_STRING FSSPEC_S3_SECRET AZURE_STORAGE_CONNECTION_STRING SENTRY_DSN "
    "db_password".split(),
)
def test_a_name_tells_a_secret(name: str) -> None:
    assert is_secret(name)
    assert concealed(f"a {SECRET} b", {name: SECRET}) == "a *** b"


@pytest.mark.parametrize(
    "name",
    "PWD OLDPWD TOKENIZERS_PARALLELISM MAX_NEW_TOKENS KEYBOARD SSH_AUTH_SOCK HF_TOKEN_PATH "
    "MLFLOW_TRACKING_URI sse_kms_key_id".split(),
)
def test_other_names_tell_none(name: str) -> None:
    assert concealed(f"a {SECRET} b", {name: SECRET}) == f"a {SECRET} b"


def test_every_form_of_a_value_is_masked() -> None:
    environment = {"API_KEY": 'a"b/c=d e', "OTHER_TOKEN": 'a"b/c=d e and more', "PIN_PASSWORD": "1234"}
    assert concealed("a%22b%2Fc%3Dd%20e", environment) == "***"
    assert concealed(json.dumps({"key": 'a"b/c=d e'}), environment) == '{"key": "***"}'
    assert concealed('a"b/c=d e and more', environment) == "***", "the longest comes first"
    assert concealed("in 1234 steps", environment) == "in 1234 steps", "so short a value stands in ordinary text"
    key = "-----BEGIN KEY-----\nline-one-of-the-key\nline-two-of-the-key\n"
    assert concealed("> line-two-of-the-key", {"PRIVATE_KEY": key}) == "> ***"


def test_a_variable_may_be_named_and_hold_json_or_a_url(tmp_path: Path) -> None:
    assert concealed(SECRET, {"MOLF_SECRETS": "COLOUR, SHAPE", "SHAPE": SECRET}) == "***"
    options = json.dumps({"client_kwargs": {"headers": {"Authorization": SECRET, "Accept": "text/plain"}}})
    assert concealed(f"{SECRET} text/plain", {"FSSPEC_HTTPS": options}) == "*** text/plain"
    assert concealed("p@ssw0rd p%40ssw0rd", {"DATABASE_URI": "postgresql://u:p%40ssw0rd@h/d"}) == "*** ***"
    file = tmp_path / "credentials.json"
    file.touch()
    environment = {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}
    assert concealed(file, environment) == str(file), "where a secret lies is none"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://molf:p@ss@h/db", "postgresql://molf:***@h/db"),
        ("https://oauth2:abc@h/x.git and y", "https://oauth2:***@h/x.git and y"),
        (f"https://{'a' * 20}@h/x.git", "https://***@h/x.git"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://h/x?sig=abc", "https://h/x?sig=***"),
        (f"hf_{'a' * 34}", "***"),
        *(
            (text, text)
            for text in (
                "http://127.0.0.1:4200/a@b",
                "git@github.com:a/b.git",
                "ssh://git@host/a/b",
                "see http://a:80 and x@y",
                "https://h/x?keyword=abc",
                "src/molf/tiny.py",
            )
        ),
    ],
)
def test_a_credential_shows_by_itself(text: str, shown: str) -> None:
    assert concealed(text, {}) == shown
    assert holds_credential(text) == (text != shown)
    assert not holds_credential(shown)


@pytest.mark.parametrize("error", [UserError(f"no {SECRET}"), RunError(f"no {SECRET}"), KeyboardInterrupt(SECRET)])
def test_no_error_shows_a_secret(
    error: BaseException, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)

    def body() -> None:
        raise error

    assert main(body)
    said = capsys.readouterr().err
    assert "***" in said and SECRET not in said


def test_no_traceback_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    code = "import os, molf.errors\ndef body(): raise ZeroDivisionError(os.environ['HF_TOKEN'])\nmolf.errors.main(body)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ZeroDivisionError: ***" in done.stderr and SECRET not in done.stderr


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (
            "tasks.sql",
            "source",
            {"kind": "url", "path": "sources.lock", "files": {"train": [f"https://me:{SECRET}@h/rows.csv"]}},
        ),
        ("tasks.sql.options", "databases", f"https://h/spider.tar?token={SECRET}"),
        ("models.tiny", "license", f"s3://me:{SECRET}@h/" + "x" * 80),
        ("general", "seed", "https://me:" + "x" * 80 + f"{SECRET}@h"),  # of a wrong type too, and cut short where shown
        ("models.tiny", "token", f"hf_{'7f3a9c' * 6}"),  # a key that is not known
        ("grid", f"https://me:{SECRET}@h", "value"),
    ],
)
def test_params_with_a_credential_are_refused_and_it_is_not_shown(place: str, key: str, value: Any) -> None:
    raw = block = read_yaml(ROOT / "params.yaml")
    for name in place.split("."):
        block = block[name]
    block[key] = value
    with pytest.raises(UserError) as raised:
        check_params(raw, "params.yaml")
    assert "set an environment variable instead" in str(raised.value)
    assert "7f3a9c" not in str(raised.value) and "x" * 20 + "..." not in str(raised.value)
    assert f"params.yaml: {place}" in str(raised.value)


def test_a_file_to_inspect_is_refused_with_a_credential(capsys: pytest.CaptureFixture[str]) -> None:
    assert molf(["inspect", f"https://me:{SECRET}@127.0.0.1:9/rows.csv"]) == 2
    said = capsys.readouterr().err
    assert "https://me:***@127.0.0.1:9/rows.csv: it holds a credential" in said and SECRET not in said


def test_remotes_with_credentials_that_git_keeps_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        "['remote \"a\"']\n    url = s3://bucket/molf\n    sse_kms_key_id = alias/molf\n    credentialpath = ../aws\n"
        "['remote \"b\"']\n    url = ssh://me@host/molf\n    ask_password = true\n"
    )
    assert remote_credentials(config) == []
    config.write_text(
        f"['remote \"a\"']\n    url = s3://bucket/molf\n    secret_access_key = {SECRET}\n"
        f"['remote \"b\"']\n    url = https://me:{SECRET}@host/molf\n"
    )
    problems = remote_credentials(config)
    assert len(problems) == 2 and SECRET not in "".join(problems)
    assert "secret_access_key" in problems[0] and "dvc remote modify --local" in problems[0]
    assert remote_credentials(ROOT / ".dvc/config") == []


def test_a_dead_tracker_is_named_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    assert not tracking.initialise(tmp_path, "molf")
    with pytest.raises(RunError) as raised:
        tracking.find_run("f", "molf", tmp_path)
    said = capsys.readouterr().err + str(raised.value)
    assert "127.0.0.1" in said and SECRET not in said and "http://me:***@127.0.0.1:9" in said
