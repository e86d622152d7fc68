"""What a run survives: kill -9 at any moment, full disks, read-only folders, signals, wrong clocks, hostile files, no
optional package at all; and that it gives the same numbers each time and does not grow.

Single faults are in test_train (the command line killed again and again, two processes, a full disk), test_circles and
test_datasets (killed and failed writers, hostile archives and pickles), bad input in test_bad_input. With SBVAE_SLOW=1
the crash tests kill 50 times and the endurance test takes 100,000 steps.
"""

import ast
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import assert_same_state, history

import gen_circles
import sbvae
from sbvae import Config

ROOT = Path(__file__).resolve().parent.parent
SLOW = os.environ.get("SBVAE_SLOW") == "1"
KILLS = 50 if SLOW else 6
TINY = dict(dataset="tiny.npz", latents=3, conv_layers=1, batch_size=2, device="cpu", precision="fp32", log_every=2,
            save_every=4)
FLAGS = [word for name, value in TINY.items() for word in (sbvae.flag(name), str(value))]
FILES = ["checkpoint.pt", "config.json", "metrics.jsonl", "reconstructions.png", "traversals.png"]

# ------------------------------------------------------------------------------- a cheap process
#
# To start Python and to import torch takes seconds, so one process does it and then forks: a child for each line of
# code that comes in. A child is a process of its own, can be killed, and ends with an exit code like any other.

NURSERY = """
import io, json, os, resource, signal, sys, time, traceback
import matplotlib.figure, numpy, torch, tqdm
import datasets, eval, gen_circles, kernels, sbvae
matplotlib.figure.Figure().savefig(io.BytesIO())
torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True)  # what is imported late is imported now
torch.set_num_threads(1)
outputs = {}
for line in sys.stdin:
    what, value = json.loads(line)
    if what == "start":
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            for number in (1, 2):
                os.dup2(theirs, number)
            break
        os.close(theirs)
        outputs[child] = ours
        print(child, flush=True)
    else:  # only now: until then its number is not given to another process
        with open(outputs.pop(value), errors="replace") as file:
            text = file.read()
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(value, 0)[1]), text]), flush=True)
else:
    sys.exit()
sys.stdin, code = open(os.devnull), 0
try:
    exec(value)
except SystemExit as stop:
    code = stop.code or 0
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
os._exit(code)  # to take the interpreter down properly takes four times as long as a short training
"""


