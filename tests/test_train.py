"""The program as people run it: runs, resumes, signals, errors, the single file."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sbvae
from sbvae import Config

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--batch-size", "2", "--device", "cpu", "--log-every", "3", "--save-every", "4"]


def command(*arguments, script=ROOT / "sbvae.py"):
    return [sys.executable, str(script), *map(str, arguments)]


def run(*arguments, cwd, **kw):
    return subprocess.run(command(*arguments, **kw), cwd=cwd, capture_output=True, text=True, timeout=300)


def history(folder, timing=False):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if timing or k not in ("images_per_s", "seconds_left")} for r in records]


def assert_same_state(a, b):
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (a, b))

    def compare(x, y, where):
        assert type(x) is type(y), where
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), where
        elif isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for k in x:
                if k not in ("out", "save_every"):
                    compare(x[k], y[k], f"{where}.{k}")
        elif isinstance(x, list):
            for i, pair in enumerate(zip(x, y, strict=True)):
                compare(*pair, f"{where}[{i}]")
        else:
            assert x == y, where

    compare(a, b, "checkpoint")


def test_a_run_from_the_command_line(tmp_path):
    """What is printed and what is written, from another folder, with the default run folder."""
    done = run(*SMALL, "--steps", 7, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    folder = tmp_path / "runs" / "sprites-broadcast-steps7-batchsize2"
    for word in ("467,476", "81,027", "cpu", "kernel", "steps 0 to 7", "lr 0.0003", "ELBO", "latents used", "left"):
        assert word in done.stdout
    assert re.search(r"fp32 \(the device has no bf16 units\)|bf16 \(the device has bf16 units\)", done.stdout)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint.pt", "config.json", "metrics.jsonl", "reconstructions.png", "traversals.png"]
    records = history(folder, timing=True)
    assert [r["step"] for r in records] == [3, 6, 7]
    names = ["step", "elbo", "nll", "kl", "latents_used", "images_per_s", "seconds_left"]
    assert all(list(r) == names for r in records)
    assert all(r["elbo"] == pytest.approx(r["nll"] + r["kl"], rel=1e-6) for r in records)
    told = json.loads((folder / "config.json").read_text())
    assert told["config"]["steps"] == 7 and told["config"]["lr"] == 3e-4 and told["torch"] == torch.__version__
    for name in ("reconstructions.png", "traversals.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    again = run(*SMALL, "--steps", 7, cwd=tmp_path)  # starting over it is refused, with a hint
    assert again.returncode == 2 and "--resume" in again.stderr and again.stderr.count("\n") == 1
    assert history(folder, timing=True) == records


def test_metrics_are_means_over_the_interval(tmp_path):
    """Records of every step and of every third agree."""
    config = Config(steps=6, batch_size=2, precision="fp32", device="cpu")
    every = sbvae.train(dataclasses.replace(config, log_every=1, out=str(tmp_path / "a")))
    sbvae.train(dataclasses.replace(config, log_every=3, out=str(tmp_path / "b")))
    ones, threes = history(tmp_path / "a"), history(tmp_path / "b")
    assert every["step"] == 6 and len(ones) == 6 and len(threes) == 2
    for i, record in enumerate(threes):
        for name in ("elbo", "nll", "kl", "latents_used"):
            mean = sum(r[name] for r in ones[3 * i : 3 * i + 3]) / 3
            assert record[name] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("model", ["vae", "factorvae"])
def test_kill_9_at_any_moment_then_resume_is_exact(model, tmp_path):
    """Killed again and again, at random moments, and carried on each time: weights, both optimizers, generator
    and metrics equal those of the run that was left alone, bit for bit."""
    arguments = ["--model", model, "--decoder", "deconv" if model == "factorvae" else "broadcast", "--steps", 12,
                 "--save-every", 2, "--log-every", 5, "--batch-size", 2, "--device", "cpu"]
    whole = run(*arguments, "--out", "whole", "--save-every", 100, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    random.seed(0)
    broken, kills = tmp_path / "broken", 0
    for life in range(20):
        ask = ["--resume", broken] if (broken / "checkpoint.pt").exists() else [*arguments, "--out", broken]
        process = subprocess.Popen(command(*ask), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:  # wait until it has begun: then each life makes a few steps
            if line.startswith("run "):
                break
        try:
            time.sleep(0.3 * (life + 1) * random.random())  # longer and longer, so that it ends
            if process.poll() is None:
                process.kill()
                kills += 1
        finally:
            process.stdout.close()
            process.wait()
        if process.returncode == 0:
            break
    assert process.returncode == 0 and kills >= 2
    assert_same_state(tmp_path / "whole", broken)
    assert history(tmp_path / "whole") == history(broken)
    assert not list(broken.glob(".*")) and not list(broken.glob("*.tmp"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave(number, code, tmp_path):
    process = subprocess.Popen(command(*SMALL, "--steps", 100_000, "--save-every", 50_000, "--out", "r"), cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and err == "" and "--resume r" in out
    step = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["step"]
    assert step >= 3
    finished = run("--resume", "r", "--steps", step + 2, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    straight = run(*SMALL, "--steps", step + 2, "--out", "s", cwd=tmp_path)
    assert straight.returncode == 0
    assert torch.equal(*(sbvae.load(tmp_path / f).encoder.latents.weight for f in "rs"))


def test_load_gives_the_trained_model(tmp_path):
    sbvae.train(Config(steps=2, batch_size=2, shuffle_coords=True, device="cpu", out=str(tmp_path / "r")))
    model = sbvae.load(tmp_path / "r")
    assert not model.training and model.config.steps == 2 and model.config.shuffle_coords
    fresh = sbvae.build_model(model.config)
    assert torch.equal(fresh.decoder.coords, model.decoder.coords)
    assert not torch.equal(fresh.encoder.latents.weight, model.encoder.latents.weight)


def test_factorvae_gradients_stay_on_their_side(tmp_path, monkeypatch):
    """One step with and without the discriminator's loss: the VAE ends the same, so none of that loss reaches it;
    without it the discriminator stays as it began, so none of the VAE's loss moves it."""
    config = dict(model="factorvae", steps=1, batch_size=4, precision="fp32", device="cpu")
    sbvae.train(Config(**config, out=str(tmp_path / "with")))
    true_loss = sbvae.discriminator_loss
    monkeypatch.setattr(sbvae, "discriminator_loss", lambda a, b: 0 * true_loss(a, b))
    sbvae.train(Config(**config, out=str(tmp_path / "without")))
    a, b = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True) for f in ("with", "without"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    start = sbvae.build_discriminator(10, seed=0).state_dict()
    assert all(torch.equal(start[k], b["discriminator"][k]) for k in start)
    assert not any(torch.equal(start[k], a["discriminator"][k]) for k in start)  # with its loss it moves
    monkeypatch.undo()
    monkeypatch.setattr(sbvae, "total_correlation", lambda logits: 0 * logits.sum())
    sbvae.train(Config(**config, out=str(tmp_path / "no-tc")))
    c = torch.load(tmp_path / "no-tc" / "checkpoint.pt", weights_only=True)
    moved = [k for k in a["model"] if "encoder" in k and not torch.equal(a["model"][k], c["model"][k])]
    assert moved  # the penalty does reach the encoder


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    data, calls = sbvae.Sprites(), []

    class Poisoned(sbvae.Sprites):
        def sample(self, n, generator):
            calls.append(n)
            images = data.sample(n, generator)
            return images * math.nan if len(calls) == 8 else images  # the pictures take the first call

    monkeypatch.setattr(sbvae, "load_dataset", lambda *_: Poisoned())
    with pytest.raises(FloatingPointError, match="between steps 6 and 8") as error:
        sbvae.train(Config(steps=50, batch_size=2, log_every=3, save_every=4, device="cpu", out=str(tmp_path / "r")))
    assert "\n" not in str(error.value)
    checkpoint = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 4 and all(v.isfinite().all() for v in checkpoint["model"].values())
    assert [r["step"] for r in history(tmp_path / "r")] == [3, 6]


def test_a_diverged_run_ends_with_one_line(tmp_path):
    done = run(*SMALL, "--steps", 200, "--lr", 1e12, "--out", "r", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


BAD = [  # arguments, what the one line must contain
    (["--decoder", "conv"], "broadcast"),
    (["--colour", "red"], "--colour"),
    (["--steps", "many"], "--steps"),
    (["--step", "5"], "--step"),  # no abbreviations: they would break when flags are added
    (["--lr", "-1"], "--lr"),
    (["--beta", "nan"], "--beta"),
    (["--dataset", "no-such-file.npz"], "no-such-file.npz"),
    (["--dataset", "circles-zz"], "circles-zz"),
    (["--shuffle-coords", "--decoder", "deconv"], "--shuffle-coords"),
    (["--device", "tpu"], "--device"),
    (["--device", "cpu", "--precision", "tf32"], "tf32"),
    (["--device", "cpu", "--kernel", "triton"], "triton"),
    (["--resume", "nothing-here"], "nothing-here"),
    (["--out", "file/below"], "file/below"),
    (["--out", "file"], "file"),
    (["--seed", "99999999999999999999"], "--seed"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_ends_in_one_line(arguments, words, tmp_path):
    (tmp_path / "file").write_text("precious")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert words in lines[-1] and "rror: " in lines[-1] and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "precious"
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "file"]
    assert all(p.name == "metrics.jsonl" and p.stat().st_size == 0 for p in left), left


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    done = run(*SMALL, "--out", "r", cwd=tmp_path)
    tmp_path.chmod(0o700)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "r"
    sbvae.train(Config(steps=2, batch_size=2, device="cpu", out=str(folder)))
    return folder


def damage(folder, how):
    path = folder / "checkpoint.pt"
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif how == "pickle":  # would run code if it were unpickled freely
        path.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    elif how == "flipped":
        path.write_bytes(data[:200] + b"\0" * 400 + data[600:])
    elif how == "no config":
        torch.save({"model": {}}, path)
    elif how == "older":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["config"]["a_flag_that_was"] = 1
        torch.save(checkpoint, path)
    elif how == "other":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["config"]["beta"] = 4.0
        torch.save(checkpoint, path)
    elif how == "config.json":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "pickle", "flipped", "no config", "older", "other",
                                 "config.json"])
def test_damaged_run_folders_are_refused(how, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "r")
    damage(Path("r"), how)
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}
    for attempt in (lambda: sbvae.train(Config(resume="r", steps=4)), lambda: sbvae.load("r")):
        with pytest.raises(sbvae.InputError) as error:
            attempt()
        assert "\n" not in str(error.value) and "r" in str(error.value)
    assert {p.name: p.read_bytes() for p in Path("r").iterdir()} == before  # nothing lost
    assert not Path("executed").exists()


