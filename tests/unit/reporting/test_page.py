"""The report of hand-written run directories, intact and damaged."""

import base64
import json
import shutil
import struct
import time
import zlib

import pytest
from support.report_pages import charts, curve, parsed, tiles
from support.run_records import CONFIG, first, hostile_run, lines, moment, second, write

from trainer import report, reporting
from trainer.checkpoint import lineage
from trainer.core.nested import flatten
from trainer.errors import ConfigError, StoreError
from trainer.reporting import clock, facts, settings
from trainer.storage import LocalStore, open_store
from trainer.tracking.jsonl import FILE_NAME


@pytest.fixture
def run(tmp_path):
    """Two attempts, 40 steps, finished; nothing of it was ever a checkpoint."""
    return write(tmp_path / "run", lines(), records=[first(), second()])


def page_of(folder, *more):
    return parsed(reporting.render([str(folder), *map(str, more)]))


# --- metrics match the file ---------------------------------------------------------


def test_curves_match_the_metrics_file(run):
    page_charts = charts(page_of(run))
    written = [json.loads(text) for text in (run / FILE_NAME).read_text().splitlines()]
    for key, heading in (("loss", "Loss"), ("accuracy", "Accuracy")):
        for split, name in (("train", "training"), ("eval", "evaluation")):
            expected = [(o["step"], o[key]) for o in written if o["split"] == split]
            assert curve(page_charts[heading], name) == [
                (s, pytest.approx(v, 1e-5)) for s, v in expected
            ]
    assert curve(page_charts["Learning rate"], "lr")[9] == (10, 0.01)
    assert curve(page_charts["Throughput"], "measured")[0] == (1, 101.0)


def test_tiles_show_progress_and_best_evaluation(run):
    page_charts = tiles(page_of(run))
    assert page_charts["step"] == "40"
    assert page_charts["epoch"] == "4"
    assert page_charts["best accuracy"] == "0.9"
    assert page_charts["eval loss"] == "0.0875"
    assert page_charts["train loss"] == "0.075"
    assert page_charts["goodput"] == "95.2 %"  # 40 of 42 steps
    assert page_charts["time"] == "42 s"
    text = page_of(run).all("div", "tiles")[0].text
    assert "of 40" in text  # four epochs of ten steps, as the lines show
    assert "at step 30" in text
    assert "2 steps repeated" in text


def test_attempts_table_shows_ends_and_changes(run):
    page = page_of(run)
    rows = [
        [cell.text for cell in row.all("td")] for row in page.all("table", "attempts")[0].all("tr")
    ]
    assert rows[2][2:5] == ["n1, 2 × cpu", "0 … 20", "21 s"]
    assert rows[2][5] == "stopped SIGTERM"
    assert rows[1][5] == "finished changed: optimizer.lr: 0.2 -> 0.1"
    bars = page.all("i", "bar")
    assert [bar.text for bar in bars if "training" in bar.kinds][:2] == ["1", "2"]
    assert "nothing ran for 6 min" in page.all("i", "idle")[0].attributes["title"]
    facts_table = page.all("table", "facts")[0].text
    assert "world size4earlier: 2" in facts_table


def test_optional_metrics_are_drawn_if_present(run):
    extended = [
        {**line, "step_p50_s": 0.1, "step_p95_s": 0.2, "data_wait_s": 0.01, "tokens_per_s": 5.0,
         "peak_memory_bytes": 1e9, "skipped": 1.0}
        if line["split"] == "train" else line
        for line in lines()
    ]  # fmt: skip
    write(run, extended, records=[first(), second(peak_bytes=[2e9, 3e9])])
    took = {"save_s": 2.0, "stall_s": 0.01, "bytes": 4e9}
    saves = [{"step": s, "time": time.time() - 990 + s, **took} for s in (10, 20)]
    (run / "saves.jsonl").write_text("".join(json.dumps(one) + "\n" for one in saves) + "{\n")
    page = page_of(run)
    page_charts = charts(page)
    assert [one["name"] for one in page_charts["Step time"]["curves"]] == [
        "median", "95th percentile", "wait for data",
    ]  # fmt: skip
    assert curve(page_charts["Saves"], "training stalled") == [(10, 0.01), (20, 0.01)]
    assert {"Tokens per second", "Peak memory", "Skipped"} <= set(page_charts)
    assert "duration 2 s (median; longest 2 s)" in page.text
    assert "2 GB/s" in page.text
    assert "peak bytes3 GB (the largest of 2)" in page.text
    assert "1 damaged line was skipped in saves.jsonl" in page.text
    assert len(page.all("i", "save")) == 2


