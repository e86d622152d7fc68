"""The program as people run it: runs, resumes, signals, errors, the single file."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from torch import distributions as D

import sbvae
from sbvae import Config

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--batch-size", "2", "--device", "cpu", "--log-every", "3", "--save-every", "4"]
QUICK = [*SMALL, "--conv-layers", "1"]  # where the size of the model is not what is tested
TINY = dict(batch_size=2, conv_layers=1, device="cpu")  # likewise, from Python


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


def test_kill_9_at_any_moment_then_resume_is_exact(tmp_path):
    """FactorVAE (the VAE is in test_trust), killed again and again, at first mostly between a checkpoint and the next
    log line, then at random moments, and carried on each time: weights, both optimizers, generator and metrics equal
    those of the run that was left alone, bit for bit."""
    arguments = [*QUICK, "--model", "factorvae", "--steps", 30, "--save-every", 2, "--log-every", 5]
    whole = run(*arguments, "--out", "whole", "--save-every", 100, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    random.seed(0)
    broken, kills = tmp_path / "broken", 0
    for life in range(9):
        ask = ["--resume", broken] if (broken / "checkpoint.pt").exists() else [*arguments, "--out", broken]
        process = subprocess.Popen(command(*ask), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:  # mostly wait until it has begun, so that each life makes a few steps
            if line.startswith(("run " if life % 4 else "data ") if life else "step "):
                break
        try:
            if life == 8:  # enough: on a slow machine it might never end
                process.communicate(timeout=300)
            time.sleep(0.3 * life * random.random())
            if process.poll() is None:
                process.kill()
                kills += 1
        finally:
            process.stdout.close()
            process.wait()
        if life == 0:
            assert 4 <= torch.load(broken / "checkpoint.pt", weights_only=True)["step"] < 30
        if process.returncode == 0:
            break
    assert process.returncode == 0 and kills >= 2
    assert_same_state(tmp_path / "whole", broken)
    assert history(tmp_path / "whole") == history(broken)
    assert not list(broken.glob(".*")) and not list(broken.glob("*.tmp"))


@pytest.mark.parametrize("model", ["vae", "factorvae"])
def test_resume_between_two_log_lines_is_exact(model, tmp_path, monkeypatch):
    """A crash at the fifth step, of the checkpoint at step 4, with a log line every third: sums of one step are in it.
    Not left to chance, as to kill a process at a random moment is on a busy machine."""
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8))
    monkeypatch.setattr(sbvae, "save_pictures", lambda *_: None)
    config = dict(**TINY, dataset=str(tmp_path / "a.npz"), model=model, precision="fp32", log_every=3, save_every=2)
    sbvae.train(Config(**config, steps=7, out=str(tmp_path / "whole")))
    step, calls = sbvae.training_step, []

    def crash(*arguments, **parts):
        calls.append(1)
        if len(calls) == 6:
            raise ZeroDivisionError
        return step(*arguments, **parts)

    monkeypatch.setattr(sbvae, "training_step", crash)
    with pytest.raises(ZeroDivisionError):
        sbvae.train(Config(**config, steps=7, out=str(tmp_path / "r")))
    assert torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)["step"] == 4
    sbvae.train(Config(resume=str(tmp_path / "r")))
    assert_same_state(tmp_path / "whole", tmp_path / "r")
    assert history(tmp_path / "whole") == history(tmp_path / "r")


def test_resume_takes_new_intervals_and_the_steps_it_has(tmp_path):
    run = tmp_path / "r"
    sbvae.train(Config(**TINY, steps=2, log_every=2, out=str(run)))
    assert sbvae.train(Config(resume=str(run), steps=2))["step"] == 2  # nothing to do, and no mistake
    sbvae.train(Config(resume=str(run), steps=5, log_every=1, save_every=3))
    assert [r["step"] for r in history(run)] == [2, 3, 4, 5]
    told = json.loads((run / "config.json").read_text())["config"]
    assert (told["steps"], told["log_every"], told["save_every"]) == (5, 1, 3)


def test_a_run_cut_short_is_not_done_where_it_stopped(tmp_path, monkeypatch):
    """To end it there would leave it without its last log line and pictures; a step further it has both."""
    loss, calls = sbvae.vae_loss, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)

    monkeypatch.setattr(sbvae, "vae_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sbvae.train(Config(**TINY, steps=50, log_every=3, out=str(tmp_path / "r")))
    before = {p: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    with pytest.raises(sbvae.InputError, match="is at step 4 already; --steps must be more"):
        sbvae.train(Config(resume=str(tmp_path / "r"), steps=4))
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    assert sbvae.train(Config(resume=str(tmp_path / "r"), steps=5))["step"] == 5
    assert [r["step"] for r in history(tmp_path / "r")] == [3, 5] and (tmp_path / "r/traversals.png").exists()
    assert sbvae.train(Config(resume=str(tmp_path / "r")))["step"] == 5  # it is done now


def test_a_second_signal_ends_it_at_once(tmp_path, monkeypatch):
    """Without a checkpoint of what was under way; and handlers are afterwards what they were before."""
    loss, number, before = sbvae.vae_loss, signal.SIGINT, [signal.getsignal(n) for n in (2, 15)]

    def signals(times):
        def interrupted(*arguments):
            for _ in range(times):
                os.kill(os.getpid(), number)
            return loss(*arguments)
        return interrupted

    for times, saved in ((1, 1), (2, 0)):
        monkeypatch.setattr(sbvae, "vae_loss", signals(times))
        with pytest.raises(KeyboardInterrupt):
            sbvae.train(Config(**TINY, steps=4, out=str(tmp_path / str(times))))
        assert torch.load(tmp_path / str(times) / "checkpoint.pt", weights_only=True)["step"] == saved
        assert [signal.getsignal(n) for n in (2, 15)] == before


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave(number, code, tmp_path):
    process = subprocess.Popen(command(*QUICK, "--steps", 100_000, "--save-every", 50_000, "--out", "r"), cwd=tmp_path,
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
    straight = run(*QUICK, "--steps", step + 2, "--out", "s", cwd=tmp_path)
    assert straight.returncode == 0
    assert torch.equal(*(sbvae.load(tmp_path / f).encoder.latents.weight for f in "rs"))


def test_load_gives_the_trained_model(tmp_path):
    sbvae.train(Config(**TINY, steps=2, shuffle_coords=True, out=str(tmp_path / "r")))
    model = sbvae.load(tmp_path / "r")
    assert not model.training and model.config.steps == 2 and model.config.shuffle_coords
    fresh = sbvae.build_model(model.config)
    assert torch.equal(fresh.decoder.coords, model.decoder.coords)
    assert not torch.equal(fresh.encoder.latents.weight, model.encoder.latents.weight)


def test_traversals_go_around_the_mean_nearest_to_the_prior(tmp_path, monkeypatch):
    model, seen = sbvae.build_model(Config(latents=3, conv_layers=1, image_shape=[1, 8, 12])), []
    mu, logvar = torch.tensor([[3.0, 0, 0], [0.5, -0.25, 0.1], [2, 2, 2]]), torch.tensor([[0.0, -2, -1]]).expand(3, -1)
    decode = model.decode
    monkeypatch.setattr(model, "encode", lambda images: (mu, logvar))
    monkeypatch.setattr(model, "decode", lambda z: seen.append(z) or decode(z))
    sbvae.save_pictures(tmp_path, model, torch.rand(3, 1, 8, 12))
    for k, z in zip((1, 2, 0), seen[:3], strict=True):  # the latent with the least variance first
        assert torch.equal(z[:, k], torch.linspace(-2, 2, 11))
        rest = [i for i in range(3) if i != k]
        assert torch.equal(z[:, rest], mu[1, rest].expand(11, -1))


def test_blank_images_have_no_say_in_the_traversals(tmp_path, monkeypatch):
    """Figure 20: a blank image has the prior for its x, which is no less informative. Where all are blank all count."""
    model, seen = sbvae.build_model(Config(latents=2, conv_layers=1, image_shape=[1, 8, 12])), []
    mu, variance = torch.tensor([[1.0, 1], [0, 0], [2, 2]]), torch.tensor([[0.01, 0.3], [1, 0.1], [0.03, 0.3]])
    decode = model.decode
    monkeypatch.setattr(model, "encode", lambda images: (mu, variance.log()))
    monkeypatch.setattr(model, "decode", lambda z: seen.append(z) or decode(z))
    for images, order, center in ((torch.tensor([0.2, 0, 0.2]), [0, 1], mu[0]), (torch.zeros(3), [1, 0], mu[1])):
        seen.clear()
        sbvae.save_pictures(tmp_path, model, images[:, None, None, None] * torch.ones(3, 1, 8, 12))
        for k, z in zip(order, seen[:2], strict=True):
            assert torch.equal(z[:, k], torch.linspace(-2, 2, 11)) and (z[:, 1 - k] == center[1 - k]).all()


def test_pictures_of_large_images_stay_small(tmp_path, monkeypatch):
    """No batch is larger than training's, and 300 pixels are shown as 100, each the mean of nine."""
    from matplotlib.image import imread

    model, sizes = sbvae.build_model(Config(latents=2, conv_layers=1, batch_size=4, image_shape=[1, 200, 300])), []
    encode, decode = model.encode, model.decode
    monkeypatch.setattr(model, "encode", lambda x: sizes.append(len(x)) or encode(x))
    monkeypatch.setattr(model, "decode", lambda z: sizes.append(len(z)) or decode(z))
    stripes = (torch.arange(300) % 3 == 1).float().expand(10, 1, 200, 300)
    sbvae.save_pictures(tmp_path, model, stripes)
    assert max(sizes) == 4 and sum(sizes) == 10 + 2 * 11 + 10
    for name, columns in (("reconstructions", 10), ("traversals", 11)):
        width = imread(tmp_path / f"{name}.png").shape[1]
        assert 2 * columns * 102 <= width < 2 * columns * 102 + 400  # a label on the left
    data = imread(tmp_path / "reconstructions.png")[40:100, -1000:-900, 0]
    assert (abs(data - 1 / 3) < 0.01).mean() > 0.9


