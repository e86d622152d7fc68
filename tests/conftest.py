import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the top level, from wherever pytest is called

# Before torch is loaded, here and in the processes that tests start: threads that spin slow each other when several
# processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# cuBLAS reads it once in a process, the tests of --deterministic on a GPU need it, and others come before them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A shell ignores Ctrl-C in what it starts in the background, and so do all programs started from there: tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Stand-ins for CUDA's streams and graphs, with training steps watched -> a list of what happens.
    The usual stream is "usual", a new one "side"."""
    import torch
    import torch._dynamo  # keeps what torch.cuda has when it is loaded: not the stand-ins

    import sbvae

    class Stream(str):
        def wait_stream(self, other):
            happened.append(f"{self} waits for {other}")

    streams, happened = [Stream("usual")], []

    class Graph:
        def register_generator_state(self, generator):
            happened.append("registered")

        def replay(self):
            happened.append(f"replayed on {streams[-1]}")

    @contextlib.contextmanager
    def stream(name):
        streams.append(name)
        yield
        streams.pop()

    @contextlib.contextmanager
    def graph(graph, stream):
        happened.append(f"captured on {stream}")
        yield

    def training_step(*arguments, train=sbvae.training_step, **parts):
        happened.append(f"step on {streams[-1]}")
        return train(*arguments, **parts)

    for name, fake in dict(CUDAGraph=Graph, graph=graph, Stream=lambda device=None: Stream("side"), stream=stream,
                           synchronize=lambda: None, current_stream=lambda device=None: streams[-1]).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(sbvae, "training_step", training_step)
    return happened
