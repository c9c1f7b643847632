"""The prepare command: output, exit codes, and files after a signal."""

import json
import os
import signal

import pytest

from trainer import prepare
from trainer.data import corpus
from trainer.data.text import Text


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Arguments for a small corpus, with several shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for number in range(30):
        (tmp_path / "corpus" / f"{number}.txt").write_bytes(b"%d words" % number)
    return [
        "data=text", f"data.files='{tmp_path}/corpus/*.txt'", f"data.dir={tmp_path}/shards",
        "data.eval_share=0.3", "data.shard_tokens=50", "sample.shape=[4]",
    ]  # fmt: skip


def test_prepare_prints_folder_tokenizer_and_parts(arguments, tmp_path, capsys):
    assert prepare.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"folder     {tmp_path}/shards" in printed.out
    assert "bytes, 257 tokens as uint16" in printed.out
    assert "train-00000.bin: " in printed.err
    source = Text(
        f"{tmp_path}/corpus/*.txt", 4, eval_share=0.3, dir=f"{tmp_path}/shards", shard_tokens=50
    )
    part = source.prepare(pytest.fail).parts["train"]
    row = next(line for line in printed.out.splitlines() if line.startswith("train"))
    assert row.split()[:3] == ["train", str(part.documents), str(part.tokens)]


def test_prepare_json_prints_only_one_object(arguments, tmp_path, capsys):
    assert prepare.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    content = json.loads(printed.out)
    assert content["folder"] == f"{tmp_path}/shards"
    assert (content["is_prepared"], content["vocabulary"], content["dtype"]) == (
        True,
        257,
        "uint16",
    )
    assert sum(part["documents"] for part in content["parts"].values()) == 30
    index = json.loads((tmp_path / "shards" / "index.json").read_bytes())
    assert content["parts"] == index["parts"]


def test_prepare_without_anything_to_do_reports_that(capsys):
    assert prepare.main([]) == 0
    assert capsys.readouterr().out == "trainer.data.digits.Digits does not need preparation\n"
    assert prepare.main(["data=synthetic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_prepared"] is False


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130),
])  # fmt: skip
def test_prepare_after_a_signal_continues_from_finished_shards(
    arguments, tmp_path, capsys, monkeypatch, number, code
):
    handlers = [signal.getsignal(n) for n in prepare._SIGNALS]
    second, read = tmp_path / "shards" / "train-00001.json", corpus._read_local

    def reading(document):
        if second.exists():
            os.kill(os.getpid(), number)
        return read(document)

    monkeypatch.setattr(corpus, "_read_local", reading)
    assert prepare.main(arguments) == code
    assert "The same command continues." in capsys.readouterr().err
    assert [signal.getsignal(n) for n in prepare._SIGNALS] == handlers
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert names == [".lock", "train-00000.bin", "train-00000.json", "train-00001.bin", second.name]
    monkeypatch.setattr(corpus, "_read_local", read)
    assert prepare.main(arguments) == 0
    assert capsys.readouterr().err.splitlines()[:2] == [
        "train-00000.bin: already complete", "train-00001.bin: already complete",
    ]  # fmt: skip


@pytest.mark.parametrize(("more", "code", "message"), [
    (["data=txt"], 2, "no such choice: data=txt (did you mean 'text'?)"),
    (["data.filse=x"], 2, "has no argument 'filse' (did you mean 'files'?)"),
    (["trainer.max_epohcs=3"], 2, "did you mean 'max_epochs'?"),
    (["data.context=0"], 2, "data.context=0 is too small"),
    (["sample.classes=200"], 2, "set sample.classes=257"),
    (["data.files=/nowhere/*.txt"], 1, "no such files"),
    (["data.eval_share=0.2,0.3"], 2, "data.eval_share: give one value"),
    (["--jsn"], 2, "no such argument: '--jsn' (did you mean '--json'?)"),
    (["words"], 2, "no such argument: 'words'"),
    (["--config-dir=/nowhere"], 2, "--config-dir '/nowhere' is not a directory"),
    (["--config-dir"], 2, "--config-dir '' is not a directory"),
    (["data._target_=nowhere.Data"], 2, "no such module 'nowhere'"),
    (["+data/x=1"], 2, "data/x"),
])  # fmt: skip
def test_prepare_with_invalid_arguments_reports_them(arguments, capsys, more, code, message):
    assert prepare.main([*arguments, *more]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_prepare_with_config_dir_uses_the_users_groups(arguments, tmp_path, capsys):
    folder = tmp_path / "my conf" / "data"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        f"_target_: trainer.data.text.Text\nfiles: {tmp_path}/corpus/*.txt\neval_share: 0.3\n"
    )
    assert prepare.main(["data=mine", "--config-dir", str(folder.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"].startswith(
        f"{tmp_path}/cache/perdure/text-"
    )


def test_prepare_help_prints_the_usage(capsys):
    assert prepare.main(["--help"]) == 0
    assert "usage: python -m trainer.prepare" in capsys.readouterr().out
