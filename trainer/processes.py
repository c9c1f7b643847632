"""What this process asks of the kernel about its parent."""

import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (prctl(2), Linux).

    Otherwise the children of a killed process would go on: ranks as a second job on the same run.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
