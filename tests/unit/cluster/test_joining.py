"""Ranks that do not start: named, with the setting that helps."""

import socket
import threading

import pytest

from trainer.cluster import joining
from trainer.errors import CONFIGURATION, RUN_AGAIN, ConfigError, PeerLostError

TASK = {"SLURM_PROCID": "0", "RANK": "0", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture
def environ(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "4"}
    monkeypatch.setattr("os.environ", variables)
    monkeypatch.setattr(joining, "_ALONE_S", 0.6)
    monkeypatch.setattr(joining, "_WARN_S", 0.3)
    return variables


def meet_on_threads(ranks, size, timeout_s):
    """Return the error or store of each rank."""
    results = {}

    def meet(rank):
        try:
            results[rank] = joining.meet(rank, size, timeout_s=timeout_s)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_all_ranks_meet_at_one_store(environ):
    stores = meet_on_threads(range(5), 5, 30)
    stores[3].set("key", "value")
    assert stores[0].get("key") == b"value"


def test_meet_ignores_restart_counts_which_agents_count_differently(environ):
    environ["TORCHELASTIC_RESTART_COUNT"] = "2"
    stores = []
    first = threading.Thread(target=lambda: stores.append(joining.meet(0, 2, timeout_s=30)))
    first.start()
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", int(environ["MASTER_PORT"]))) != 0:
            assert first.is_alive()
    environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    joining.meet(1, 2, timeout_s=30)
    first.join(60)
    assert len(stores) == 1


@pytest.mark.parametrize("terminal", [{"LOCAL_WORLD_SIZE": "4"}, {"SLURM_PTY_PORT": "1"}])
def test_meet_in_an_interactive_shell_names_missing_tasks_and_the_setting(
    environ, capsys, terminal
):
    environ.update({**TASK, "LOCAL_WORLD_SIZE": "1", **terminal})
    with pytest.raises(ConfigError) as caught:
        joining.meet(0, 4, timeout_s=60)
    assert caught.value.exit_code == CONFIGURATION
    text = str(caught.value)
    assert "1 of 4 ranks started; missing: ranks 1, 2, 3." in text
    assert "launch.nproc=N" in text
    assert "SLURM_NTASKS=4" in text
    assert "missing: ranks 1, 2, 3" in capsys.readouterr().err  # before the end


@pytest.mark.parametrize("variables", [
    {},  # torchrun, Kubernetes
    {"SLURM_PROCID": "0", "RANK": "0", "LOCAL_WORLD_SIZE": "1"},  # one task per node
    {**TASK, "TORCHELASTIC_RUN_ID": "x"},
])  # fmt: skip
def test_missing_nodes_may_come_later(environ, variables, monkeypatch):
    environ.update(variables)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(PeerLostError, match="1 of 3 ranks started; missing: ranks 1, 2") as caught:
        joining.meet(0, 3, timeout_s=2)
    assert caught.value.exit_code == RUN_AGAIN


def test_ranks_that_started_learn_which_are_missing(environ):
    environ.update(TASK)
    errors = meet_on_threads([0, 2], 4, 2)
    for error in errors.values():
        assert isinstance(error, PeerLostError)
        assert "2 of 4 ranks started; missing: ranks 1, 3." in str(error)


def test_rank_without_rank_0_reports_its_address(environ):
    with pytest.raises(PeerLostError, match=r"rank 0 does not answer at 127\.0\.0\.1:"):
        joining.meet(1, 2, timeout_s=1)


def test_port_in_use_is_a_config_error(environ):
    with socket.socket() as other:
        other.bind(("", int(environ["MASTER_PORT"])))
        other.listen()
        with pytest.raises(ConfigError, match="cannot listen on MASTER_PORT"):
            joining.meet(0, 2, timeout_s=5)


def test_long_list_of_missing_ranks_is_cut(environ):
    with pytest.raises(PeerLostError, match=r"missing: ranks 1, 2, 3, 4, 5, 6, 7, 8, …\."):
        joining.meet(0, 100, timeout_s=0.5)