@pytest.mark.parametrize("more, told", [
    (dict(dataset="objects"), "6 convolutions"), (dict(decoder="deconv"), "5 deconvolutions, after an MLP of 1"),
    (dict(upscales=2, mlp_layers=3, shuffle_coords=True),
     "3 convolutions, 2 of them upscaling, after an MLP of 3, coordinates shuffled")])
def test_what_the_paper_chooses_is_printed(more, told, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sbvae, "save_pictures", lambda *_: None)
    sbvae.train(Config(device="cpu", steps=1, batch_size=2, out=str(tmp_path / "r"), **more))
    assert f"layers   decoder of {told}" in capsys.readouterr().out.splitlines()


def test_a_run_goes_on_where_memory_does_not_suffice_for_pictures(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise errors.pop(0)

    monkeypatch.setattr(sbvae, "save_pictures", fails)
    errors = [MemoryError(), torch.OutOfMemoryError("of a GPU"), RuntimeError("can't allocate memory: 9 bytes")]
    sbvae.train(Config(**TINY, steps=3, save_every=1, out=str(tmp_path / "r")))
    assert not errors and capsys.readouterr().out.count("note: no new pictures, as memory does not suffice") == 3
    assert torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)["step"] == 3
    errors = [RuntimeError("something else")]
    with pytest.raises(RuntimeError, match="something else"):
        sbvae.train(Config(resume=str(tmp_path / "r"), steps=4))


@pytest.mark.parametrize("changes", [dict(beta=4.0), dict(likelihood="gaussian"), dict(model="factorvae", gamma=350.0)],
                         ids=lambda changes: "-".join(map(str, changes.values())))
