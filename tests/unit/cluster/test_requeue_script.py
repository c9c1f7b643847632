"""slurm/requeue.sh: exit codes that requeue the job, with a scontrol that writes down its use."""

import os
import subprocess

import pytest

from tests.support.run_commands import ROOT

SCRIPT = """
source {root}/slurm/requeue.sh
sleep() {{ :; }}
export PERDURE_OUTCOME={folder}/outcome
{function}
"""


def run(folder, function):
    (folder / "bin").mkdir(exist_ok=True)
    scontrol = folder / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>{folder}/requeued\n')
    scontrol.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", SCRIPT.format(root=ROOT, folder=folder, function=function)],
        env={**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
             "PERDURE_PYTHON": str(folder / "python")},
        capture_output=True, text=True,
    )  # fmt: skip
    requeued = folder / "requeued"
    return done.returncode, requeued.read_text() if requeued.exists() else ""


@pytest.mark.parametrize("code", [75, 129, 138, 140, 141, 143])
def test_end_attempt_requeues_after_75_and_after_its_own_signals(tmp_path, code):
    assert run(tmp_path, f"end_attempt {code}") == (75, "requeue 7\n")


@pytest.mark.parametrize("code", [0, 1, 2, 76, 130, 137])
def test_end_attempt_passes_other_codes_on(tmp_path, code):
    assert run(tmp_path, f"end_attempt {code}") == (code, "")


@pytest.mark.parametrize(("outcome", "code", "expected"), [
    ("75", 1, 75), ("1", 143, 1), ("0", 143, 0), ("76", 75, 76), ("75", 137, 75),
    ("75", 134, 134), ("75", 139, 139),  # a rank crashed, and its peers lost it
])  # fmt: skip
def test_end_attempt_prefers_the_outcome_file(tmp_path, outcome, code, expected):
    (tmp_path / "outcome").write_text(outcome)
    assert run(tmp_path, f"end_attempt {code}")[0] == expected
    assert not (tmp_path / "outcome").exists()


@pytest.mark.parametrize(("doctor", "expected"), [("kill -TERM $$", 75), ("exit 2", 2)])
def test_examine_requeues_if_a_signal_ended_the_doctor(tmp_path, doctor, expected):
    (tmp_path / "python").write_text(f"#!/bin/bash\n{doctor}\n")
    (tmp_path / "python").chmod(0o755)
    assert run(tmp_path, "examine name=a")[0] == expected


@pytest.mark.parametrize(
    ("code", "is_rejected"), [(0, False), (1, True), (127, True), (143, False)]
)
def test_end_attempt_prints_what_to_do_if_the_requeue_was_rejected(tmp_path, code, is_rejected):
    """127: this node has no scontrol. Requeueing ends the shell with a signal."""
    function = f"scontrol() {{ return {code}; }}; end_attempt 75 >{tmp_path}/printed"
    assert run(tmp_path, function)[0] == 75
    printed = (tmp_path / "printed").read_text()
    assert ("slurm/chain.sh 5" in printed) == is_rejected


@pytest.mark.parametrize(("failures", "requeues"), [(1, True), (4, True), (5, False)])
def test_commands_of_slurm_are_tried_five_times(tmp_path, failures, requeues):
    """141: SIGPIPE, with which they end if munge hangs up on them."""
    function = f"""
    scontrol() {{
      echo x >>{tmp_path}/calls
      (($(wc -l <{tmp_path}/calls) > {failures})) || return 141
    }}
    end_attempt 75 >{tmp_path}/printed"""
    assert run(tmp_path, function)[0] == 75
    assert len((tmp_path / "calls").read_text().split()) == min(failures + 1, 5)
    assert ("slurm/chain.sh 5" not in (tmp_path / "printed").read_text()) == requeues