def test_saves_of_the_running_attempt_in_a_bucket_are_drawn(tmp_path):
    store = open_store(f"memory:/{tmp_path}")
    lineage.begin(store, {})
    store.replace(FILE_NAME, b"")
    saves = [{"step": s, "attempt": 1, "time": 1.0, "save_s": s / 10} for s in (10, 20)]
    for number, one in enumerate(saves, 1):
        store.replace(f"saves/0001-{number:06d}.jsonl", (json.dumps(one) + "\n").encode())
    page_charts = charts(parsed(reporting.render([store.url])))
    assert curve(page_charts["Saves"], "save") == [(10, 1.0), (20, 2.0)]


def test_only_a_loss_that_spans_decades_has_a_log_scale(run):
    page_charts = charts(page_of(run))
    assert page_charts["Loss"]["log"]
    assert not page_charts["Accuracy"]["log"]
    assert not page_charts["Learning rate"]["log"]


def test_nonfinite_values_are_counted(run):
    broken = lines()
    broken[3]["loss"] = broken[5]["loss"] = None
    write(run, broken)
    page = page_of(run)
    assert "2 not finite" in page.all("figure", "chart")[0].text
    assert len(curve(charts(page)["Loss"], "training")) == 38


# --- damaged and hostile files -------------------------------------------------------------------


def test_damaged_lines_are_skipped_and_counted(run):
    texts = (run / FILE_NAME).read_text().splitlines()
    texts[4:4] = ['{"step": 5, "spl', "[]", '{"step": "x", "split": "train"}', "\0\0"]
    (run / FILE_NAME).write_bytes("\n".join([*texts, '{"step": 41, "tra']).encode() + b"\xff")
    page = page_of(run)
    assert "5 damaged lines were skipped in metrics.jsonl" in page.all("ul", "notes")[0].text
    assert len(curve(charts(page)["Loss"], "training")) == 40


@pytest.mark.parametrize("attempts", [0, 1])
def test_run_without_metrics_is_rendered(tmp_path, attempts):
    records = [{"started": moment(5), "host": "n1"}] * attempts
    page = page_of(write(tmp_path / "run", config=None, records=records))
    assert "No metrics yet" in page.text
    assert "No checkpoints." in page.text
    assert "no config.yaml" in page.text
    assert "This run has no samples" in page.text
    assert page.all("span", "pill")[0].text == ("starting" if attempts else "unknown")


def test_unreadable_files_are_reported_and_the_rest_is_shown(run):
    (run / "attempts/0001.json").write_text("{")
    (run / "config.yaml").write_text("a: [")
    page = page_of(run)
    notes = page.all("ul", "notes")[0].text
    assert "attempts/ cannot be read" in notes
    assert "config.yaml is not YAML" in notes
    assert len(curve(charts(page)["Loss"], "training")) == 40


@pytest.mark.parametrize(("newest", "state", "text"), [
    ({"told": 10, "first_step": 0}, "running", "active"),
    ({"told": 500, "first_step": 0}, "silent", "no activity for 8 min: killed or hanging"),
    ({"ended": 100, "outcome": "preempted", "reason": "SIGUSR1"}, "stopped", "SIGUSR1"),
    ({"ended": 100, "outcome": "error", "error": "ValueError: x"}, "died", "ValueError: x"),
])  # fmt: skip
def test_head_shows_the_state(tmp_path, newest, state, text):
    ago = {key: moment(value) for key, value in newest.items() if key in ("told", "ended")}
    record = {"started": moment(600), "host": "n1", **newest, **ago}
    page = page_of(write(tmp_path / "run", lines(began_s=600), records=[record]))
    assert page.all("h1")[0].text == f"mine {state}"
    assert text in page.all("p", "since")[0].text
    assert state in page.all("i", "training")[0].kinds


def test_attempt_without_an_end_lasts_as_long_as_its_lines(tmp_path):
    silent = {"started": moment(1000), "first_step": 0, "told": moment(998)}
    folder = write(tmp_path / "run", lines(), records=[silent, second()])
    run = facts.gather(str(folder), reporting.ObjectStore())
    killed, finished = clock.spans(run)
    assert killed.end_s == run.lines[-1]["time"]
    assert finished.has_ended
    assert "no end recorded" in page_of(folder).all("table", "attempts")[0].text


def test_hostile_file_contents_never_become_markup(tmp_path):
    folder = hostile_run(tmp_path / "run")
    for page in (page_of(folder), page_of(folder, hostile_run(tmp_path / "other"))):
        assert page.text.count("alert(1)") > 2  # it is there, as text
        scripts = page.all("script")
        assert [one.attributes for one in scripts[:-1]] == [{"type": "application/json"}] * (
            len(scripts) - 1
        )
        assert "alert" not in scripts[-1].text
        elements = [one for name in ("img", "a", "link", "iframe", "i") for one in page.all(name)]
        for one in elements:
            assert not any(key.startswith("on") for key in one.attributes)
            assert one.attributes.get("src", "data:").startswith("data:")
            assert one.attributes.get("href", "#").startswith("#")