def test_training_is_the_papers(changes, tmp_path, monkeypatch):
    """Six steps of the program against a transcription in float64 of the paper's losses, of Adam (Kingma and Ba,
    algorithm 1) and of FactorVAE (Kim and Mnih, algorithm 2): what each step logs, and the weights at the end."""
    build = sbvae.build_model

    def widened(config):  # else no posterior is narrow yet, and the KL does not count
        model = build(config)
        with torch.no_grad():
            model.encoder.latents.weight.mul_(60)
        return model

    monkeypatch.setattr(sbvae, "build_model", widened)
    images = np.random.default_rng(0).integers(0, 256, (50, 16, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    factor = "model" in changes
    config = Config(dataset=str(tmp_path / "images.npz"), batch_size=8, seed=5, steps=6, log_every=1, device="cpu",
                    precision="fp32", out=str(tmp_path / "r"), **changes)
    shaped = sbvae.resolve(dataclasses.replace(config, image_shape=[3, 16, 32]))
    start = {k: v.double() for k, v in widened(shaped).state_dict().items() if "coords" not in k}
    judge = sbvae.build_discriminator(10, 5).double()  # another one than seed 0's
    d_start = {k: v.clone() for k, v in judge.state_dict().items()}
    generator = torch.Generator().manual_seed(5)

    def batch():
        index = torch.randint(50, (8,), generator=generator)
        return torch.from_numpy(images)[index].permute(0, 3, 1, 2).double() / 255

    def noise():
        return torch.randn(8, 10, generator=generator).double()

    def adam(weights, lr, beta1, beta2):
        m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
        for t in itertools.count(1):
            loss = yield
            for i, (w, g) in enumerate(zip(weights, torch.autograd.grad(loss, weights), strict=True)):
                m[i] = beta1 * m[i] + (1 - beta1) * g
                v[i] = beta2 * v[i] + (1 - beta2) * g**2
                w.data -= lr * (m[i] / (1 - beta1**t)) / ((v[i] / (1 - beta2**t)).sqrt() + 1e-8)

    w = {k: v.clone().requires_grad_() for k, v in start.items()}
    vae_adam = adam(list(w.values()), 1e-4 if factor else 3e-4, 0.9, 0.999)
    d_adam = adam(list(judge.parameters()), 2e-5, 0.5, 0.9)
    next(vae_adam), next(d_adam)
    expected = []
    for _ in range(6):
        x = batch()
        mu, logvar = naive.encode(w, x)
        q = D.Normal(mu, (logvar / 2).exp())
        z = mu + q.stddev * noise()
        out = naive.decode(w, z, 16, 32)
        p = D.Normal(out, 0.3**0.5) if "likelihood" in changes else D.Bernoulli(logits=out, validate_args=False)
        nll = -p.log_prob(x).sum((1, 2, 3)).mean()
        kl = D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1).mean()
        loss = nll + changes.get("beta", 1) * kl
        line = dict(elbo=nll + kl, nll=nll, kl=kl, latents_used=(q.stddev < 0.5).sum(1).double().mean())
        if factor:
            log_d = judge(z).log_softmax(1)
            line["tc"] = (log_d[:, 0] - log_d[:, 1]).mean()
            loss = loss + 350 * line["tc"]
        vae_adam.send(loss)
        if factor:
            mu, logvar = naive.encode(w, batch())
            other = (mu + (logvar / 2).exp() * noise()).detach()
            order = torch.rand(8, 10, generator=generator).argsort(0)
            permuted = torch.stack([other[order[:, k], k] for k in range(10)], 1)
            p_joint, p_permuted = judge(z.detach()).softmax(1)[:, 0], judge(permuted).softmax(1)[:, 1]
            line["d_loss"] = -(p_joint.log() + p_permuted.log()).mean() / 2
            d_adam.send(line["d_loss"])
        expected.append({k: v.item() for k, v in line.items()})
    sbvae.train(config)
    # Rounding adds up over the steps: in a count by one latent of one of 8 images, in a difference near zero
    later = {"latents_used": 0.126, "tc": 1e-3}
    for i, (ours, theirs) in enumerate(zip(history(tmp_path / "r"), expected, strict=True)):
        for k, value in theirs.items():
            assert ours[k] == pytest.approx(value, rel=5e-3 if i else 1e-5, abs=later.get(k, 0) if i else 0), k
    assert 0 < expected[0]["latents_used"] < 10
    saved = torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)
    ends = [(saved["model"], w, start)] + factor * [(saved.get("discriminator"), judge.state_dict(), d_start)]
    for ours, theirs, before in ends:
        off, moved = (math.sqrt(sum((a[k] - theirs[k].detach()).square().sum().item() for k in theirs))
                      for a in (ours, before))
        assert off < 0.05 * moved


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_is_in_the_precision_asked_for(precision, dtype, tmp_path, monkeypatch):
    build, seen = sbvae.build_model, []

    def watched(config):
        model = build(config)
        for conv in (model.encoder.convs[1], model.decoder.convs[-1]):
            conv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        return model

    monkeypatch.setattr(sbvae, "build_model", watched)
    monkeypatch.setattr(sbvae, "save_pictures", lambda *_: None)
    sbvae.train(Config(batch_size=2, conv_layers=2, steps=2, device="cpu", precision=precision,
                       out=str(tmp_path / "r")))
    assert seen == [dtype] * 4