def test_resume_refuses_another_configuration(finished):
    for change in (dict(beta=4.0), dict(decoder="deconv"), dict(seed=1), dict(lr=1e-3), dict(dataset="objects")):
        with pytest.raises(sbvae.InputError, match="was trained with --" + next(iter(change))):
            sbvae.train(Config(resume=str(finished), steps=4, **change))
    assert sbvae.train(Config(resume=str(finished), beta=1.0))["step"] == 2  # the same value is no contradiction


def test_two_processes_never_write_one_run(tmp_path):
    first = subprocess.Popen(command(*SMALL, "--steps", 100_000, "--out", "r"), cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE)
    for line in first.stdout:
        if line.startswith("step "):
            break
    second = run("--resume", "r", cwd=tmp_path)
    first.kill()
    first.stdout.close()
    first.wait()
    assert second.returncode == 2 and "another process" in second.stderr and second.stderr.count("\n") == 1
    third = run("--resume", "r", "--steps", 1, cwd=tmp_path)  # a dead process's lock does not block
    assert third.returncode == 0, third.stderr


def test_the_file_works_alone(tmp_path):
    """Copied into an empty folder it trains sprites, the paper's model, and other data are refused with a reason."""
    shutil.copy(ROOT / "sbvae.py", tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "sbvae.py", *SMALL, "--steps", "2", "--out", "r"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "kernels/ is not beside" in done.stdout and (tmp_path / "r/traversals.png").exists()
    for name in ("objects", "circles-xy"):
        done = subprocess.run([sys.executable, "sbvae.py", "--dataset", name], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and name in done.stderr


def test_importing_has_no_side_effects(tmp_path):
    """No output, no file, no CUDA context, no window, no change of torch's state, no signal handler."""
    code = ("import os, signal, sys, torch; before = torch.get_rng_state(), torch.get_num_threads(), "
            "torch.get_default_dtype(), signal.getsignal(signal.SIGTERM), set(os.environ); import sbvae; "
            "assert torch.equal(before[0], torch.get_rng_state()); "
            "assert before[1:] == (torch.get_num_threads(), torch.get_default_dtype(), "
            "signal.getsignal(signal.SIGTERM), set(os.environ)); "
            "assert not torch.cuda.is_initialized() and not {'pygame', 'matplotlib'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_help_says_where_in_the_paper():
    done = run("--help", cwd=ROOT)
    assert done.returncode == 0
    for words in ("model and data:", "architecture:", "training:", "machine:", "run folder:", "(Table 10)", "(B)",
                  "(E)", "(A.2, Table 2)", "(Table 4)"):
        assert words in re.sub(r"\s+", " ", done.stdout), words
    flags = set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    assert {sbvae.flag(name) for name in vars(Config()) if name != "image_shape"} <= flags


def test_readme_and_ci_give_the_same_test_command():
    tests = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "pytest" in line]
    assert len(tests) == 1 and tests[0] in (ROOT / "README.md").read_text().splitlines()
