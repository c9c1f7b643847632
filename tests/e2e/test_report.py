"""The page of a real run, preempted and finished; in a real browser."""

import json
import re
import shutil
import subprocess
import threading

import pytest
from support.report_pages import charts, curve, parsed, tiles
from support.run_commands import HARD, in_folder
from support.run_records import HOSTILE, first, hostile_run, lines, write

from trainer import reporting
from trainer.checkpoint import lineage
from trainer.config.schema import Run
from trainer.reporting import overview
from trainer.storage import LocalStore
from trainer.training import attempt

FRAGILE = [
    *HARD, "task._target_=mine.task.Fragile", "name=a", "checkpoint.metric=accuracy", "report=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The directory of a run that was preempted in step 9 and resumed."""
    command = in_folder(tmp_path_factory.mktemp("real"))
    run = command.folder / "runs/a"
    stopped = command(*FRAGILE, SIGNAL_IN_STEP="SIGTERM")
    assert stopped.returncode == 75, stopped.stderr
    assert not (run / "report.html").exists()  # the run is not finished
    done = command(*FRAGILE, "trainer.clip_norm=2.0")
    assert done.returncode == 0, done.stderr
    assert "report         runs/a/report.html" in done.stdout
    return run


def test_early_stop_has_its_reason_in_the_output_report_and_table(tmp_path):
    command = in_folder(tmp_path)
    constant = [*HARD, "model.batch_norm=false", "optimizer.lr=0", "trainer.patience_evals=2"]
    arguments = [*constant, "name=a", "checkpoint.metric=accuracy", "report=true"]
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    (record,) = lineage.records(LocalStore(command.folder / "runs/a"))
    best = record["best"]
    assert (best["metric"], best["step"]) == ("accuracy", 7)  # of equal ones, the first
    reason = f"accuracy did not improve in 2 evaluations; best {best['value']:.4f} at step 7"
    assert record["reason"] == reason
    assert "Finished at step 20 " in done.stdout
    assert f"Stopped early: {reason}." in done.stdout
    assert reason in (command.folder / "runs/a/report.html").read_text()
    again = command(*arguments)
    assert again.returncode == 0, again.stderr
    assert f"Stopped early: {reason}." in again.stdout
    table = command("runs", "--once", module="trainer.top").stdout
    assert "finished early" in table
    assert reason in table


def test_report_matches_the_run_files(folder):
    page = parsed((folder / "report.html").read_text())
    written = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    page_charts = charts(page)
    for split, name in (("train", "training"), ("eval", "evaluation")):
        expected = [
            (o["step"], pytest.approx(o["loss"], 1e-5)) for o in written if o["split"] == split
        ]
        assert curve(page_charts["Loss"], name) == expected
    best = max(one["accuracy"] for one in written if one["split"] == "eval")
    assert float(tiles(page)["best accuracy"]) == pytest.approx(best, rel=1e-3)
    assert tiles(page)["step"] == "40"
    assert page.all("h1")[0].text == "a finished"
    second, earlier = page.all("table", "attempts")[0].all("tr")[1:]
    assert "SIGTERM" in earlier.text
    assert "changed: trainer.clip_norm: 1.0 -> 2.0" in second.text
    stopped, done = lineage.records(LocalStore(folder))
    assert f"{stopped['last_step']} … 40" in second.text
    assert (done["max_steps"], done["steps_per_epoch"]) == (40, 20)
    steps = [int(row.all("td")[0].text) for row in page.all("section")[3].all("tr")[1:]]
    assert steps == [commit.step for commit in reversed(lineage.commits(LocalStore(folder)))]
    assert [one.text for one in page.all("span", "best")] == ["best"]
    changed = page.all("tr", "changed")
    assert [row.attributes["data-key"] for row in changed] in ([], ["trainer.clip_norm"])


def test_top_row_matches_the_run(folder):
    row = overview.read_row(str(folder), reporting.ObjectStore())
    assert (row.state, row.step, row.max_steps, len(row.attempts)) == ("finished", 40, 40, 2)
    assert row.checkpoint_step == 40
    assert row.metric == "accuracy"


# --- at the end of a run -------------------------------------------------------------------------


def hangs(*arguments, **settings):
    threading.Event().wait(30)


def fails(*arguments, **settings):
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(("writer", "text"), [
    (None, "warning: no report: ConfigError: "),
    (fails, "warning: no report: ZeroDivisionError: a bug"),
    (hangs, "warning: no report: not written within"),
])  # fmt: skip
def test_report_failure_is_logged_and_changes_nothing(tmp_path, capsys, monkeypatch, writer, text):
    if writer is not None:
        monkeypatch.setattr(reporting, "write", writer)
    monkeypatch.setattr(attempt, "_REPORT_S", 0.05 if writer is hangs else 30.0)
    attempt._report(Run(name="a", run_dir=str(tmp_path / "nowhere")))
    output = capsys.readouterr().out
    assert text in output
    assert ("Traceback" in output) is (writer is fails)  # of a bug, and of nothing else
    assert list(tmp_path.iterdir()) == []


# --- in a browser --------------------------------------------------------------------------------


def rendered(page, profile, *flags):
    """Return the page's DOM after its script, and the browser's console errors."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium: apt-get install chromium")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", *flags,
            "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


@pytest.mark.slow
def test_report_renders_in_chromium_without_errors(folder, tmp_path):
    dark = "--blink-settings=preferredColorScheme=0"
    for name, flags in (("light", []), ("dark", [dark]), ("narrow", ["--window-size=400,900"])):
        text, complaints = rendered(folder / "report.html", tmp_path / name, *flags)
        assert complaints == []
        page = parsed(text.removeprefix("<!DOCTYPE html>"))
        elements = page.all("figure", "chart")
        ready = page.all("html")[0].attributes["data-ready"]  # the script has come to its end
        assert int(ready) == len(elements) >= 4
        assert all(element.all("canvas") for element in elements)


USE = """
addEventListener("load", async () => {
  const canvas = document.querySelector("canvas");
  const over = document.querySelector(".u-over");
  const results = [];
  const settled = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const mouse = (kind, share) => {
    const box = over.getBoundingClientRect();
    const at = { clientX: box.left + share * box.width, clientY: box.top + box.height / 2 };
    over.dispatchEvent(new MouseEvent(kind, { ...at, movementX: 1, bubbles: true }));
  };
  const note = async () => {
    await settled();
    const { width, height } = canvas;
    const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const pixels = copy.getImageData(0, 0, width, height).data;
    results.push({
      legends: [...document.querySelectorAll(".chart")].map((chart) =>
        [...chart.querySelectorAll(".u-series")].map((row) => row.textContent)),
      off: document.querySelectorAll(".u-series.u-off").length,
      drawn: pixels.filter((value, index) => index % 4 === 3 && value > 0).length,
    });
  };
  mouse("mouseenter", 0.5);
  mouse("mousemove", 0.5);
  await note();
  mouse("mousedown", 0.5);
  mouse("mousemove", 1);
  mouse("mouseup", 1);
  await settled();
  mouse("mousemove", 0);
  await note();
  mouse("dblclick", 0);
  await settled();
  mouse("mousemove", 0.5);
  await note();
  const names = document.querySelector(".chart").querySelectorAll(".u-series th");
  for (const name of [...names].slice(1)) name.click();
  await note();
  document.documentElement.dataset.results = JSON.stringify(results);
});
"""


@pytest.mark.slow
def test_charts_show_values_zoom_together_and_hide_curves(folder, tmp_path):
    """Mouse events on the first chart, in the page with one script more than its policy allows."""
    text = (folder / "report.html").read_text()
    text = re.sub(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", text)
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{USE}</script></body>"))
    dom, complaints = rendered(tmp_path / "page.html", tmp_path / "profile")
    assert complaints == []
    page = parsed(dom.removeprefix("<!DOCTYPE html>"))
    hovered, zoomed, reset, hidden = json.loads(page.all("html")[0].attributes["data-results"])
    loss = charts(page)["Loss"]
    assert hovered["legends"][0][0] == "step20 (epoch 1)"
    for legend, name in zip(hovered["legends"][0][1:], ("training", "evaluation"), strict=True):
        points = curve(loss, name)
        step, value = min(points, key=lambda point: abs(point[0] - 20))
        text, _, at = legend.removeprefix(name).partition(" (at ")
        assert float(text) == pytest.approx(value, rel=1e-4)
        assert at == ("" if step == 20 else f"{step})")
    assert {legend[0] for legend in hovered["legends"]} == {"step20 (epoch 1)"}
    assert {legend[0] for legend in zoomed["legends"]} == {"step20 (epoch 1)"}  # at the left edge
    assert reset["legends"] == hovered["legends"]
    assert (hovered["off"], hidden["off"]) == (0, 2)
    assert 0 < hidden["drawn"] < reset["drawn"]  # the axes remain


@pytest.mark.slow
def test_extreme_values_are_drawn(tmp_path):
    values = [1e308, -1e308, 1e-320, 5.0]
    extreme = [{**line, "loss": values[line["step"] % 4]} for line in lines()]
    write(tmp_path / "run", extreme, records=[first()])
    reporting.write([str(tmp_path / "run")], str(tmp_path / "page.html"))
    text, complaints = rendered(tmp_path / "page.html", tmp_path / "profile")
    assert complaints == []
    page = parsed(text.removeprefix("<!DOCTYPE html>"))
    assert all(one.all("canvas") for one in page.all("figure", "chart"))
    assert int(page.all("html")[0].attributes["data-ready"]) > 1


@pytest.mark.slow
def test_report_runs_no_script_from_run_files(tmp_path):
    hostile_run(tmp_path / "run")
    path = reporting.write([str(tmp_path / "run")], str(tmp_path / "page.html"))
    text, complaints = rendered(tmp_path / "page.html", tmp_path / "profile")
    assert path == str(tmp_path / "page.html")
    assert complaints == []
    page = parsed(text.removeprefix("<!DOCTYPE html>"))
    assert HOSTILE in page.all("h1")[0].text
    assert page.all("img") == []
    assert all(one.attributes for one in page.all("script") if "alert" in one.text)  # only data
    assert "data-hacked" not in page.all("html")[0].attributes