def test_factorvae_gradients_stay_on_their_side(tmp_path, monkeypatch):
    """Where the two losses are made, during training: the discriminator's has no gradient for any weight of the VAE,
    the penalty has one for the encoder and none for the discriminator; and three steps without the discriminator's
    loss leave the discriminator as it began."""
    models, seen = {}, []
    build, penalty, d_loss = sbvae.build_model, sbvae.total_correlation, sbvae.discriminator_loss
    build_d = sbvae.build_discriminator
    monkeypatch.setattr(sbvae, "build_model", lambda c: models.setdefault("vae", build(c)))
    monkeypatch.setattr(sbvae, "build_discriminator", lambda *a: models.setdefault("d", build_d(*a)))

    def reached(loss, name):
        weights = [p for p in models[name].parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) if weights else []
        return any(g is not None and g.any() for g in grads)

    def check_penalty(logits):
        tc = penalty(logits)
        seen.append(("penalty", reached(tc, "vae"), reached(tc, "d")))
        return tc

    def check_d_loss(joint, permuted):
        loss = d_loss(joint, permuted)
        seen.append(("d_loss", reached(loss, "vae"), reached(loss, "d")))
        return 0 * loss

    monkeypatch.setattr(sbvae, "total_correlation", check_penalty)
    monkeypatch.setattr(sbvae, "discriminator_loss", check_d_loss)
    sbvae.train(Config(**TINY, model="factorvae", steps=3, out=str(tmp_path / "r")))
    assert seen == [("penalty", True, False), ("d_loss", False, True)] * 3
    start = build_d(10, 0).state_dict()
    assert all(torch.equal(start[k], v) for k, v in models["d"].state_dict().items())


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    data, calls = sbvae.Sprites(), []

    class Poisoned(sbvae.Sprites):
        def sample(self, n, generator):
            calls.append(n)
            images = data.sample(n, generator)
            return images * math.nan if len(calls) == 8 else images  # the pictures take the first call

    monkeypatch.setattr(sbvae, "load_dataset", lambda *_: Poisoned())
    with pytest.raises(FloatingPointError, match="elbo is nan, nll is nan, kl is nan.* at step 7;") as error:
        sbvae.train(Config(**TINY, steps=50, log_every=3, save_every=4, out=str(tmp_path / "r")))
    assert "\n" not in str(error.value)
    checkpoint = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 4 and all(v.isfinite().all() for v in checkpoint["model"].values())
    assert [r["step"] for r in history(tmp_path / "r")] == [3, 6]


def test_the_first_cause_is_named_not_what_followed(tmp_path, monkeypatch):
    loss, calls = sbvae.vae_loss, []

    def overflow(*arguments):  # an infinite KL at the fifth step, then NaN everywhere
        calls.append(1)
        total, nll, kl = loss(*arguments)
        return total, nll if len(calls) < 6 else nll * math.nan, kl if len(calls) < 5 else kl / 0

    monkeypatch.setattr(sbvae, "vae_loss", overflow)
    with pytest.raises(FloatingPointError, match="diverged: elbo is inf, kl is inf at step 5; .* last good state"):
        sbvae.train(Config(**TINY, steps=50, log_every=50, save_every=9, out=str(tmp_path / "r")))
    assert torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["step"] == 0


def test_an_exploding_kl_stops_the_run(tmp_path, monkeypatch):
    """Finite all the way: more nats than the raw image has, 12,288 bytes at ln 256, are of no use."""
    raw, loss = 12_288 * 5.545177444479562, sbvae.vae_loss
    for factor, ends in ((0.999, True), (1.001, False)):
        monkeypatch.setattr(sbvae, "vae_loss", lambda *a, factor=factor: (*loss(*a)[:2], torch.tensor(factor * raw)))
        config = Config(**TINY, steps=6, log_every=3, save_every=2, out=str(tmp_path / str(factor)))
        if ends:
            assert sbvae.train(config)["kl"] == pytest.approx(factor * raw)
            continue
        with pytest.raises(FloatingPointError, match="KL has exploded to 6.82e[+]04 nats between steps 0 and 2"):
            sbvae.train(config)
        assert torch.load(tmp_path / "1.001" / "checkpoint.pt", weights_only=True)["step"] == 0


def test_deterministic_is_set_and_unset(tmp_path):
    for asked in (True, False):
        sbvae.train(Config(**TINY, steps=1, deterministic=asked, out=str(tmp_path / str(asked))))
        assert torch.are_deterministic_algorithms_enabled() == asked


@pytest.mark.parametrize("model", ["vae", "factorvae"])
def test_no_step_waits_for_the_device(model, tmp_path, monkeypatch):
    """Reading a value, or a shape that depends on values, would stall a GPU and cannot be captured in a graph: five
    steps must do it as often as two, and the same test sees it when a step does."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            table = op is torch.ops.aten.index.Tensor and all(i is None or i.dtype != torch.bool for i in args[1])
            waits = torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags
            self.count += waits and not table  # an index by numbers has a known shape, one by a mask has not
            return op(*args, **kwargs or {})

    def waits(steps):
        folder = tmp_path / str(random.random())
        config = Config(model=model, conv_layers=1, steps=steps, batch_size=2, device="cpu", out=str(folder))
        with Waits() as mode:
            sbvae.train(config)
        return mode.count

    for check in ("check_classes", "check_pixels"):  # they look at the values on a CPU only
        monkeypatch.setattr(sbvae, check, lambda *_: None)
    monkeypatch.setattr(sbvae, "save_pictures", lambda *_: None)
    once = waits(2)
    assert once > 0 and waits(5) == once
    sample = sbvae.Sprites.sample
    monkeypatch.setattr(sbvae.Sprites, "sample", lambda *a: (lambda x: x * float(x.isfinite().all()))(sample(*a)))
    assert waits(5) > once + 3


def test_compiled_parts_do_what_eager_ones_do(tmp_path, monkeypatch):
    """From one seed the log differs by rounding only, another seed's by more; and each part is compiled as a whole."""
    from torch._dynamo.utils import counters

    for check in ("check_classes", "check_pixels"):  # they look at the values on a CPU only
        monkeypatch.setattr(sbvae, check, lambda *_: None)
    logs, graphs = [], []
    for name, change in (("eager", {}), ("compiled", dict(compile=True)), ("other", dict(seed=1))):
        torch.compiler.reset()
        counters.clear()
        sbvae.train(Config(model="factorvae", steps=4, **TINY, precision="fp32", log_every=2,
                           out=str(tmp_path / name), **change))
        logs.append(np.array([list(line.values()) for line in history(tmp_path / name)]))
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    eager, compiled, other = logs
    assert np.allclose(compiled, eager, rtol=1e-4, atol=1e-5) and not np.allclose(other, eager, rtol=1e-4, atol=1e-5)
    # drawing and encoder with gradients and without, decoder, loss, discriminator as judge and as pupil: 8, or one less
    # where the compiler tells fewer cases apart; pictures would add some
    assert graphs[0] == graphs[2] == 0 and graphs[1] in (7, 8)