def test_page_is_one_file_that_loads_nothing(run):
    text = reporting.render([str(run)])
    assert "http://" not in text
    assert "https://" not in text
    (policy,) = [
        one.attributes["content"]
        for one in parsed(text).all("meta")
        if "http-equiv" in one.attributes
    ]
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


# --- samples -----------------------------------------------------------------------------------


def png(side=4):
    def chunk(kind, content):
        summed = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + summed

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(side)) * side)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.fixture
def samples(run):
    folder = run / "samples"
    folder.mkdir()
    for name in ("0007.png", "grid.png"):
        (folder / name).write_bytes(png())
    (folder / "evil.png").write_bytes(b"<svg onload=alert(1)>")
    (folder / "one.txt").write_text("To be, or <not> to be")
    (folder / "index.json").write_text(
        json.dumps({"step": 40, "files": ["0007.png", "grid.png", "one.txt", "../config.yaml", 3]})
    )
    predictions = {
        "samples": [
            {"index": 7, "label": 1, "prediction": 1, "probability": 0.875},
            {"index": 8, "label": 0, "prediction": 1, "probability": 0.6},
        ],
        "confusion": [[5, 1], [0, 4]], "confusion_samples": 10, "classes": ["cat", "dog"],
    }  # fmt: skip
    (folder / "predictions.json").write_text(json.dumps(predictions))
    return folder


def test_samples_are_embedded(run, samples):
    page = page_of(run)
    source = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    assert [image.attributes["src"] for image in page.all("img")] == [source, source]
    right, wrong = page.all("div", "card")
    assert right.text == "dog87.5 %"
    assert right.all("img")  # the image whose name has the sample's number
    assert wrong.text == "dog60.0 %is cat"
    assert "wrong" in wrong.kinds
    assert "To be, or <not> to be" in page.all("pre")[0].text
    matrix = [
        [cell.text for cell in row.all("td")] for row in page.all("table", "confusion")[0].all("tr")
    ]
    assert matrix[1:] == [["5", "1"], ["", "4"]]
    assert "10 samples" in page.text
    assert "Taken at step 40" in page.text


def test_unreadable_samples_are_reported(run, samples, monkeypatch):
    (samples / "predictions.json").write_text("{")
    assert "samples/predictions.json cannot be read" in page_of(run).text
    entries = LocalStore.entries

    def fail(store, prefix):
        if prefix == "samples":
            raise StoreError("no rights")
        return entries(store, prefix)

    monkeypatch.setattr(LocalStore, "entries", fail)
    assert "samples/ cannot be read" in page_of(run).text


@pytest.mark.parametrize("content", [
    "{", "[]", "[1]", '{"samples": 3, "confusion": [[1, 2]], "classes": 4}', '{"samples": [3]}',
    '{"samples": [{}], "confusion": [["a"]]}', '{"confusion": [[-1]]}', "\0",
])  # fmt: skip
def test_malformed_samples_do_not_break_the_page(run, samples, content):
    (samples / "predictions.json").write_text(content)
    (samples / "index.json").write_text(content)
    page = page_of(run)
    assert page.all("table", "confusion") == []
    assert "To be, or <not> to be" in page.text


# --- settings ----------------------------------------------------------------------------------


def test_differing_settings_are_listed():
    one, other = flatten(CONFIG), flatten({**CONFIG, "optimizer": {"lr": 0.2}})
    assert settings.differing([one, one]) == []
    assert settings.differing([one, other]) == ["optimizer.lr"]
    assert settings.differing([one, {}]) == sorted(one)


def test_runs_are_compared(run, tmp_path):
    slow = [{**line, "loss": line["loss"] * 2} for line in lines()]
    for line in slow:
        line["accuracy"] = line["accuracy"] / 2
    config = {**CONFIG, "name": "slow", "optimizer": {"lr": 0.2}}
    other = write(tmp_path / "other", slow, config, [first()])
    page = page_of(run, other)
    page_charts = charts(page)
    assert [one["name"] for one in page_charts["Loss, evaluation"]["curves"]] == ["mine", "slow"]
    assert curve(page_charts["Loss, training"], "slow")[0] == (1, 6.0)
    tables = page.all("table")
    rows = [[cell.text for cell in row.all("td")] for row in tables[0].all("tr")[1:]]
    assert [row[0] for row in rows] == ["mine", "slow"]
    assert rows[0][-2:] == ["accuracy 0.9", "30"]
    assert [cell.text for cell in tables[0].all("b")] == ["accuracy 0.9"]
    assert [cell.text for cell in tables[1].all("td")] == ["optimizer.lr", "0.1", "0.2"]