class Nursery:
    def __init__(self, folder, *prefix):
        self.folder = folder
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", NURSERY], cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        assert self.run("print('ready')") == [0, "ready\n"]  # from now on it is quick

    def ask(self, what, value):
        self.process.stdin.write(json.dumps([what, value]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, code):
        return self.ask("start", code)

    def wait(self, child):
        """-> exit code (-9 when killed), all that was printed."""
        return self.ask("wait", child)

    def run(self, code):
        return self.wait(self.start(code))

    def train(self, *arguments, before=""):
        return self.run(f"{before}\nsys.argv[1:] = {list(map(str, arguments))}\nsbvae.main()")


def powerless():
    """A command prefix under which modes of files count, for root too, who else may write anywhere. Or skip."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root writes anywhere, and setpriv is not there to take that away")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def write_tiny(folder):
    np.savez(folder / "tiny.npz", images=np.random.default_rng(0).integers(0, 256, (16, 8, 8), np.uint8))


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nursery")
    write_tiny(folder)
    nursery = Nursery(folder, *powerless())
    yield nursery
    nursery.process.stdin.close()
    assert nursery.process.wait(60) == 0


@pytest.fixture(scope="module")
def whole(nursery):
    """A run that was left alone, to 8 steps, and how long it took."""
    begin = time.perf_counter()
    code, text = nursery.train(*FLAGS, "--steps", 8, "--out", "whole")
    assert code == 0, text
    return nursery.folder / "whole", time.perf_counter() - begin


def assert_sound(run):
    """Whatever is under its final name is whole, at any moment."""
    for path in run.glob("[!.]*"):
        if path.name == "checkpoint.pt":
            assert zipfile.ZipFile(path).testzip() is None and "step" in torch.load(path, weights_only=True)
        elif path.name == "config.json":
            assert json.loads(path.read_text())["config"]
        elif path.suffix == ".png":
            data = path.read_bytes()
            assert data.startswith(b"\x89PNG") and data[-8:-4] == b"IEND"
        elif path.name == "metrics.jsonl":
            assert all(json.loads(line)["step"] for line in path.read_text().split("\n")[:-1])


def assert_complete(run, whole):
    """It ended as the run that was left alone did, to the last bit, and left nothing else behind."""
    assert sorted(p.name for p in run.iterdir()) == FILES
    assert_sound(run)
    assert_same_state(run, whole)
    assert history(run) == history(whole)
    for name in FILES[3:]:
        assert (run / name).read_bytes() == (whole / name).read_bytes()


# ------------------------------------------------------------------------------------ kill -9
#
# A moment is a number of lines that have been executed in our files: it comes again with its seed, and saving is hit
# as often as it has lines. Every other time it is a time, which also hits what is done in C, such as writing.

KILL_AT = """
lines = iter(range({moment}))
def trace(frame, event, arg):
    if os.path.basename(frame.f_code.co_filename) in ("sbvae.py", "gen_circles.py", "datasets.py", "eval.py"):
        if event == "line" and next(lines, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
sys.settrace(trace)
"""
COUNT = """
count = [0]
def trace(frame, event, arg):
    if os.path.basename(frame.f_code.co_filename) in ("sbvae.py", "gen_circles.py", "datasets.py", "eval.py"):
        count[0] += event == "line"
        return trace
sys.settrace(trace)
try:
    exec({code!r})
finally:
    print("LINES", count[0])
"""


def count_lines(nursery, code):
    status, text = nursery.run(COUNT.format(code=code))
    assert status == 0, text
    return int(text.split("LINES")[-1])


def run_and_kill(nursery, code, rng, lines, seconds):
    """-> exit code: -9, or 0 when it came to its end before."""
    if rng.random() < 0.5:
        status, text = nursery.run(KILL_AT.format(moment=rng.randrange(lines)) + code)
    else:
        child = nursery.start(code)
        time.sleep(rng.random() * seconds)
        os.kill(child, signal.SIGKILL)  # if it has ended, it is still there for `wait`
        status, text = nursery.wait(child)
    assert status in (0, -9), text
    return status


def test_training_killed_at_random_moments(nursery, whole):
    """Killed, looked at, carried on, until it ends; then another run is begun, until there were enough kills."""
    whole, seconds = whole
    rng, kills, runs = random.Random(0), 0, 0
    arguments = [*FLAGS, "--steps", "8"]
    lines = count_lines(nursery, f"sys.argv[1:] = {[*arguments, '--out', 'counted']}\nsbvae.main()")
    assert lines > 500
    while kills < KILLS:
        run, ended, lives = nursery.folder / f"killed{runs}", False, 0
        while not ended:
            begun = (run / "checkpoint.pt").exists()
            words = ["--resume", str(run)] if begun else [*arguments, "--out", str(run)]
            code = f"sys.argv[1:] = {words}\nsbvae.main()"
            if kills < KILLS:
                ended = run_and_kill(nursery, code, rng, lines, seconds) == 0
                kills += not ended
            else:
                status, text = nursery.run(code)
                assert status == 0, text
                ended = True
            assert_sound(run)
            lives += 1
            assert lives < 60
        assert_complete(run, whole)
        shutil.rmtree(run)
        runs += 1


def test_files_reach_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    """Else a power failure could leave the new name on an empty file."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (done.append("fsync"), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("replace"), replace(*a)))
    with sbvae.atomically(tmp_path / "a") as path:
        path.write_text("b")
    assert done == ["fsync", "replace"] and (tmp_path / "a").read_text() == "b"


def test_killed_at_each_line_that_writes(nursery, whole):
    """Not left to chance: in each line of the functions that write into the run folder, in their second call at step 4,
    and in the first ones, when the folder is new. Without SBVAE_SLOW=1 every fifth line."""
    whole, _ = whole
    code = """
hits, seen = {hits}, set()
def trace(frame, event, arg):
    if frame.f_code in codes:
        if event == "line":
            line = frame.f_code.co_name, frame.f_lineno
            times = sum(key[:2] == line for key in seen)
            seen.add((*line, min(times, 1)))  # the first time and the second
            if len(seen) == hits:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
codes = [f.__code__ for f in (sbvae.open_log, sbvae.save_pictures, sbvae.atomically.__wrapped__)]
codes += [c for c in sbvae.train.__code__.co_consts if getattr(c, "co_name", "") == "save"]
assert len(codes) == 4
sys.settrace(trace)
sys.argv[1:] = {words}
try:
    sbvae.main()
finally:
    print("LINES", len(seen))
"""
    arguments = [*FLAGS, "--steps", "8", "--out"]
    status, text = nursery.run(code.format(hits=-1, words=[*arguments, "lines"]))
    assert status == 0, text
    total = int(text.split("LINES")[-1])
    assert total > 100
    run = nursery.folder / "each"
    for hits in range(1, total + 1, 1 if SLOW else max(total // 12, 1)):
        status, text = nursery.run(code.format(hits=hits, words=[*arguments, str(run)]))
        assert status == -9, text
        assert_sound(run)
        words = ["--resume", run] if (run / "checkpoint.pt").exists() else [*arguments, run]
        status, text = nursery.train(*words)
        assert status == 0, text
        assert_complete(run, whole)
        shutil.rmtree(run)


def test_generation_killed_at_random_moments(nursery):
    """gen_circles.py, and the copy of a compressed file that datasets.py keeps: after the next call there is what an
    undisturbed call writes, and nothing else."""
    rng, folder = random.Random(1), nursery.folder
    images = np.random.default_rng(0).integers(0, 256, (3000, 32, 32), np.uint8)
    np.savez_compressed(folder / "large.npz", images=images)
    for code in ("gen_circles.main(['circles-rg:blank', '--num', '120000', '--out', OUT])",
                 "datasets.load_file('large.npz', cache_dir=OUT, max_bytes=0)"):
        begin = time.perf_counter()
        status, text = nursery.run(code.replace("OUT", "'once'"))
        assert status == 0, text
        seconds = time.perf_counter() - begin
        (expected,) = (folder / "once").iterdir()
        lines = count_lines(nursery, code.replace("OUT", "'counted'"))
        kills = 0
        while kills < KILLS // 2:
            again, path = code.replace("OUT", "'out'"), folder / "out" / expected.name
            kills += run_and_kill(nursery, again, rng, lines, seconds) == -9
            if path.exists():  # it appears when it is whole
                assert arrays(path) == arrays(expected)
            if rng.random() < 0.5:
                status, text = nursery.run(again)
                assert status == 0, text
                assert [p.name for p in (folder / "out").iterdir()] == [path.name]
                assert arrays(path) == arrays(expected)
                shutil.rmtree(folder / "out")
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.rmtree(folder / "once")
        shutil.rmtree(folder / "counted")


def test_evaluation_killed_at_random_moments(nursery, whole):
    """metrics.json and the picture are those of an undisturbed evaluation or are not there, and the next one leaves
    nothing else behind."""
    code = "import eval\neval.evaluate('judged', samples=40, votes=5)"
    rng, run, kills = random.Random(2), nursery.folder / "judged", 0

    def told():
        return {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k != "seconds"}

    shutil.copytree(whole[0], run)
    lines, begin = count_lines(nursery, code), time.perf_counter()
    status, text = nursery.run(code)
    seconds, expected = time.perf_counter() - begin, told()
    assert status == 0 and expected["step"] == 8 and math.isfinite(expected["elbo"]), text
    while kills < KILLS // 2:
        for name in ("metrics.json", "evaluation.png"):
            (run / name).unlink(missing_ok=True)
        kills += run_and_kill(nursery, code, rng, lines, seconds) == -9
        assert_sound(run)
        assert not (run / "metrics.json").exists() or told() == expected
        status, text = nursery.run(code)
        assert status == 0 and told() == expected, text
        assert sorted(p.name for p in run.iterdir()) == sorted([*FILES, "evaluation.png", "metrics.json"])


def arrays(path):
    """The members of an .npz but for the time that zip writes beside each."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ----------------------------------------------------------------------------- signals and clocks


class Quiet:
    """Runs of this process: without pictures, their output kept."""

    def __init__(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sbvae, "save_pictures", lambda *_: None)
        write_tiny(folder)

    def __call__(self, **options):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                return sbvae.train(Config(**options))
            finally:
                self.text = out.getvalue()


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    return Quiet(tmp_path, monkeypatch)


def test_sigterm_at_any_line_saves_the_step_it_tells(quiet):
    """Also during a save: in each line of the loop and of what saves, one after the other. The step told at the end is
    the one in the checkpoint, and its weights are those of that step. (Every third line without SBVAE_SLOW=1.)"""
    options = TINY | dict(steps=3, log_every=2, save_every=10)
    weights = {}
    for step in (1, 2, 3):
        quiet(**options | dict(steps=step, out=f"straight{step}"))
        weights[step] = torch.load(f"straight{step}/checkpoint.pt", weights_only=True)
    ours = [sbvae.train.__code__, sbvae.atomically.__wrapped__.__code__,
            *(c for c in sbvae.train.__code__.co_consts if getattr(c, "co_name", "") == "save")]
    assert len(ours) == 3

    def trace_for(moment):
        lines = itertools.count(1)

        def trace(frame, event, arg):
            if frame.f_code in ours:
                heeds = getattr(signal.getsignal(signal.SIGTERM), "__name__", "") == "stop"
                if event == "line" and heeds and next(lines) == moment:
                    sent.append((frame.f_code.co_name, frame.f_lineno))
                    os.kill(os.getpid(), signal.SIGTERM)
                return trace

        return trace

    stops, sent, outer = [], [], sys.gettrace()
    for moment in itertools.count(1, 1 if SLOW else 3):
        before = len(sent)
        sys.settrace(trace_for(moment))
        try:
            quiet(**options, out=f"r{moment}")
        except SystemExit as stop:
            assert stop.code == 143
            told = int(re.search(r"(?:stopped at step|done) +(\d+)", quiet.text)[1])
            stops.append(told)
        else:
            told = 3  # it came too late to be heeded
        finally:
            sys.settrace(outer)
        checkpoint = torch.load(f"r{moment}/checkpoint.pt", weights_only=True)
        assert checkpoint["step"] == told, sent[-1]
        for name, weight in weights[told]["model"].items():
            assert torch.equal(weight, checkpoint["model"][name]), sent[-1]
        assert sorted(os.listdir(f"r{moment}")) == FILES[:3]
        shutil.rmtree(f"r{moment}")
        if len(sent) == before:  # there is no such line any more
            break
    assert len(sent) > 20 and {1, 2, 3} == set(stops)


def test_a_clock_set_back(nursery, whole):
    """It runs backwards from 1970 on, and all files are of the year 2100: the numbers are the same, and nothing is
    drawn anew."""
    before = """
import itertools
ticks = itertools.count(10**6, -1000)
time.time = lambda: next(ticks)
gen_circles.main(['circles-rg', '--num', '50', '--out', 'circles'])
"""
    run = nursery.folder / "clock"
    for steps, drawn in ((4, "drawing"), (8, "50 images")):
        words = ["--resume", run, "--steps", steps] if run.exists() else [*FLAGS, "--steps", steps, "--out", run]
        status, text = nursery.train(*words, before=before)
        assert status == 0 and drawn in text and ("drawing" in text) == (steps == 4), text
        for path in nursery.folder.rglob("*"):
            os.utime(path, (4102444800, 4102444800))
    assert_complete(run, whole[0])


# --------------------------------------------------------------------------------- disks and locks


def one_error(text):
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text and text.splitlines()[-1] == lines[0], text
    return lines[0]


@pytest.mark.parametrize("at", ["the start", "the end"])
def test_files_that_cannot_grow(at, nursery, whole):
    """A quota that ends in each of the files in turn. One line, exit code 2, the last checkpoint as it was; with room
    again the run ends as if nothing had been."""
    run, lines = nursery.folder / "quota", set()
    for size in (0, 300, 1500, 20_000, 2_000_000):
        if at == "the end":
            assert nursery.train(*FLAGS, "--steps", 4, "--out", run)[0] == 0
            before = (run / "checkpoint.pt").read_bytes()
        words = [*FLAGS, "--steps", "8", "--out", run] if at == "the start" else ["--resume", run, "--steps", "8"]
        status, text = nursery.train(
            *words, before=f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))")
        assert status == 2, text
        lines.add(one_error(text))
        assert not list(run.glob(".*"))
        assert_sound(run)
        if at == "the end":
            assert (run / "checkpoint.pt").read_bytes() == before
        elif (run / "checkpoint.pt").exists():
            words = ["--resume", run, "--steps", "8"]
        status, text = nursery.train(*words)
        assert status == 0, text
        assert_complete(run, whole[0])
        shutil.rmtree(run)
    assert len(lines) >= 2


def test_a_full_disk(tmp_path, nursery, whole):
    """A small one, with less and less room."""
    prefix = [] if os.geteuid() == 0 else ["-r"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=16m none "{disk}" && exec "$@"'
    enter = ["unshare", "-m", *prefix, "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here")
    small = Nursery(tmp_path, *enter)
    write_tiny(tmp_path)
    fill = """
import shutil
room = shutil.disk_usage('disk').free - {left}
open('disk/ballast', 'wb').write(bytes(room))
"""
    for left in (0, 60_000, 2_500_000):
        status, text = small.train(*FLAGS, "--steps", 4, "--out", "disk/r")
        assert status == 0, text
        status, text = small.train("--resume", "disk/r", "--steps", 8, before=fill.format(left=left))
        assert status == 2 and ("No space left" in text or "cannot write" in text), text
        one_error(text)
        status, text = small.run("os.remove('disk/ballast'); print(*sorted(os.listdir('disk/r')))")
        assert text.split() == FILES
        status, text = small.train("--resume", "disk/r", "--steps", 8)
        assert status == 0, text
        assert small.run("import shutil; shutil.move('disk/r', 'r')")[0] == 0
        assert_complete(tmp_path / "r", whole[0])
        shutil.rmtree(tmp_path / "r")
    small.process.stdin.close()
    assert small.process.wait(60) == 0


def test_read_only_folders(nursery, whole):
    """The place for a run, a run, its files; folders of data and of caches. One line, and nothing is changed."""
    folder = nursery.folder / "locked"
    run = shutil.copytree(whole[0], folder / "r")
    np.savez_compressed(folder / "large.npz", images=np.full((9, 9, 9), 9, np.uint8))
    names = sorted(folder.rglob("*"))
    resume = ["--resume", run, "--steps", 9]
    for path, mode, words in [
        (folder, 0o555, [*FLAGS, "--out", folder / "new"]), (run, 0o555, [*FLAGS, "--out", run / "below"]),
        (run, 0o555, resume), (run / "metrics.jsonl", 0o444, resume), (run / "metrics.jsonl", 0, resume),
        (run / "checkpoint.pt", 0, resume), (run / "config.json", 0, resume), (run, 0, resume),
    ]:  # fmt: skip
        before = path.stat().st_mode
        path.chmod(mode)
        status, text = nursery.train(*words)
        path.chmod(before)
        assert status == 2, text
        one_error(text)
    folder.chmod(0o555)
    for code in (f"sys.exit(gen_circles.main(['circles-rg', '--num', '5', '--out', '{folder}/data']))",
                 f"sys.exit(gen_circles.main(['circles-rg', '--num', '5', '--out', '{folder}']))",
                 f"datasets.load_file('{folder}/large.npz', cache_dir='{folder}/cache', max_bytes=0)"):
        status, text = nursery.run(code)
        last = text.splitlines()[-1]
        assert status == 2 and last.startswith("error: ") or last.startswith("OSError: "), text
    folder.chmod(0o755)
    assert sorted(folder.rglob("*")) == names
    assert_complete(run, whole[0])


def test_many_processes_start_the_same_run(nursery, whole):
    """At the same moment: one of them trains, the others are told, and the run is as if it had been alone."""
    for words in ([*FLAGS, "--steps", "4", "--out", "raced"], ["--resume", "raced", "--steps", "8"]):
        children = [nursery.start(f"sys.argv[1:] = {words}\nsbvae.main()") for _ in range(4)]
        results = [nursery.wait(child) for child in children]
        assert [status for status, _ in results].count(0) >= 1, results
        for status, text in results:
            assert status in (0, 2)
            if status:
                assert "another process" in one_error(text) or "already" in text
        step = torch.load(nursery.folder / "raced/checkpoint.pt", weights_only=True)["step"]
        assert step == (8 if "--resume" in words else 4)
    assert_complete(nursery.folder / "raced", whole[0])


# ------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
@pytest.mark.parametrize("program", ["sbvae.py", "gen_circles.py"])
def test_closed_streams(program, closed, tmp_path):
    """As some schedulers start programs."""
    write_tiny(tmp_path)
    words = [*FLAGS, "--steps", "2"] if program == "sbvae.py" else ["circles-rg", "--num", "9"]
    line = " ".join([sys.executable, str(ROOT / program), *words, "--out", "r", closed])
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    made = ["circles-rg.npz"] if program == "gen_circles.py" else FILES
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == made


def test_a_signal_that_is_ignored_stays_ignored(nursery):
    """As under nohup, or in a script that takes Ctrl-C for itself."""
    before = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
vae_loss = sbvae.vae_loss
sbvae.vae_loss = lambda *a: os.kill(os.getpid(), signal.SIGINT) or vae_loss(*a)
"""
    status, text = nursery.train(*FLAGS, "--steps", 3, "--out", "ignored", before=before)
    assert status == 0 and "done     3 steps" in text, text


@pytest.mark.parametrize("program", ["sbvae.py", "eval.py"])
def test_ctrl_c_while_torch_is_loaded(program, tmp_path):
    """Which takes seconds, before any line of ours could catch it."""
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    started = subprocess.Popen([sys.executable, ROOT / program], env=dict(os.environ, PYTHONPATH=str(tmp_path)),
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "loading\n"
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=50)[1] == "" and started.returncode == -signal.SIGINT


# ------------------------------------------------------------------------------- other versions


def test_a_checkpoint_from_before_a_flag_existed(quiet):
    """A flag that the file does not know has its default. The run goes on as it would have."""
    quiet(**TINY | dict(steps=6, out="straight"))
    quiet(**TINY | dict(steps=4, out="r"))
    told, checkpoint = json.loads(Path("r/config.json").read_text()), torch.load("r/checkpoint.pt", weights_only=True)
    for name in ("deterministic", "upscales", "shuffle_coords", "save_every"):
        del told["config"][name], checkpoint["config"][name]
    checkpoint["something new"] = 1
    torch.save(checkpoint, "r/checkpoint.pt")
    Path("r/config.json").write_text(json.dumps(told))
    quiet(resume="r", steps=6)
    ended, straight = (torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in ("r", "straight"))
    assert all(torch.equal(ended["model"][k], v) for k, v in straight["model"].items())
    assert history(Path("r")) == history(Path("straight"))


# --------------------------------------------------------------------- nothing runs, nothing gets out


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore")  # torch's, about its own old formats
def test_hostile_run_folders(quiet):
    """Pickles that call, in each place where torch or numpy could find one, and links in place of files."""
    quiet(**TINY | dict(steps=2, out="r"))
    precious = b'{"step": 2}\n{"step": 9}\n'  # of another run: it could pass for this one's log
    Path("precious").write_bytes(precious)
    pickle.loads(pickle.dumps(Evil()))
    os.rmdir("executed")  # the trap works
    checkpoint = torch.load("r/checkpoint.pt", weights_only=True)
    hostile = {
        "a pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
        "torch's zip": lambda path: torch.save(Evil(), path),
        "a value": lambda path: torch.save(checkpoint | {"step": Evil()}, path),
        "torch's old format": lambda path: torch.save(Evil(), path, _use_new_zipfile_serialization=False),
        "an .npz": lambda path: np.savez(path.open("wb"), images=np.array([Evil()], object)),
        "a tar": lambda path: tarfile.open(path, "w").close(),
        "a script": lambda path: torch.jit.script(torch.nn.Linear(1, 1)).save(str(path)),
    }
    for name in ("checkpoint.pt", "config.json", "metrics.jsonl"):
        for how, plant in hostile.items():
            shutil.copytree("r", "h")
            plant(Path("h") / name)
            with pytest.raises(sbvae.InputError):
                quiet(resume="h", steps=4)
            if name != "metrics.jsonl":
                with pytest.raises(sbvae.InputError):
                    sbvae.load("h")
            assert not Path("executed").exists(), how
            shutil.rmtree("h")
    for name in (*FILES, *(f".{name}.tmp" for name in FILES)):
        shutil.copytree("r", "h")
        Path("h", name).unlink(missing_ok=True)
        os.symlink("../precious", Path("h", name))
        with contextlib.suppress(sbvae.InputError):
            quiet(resume="h", steps=4)
        assert Path("precious").read_bytes() == precious, name
        shutil.rmtree("h")


def test_links_in_the_data_folder_are_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    path = gen_circles.file_path("circles-rg", tmp_path)
    for name in (f".{path.name}.tmp", path.name):
        os.symlink("precious", tmp_path / name)
        gen_circles.main(["circles-rg", "--num", "5", "--out", str(tmp_path)])
        assert (tmp_path / "precious").read_text() == "precious"
        (tmp_path / name).unlink(missing_ok=True)


def test_names_are_names(nursery):
    """Whatever a shell, a format or a terminal would make of them; also one that is no text."""
    folder = nursery.folder / "names"
    folder.mkdir()
    names = ["$(touch executed)", "; touch executed;", "`touch executed`", "|touch executed", "a b\nc", "%s{0}", "-rf",
             "*", "\udcff", "ä", "{config.seed}", "'\"", "__init__"]  # fmt: skip
    for name in names:
        shutil.copy(nursery.folder / "tiny.npz", folder / f"{name}.npz")
        before = f"os.chdir({str(folder)!r})"
        status, text = nursery.train(f"--dataset={name}.npz", *FLAGS[2:], "--steps", 2, before=before)
        assert status == 0, text
        (run,) = (folder / "runs").iterdir()
        assert run.name.startswith(name) and sorted(p.name for p in run.iterdir()) == FILES
        shutil.rmtree(folder / "runs")
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{name}.npz" for name in names)


# ----------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1.0, 88.0, 1e4, 1e30, 3e38])
def test_losses_of_extreme_logits(size, dtype):
    """Finite as long as the answer is, and the answer in float64's; the gradient is bounded by 1."""
    logits = (torch.tensor([-1.0, 1.0, -1.0, 1.0]) * size).to(dtype).float().view(1, 1, 2, 2).requires_grad_()
    images, z = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2), torch.zeros(1, 2)
    loss, nll, _ = sbvae.vae_loss(logits, images, z, z)
    exact = torch.log1p(torch.exp(-logits.double().abs())) + (logits.double() * (logits > 0)) - logits.double() * images
    if exact.sum() < torch.finfo(torch.float32).max:
        torch.testing.assert_close(nll.double(), exact.sum().detach())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and gradient.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logvar", [-1e30, -200.0, -80.0, 0.0, 80.0, 85.0])
def test_posteriors_of_extreme_width(logvar, dtype):
    """In closed form up to where float32 ends; beyond it infinite, which stops a run."""
    logvar = torch.full((2, 3), logvar).to(dtype).float().requires_grad_()
    mu, images = torch.zeros(2, 3), torch.zeros(2, 1, 1, 1)
    z = sbvae.reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    assert z.isfinite().all()
    loss, _, kl = sbvae.vae_loss(images, images, mu, logvar)
    exact = 0.5 * (logvar.double().exp() - 1 - logvar.double()).sum(1).mean()
    torch.testing.assert_close(kl.double(), exact.detach(), rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, logvar)[0].isfinite().all()
    endless = sbvae.vae_loss(images, images, mu, torch.full((2, 3), 200.0))[2]
    assert endless == math.inf


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["logits", "logvar", "mu"])
def test_a_run_with_extreme_weights_is_finite_or_stops(what, precision, quiet, monkeypatch):
    """Biases of the last layers from 1 to 1e38: numbers, or one line with the step, never NaN in the log."""
    build, ends = sbvae.build_model, set()
    for power in (0, 1, 2, 4, 19, 38):
        def extreme(config, size=10.0**power):
            model = build(config)
            bias = model.decoder.convs[-1].bias if what == "logits" else model.encoder.latents.bias
            half = {"logits": slice(None), "mu": slice(0, 3), "logvar": slice(3, 6)}[what]
            with torch.no_grad():
                bias[half] = size
            return model

        monkeypatch.setattr(sbvae, "build_model", extreme)
        try:
            quiet(**TINY | dict(steps=2, log_every=1, precision=precision, out=f"r{power}"))
            ends.add("finished")
        except FloatingPointError as error:
            ends.add("stopped")
            assert "diverged" in str(error) and "step" in str(error) and f"r{power}/checkpoint.pt" in str(error)
        assert all(math.isfinite(v) for record in history(Path(f"r{power}")) for v in record.values())
        checkpoint = torch.load(f"r{power}/checkpoint.pt", weights_only=True)
        assert all(v.isfinite().all() for v in checkpoint["model"].values())
    assert "finished" in ends and (what == "logits" or "stopped" in ends)


# -------------------------------------------------------------------------------------- determinism


def lines_without_times(run):
    """metrics.jsonl as bytes, without the two keys that hold times."""
    return re.sub(rb', "(images_per_s|seconds_left)": [^,}]+', b"", (run / "metrics.jsonl").read_bytes())


def test_the_same_seed_writes_the_same_bytes(nursery, whole, monkeypatch):
    """Twice in one process, in a process of its own, after a resume, under torchrun; and another seed does not."""
    monkeypatch.chdir(nursery.folder)
    expected = lines_without_times(whole[0])
    assert expected.count(b"\n") == 4 and b"elbo" in expected and b"seconds" not in expected
    runs = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, seed in (("first", 0), ("second", 0), ("other", 1)):
            torch.manual_seed(len(runs))  # what others drew from torch's own generator does not matter
            sbvae.train(Config(**TINY, steps=8, seed=seed, out=name))
            runs.append(lines_without_times(Path(name)))
    finally:
        torch.set_num_threads(threads)
    assert runs[0] == runs[1] == expected != runs[2]
    for words in ([*FLAGS, "--steps", 4, "--out", "halves"], ["--resume", "halves", "--steps", 8]):
        status, text = nursery.train(*words)
        assert status == 0, text
    assert lines_without_times(nursery.folder / "halves") == expected
    if torch.distributed.is_available():
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", ROOT / "sbvae.py",
             *FLAGS, "--steps", "8", "--out", "torchrun"], capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_complete(nursery.folder / "torchrun", whole[0])


# ---------------------------------------------------------------------------------------- endurance

ENDURE = """
import gc
gc.freeze()  # what is there already need not be looked at again
kept, rows = [], []
Encoder, vae_loss = sbvae.Encoder, sbvae.vae_loss
sbvae.Encoder = lambda *a, **k: Encoder(*a[:4], (4, 4))  # its size does not matter here, and it takes the time
def watched(*a):
    if {leak}:
        kept.append(bytes(2000))
    watched.step += 1
    if watched.step % {every} == 0:
        gc.collect()  # figures refer to themselves and stay until Python finds the time
        resident = int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
        rows.append([resident, len(os.listdir('/proc/self/fd')), os.path.getsize('endurance/checkpoint.pt')])
    return vae_loss(*a)
watched.step = 0
sbvae.vae_loss = watched
sys.argv[1:] = {words}
try:
    sbvae.main()
finally:
    print('ROWS', json.dumps(rows))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its size from /proc")
def test_memory_files_and_logs_do_not_grow(nursery):
    """3,000 tiny steps, 100,000 with SBVAE_SLOW=1. After the first third the process grows by less than 200 bytes a
    step, opens no more files, and its checkpoints keep their size. One that keeps 2,000 bytes a step is found out."""
    for leak, steps in ((False, 100_000 if SLOW else 3000), (True, 900)):
        words = ["--dataset", "tiny.npz", *FLAGS[2:-4], "--log-every", "10", "--save-every",
                 str(steps // (100 if SLOW else 10)), "--out", "endurance", "--steps", str(steps)]
        status, text = nursery.run(ENDURE.format(leak=leak, every=steps // 30, words=words))
        assert status == 0, text[-2000:]
        rows = json.loads(text.split("ROWS")[-1].splitlines()[0])
        assert len(rows) == 30
        (first, files, size), last = rows[9], rows[-1]
        growth = (last[0] - first) / (steps * 2 / 3)
        assert (growth > 1000) if leak else (growth < 200), rows
        assert {row[1] for row in rows[10:]} == {files} and {row[2] for row in rows[10:]} == {size}, rows
        log = (nursery.folder / "endurance/metrics.jsonl").read_bytes().splitlines()
        assert len(log) == steps // 10 and max(map(len, log)) < 400
        shutil.rmtree(nursery.folder / "endurance")


# ----------------------------------------------------------------------------------- bare machines


def test_bare_and_read_only(tmp_path):
    """From another folder, source that can't be written to, and without matplotlib, tqdm, triton, pygame, kernels/,
    datasets.py, gen_circles.py, a display or a home: it trains and resumes."""
    source, away = tmp_path / "source", tmp_path / "away"
    source.mkdir()
    away.mkdir()
    shutil.copy(ROOT / "sbvae.py", source)
    source.chmod(0o555)
    missing = ["matplotlib", "tqdm", "triton", "pygame", "kernels", "datasets", "gen_circles"]
    code = f"""
import os, sys
sys.modules.update(dict.fromkeys({missing}))
sys.path.insert(0, {str(source)!r})
import sbvae
assert not os.access({str(source)!r}, os.W_OK)  # modes count here
sbvae.main()
"""
    words = ["--latents", "3", "--conv-layers", "1", "--batch-size", "2", "--device", "cpu", "--out", "r"]
    try:
        for arguments in ([*words, "--steps", "1"], ["--resume", "r", "--steps", "2"]):
            done = subprocess.run([*powerless(), sys.executable, "-c", code, *arguments], cwd=away, capture_output=True,
                                  env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}, text=True, timeout=300)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
            assert sorted(p.name for p in (away / "r").iterdir()) == FILES[:3]
        assert torch.load(away / "r/checkpoint.pt", weights_only=True)["step"] == 2
        assert [p.name for p in source.iterdir()] == ["sbvae.py"]
    finally:
        source.chmod(0o755)


@pytest.mark.parametrize("dataset", ["objects", "circles-xy"])
def test_without_tqdm_there_is_only_no_bar(dataset, tmp_path):
    code = f"""
import sys
sys.modules["tqdm"] = None
sys.path.insert(0, {str(ROOT)!r})
import sbvae
sbvae.main()
"""
    words = ["--dataset", dataset, "--steps", "1", "--batch-size", "2", "--conv-layers", "1", "--device", "cpu"]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("path", [p.relative_to(ROOT) for p in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py"))],
                         ids=str)
def test_syntax_of_python_3_10(path):
    tree = ast.parse((ROOT / path).read_text(), feature_version=(3, 10))
    later = {"tomllib", "StrEnum", "ExceptionGroup", "TaskGroup", "Self", "batched", "override", "chdir", "UTC",
             "file_digest", "LiteralString", "cbrt", "exp2", "sumprod"}  # fmt: skip
    modules = ("contextlib", "itertools", "math", "enum", "typing", "asyncio", "datetime", "hashlib")
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in modules:
            names.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.FormattedValue) and node.format_spec:
            spec = "".join(part.value for part in node.format_spec.values if isinstance(part, ast.Constant))
            assert "z" not in spec, spec
    assert not names & later