def test_a_compiler_that_is_missing(tmp_path):
    """One line, and nothing is written."""
    environment = {**os.environ, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command(*QUICK, "--steps", 3, "--compile", "--out", "r"), cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and not (tmp_path / "r").exists()
    assert re.fullmatch(r"error: --compile does not work here .*; drop it\n", done.stderr)


def test_speed_is_steps_over_time(tmp_path, monkeypatch, capsys):
    """However often it logs: by a clock on which a step takes half a second and nothing else takes time."""
    now = [0.0]

    def training_step(*arguments, train=sbvae.training_step, **parts):
        now[0] += 0.5
        return train(*arguments, **parts)

    monkeypatch.setattr(sbvae, "training_step", training_step)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for log_every in (8, 100):
        config = Config(**TINY, steps=140, log_every=log_every, out=str(tmp_path / str(log_every)))
        sbvae.train(config)
        assert "speed    2 steps/s; 1.0 min to go, until " in capsys.readouterr().out
        lines = map(json.loads, Path(config.out, "metrics.jsonl").read_text().splitlines())
        assert {line["images_per_s"] for line in lines} == {2.0 * TINY["batch_size"]}


def test_what_is_printed_is_what_is_logged_and_the_time_left(tmp_path, monkeypatch, capsys):
    """By a clock on which a step takes half a second."""
    now, step = [0.0], sbvae.training_step

    def slow(*arguments, **parts):
        now[0] += 0.5
        return step(*arguments, **parts)

    monkeypatch.setattr(sbvae, "training_step", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    sbvae.train(Config(**TINY, model="factorvae", steps=6, log_every=2, out=str(tmp_path / "r")))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    pattern = (r"step +(\d+)  ELBO +([\d.]+)  NLL +([\d.]+)  KL +([\d.]+)  latents used +([\d.]+)  TC +(-?[\d.]+)  "
               r"D loss ([\d.]+) ")
    names = ("step", "elbo", "nll", "kl", "latents_used", "tc", "d_loss")
    for line, record in zip(lines, history(tmp_path / "r", timing=True), strict=True):
        told = dict(zip(names, map(float, re.match(pattern, line).groups()), strict=True))
        assert told == pytest.approx({n: record[n] for n in names}, abs=0.006)
        assert record["seconds_left"] == (6 - record["step"]) / 2


def test_clock():
    for seconds, told in ((30, "0.5 min"), (7199, "120.0 min"), (7200, "2.0 h"), (47.9 * 3600, "47.9 h"),
                          (48 * 3600, "2.0 days"), (31 * 86400, "31.0 days")):
        assert sbvae.clock(seconds) == told


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_is_captured_on_the_stream_of_the_steps_before(fails, fake_cuda, tmp_path, monkeypatch, capsys):
    """Three steps, then the graph, all on a stream that waits for the usual one, and at the end the usual one for it.
    Where it cannot be captured the steps go on, with a generator that is not caught in it."""

    @contextlib.contextmanager
    def broken(graph, stream, capture=torch.cuda.graph):
        with capture(graph, stream):
            yield
        raise RuntimeError("no\ngraph")

    class Generator(torch.Generator):
        def graphsafe_set_state(self, state):
            fake_cuda.append("generator restored")
            self.set_state(state.get_state())

    if fails:
        monkeypatch.setattr(torch.cuda, "graph", broken)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(sbvae, "choose_device", lambda c: (torch.device("cpu"), "fp32", "as it is"))
    sbvae.train(Config(**TINY, steps=5, cuda_graph=True, out=str(tmp_path / "r")))
    step, said = ["step on side"], capsys.readouterr().out
    after = ["generator restored", *step * 2] if fails else ["replayed on side"] * 2
    assert fake_cuda == ["side waits for usual", *step * 3, "registered", "captured on side", *step, *after,
                         "usual waits for side"]
    assert torch.cuda.current_stream() == "usual"
    assert ("graph    none, kernels are launched one by one (no graph)" if fails else
            "graph    a step is one CUDA graph") in said.splitlines()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", ["vae", "factorvae"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_does_what_an_eager_one_does(compiled, model, tmp_path, capsys):
    """From one seed, in fp32, the log differs by rounding only, and resuming draws on, not again. 200 steps, but 20
    when compiled, as other code rounds otherwise, which training soon makes visible."""
    records, steps = [], 10 if compiled else 100
    for graph in (False, True):
        config = Config(model=model, steps=steps, log_every=steps // 2, device="cuda", precision="fp32",
                        cuda_graph=graph, compile=graph and compiled, deterministic=not compiled,
                        out=str(tmp_path / str(graph)))
        sbvae.train(config)
        sbvae.train(Config(resume=config.out, steps=2 * steps))
        said = capsys.readouterr().out
        assert said.count("a step is one CUDA graph") == 2 * graph, said
        records.append(history(Path(config.out)))
    for eager, captured in zip(*records, strict=True):
        assert captured == pytest.approx(eager, rel=1e-2, abs=1e-3 if compiled else 0)
    weights = [sbvae.load(tmp_path / str(g)).state_dict() for g in (False, True)]
    for name, eager in weights[0].items():
        torch.testing.assert_close(weights[1][name], eager, rtol=0.02, atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("change", [{}, dict(decoder="deconv"), dict(model="factorvae"), dict(precision="fp32")])
def test_deterministic_gives_the_same_bits_on_a_gpu(change, graph, tmp_path):
    """Two runs from one seed, and one resumed half-way, end with the same log and weights; another seed's does not."""
    ends = []
    for name, stops, seed in (("a", [60], 0), ("b", [60], 0), ("resumed", [30, 60], 0), ("other", [60], 1)):
        config = Config(**change, steps=stops[0], log_every=10, device="cuda", cuda_graph=graph, deterministic=True,
                        seed=seed, out=str(tmp_path / name))
        sbvae.train(config)
        for stop in stops[1:]:
            sbvae.train(Config(resume=config.out, steps=stop))
        state = sbvae.load(config.out).state_dict()
        ends.append((history(Path(config.out)), torch.cat([v.flatten() for v in state.values()])))
    for lines, weights in ends[1:3]:
        assert lines == ends[0][0] and torch.equal(weights, ends[0][1])
    assert not torch.equal(ends[3][1], ends[0][1])


def test_a_diverged_run_ends_with_one_line(tmp_path):
    done = run(*QUICK, "--steps", 200, "--lr", 1e12, "--out", "r", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_each_process_takes_its_share_of_the_cores(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    for beside in (1, 2, 3, 16):
        for name, value in dict(RANK=20, WORLD_SIZE=40, LOCAL_RANK=0, LOCAL_WORLD_SIZE=beside).items():
            monkeypatch.setenv(name, str(value))
        assert sbvae.share_machine() == (20, 40)
    assert taken == [5, 3, 1]


def test_seeds_are_runs_by_themselves(tmp_path):
    """One after the other, dealt out by torchrun, or each started by hand: the same bits. And they are carried on."""
    words = [*QUICK, "--steps", 5]

    def start(*arguments, launcher=()):
        threads = str(max(1, len(os.sched_getaffinity(0)) // 2))  # as many as each of torchrun's two takes
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": ""}
        done = subprocess.run([sys.executable, *launcher, *command(*arguments)[1:]], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    for seed in (7, 8):
        start(*words, "--seed", seed, "--out", f"alone-seed{seed}")
    assert sum(line.startswith("done     3 steps") for line in start(*QUICK, "--steps", 3, "--seeds", "7-8")) == 2
    assert sorted(p.name[-5:] for p in (tmp_path / "runs").iterdir()) == ["seed7", "seed8"]
    start(*words, "--seeds", "7-8", "--out", "serial")
    if torch.distributed.is_available():
        start(*QUICK, "--steps", 3, "--seed", 8, "--out", "dealt-seed8")  # half of it is there
        lines = start(*words, "--seeds", "7-8", "--out", "dealt", launcher=[
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
        assert sorted(" ".join(line.split()[:4]) for line in lines if line.startswith("seed")) == [
            "seed 7 step 3", "seed 7 step 5", "seed 8 step 5"]
    for how in ("serial", "dealt") if torch.distributed.is_available() else ("serial",):
        for seed in (7, 8):
            assert_same_runs(tmp_path / f"{how}-seed{seed}", tmp_path / f"alone-seed{seed}")
    with pytest.raises(AssertionError):  # the seeds themselves differ
        assert_same_runs(tmp_path / "serial-seed7", tmp_path / "alone-seed8")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("serial-seed*/*")}
    assert start(*words, "--seeds", "7-8", "--out", "serial") == ["seed 7: done before", "seed 8: done before"]
    assert len(before) == 10 and before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before}
    other = run(*words, "--seeds", "6-8", "--out", "serial", "--lr", "0.1", cwd=tmp_path)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1) and "serial-seed7 was trained with" in other.stderr
    assert not (tmp_path / "serial-seed6").exists() and "step" not in other.stdout  # told before anything is trained


def assert_same_runs(a, b):
    assert_same_state(a, b)
    assert history(a) == history(b)


@pytest.mark.parametrize("rank, error, code", [
    (None, FloatingPointError, 1), (None, sbvae.InputError, 2), ("0", FloatingPointError, 0)])
def test_a_seed_that_fails_does_not_stop_the_others(rank, error, code, tmp_path, monkeypatch, capsys):
    """Nor those of torchrun's other processes, which it would end if this one failed."""
    monkeypatch.chdir(tmp_path)
    trained = []

    def train(config):
        trained.append((config.seed, config.out))
        if config.seed == 3:
            raise error("something of seed 3")

    monkeypatch.setattr(sbvae, "train", train)
    monkeypatch.setattr(sys, "argv", ["sbvae.py", "--seeds", "2-4", "--out", "x"])
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as left:
        sbvae.main()
    assert trained == [(2, "x-seed2"), (3, "x-seed3"), (4, "x-seed4")] and (not code or left.value.code == code)
    assert capsys.readouterr().err == "error: seed 3: something of seed 3\n"


@pytest.mark.parametrize("number, left", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_in_a_seeds_last_step_stops_them_all(number, left, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sbvae, "save_pictures", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(left):
        sbvae.train_seeds(Config(**TINY, steps=2, out="x"), "0-1")
    assert [p.name for p in tmp_path.iterdir()] == ["x-seed0"]
    assert torch.load("x-seed0/checkpoint.pt", weights_only=True)["step"] == 2


def test_the_seeds_of_a_process(tmp_path, monkeypatch):
    """Every seed is one process's, whatever their number; and eval.py finds them where they are."""
    import eval as evaluation

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # it would stay on the last GPU
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sbvae, "train", lambda config: mine.append(config))
    for world in (1, 2, 3, 7):
        mine = []
        for rank in range(world):
            for name, value in dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=world).items():
                monkeypatch.setenv(name, str(value))
            before = len(mine)
            sbvae.train_seeds(Config(dataset="circles-xy", decoder="deconv", steps=9), "0-4")
            assert abs(len(mine) - before - 5 / world) < 1
        assert sorted(c.seed for c in mine) == [0, 1, 2, 3, 4]
        jobs = evaluation.list_jobs("fig4", replicas=5, steps=9)
        assert {Path(c.out) for c in mine} == {job.run for job in jobs if "deconv" in str(job.run)}


@pytest.mark.parametrize("dataset, decoder, shape", [
    ("circles-xy:hole-center", "broadcast", (3, 64, 64)), ("circles-xh:blank", "deconv", (3, 64, 64)),
    ("objects", "broadcast", (3, 64, 64)), ("mine.npz", "broadcast", (1, 20, 12)), ("mine4.npz", "deconv", (4, 32, 64)),
    ("dsprites_some.npz", "broadcast", (1, 64, 64)), ("circles-mine.npz", "broadcast", (1, 20, 12))])
def test_every_kind_of_data_set_trains(dataset, decoder, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("mine.npz", "circles-mine.npz"):
        write_npz(name, images=random.integers(0, 256, (9, 20, 12), np.uint8))
    write_npz("mine4.npz", images=random.integers(0, 256, (9, 32, 64, 4), np.uint8))
    classes = np.stack([np.zeros(40), *[np.arange(40) % n for n in sbvae.SPRITE_SIZES]], 1)  # not all combinations
    images = sbvae.draw_sprites(torch.from_numpy(classes[:, 1:]).long()).numpy().astype(np.uint8)
    write_npz("dsprites_some.npz", imgs=images, latents_classes=classes.astype(np.int64), latents_values=classes)
    config = Config(dataset=dataset, decoder=decoder, conv_layers=2, steps=2, batch_size=2, device="cpu", out="r",
                    image_shape=shape)  # a tuple is as good as a list
    record = sbvae.train(config)
    assert record["step"] == 2 and math.isfinite(record["elbo"])
    model = sbvae.load("r")
    assert model.config.image_shape == list(shape)
    assert model.decode(torch.zeros(1, 10)).shape == (1, *shape)
    assert Path("r/traversals.png").exists()


def test_dsprites_own_file_is_coloured_like_the_drawing(monkeypatch):
    import datasets

    class File:  # what `load_file` gives for the whole official file: masks by classes
        factor_sizes, draw = sbvae.SPRITE_SIZES, print

        def mask(self, factors):
            return sbvae.draw_sprites(factors)

    monkeypatch.setattr(datasets, "load_file", lambda *_, **__: File())
    images = sbvae.load_dataset("dsprites.npz").sample(4, torch.Generator().manual_seed(0))
    assert torch.equal(images, sbvae.Sprites().sample(4, torch.Generator().manual_seed(0)))


def test_defaults_follow_the_data_set_and_not_what_lies_around(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("objects").mkdir()
    names = {"objects": (2_500_000, 6), "3dshapes.h5": (2_500_000, 6), "x/dsprites_a.npz": (1_500_000, 3),
             "rendered_chairs.tar": (700_000, 3), "my_objects.npz": (500_000, 3), "circles-rg:blank": (500_000, 3)}
    for name, expected in names.items():
        c = sbvae.resolve(Config(dataset=name))
        assert (c.steps, c.conv_layers) == expected, name


BAD = [  # arguments, what the one line must contain
    (["--decoder", "conv"], "broadcast"),
    (["--colour", "red"], "--colour"),
    (["--steps", "many"], "--steps"),
    (["--step", "5"], "--step"),  # no abbreviations: they would break when flags are added
    (["--lr", "-1"], "--lr"),
    (["--beta", "nan"], "--beta"),
    (["--dataset", "no-such-file.npz"], "no-such-file.npz"),
    (["--dataset", "circles-zz"], "circles-zz"),
    (["--dataset", "two\nlines.npz"], "two lines.npz"),
    (["--dataset", "~nobody-of-this-name/x.npz"], "x.npz"),
    (["--shuffle-coords", "--decoder", "deconv"], "--shuffle-coords"),
    (["--device", "tpu"], "--device"),
    (["--device", "cpu", "--precision", "tf32"], "tf32"),
    (["--device", "cpu", "--kernel", "triton"], "triton"),
    (["--resume", "nothing-here"], "nothing-here"),
    (["--out", "file/below"], "file/below"),
    (["--out", "file"], "file"),
    (["--out", "mine"], "mine"),
    (["--out", "/proc/nowhere"], "/proc/nowhere"),
    (["--resume", ""], "no run"),
    (["--conv-layers", "20000"], "--conv-layers"),
    (["--seed", "99999999999999999999"], "--seed"),
    (["--seeds", "5-3"], "--seeds"),
    (["--seeds", "3"], "--seeds"),
    (["--seeds", "0-99999999999999999999"], "--seeds"),
    (["--seeds", "0-1", "--seed", "3"], "--seed"),
    (["--seeds", "0-1", "--resume", "r"], "--resume"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_ends_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    """Every sixth as a command; the others in this process, as a new one takes seconds."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text('{"epoch": 1}\n')  # another program's
    (tmp_path / "mine" / ".notes.tmp").write_text("precious")
    if BAD.index((arguments, words)) % 6 == 0:
        done = run(*arguments, cwd=tmp_path)
        code, error = done.returncode, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sbvae.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            sbvae.main()
        code, error = stop.value.code, capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and words in error and error.count("\n") == 1, error
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".notes.tmp", "file", "metrics.jsonl", "mine"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "r"
    sbvae.train(Config(**TINY, steps=2, out=str(folder)))
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
    elif how == "weights":
        middle = len(data) // 2  # torch does not look at checksums
        path.write_bytes(data[:middle] + b"\0" * 64 + data[middle + 64 :])
    elif how in ("no generator", "renamed weight"):
        checkpoint = torch.load(path, weights_only=True)
        if how == "no generator":
            del checkpoint["generator"]
        else:
            checkpoint["model"]["encoder.other"] = checkpoint["model"].pop("encoder.latents.bias")
        torch.save(checkpoint, path)
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


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "pickle", "flipped", "weights", "no generator",
                                 "renamed weight", "no config", "older", "other", "config.json"])
def test_damaged_run_folders_are_refused(how, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "r")
    damage(Path("r"), how)
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}
    attempts = [lambda: sbvae.train(Config(resume="r", steps=4)), lambda: sbvae.load("r")]
    for attempt in attempts[: 1 if how == "no generator" else 2]:  # a model needs no generator
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
    first = subprocess.Popen(command(*QUICK, "--steps", 100_000, "--out", "r"), cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE)
    for line in first.stdout:
        if line.startswith("step "):
            break
    second = run("--resume", "r", cwd=tmp_path)
    first.kill()
    first.stdout.close()
    first.wait()
    assert second.returncode == 2 and "another process" in second.stderr and second.stderr.count("\n") == 1
    step = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["step"]
    third = run("--resume", "r", "--steps", step + 1, cwd=tmp_path)  # a dead process's lock does not block
    assert third.returncode == 0, third.stderr


def test_a_run_that_moved_on_meanwhile_is_not_overwritten(finished, tmp_path, monkeypatch):
    """Between reading the checkpoint and taking the lock another process may train and leave."""
    shutil.copytree(finished, tmp_path / "r")
    load_dataset = sbvae.load_dataset

    def slow(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sbvae, "load_dataset", load_dataset)
            sbvae.train(Config(resume=str(tmp_path / "r"), steps=3))
        return load_dataset(*arguments)

    monkeypatch.setattr(sbvae, "load_dataset", slow)
    with pytest.raises(sbvae.InputError, match="has just trained"):
        sbvae.train(Config(resume=str(tmp_path / "r"), steps=5))
    assert torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["step"] == 3
    with pytest.raises(sbvae.InputError, match="at step 3 already"):
        sbvae.train(Config(resume=str(tmp_path / "r"), steps=2))


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "r")
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    script = f"ulimit -f 2000; exec {sys.executable} {ROOT / 'sbvae.py'} --resume r --steps 3"  # files up to 2 MB
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before and not list((tmp_path / "r").glob(".*"))


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


def test_the_commit_is_that_of_the_code(tmp_path):
    """Changed results are no other code; a changed .py is, also in a folder."""
    (tmp_path / "kernels").mkdir()
    for source, name in ((ROOT / "sbvae.py", "sbvae.py"), (ROOT / "kernels" / "bench.py", "kernels/bench.py")):
        shutil.copy(source, tmp_path / name)
    names = ("broadcast_conv", "broadcast_conv2d", "coordinates", "same_conv2d")
    (tmp_path / "kernels" / "__init__.py").write_text(" = ".join(names) + " = None\n")
    (tmp_path / "result.md").write_text("1")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # a hook's name the repository it runs in

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True,
                              env=clean).stdout

    def told():
        code = "import sbvae, kernels.bench; print(sbvae.versions()['commit'], *kernels.bench.commit())"
        done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, check=True, capture_output=True,
                              text=True, env=dict(clean, PYTHONPATH=""))
        return done.stdout.split()

    try:
        git("init", "-q")
    except OSError:
        pytest.skip("needs git")
    git("add", ".")
    git("commit", "-qm", "a")
    head = git("rev-parse", "--short=12", "HEAD").strip()
    (tmp_path / "result.md").write_text("2")
    assert told() == [head, "commit", head]
    for name in ("kernels/__init__.py", "sbvae.py"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(before + "# changed\n")
        assert told() == [f"{head}-dirty", "commit", f"{head}-dirty"]
        (tmp_path / name).write_text(before)
    git("rm", "-q", "--cached", "sbvae.py", "kernels/bench.py")  # copied into a repository that is not theirs
    assert told() == ["None"]


@pytest.mark.parametrize("name", ["sbvae.py", "eval.py"])
def test_threads_of_a_program_spin_briefly_then_sleep(name):
    """Told to OpenMP before torch is loaded; what the user has set stays."""
    code = f"""
import os, runpy, sys
sys.argv = [{name!r}, "--help"]
assert "torch" not in sys.modules

def told(event, what):
    if event == "import" and what[0] == "torch" and not found:
        found.append((os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")))

found = []
sys.addaudithook(told)
try:
    runpy.run_path({str(ROOT / name)!r}, run_name="__main__")
except SystemExit:
    print(*found[0])
"""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for given, expected in (({}, "None 30000"), ({"OMP_WAIT_POLICY": "active"}, "active None"),
                            ({"GOMP_SPINCOUNT": "0"}, "None 0")):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**clean, **given}, capture_output=True,
                              text=True, timeout=300)
        assert done.stdout.splitlines()[-1:] == [expected], done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_is_kept_from_step_to_step():
    """Three tensors of 30 MB, made and freed, 7,300 pages each: got from the system once, by a process that else gets
    them every time (by itself glibc does so or not, as its heap happens to lie). Larger ones are not kept."""
    code = """
import resource, torch, sbvae
if {prepared}:
    sbvae.prepare_process()
for i in range(20):
    tensors = [torch.ones(7_500_000) for _ in range(3)]
    del tensors
    if i == 9:
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(5):
    large = torch.ones(50_000_000)
    del large
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun)
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="100000")
    said = [subprocess.run([sys.executable, "-c", code.format(prepared=prepared)], cwd=ROOT, text=True, env=environment,
                           capture_output=True, check=True, timeout=300).stdout.split() for prepared in (True, False)]
    (faults, grown), (others, _) = ([int(n) for n in numbers] for numbers in said)
    assert faults < 5000 and grown < 250_000, said  # KB, for one of 200 MB
    assert others > 50_000 or Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().startswith("[always]")


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