def test_runs_with_one_name_are_listed_by_url(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    page_charts = charts(page_of(run, tmp_path / "copy"))
    assert [one["name"] for one in page_charts["Loss, evaluation"]["curves"]] == [
        str(run), str(tmp_path / "copy"),
    ]  # fmt: skip
    assert (
        len({one["name"] for one in charts(page_of(run, run))["Accuracy, evaluation"]["curves"]})
        == 2
    )


# --- the command -------------------------------------------------------------------------------


def test_report_command_writes_into_the_run_or_to_out(run, tmp_path, capsys, monkeypatch):
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run}/report.html\n"
    assert parsed((run / "report.html").read_text()).all("h1")[0].text == "mine finished"
    assert report.main([str(run), f"out={tmp_path}/x.html"]) == 0
    assert (tmp_path / "x.html").exists()
    monkeypatch.chdir(tmp_path)
    assert report.main([str(run), "./run", "out="]) == 0
    assert "2 runs" in (tmp_path / "compare.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.html", "run", "x.html"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_report_of_a_folder_ranks_its_runs_by_best_value(tmp_path, mode, monkeypatch, capsys):
    values = {"a": [3.0, 2.0], "b/c": [1.0, 9.0], "d": [5.0, 4.0], "e": []}
    for name, scores in values.items():
        evaluations = [
            {"step": 5 * i, "epoch": 0, "samples": 5 * i, "split": "eval", "score": score}
            for i, score in enumerate(scores, 1)
        ]
        config = {**CONFIG, "name": name, "checkpoint": {"metric": "score", "mode": mode}}
        write(tmp_path / "runs" / name, evaluations, config, [second()])
    monkeypatch.chdir(tmp_path)
    assert report.main(["runs"]) == 0
    assert capsys.readouterr().out == "wrote compare.html\n"
    rows = parsed((tmp_path / "compare.html").read_text()).all("table")[0].all("tr")[1:]
    cells = [
        [cell.text.strip() for cell in (row.all("td")[0], *row.all("td")[-2:])] for row in rows
    ]
    best = {
        "max": [["b/c", "score 9", "10"], ["d", "score 5", "5"], ["a", "score 3", "5"]],
        "min": [["b/c", "score 1", "5"], ["a", "score 2", "10"], ["d", "score 4", "10"]],
    }
    assert cells == [*best[mode], ["e", "–", "–"]]


def test_report_of_many_runs_shows_the_best(tmp_path, monkeypatch):
    for index in range(43):
        value = {"step": 5, "epoch": 0, "samples": 5, "split": "eval", "accuracy": index * 7 % 43}
        write(tmp_path / f"runs/{index}", [value], {**CONFIG, "name": str(index)}, [second()])
    page = page_of(tmp_path / "runs")
    assert "The best 40 of 43 runs" in page.all("header")[0].text
    names = [row.all("td")[0].text.strip() for row in page.all("table")[0].all("tr")[1:]]
    assert [int(name) * 7 % 43 for name in names] == list(range(42, 2, -1))


def test_report_of_a_folder_with_one_run_is_the_page_of_that_run(run, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"wrote {run}/report.html\n"


@pytest.mark.parametrize(("arguments", "text"), [
    (["{}/nope"], "does not exist, or is empty"),
    (["{}/run/attempts"], "is not a run (it has 0001.json"),
    (["{}/run", "{}/nope"], "nope does not exist"),
    (["{}/run", "out=/proc/x/report.html"], "choose another path with out="),
    (["{}/run", "out={}/"], "not a file name"),
    (["{}/run", "outt=x"], "did you mean 'out'?"),
    (["out=x"], "1 to 1000 paths needed, 0 given"),
])  # fmt: skip
def test_report_command_rejects_bad_arguments_and_writes_nothing(
    run, tmp_path, capsys, arguments, text
):
    assert report.main([one.replace("{}", str(tmp_path)) for one in arguments]) == 2
    assert text in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_write_rejects_a_folder_that_is_not_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")  # a folder of configurations, for one
    with pytest.raises(ConfigError, match="is not a run"):
        facts.gather(str(tmp_path), reporting.ObjectStore())


def test_render_changes_nothing(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    reporting.render([str(run)])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert lineage.attempts(LocalStore(run)) == [1, 2]


def test_absurd_numbers_do_not_break_the_page(tmp_path):
    huge = 10**400
    config = {**CONFIG, "trainer": {"max_steps": huge}}
    records = [{**first(), "first_step": -huge}, {**second(), "last_step": huge, "save_s": huge}]
    metric_lines = [{**lines()[0], "loss": huge, "step_p50_s": huge}, *lines()[1:]]
    page = page_of(write(tmp_path / "run", metric_lines, config, records))
    assert len(charts(page)) > 0
