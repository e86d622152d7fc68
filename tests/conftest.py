import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the top level, from wherever pytest is called

# Before torch is loaded, here and in the processes that tests start: threads that spin slow each other when several
# processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# cuBLAS reads it once in a process, the tests of --deterministic on a GPU need it, and others come before them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A shell ignores Ctrl-C in what it starts in the background, and so do all programs started from there: tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
