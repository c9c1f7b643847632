"""Fixtures of all tests, and the rule that continuous integration skips nothing."""

import os
import signal

import hypothesis
import pytest

hypothesis.settings.register_profile("timeless", deadline=None)  # machines are shared
hypothesis.settings.load_profile("timeless")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `&`; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup; commands would inherit it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest.register_assert_rewrite("support")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn a skip into a failure where PERDURE_NO_SKIPS is set."""
    report = yield
    if report.skipped and os.environ.get("PERDURE_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and PERDURE_NO_SKIPS is set: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _state_home(tmp_path_factory):
    """Keep the tests' runs out of the user's private state."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture
def one_thread():
    """Compute on one thread: the bits of the ranks, and no waiting for threads of other tests."""
    import torch  # slow, and not every test needs it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
