"""What bad input gets: one message, the right exit code, no traceback, nothing lost."""

import gzip

import pytest
from support.run_commands import HARD, committed

from trainer import run

TINY = [*HARD, "trainer.max_steps=4", "tracker=silent"]


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command in this process, for what is decided before any training; in an empty folder."""
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
def test_a_mistake_is_named_with_its_key_and_a_way_out(here, arguments, words):
    code, _, err = here(*arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err


def test_all_problems_are_shown_together(here):
    code, out, err = here(
        "model=cmn", "optimizer.lrr=1", "trainer.max_epoch=3", "data.foo=1", "seed=-1",
        "checkpoint.mode=mx", "a=[1",
    )  # fmt: skip
    assert code == 2
    assert err.startswith("ConfigError: 7 problems in the configuration:")
    assert out == ""


def test_a_typo_in_a_users_yaml_file_is_found_too(here, tmp_path):
    (tmp_path / "my_conf/experiment").mkdir(parents=True)
    (tmp_path / "my_conf/experiment/mine.yaml").write_text(
        "# @package _global_\ntrainer: {max_stepz: 3}\noptimizer: {lrr: 1}\n"
    )
    code, _, err = here("--config-dir", "my_conf", "experiment=mine", "--check")
    assert code == 2
    assert "trainer.max_stepz" in err
    assert "optimizer.lrr" in err


def test_check_only_checks(here, tmp_path):
    code, out, _ = here("--check")
    assert code == 0
    assert "fine" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_hydras_own_flags_work(command, flags):
    done = command(*flags, "trainer.max_epochs=3")
    assert done.returncode == 0, done.stderr
    assert "max_epochs: 3" in done.stdout
    assert list(command.folder.iterdir()) == []


def test_a_missing_data_directory_says_where_to_get_the_data(command):
    failed = command("data=mnist", "data.dir=/nowhere")
    assert failed.returncode == 1
    assert "data.dir=/nowhere: there is no such directory" in failed.stderr
    assert "dataset-fashion-mnist" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_corrupt_idx_file_is_named(command):
    folder = command.folder / "idx"
    folder.mkdir()
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        (folder / name).write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 9]) + bytes(30))
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (folder / f"{name}.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + bytes(4)))
    failed = command("data=mnist", f"data.dir={folder}", "launch.nproc=2")
    assert failed.returncode == 1
    shown = failed.stdout + failed.stderr
    assert shown.count("train-images-idx3-ubyte") == 1
    assert "cut short or altered" in shown
    assert "Traceback" not in shown


def test_a_run_dir_that_cannot_be_written_is_found_before_training(here, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = here("run_dir=file/run")
    assert code == 2
    assert "run_dir=file/run cannot be written" in err
    assert "Traceback" not in err


def test_a_changed_configuration_is_refused_with_the_difference_and_ways_out(command):
    assert command(*TINY, "name=a").returncode == 0
    refused = command(*TINY, "name=a", "model.hidden=32", "seed=7")
    assert refused.returncode == 2
    assert "model.hidden: 16 -> 32" in refused.stderr
    assert "seed: 0 -> 7" in refused.stderr
    for way in ("name=…", "resume=runs/a", "init.weights="):
        assert way in refused.stderr
    assert not (command.folder / "runs/a/attempts/0002.json").exists()
    never = command(*TINY, "name=a", "resume=never")
    assert never.returncode == 2
    assert "has checkpoints up to step 4" in never.stderr


def test_a_finished_run_says_so_and_a_longer_one_goes_on(command):
    assert command(*TINY, "name=a").returncode == 0
    again = command(*TINY, "name=a")
    assert again.returncode == 0
    assert "runs/a is already finished at step 4" in again.stdout
    longer = command(*TINY, "name=a", "trainer.max_steps=6", "tracker=console")
    assert longer.returncode == 0, longer.stderr
    assert "resuming from step 4; 2 steps left" in longer.stdout
    assert "trainer.max_steps: 4 -> 6" in longer.stdout


@pytest.mark.parametrize("more", [
    ["trainer.log_every_steps=100"], ["trainer.log_every_steps=1"],
    ["checkpoint.every_steps=5", "trainer.max_steps=10"],
])  # fmt: skip
def test_a_gradient_that_is_no_number_is_noticed_before_anything_is_made_of_the_weights(
    command, more
):
    done = command(
        *HARD, "name=a", "trainer.clip_norm=null", *more,
        "task._target_=mine.task.Fragile", NO_GRADIENT_AT="0:10",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "the weights are no numbers after step 10: a gradient was not finite" in done.stderr
    assert "Newest checkpoint, from before: step 5." in done.stderr
    assert committed(command.folder / "runs/a") == [5]


def test_nor_by_a_stop_after_the_step_was_logged(command):
    done = command(
        *HARD, "name=a", "trainer.clip_norm=null", "checkpoint.every_steps=7",
        "task._target_=mine.task.Fragile", NO_GRADIENT_AT="0:10", TERM_AT="0:10",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "the weights are no numbers after step 1" in done.stderr
    assert committed(command.folder / "runs/a") == [7]


@pytest.mark.parametrize(
    ("arguments", "code"), [("trainer.max_steps=2", 0), ("--help", 1), ("--check", 1)]
)
def test_a_training_that_nobody_reads_is_finished_and_nothing_else_is_a_traceback(
    command, arguments, code
):
    process = command.start(*HARD, arguments)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == code, err
    assert "Traceback" not in err
