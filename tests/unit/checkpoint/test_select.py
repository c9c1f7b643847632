"""Selection: which checkpoint a path and a request mean, compared with the documented rules.

Only manifests decide, so these checkpoints have no shards.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.manifests import commit_manifest, evaluated, sealed, spoil
from support.timelines import start

from trainer.checkpoint import lineage, location, manifest, select
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.replicas import Replicas
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import LocalStore
from trainer.storage.store import Fallback

RUN_FACTS = {"resumed_from": {"step": 0}}


@pytest.fixture
def replicas(tmp_path: Path) -> Replicas:
    """A run and its mirror, with the record of one attempt."""
    both = Replicas(LocalStore(str(tmp_path / "run")), LocalStore(str(tmp_path / "mirror")))
    both.begin(RUN_FACTS)
    return both


# --- the newest ----------------------------------------------------------------------------------


def test_newest_intact_skips_a_damaged_newest_and_names_it(replicas):
    alone = Replicas(replicas.run)
    first, second, third = (commit_manifest(alone.run, step) for step in (10, 20, 30))
    spoil(alone.run, third)
    lineage.mark_damaged(alone.run, second, "bytes 1 to 2 do not match")
    selection = select.newest_intact(alone.survey(), alone.run.url)
    assert (selection.commit, selection.manifest.step) == (first, 10)
    assert selection.urls == (alone.run.url,)
    assert selection.is_copied
    (error,) = selection.skipped  # a marked one is known to be damaged and is not tried
    assert third.manifest_key in error


def test_newest_intact_stops_at_an_intact_manifest_of_a_later_version(replicas):
    alone = Replicas(replicas.run)
    commit_manifest(alone.run, 10)
    newest = commit_manifest(alone.run, 20)
    later = alone.run.read(newest.manifest_key).replace(b'"version":2', b'"version":3')
    alone.run.replace(newest.manifest_key, later)  # its checksum does not match: damaged
    assert select.newest_intact(alone.survey(), alone.run.url).commit.step == 10
    fields = later.partition(b',\n"checksum"')[0].decode().removeprefix("{\n")
    alone.run.replace(newest.manifest_key, sealed(fields))
    with pytest.raises(manifest.VersionError, match="reads versions 1 to 2"):
        select.newest_intact(alone.survey(), alone.run.url)


def test_newest_intact_reads_the_mirror_where_the_run_is_damaged(replicas):
    commit_manifest(replicas.stores, 10)
    newest = commit_manifest(replicas.stores, 20)
    spoil(replicas.run, newest)
    selection = select.newest_intact(replicas.survey(), replicas.run.url)
    assert (selection.commit, selection.urls) == (newest, (replicas.mirror.url,))
    assert len(selection.skipped) == 1
    lineage.mark_damaged(replicas.run, newest, "a manifest that does not match")
    selection = select.newest_intact(replicas.survey(), replicas.run.url)
    assert (selection.commit, selection.urls) == (newest, (replicas.mirror.url,))
    assert selection.skipped == ()


def test_newest_intact_without_copy_is_not_copied(replicas):
    commit_manifest(replicas.stores, 10)
    newest = commit_manifest(replicas.run, 20)
    survey = replicas.survey()
    selection = select.newest_intact(survey, replicas.run.url)
    assert (selection.commit, selection.is_copied) == (newest, False)
    older = select.newest_intact(survey, replicas.run.url, commits=survey.commits[:1])
    assert (older.commit.step, older.is_copied) == (10, True)
    assert older.urls == (replicas.run.url, replicas.mirror.url)


def test_newest_intact_passes_over_views_that_failed_to_load(replicas):
    older, newest = commit_manifest(replicas.stores, 10), commit_manifest(replicas.stores, 20)
    survey, url = replicas.survey(), replicas.run.url
    damaged, steps = [], []
    for _ in range(4):
        selection = select.newest_intact(survey, url, damaged=damaged)
        damaged.append((selection.commit, selection.urls))
        steps.append((selection.commit, len(selection.urls)))
    assert steps == [(newest, 2), (newest, 1), (older, 2), (older, 1)]
    with pytest.raises(CheckpointError, match=r"every checkpoint in .*run is damaged"):
        select.newest_intact(survey, url, damaged=damaged)


def test_newest_intact_with_all_damaged_names_each(replicas):
    commits = [commit_manifest(replicas.run, step) for step in (10, 20)]
    for damaged in commits:
        spoil(replicas.run, damaged)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .*run is damaged") as error:
        select.newest_intact(replicas.survey(), replicas.run.url)
    assert all(damaged.manifest_key in str(error.value) for damaged in commits)


# --- a step --------------------------------------------------------------------------------------


def test_named_step_accepts_leading_zeros_and_lists_the_steps(replicas):
    zero, ten = commit_manifest(replicas.run, 0), commit_manifest(replicas.run, 10)
    survey = replicas.survey()
    for text in ("10", "010", "00000010"):
        assert select.named_step(survey, text, "runs/a", "step=") == ten
    for text in ("0", "000"):
        assert select.named_step(survey, text, "runs/a", "step=") == zero
    for text in ("1", "100", "", "-10", "1e1", "١٠", "next"):
        with pytest.raises(ConfigError) as error:
            select.named_step(survey, text, "runs/a", "resume=")
        assert str(error.value) == (
            f"resume={text}: no checkpoint of that step in runs/a; steps available: 0, 10"
        )
    with pytest.raises(ConfigError, match="steps available: none"):
        select.named_step(Replicas(replicas.mirror).survey(), "10", "runs/a", "step=")


def test_step_in_two_folders_selects_newest_attempt(tmp_path):
    store = LocalStore(str(tmp_path))
    _, newer = commit_manifest(store, 10, attempt=1), commit_manifest(store, 10, attempt=2)
    survey = location.open_location(str(tmp_path)).survey()
    assert select.at_step(survey, 10) == newer
    assert select.named_step(survey, "10", "runs/a", "step=") == newer
    assert select.at_step(survey, 11) is None


# --- the best ------------------------------------------------------------------------------------


def test_best_of_equal_values_is_the_earliest(replicas):
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.9), (40, 0.5)):
        commit_manifest(replicas.run, step, evaluated(step, accuracy=accuracy))
    survey = replicas.survey()
    assert select.best(survey, "accuracy", "max").step == 20
    assert select.best(survey, "accuracy", "min").step == 10


def test_best_ignores_checkpoints_without_the_metric_at_their_step(replicas):
    commit_manifest(replicas.run, 10, evaluated(10, accuracy=0.5))
    commit_manifest(replicas.run, 20, evaluated(10, accuracy=0.9))  # from an earlier evaluation
    commit_manifest(replicas.run, 30, evaluated(30, loss=0.1))
    commit_manifest(replicas.run, 40, evaluated(40, accuracy=None))
    commit_manifest(replicas.run, 50, {"last_eval_step": 50, "metrics": "none"})
    commit_manifest(replicas.run, 60)
    survey = replicas.survey()
    assert select.best(survey, "accuracy", "max").step == 10
    assert select.best(survey, "loss", "min").step == 30
    assert select.best(survey, "recall", "max") is None
    assert select.best(survey, None, "max") is None
    assert select.best(Replicas(replicas.mirror).survey(), "accuracy", "max") is None


@pytest.mark.parametrize(
    ("metric", "stored", "step"),
    [
        ("loss", {"metric": "loss", "mode": "max"}, 20),  # the name decides
        ("score", {"metric": "score", "mode": "min"}, 20),  # then the run's mode
        ("score", {"metric": "other", "mode": "min"}, 10),  # which is another metric's
        ("score", {}, 10),
    ],
)
def test_best_without_mode_uses_metric_name_then_stored_mode(replicas, metric, stored, step):
    for number, value in ((10, 0.5), (20, 0.1), (30, 0.3)):
        state = evaluated(number, **{metric: value})
        commit_manifest(replicas.run, number, state, config={"checkpoint": stored})
    assert select.best(replicas.survey(), metric, None).step == step


def test_best_reports_a_damaged_manifest_unless_the_mirror_has_it(replicas):
    commit_manifest(replicas.stores, 10, evaluated(10, accuracy=0.5))
    damaged = commit_manifest(replicas.stores, 20, evaluated(20, accuracy=0.9))
    spoil(replicas.run, damaged)
    assert select.best(replicas.survey(), "accuracy", "max") == damaged
    spoil(replicas.mirror, damaged)
    with pytest.raises(CheckpointError, match=damaged.manifest_key):
        select.best(replicas.survey(), "accuracy", "max")


# --- random runs ---------------------------------------------------------------------------------

COPIES = st.sampled_from(["intact", "spoiled", "marked", "absent"])
LISTED = {"intact", "spoiled"}
"""Copies that a survey lists; the damage of a spoiled one is not known before it is read."""
METRICS = st.none() | st.sampled_from([0.0, 0.5, 1.0]) | st.floats(-2, 2)
CHECKPOINTS = st.dictionaries(
    st.integers(0, 40), st.tuples(COPIES, COPIES, METRICS), min_size=1, max_size=6
)


@given(CHECKPOINTS, st.booleans(), st.sampled_from(["max", "min"]), st.integers(0, 4))
def test_selection_agrees_with_the_documented_rules(
    tmp_path_factory, checkpoints, has_mirror, mode, zeros
):
    folder = tmp_path_factory.mktemp("random")
    stores = [LocalStore(str(folder / name)) for name in ("run", "mirror")[: 1 + has_mirror]]
    Replicas(*stores).begin(RUN_FACTS)
    commits = {}
    for step, (*copies, metric) in checkpoints.items():
        commits[step] = here = Commit(step, 1, f"checkpoints/{manifest.folder_name(step, 1)}")
        for store, copy in zip(stores, copies, strict=False):
            if copy != "absent":
                commit_manifest(store, step, evaluated(step, accuracy=metric))
            if copy == "spoiled":
                spoil(store, here)
            if copy == "marked":
                lineage.mark_damaged(store, here, "bytes 1 to 2 do not match")
    copies_of = {step: set(copies[: len(stores)]) for step, (*copies, _) in checkpoints.items()}
    listed = sorted(step for step, copies in copies_of.items() if copies & LISTED)
    intact = [step for step in listed if "intact" in copies_of[step]]
    survey = Replicas(*stores).survey()

    assert [commit.step for commit in survey.commits] == listed
    for step in range(41):
        expected = commits[step] if step in listed else None
        assert select.at_step(survey, step) == expected
        if expected is not None:
            assert select.named_step(survey, "0" * zeros + str(step), "run", "step=") == expected

    if intact:
        selection = select.newest_intact(survey, "run")
        step = intact[-1]
        assert selection.commit == commits[step]
        assert selection.manifest.step == step
        assert selection.is_copied == (not has_mirror or checkpoints[step][1] in LISTED)
        view = Fallback(selection.stores)
        assert lineage.read_manifest(view, selection.commit) == selection.manifest
    else:
        with pytest.raises(CheckpointError, match="every checkpoint in run is damaged"):
            select.newest_intact(survey, "run")

    if intact == listed:
        sign = 1 if mode == "max" else -1
        values = {step: checkpoints[step][2] for step in listed}
        ranked = sorted(
            (step for step in listed if values[step] is not None),
            key=lambda step: (-sign * values[step], step),
        )
        best = select.best(survey, "accuracy", mode)
        assert best == (commits[ranked[0]] if ranked else None)
    else:
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            select.best(survey, "accuracy", mode)


# --- a request -----------------------------------------------------------------------------------


def test_pick_newest_best_and_a_step(tmp_path):
    store = LocalStore(str(tmp_path))
    start(store)
    config = {"checkpoint": {"metric": "loss", "mode": "min"}}
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        commit_manifest(store, step, evaluated(step, loss=loss), config=config)
    run = location.open_location(str(tmp_path))
    requests = {"latest": 30, "best": 20, "10": 10, "0010": 10}
    assert {text: select.pick(run, text).step for text in requests} == requests
    for text in ("11", "newest", "", "-1"):
        with pytest.raises(
            ConfigError, match=r"no checkpoint of that step .*available: 10, 20, 30"
        ):
            select.pick(run, text)


def test_pick_uses_the_metric_of_the_newest_checkpoint(tmp_path):
    store = LocalStore(str(tmp_path))
    start(store)
    commit_manifest(
        store, 10, evaluated(10, loss=1.0, accuracy=0.1), config={"checkpoint": {"metric": "x"}}
    )
    newest = {"checkpoint": {"metric": "accuracy"}}  # without a mode: larger is better
    commit_manifest(store, 20, evaluated(20, loss=2.0, accuracy=0.2), config=newest)
    assert select.pick(location.open_location(str(tmp_path)), "best").step == 20


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ConfigError, "tracks no metric .checkpoint.metric is not set"),
        ({"checkpoint": {"metric": 3}}, ConfigError, "tracks no metric"),
        ({"checkpoint": {"metric": "recall"}}, CheckpointError, "'recall' measured at its own"),
    ],
)
def test_pick_best_without_a_measured_metric_fails(tmp_path, config, error, message):
    store = LocalStore(str(tmp_path))
    start(store)
    commit_manifest(store, 10, evaluated(10, loss=1.0), config=config)
    with pytest.raises(error, match=message):
        select.pick(location.open_location(str(tmp_path)), "best")


@pytest.mark.parametrize("request_", ["latest", "best", "10"])
def test_pick_without_checkpoints_names_the_run_directory(tmp_path, request_):
    start(LocalStore(str(tmp_path)))
    run = location.open_location(str(tmp_path))
    with pytest.raises(ConfigError, match="has no committed checkpoint; pass the run directory"):
        select.pick(run, request_)


# --- the newest listed ---------------------------------------------------------------------------


def test_newest_listed_uses_the_newest_record_and_skips_void_ones(tmp_path):
    store = LocalStore(str(tmp_path))
    for step in (0, 10):
        start(store, step)
    assert select.newest_listed(store, {}) is None
    ten = commit_manifest(store, 10)
    abandoned = commit_manifest(store, 20)
    record = lineage.record(store, 2)
    assert select.newest_listed(store, record) == ten
    assert select.newest_listed(store, {}) == abandoned  # no record: nothing is abandoned
    newer = commit_manifest(store, 15, attempt=2)
    assert select.newest_listed(store, record) == newer
    unfinished = f"checkpoints/{manifest.folder_name(25, 2)}/manifest.json"
    store.create(unfinished, manifest.void_bytes(2))
    assert select.newest_listed(store, record) == newer
    spoil(store, newer)
    assert select.newest_listed(store, record) == newer  # manifests are not read
    lineage.mark_damaged(store, newer, "bytes 1 to 2 do not match")
    assert select.newest_listed(store, record) == ten
