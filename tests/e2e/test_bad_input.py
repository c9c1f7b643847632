"""Bad input: one message, the right exit code, no traceback, nothing lost."""

import gzip

import pytest
from support.run_commands import HARD, committed

from trainer import run
from trainer.checkpoint import lineage
from trainer.storage import open_store

TINY = [*HARD, "trainer.max_steps=4", "tracker=silent"]


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run the command in this process and an empty folder, for errors before any training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trainer.run"])

    def call(*arguments):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        code = run.main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


CASES = [
    (["trainer.max_epoch=3"], ["trainer.max_epoch", "did you mean 'max_epochs'?"]),
    (["modle=mlp"], ["modle", "did you mean 'model'?"]),
    (["model=cmn"], ["no such choice: model=cmn", "did you mean 'cnn'?"]),
    (["model.hiden=3"], ["model.hiden", "no argument 'hiden'", "did you mean 'hidden'?"]),
    (["model.hidden=wide"], ["model.hidden", "'wide' is not int"]),
    (["model._target_=models.cnn.CMN"], ["model._target_", "did you mean 'CNN'?"]),
    (["model._target_=nowhere.Net"], ["model._target_", "no such module 'nowhere'"]),
    (["optimizer.lrr=0.1"], ["optimizer.lrr", "did you mean 'lr'?"]),
    (["optimizer.lr=fast"], ["optimizer.lr", "'fast'"]),
    (["trainer.max_epochs=2.5"], ["trainer.max_epochs", "2.5"]),
    (["trainer.precision=fp61"], ["trainer.precision", "did you mean 'fp16'?"]),
    (["launch.nproc=two"], ["launch.nproc", "'two' is neither auto nor"]),
    (
        ["launch.nproc=3", "trainer.global_batch_size=64"],
        ["trainer.global_batch_size", "3 ranks", "nearest: 63 or 66"],
    ),
    (["preemption.signals=[SIGKILL]"], ["preemption.signals", "'SIGKILL'"]),
    (["init.weights=no.safetensors"], ["init.weights", "is not a file"]),
    (["name=a/b"], ["name", "'a/b'"]),
    (["trainer.max_epochs=null"], ["the run would never end"]),
    (["+extra.thing=1"], ["extra", "no such key"]),
    (["a=[1"], ["cannot be parsed"]),
    (["@x=1"], ["command line"]),
    (["resume=12"], ["resume=12", "no checkpoint of that step"]),
    (["resume=somewhere/else"], ["resume=somewhere/else", "no committed checkpoint"]),
]


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=lambda value: str(value[0]))
def test_wrong_argument_is_reported_with_its_key_and_a_correction(here, arguments, words):
    code, _, err = here(*arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err


def test_several_problems_are_reported_together(here):
    code, out, err = here(
        "model=cmn", "optimizer.lrr=1", "trainer.max_epoch=3", "data.foo=1", "seed=-1",
        "checkpoint.mode=mx", "a=[1",
    )  # fmt: skip
    assert code == 2
    assert err.startswith("error: 7 problems in the configuration:")
    assert out == ""


def test_typo_in_a_user_yaml_file_is_reported(here, tmp_path):
    (tmp_path / "my_conf/experiment").mkdir(parents=True)
    (tmp_path / "my_conf/experiment/mine.yaml").write_text(
        "# @package _global_\ntrainer: {max_stepz: 3}\noptimizer: {lrr: 1}\n"
    )
    code, _, err = here("--config-dir", "my_conf", "experiment=mine", "--check")
    assert code == 2
    assert "trainer.max_stepz" in err
    assert "optimizer.lrr" in err


def test_check_starts_nothing(here, tmp_path):
    code, out, _ = here("--check")
    assert code == 0
    assert "fine" in out
    assert list(tmp_path.iterdir()) == []


def test_check_run_computes_one_batch_and_writes_nothing(here, tmp_path):
    small = ["data=synthetic", "sample.shape=[1,8,8]", "checkpoint.metric=accuracy"]
    code, out, err = here("--check=run", *small)
    assert code == 0, err
    assert "A training batch and an evaluation batch were computed" in out
    code, _, err = here("--check=run", *small, "model.input_shape=[3,8,8]")
    assert code == 2
    assert "the training data does not fit the model" in err
    assert "conv1, Conv2d(3, 32" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_misspelt_metric_is_rejected_before_the_first_step(here, tmp_path):
    code, _, err = here(
        "data=synthetic", "sample.shape=[1,8,8]", "checkpoint.metric=acuracy", "name=a"
    )
    assert code == 2
    assert "did you mean 'accuracy'" in err
    assert not (tmp_path / "runs/a/metrics.jsonl").exists()


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_hydra_flags_work(command, flags):
    done = command(*flags, "trainer.max_epochs=3")
    assert done.returncode == 0, done.stderr
    assert "max_epochs: 3" in done.stdout
    assert list(command.folder.iterdir()) == []


def test_missing_data_directory_names_a_source_of_the_data(command):
    failed = command("data=mnist", "data.dir=/nowhere")
    assert failed.returncode == 1
    assert "data.dir=/nowhere: no such directory" in failed.stderr
    assert "dataset-fashion-mnist" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_corrupt_idx_file_is_named_once(command):
    folder = command.folder / "idx"
    folder.mkdir()
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        (folder / name).write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 9]) + bytes(30))
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (folder / f"{name}.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + bytes(4)))
    failed = command("data=mnist", f"data.dir={folder}", "launch.nproc=2")
    assert failed.returncode == 1
    output = failed.stdout + failed.stderr
    assert output.count("train-images-idx3-ubyte") == 1
    assert "truncated or altered" in output
    assert "Traceback" not in output


def test_unwritable_run_dir_is_reported_before_training(here, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = here("run_dir=file/run")
    assert code == 2
    assert "run_dir=file/run cannot be written" in err
    assert "Traceback" not in err


def test_changed_state_setting_is_rejected_with_differences_and_alternatives(command):
    assert command(*TINY, "name=a").returncode == 0
    rejected = command(*TINY, "name=a", "model.hidden=32", "seed=7")
    assert rejected.returncode == 2
    assert "model.hidden: 16 -> 32" in rejected.stderr
    assert "seed: 0 -> 7" in rejected.stderr
    for option in ("name=…", "resume=runs/a", "init.weights="):
        assert option in rejected.stderr
    assert not (command.folder / "runs/a/attempts/0002.json").exists()
    never = command(*TINY, "name=a", "resume=never")
    assert never.returncode == 2
    assert "has checkpoints up to step 4" in never.stderr


def test_finished_run_is_reported_and_a_longer_one_continues(command):
    assert command(*TINY, "name=a").returncode == 0
    again = command(*TINY, "name=a")
    assert again.returncode == 0
    assert "runs/a is finished at step 4" in again.stdout
    longer = command(*TINY, "name=a", "trainer.max_steps=6", "tracker=console")
    assert longer.returncode == 0, longer.stderr
    assert "resuming from step 4; 2 steps left" in longer.stdout
    assert "trainer.max_steps: 4 -> 6" in longer.stdout


@pytest.mark.parametrize("more", [
    ["trainer.log_every_steps=100"], ["trainer.log_every_steps=1"],
    ["checkpoint.every_steps=5", "trainer.max_steps=10"],
])  # fmt: skip
def test_nonfinite_gradient_is_detected_before_the_weights_are_used(command, more):
    done = command(
        *HARD, "name=a", "trainer.clip_norm=null", *more,
        "task._target_=mine.task.Fragile", NO_GRADIENT_AT="0:10",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "weights became NaN or infinite at step 10" in done.stderr
    assert "Last good checkpoint: step 5." in done.stderr
    assert committed(command.folder / "runs/a") == [5]


def test_nonfinite_gradient_is_detected_before_the_save_of_a_stop(command):
    done = command(
        *HARD, "name=a", "trainer.clip_norm=null", "checkpoint.every_steps=7",
        "task._target_=mine.task.Fragile", NO_GRADIENT_AT="0:10", TERM_AT="0:10",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "weights became NaN or infinite at step 1" in done.stderr
    assert committed(command.folder / "runs/a") == [7]


@pytest.mark.parametrize(
    ("arguments", "code"), [("trainer.max_steps=2", 0), ("--help", 1), ("--check", 1)]
)
def test_closed_output_neither_stops_training_nor_causes_a_traceback(command, arguments, code):
    process = command.start(*HARD, arguments)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == code, err
    assert "Traceback" not in err


@pytest.mark.parametrize("ranks", [1, 2])
def test_tracker_constructor_failure_is_a_config_error_and_never_a_crash_loop(command, ranks):
    tracker = "tracker={mine: {_target_: mine.tracker.Broken}}"
    for _ in range(4):  # launch.max_attempts_without_progress is 3
        failed = command(*HARD, "name=a", f"launch.nproc={ranks}", "~tracker", f"+{tracker}")
        assert failed.returncode == 2, failed.stderr
        assert "error: " in failed.stderr
        assert "tracker.mine: cannot create mine.tracker.Broken: RuntimeError" in failed.stderr
        assert "Traceback" not in failed.stderr
    records = lineage.records(open_store(str(command.folder / "runs/a")))
    assert all("ended" in record for record in records)
    done = command(*TINY, "name=a")
    assert done.returncode == 0, done.stderr


DIVIDED = """
import os

import torch
from torch.utils.data import IterableDataset


class Data(IterableDataset):
    def __iter__(self):
        for number in range(int(os.environ.get("RANK", "0")), 480, 2):
            yield torch.full((1, 8, 8), float(number)), number % 10
"""


def test_stream_divided_by_rank_is_rejected_before_the_first_step(command):
    (command.folder.parent / "packages/divided.py").write_text(DIVIDED)
    failed = command(
        "name=a", "data._target_=divided.Data", "sample.shape=[1,8,8]", "trainer.max_steps=4",
        "trainer.smoke=false", "launch.nproc=2", "launch.threads=1", "tracker=silent",
    )  # fmt: skip
    assert failed.returncode == 2, failed.stderr
    assert "error: data: divided.Data gives rank 1 other training samples" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert committed(command.folder / "runs/a") == []
