"""A run that is profiled and then runs out of memory."""

import gzip
import json
from textwrap import dedent

from support.run_commands import HARD

FULL = """
    import torch

    from trainer.task import Classification


    class Full(Classification):
        steps = 0

        def loss(self, model, batch):
            self.steps += 1
            if self.steps == 4:
                torch.empty(1 << 46)  # more than any machine can address
            return super().loss(model, batch)
"""


def test_out_of_memory_writes_the_trace_and_gives_advice(command):
    package = command.folder.parent / "packages" / "mine"
    (package / "full.py").write_text(dedent(FULL))
    done = command(
        *HARD, "name=full", "task._target_=mine.full.Full", "profile=true",
        "trainer.profile_first_step=2", "trainer.profile_steps=1",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: out of memory on rank 0: " in done.stderr
    assert "Microbatch: 12 samples (12 per rank, trainer.accumulate=1)" in done.stderr
    assert "trainer.accumulate=2: microbatches of 6" in done.stderr
    run = command.folder / "runs" / "full"
    assert "profile of steps 2 to 2" in done.stdout
    trace = json.loads(
        gzip.decompress((run / "profile/attempt-0001-steps-2-2.json.gz").read_bytes())
    )
    assert any("mkldnn_convolution" in str(event.get("name")) for event in trace["traceEvents"])
    record = json.loads((run / "attempts/0001.json").read_text())
    assert record["error"].startswith("TrainingError: out of memory on rank 0")
    assert record["peak_bytes"][0] > 10_000_000
    assert record["step_p50_s"] > 0
