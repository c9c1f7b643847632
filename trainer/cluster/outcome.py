"""Exit codes and how they travel from a rank to the process that started the run.

Launchers lose exit codes: torchrun exits with 1 for all of them, srun with the highest of all
tasks. So a rank also writes the code of the run to the file named by `PERDURE_OUTCOME`, which the
batch script or the local launcher reads.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from trainer.errors import DONE, FAILURE, RUN_AGAIN, PerdureError

_VARIABLE = "PERDURE_OUTCOME"
_AGENT = "TORCHELASTIC_RUN_ID"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
RESUME_HINT = "Run the same command again to resume."


def write(code: int) -> None:
    """Write the exit code of the run to the outcome file, atomically; without one, do nothing."""
    path = os.environ.get(_VARIABLE)
    if path is not None:
        _write(Path(path), code)


def _write(path: Path, code: int) -> None:
    temporary = Path(f"{path}.{os.getpid()}")
    temporary.write_text(str(code))
    temporary.replace(path)


def read(path: Path, default: int) -> int:
    """Return the exit code in an outcome file, or `default` if no rank has written one."""
    return int(path.read_text()) if path.exists() else default


def clear() -> None:
    """Delete the outcome of an earlier attempt. Rank 0 only, before the attempt starts."""
    if _VARIABLE in os.environ:
        Path(os.environ[_VARIABLE]).unlink(missing_ok=True)


def _exists() -> bool:
    return Path(os.environ.get(_VARIABLE, "")).is_file()


@contextmanager
def file_for_ranks(path: Path) -> Iterator[None]:
    """Let the ranks started in this context write their outcome to `path`."""
    previous = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(path)
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if previous is not None:
            os.environ[_VARIABLE] = previous


def rank_exit_code(code: int) -> int:
    """Return the exit code of a rank after an outcome that all ranks agree on.

    An elastic agent treats any code but 0 as a crash: it kills the other ranks and restarts. So
    under an agent the code is 0 for a preemption, and for everything if an outcome file is set.
    """
    is_read = _VARIABLE in os.environ or code == RUN_AGAIN
    return DONE if is_read and _AGENT in os.environ else code


def exit_now(code: int, message: str = "") -> NoReturn:
    """Print the message, write the outcome, and end the process even if threads hang. Any rank.

    An existing outcome is kept: the rank that failed wrote it.
    """
    if message:
        print(message, file=sys.stderr, flush=True)
    if not _exists():
        write(code)
    sys.stdout.flush()
    os._exit(code)


def stop_early(signal_name: str, file: str | None, began_s: float) -> NoReturn:
    """End a process that received a stop signal while it had nothing to save. Any rank and thread.

    Args:
        signal_name: name of the signal.
        file: the process's outcome file, if any.
        began_s: start of the process, in seconds since 1970. An outcome that is newer is kept: the
            rank that failed wrote it.
    """
    if file is not None:
        path = Path(file)
        if not path.exists() or path.stat().st_mtime < began_s:
            _write(path, RUN_AGAIN)
    text = f"Stopped by {signal_name} outside of the training loop. {RESUME_HINT}"
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
    os._exit(rank_exit_code(RUN_AGAIN))


def exit_to_resume(reason: str) -> NoReturn:
    """End the process at once with `RUN_AGAIN`, printing the reason. Any rank."""
    exit_now(RUN_AGAIN, f"error: {reason}. {RESUME_HINT}")


def report_crash(error: BaseException) -> int:
    """Report an error of this rank alone, write its exit code as the outcome, and return it.

    Under an elastic agent the error goes to the agent's error file, so that the launcher prints it
    once; otherwise it is printed here.
    """
    is_expected = isinstance(error, PerdureError)
    text = f"error: {error}" if is_expected else ""
    code = error.exit_code if isinstance(error, PerdureError) else FAILURE
    if _ERROR_FILE not in os.environ:
        print(f"rank {os.environ.get('RANK')} failed:", file=sys.stderr, flush=True)
        if is_expected:
            print(text, file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
    elif is_expected:  # without the traceback
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        message = json.dumps({"message": {"message": text, "extraInfo": details}})
        Path(os.environ[_ERROR_FILE]).write_text(message)
    else:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
    if code != RUN_AGAIN or not _exists():
        write(code)
    return code
