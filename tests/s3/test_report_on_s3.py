"""The page of a run in a bucket, and the table of a bucket's runs."""

import json
import uuid

from support.report_pages import charts, curve, parsed
from support.run_records import CONFIG, first, lines, second

from scripts.s3_server import BUCKET
from trainer import report, top
from trainer.storage import open_store


def test_report_of_runs_in_a_bucket_is_written_into_the_run(s3, capsys):
    folder = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    store = open_store(f"{folder}/mine")
    metric_lines = lines()
    parts = {"metrics.jsonl": metric_lines[:20], "metrics/0002-000001.jsonl": metric_lines[20:]}
    for key, some in parts.items():
        store.replace(key, "".join(json.dumps(line) + "\n" for line in some).encode())
    store.replace("config.yaml", json.dumps(CONFIG).encode())  # JSON is YAML
    for number, record in enumerate((first(), second()), 1):
        complete = {"attempt": number, "token": "aaaaaaaa", **record}
        store.replace(f"attempts/{number:04d}.json", json.dumps(complete).encode())
    assert report.main([f"{folder}/mine"]) == 0
    assert f"wrote {folder}/mine/report.html" in capsys.readouterr().out
    page = parsed(store.read("report.html").decode())
    assert page.all("h1")[0].text == "mine finished"
    assert [step for step, _ in curve(charts(page)["Loss"], "training")] == list(range(1, 41))
    assert top.main([folder, "--json"]) == 0
    (text,) = json.loads(capsys.readouterr().out)["runs"]
    assert (text["run"], text["state"]) == (f"{folder}/mine", "finished")
    assert (text["step"], text["attempts"]) == (40, 2)
