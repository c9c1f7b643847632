"""Exit codes of ranks, and the outcome file that carries them to the launcher."""

import os
import subprocess
import sys

import pytest

from trainer.cluster import outcome
from trainer.errors import DONE, FAILURE, RUN_AGAIN, ConfigError, StoreError


@pytest.fixture
def environ(monkeypatch):
    variables = {}
    monkeypatch.setattr(os, "environ", variables)
    return variables


@pytest.mark.parametrize(("environment", "codes"), [
    ({}, (0, 1, 2, 75, 76)),
    ({"PERDURE_OUTCOME": "f"}, (0, 1, 2, 75, 76)),  # srun passes codes on
    ({"TORCHELASTIC_RUN_ID": "x"}, (0, 1, 2, 0, 76)),  # an agent would restart it
    ({"TORCHELASTIC_RUN_ID": "x", "PERDURE_OUTCOME": "f"}, (0, 0, 0, 0, 0)),
])  # fmt: skip
def test_rank_exit_code_depends_on_launcher(environ, environment, codes):
    environ.update(environment)
    assert tuple(outcome.rank_exit_code(code) for code in (0, 1, 2, 75, 76)) == codes


def test_write_replaces_outcome_and_clear_deletes_it(environ, tmp_path):
    outcome.write(RUN_AGAIN)  # no outcome file is configured
    environ["PERDURE_OUTCOME"] = str(tmp_path / "outcome")
    outcome.clear()
    for code in (FAILURE, RUN_AGAIN, DONE):
        outcome.write(code)
        assert (tmp_path / "outcome").read_text() == str(code)
    outcome.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("previous", [None, "another"])
def test_file_for_ranks_restores_variable(environ, tmp_path, previous):
    if previous:
        environ["PERDURE_OUTCOME"] = previous
    with outcome.file_for_ranks(tmp_path / "outcome"):
        outcome.write(FAILURE)
    assert environ.get("PERDURE_OUTCOME") == previous
    assert outcome.read(tmp_path / "outcome", DONE) == FAILURE
    assert outcome.read(tmp_path / "missing", RUN_AGAIN) == RUN_AGAIN


@pytest.mark.parametrize(("error", "code"), [
    (RuntimeError("a bug"), 1), (ConfigError("no"), 2), (StoreError("no"), 75),
])  # fmt: skip
def test_report_crash_writes_code_of_the_error(environ, tmp_path, capsys, error, code):
    environ["PERDURE_OUTCOME"] = str(tmp_path / "outcome")
    if code != RUN_AGAIN:
        outcome.write(RUN_AGAIN)  # by another rank that detected the loss first
    assert outcome.report_crash(error) == code
    assert (tmp_path / "outcome").read_text() == str(code)
    assert str(error) in capsys.readouterr().err


def test_report_crash_with_run_again_keeps_earlier_failure(environ, tmp_path):
    environ["PERDURE_OUTCOME"] = str(tmp_path / "outcome")
    outcome.report_crash(RuntimeError("a bug"))
    assert outcome.report_crash(StoreError("a disk")) == RUN_AGAIN
    assert (tmp_path / "outcome").read_text() == str(FAILURE)


@pytest.mark.parametrize(("first", "second", "expected"), [
    (1, 75, "1"), (2, 1, "2"), (75, 75, "75"),
])  # fmt: skip
def test_exit_now_keeps_outcome_of_the_failed_rank(tmp_path, first, second, expected):
    for code in (first, second):
        process = subprocess.run(
            [sys.executable, "-c", f"from trainer.cluster import outcome as o; o.exit_now({code})"],
            env={**os.environ, "PERDURE_OUTCOME": str(tmp_path / "outcome")},
        )
        assert process.returncode == code
    assert (tmp_path / "outcome").read_text() == expected
