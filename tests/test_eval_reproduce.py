"""The paper's numbers, which runs they need, and `--reproduce`: nothing twice, nothing lost, nothing left out."""

import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eval
import sbvae

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(dataset="tiny.npz", latents=3, conv_layers=1, batch_size=2, save_every=20, log_every=10)
MODELS = {"DeConv VAE": (dict(SMALL, decoder="deconv"), "Table 6, 5 layers"), "Spatial Broadcast VAE": (SMALL, None)}
TINY = dict(title="Tiny", replicas=2, figure="MIG", paper="Nothing.", rows=3, models=MODELS)
QUICK = dict(device="cpu", votes=3, samples=100)


def write_data(path):
    """16 images of a square, 8 x 8, at 4 x 4 places."""
    factors = np.array(list(itertools.product(range(4), range(4))))
    images = np.zeros((16, 8, 8), np.uint8)
    for image, (x, y) in zip(images, factors):
        image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = 255
    np.savez(path, images=images, factors=factors, factor_names=np.array(["x", "y"]))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with a data set, an experiment on it, and neither of the pictures that each run draws."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(eval.EXPERIMENTS, "tiny", TINY)
    monkeypatch.setattr(sbvae, "save_pictures", lambda *_: None)
    monkeypatch.setattr(eval, "draw_run", lambda *_: None)
    write_data("tiny.npz")
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(eval, "draw_results", lambda *_: None)
    monkeypatch.setattr(eval, "trend_figure", lambda *_: None)


@pytest.fixture
def trained(monkeypatch):
    """[(run, first step, last step)] of every training from here on."""
    calls, train = [], sbvae.train

    def spy(config):
        before = eval.steps_done(Path(config.resume)) if config.resume else 0
        calls.append((Path(config.resume or config.out).name, before, config.steps))
        return train(config)

    monkeypatch.setattr(sbvae, "train", spy)
    return calls


def folder(decoder, steps, seed=0):
    return f"tiny-{decoder}-latents3-convlayers1-steps{steps}-batchsize2" + f"-seed{seed}" * bool(seed)


def weights(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)["model"]


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def cells(text, *start):
    """The cells of the table's row that starts with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    names, (row,) = rows[0], [row for row in rows if row[: len(start)] == list(start)]
    return dict(zip(names, row, strict=True))


# The tables as the paper prints them: row, ELBO, NLL, KL, latents used, MIG, FactorVAE metric
PRINTED = """
5 2-LAYER	339 (± 2.3)	312 (± 2.7)	27.5 (± 0.54)	8.33 (± 0.37)	0.076 (± 0.038)	0.187 (± 0.027)
5 3-LAYER	329 (± 4.1)	305 (± 4.6)	24.4 (± 0.54)	7.22 (± 0.34)	0.147 (± 0.057)	0.208 (± 0.084)
5 4-LAYER	341 (± 6.8)	318 (± 7.7)	22.6 (± 0.97)	5.93 (± 0.51)	0.157 (± 0.045)	0.226 (± 0.046)
5 5-LAYER	340 (± 8.8)	317 (± 9.7)	22.7 (± 0.99)	5.70 (± 0.37)	0.173 (± 0.059)	0.218 (± 0.030)
6 3-LAYER	372 (± 8.6)	346 (± 8.9)	26.8 (± 0.40)	9.20 (± 0.04)	0.031 (± 0.018)	0.144 (± 0.031)
6 4-LAYER	349 (± 9.4)	322 (± 10.0)	27.1 (± 0.88)	8.90 (± 0.24)	0.025 (± 0.015)	0.139 (± 0.009)
6 5-LAYER	340 (± 9.8)	314 (± 10.4)	26.0 (± 1.00)	7.95 (± 0.64)	0.056 (± 0.32)	0.184 (± 0.053)
6 6-LAYER	349 (± 15.0)	326 (± 16.1)	23.3 (± 1.42)	6.36 (± 0.81)	0.056 (± 0.019)	0.199 (± 0.029)
7 0-LAYER	329 (± 4)	305 (± 5)	24.5 (± 0.54)	7.21 (± 0.34)	0.147 (± 0.057)	0.208 (± 0.084)
7 1-LAYER	330 (± 6)	307 (± 6)	23.9 (± 0.72)	6.68 (± 0.46)	0.164 (± 0.043)	0.200 (± 0.034)
7 2-LAYER	349 (± 15)	327 (± 17)	21.5 (± 2.13)	6.03 (± 0.66)	0.210 (± 0.048)	0.232 (± 0.045)
7 3-LAYER	392 (± 23)	399 (± 114)	15.7 (± 2.93)	4.17 (± 1.23)	0.160 (± 0.034)	0.275 (± 0.064)
8 1-LAYER	347 (± 13)	321 (± 14)	25.8 (± 1.3)	7.97 (± 0.72)	0.052 (± 0.020)	0.174 (± 0.043)
8 2-LAYER	352 (± 17)	328 (± 18)	23.7 (± 1.7)	6.68 (± 0.78)	0.051 (± 0.024)	0.196 (± 0.024)
8 3-LAYER	365 (± 19)	345 (± 21)	19.7 (± 2.4)	5.24 (± 0.73)	0.144 (± 0.062)	0.243 (± 0.043)
9 0-LAYER	4039 (± 3.4)	4010 (± 3.3)	29.3 (± 0.46)	8.73 (± 0.41)	0.541 (± 0.091)	0.931 (± 0.043)
9 1-LAYER	4022 (± 3.7)	4003 (± 3.7)	19.3 (± 0.35)	6.30 (± 0.49)	0.538 (± 0.105)	0.946 (± 0.043)
9 2-LAYER	4018 (± 3.3)	3999 (± 3.3)	18.5 (± 0.30)	5.94 (± 0.41)	0.574 (± 0.096)	0.978 (± 0.027)
9 3-LAYER	4020 (± 3.0)	4002 (± 2.9)	18.3 (± 0.38)	5.73 (± 0.31)	0.659 (± 0.123)	0.979 (± 0.037)
10 0 UPSCALES	329 (± 4.1)	305 (± 4.6)	24.4 (± 0.54)	7.22 (± 0.34)	0.147 (± 0.057)	0.208 (± 0.084)
10 1 UPSCALE	327 (± 4.4)	302 (± 4.9)	24.4 (± 0.55)	7.29 (± 0.26)	0.149 (± 0.048)	0.194 (± 0.026)
10 2 UPSCALES	329 (± 4.3)	304 (± 4.8)	24.2 (± 0.60)	7.14 (± 0.42)	0.122 (± 0.045)	0.235 (± 0.070)
10 3 UPSCALES	330 (± 2.4)	305 (± 2.7)	24.2 (± 0.24)	7.39 (± 0.08)	0.110 (± 0.032)	0.182 (± 0.028)
""".strip().splitlines()


def test_the_papers_numbers_are_those_it_prints():
    tables = [row for row in eval.PAPER if row.startswith("Table")]
    assert len(tables) == len(PRINTED)
    for place, line in zip(tables, PRINTED, strict=True):
        name, *printed = line.split("\t")
        assert re.findall(r"\d+", place) == re.findall(r"\d+", name)
        assert eval.PAPER[place].split() == " ".join(printed).replace("(", "").replace(")", "").split(), place
    # The caption of Figure 5
    shuffled = "ELBO 362.8 ± 2.90, NLL 336.3 ± 2.98, KL 26.56 ± 0.47, latents 8.99 ± 0.37, MIG 0.104 ± 0.025"
    assert re.findall(r"[\d.]+ ± [\d.]+", shuffled) == re.findall(r"[\d.]+ ± [\d.]+", eval.PAPER["Fig. 5, shuffled"])
    for row, elbo, mig in (("Table 5, 3 layers", "329", "0.147"), ("Table 8, 1 layer", "347", "0.052")):
        assert (eval.PAPER[row].split()[0], eval.PAPER[row].split()[-6]) == (elbo, mig)
    assert eval.REMARKS.keys() <= eval.PAPER.keys()


def test_the_papers_elbo_is_nll_plus_kl_but_where_we_say_that_it_is_not():
    """As far as the digits go: each number is rounded, and the ELBO may have been cut off."""
    for place, row in eval.PAPER.items():
        if "-" not in row:
            elbo, nll, kl = (float(cell.split(" ± ")[0]) for cell in re.split("  +", row)[:3])
            digits = 0.05 if place.startswith("Fig") else 0.5
            assert (abs(nll + kl - elbo) <= 3.1 * digits) == (place != "Table 7, 3 layers"), place
    mig, std = (float(v) for v in re.split("  +", eval.PAPER["Table 6, 5 layers"])[4].split(" ± "))
    assert std > 1.04 * (mig * (1 - mig)) ** 0.5 > 0.23  # what 25 numbers in [0, 1] of that mean can have, n - 1


def test_every_result_is_there_and_asks_for_what_it_shows():
    names = [f"fig{n}" for n in range(2, 21)] + [f"table{n}" for n in range(5, 11)]
    assert list(eval.EXPERIMENTS) == names
    runs = {name: eval.list_jobs(name) for name in names}
    assert all(len(runs[n]) == 25 * len(eval.EXPERIMENTS[n]["models"]) for n in names if n.startswith("table"))
    assert [len(runs[f"fig{n}"]) for n in (2, 4, 11, 20)] == [50, 30, 60, 60]  # 25 and 15 seeds
    settings = {n: [sbvae.resolve(job.config) for job in runs[n]] for n in names}
    for name, field, values in [("table5", "conv_layers", [2, 3, 4, 5]), ("table6", "conv_layers", [3, 4, 5, 6]),
                                ("table7", "mlp_layers", [0, 1, 2, 3]), ("table8", "mlp_layers", [1, 2, 3]),
                                ("table9", "mlp_layers", [0, 1, 2, 3]), ("table10", "upscales", [0, 1, 2, 3])]:
        first = settings[name][: len(values)]
        assert [getattr(c, field) for c in first] == values
        assert {c.decoder for c in first} == {"deconv" if name in ("table6", "table8") else "broadcast"}
        assert {c.dataset for c in first} == {"objects" if name == "table9" else "sprites"}
        rows = [eval.EXPERIMENTS[name]["models"][job.label][1] for job in runs[name][: len(values)]]
        assert [int(re.search(r"(\d+) (layer|upscale)", row)[1]) for row in rows] == values
        assert all(row.startswith(name.replace("table", "Table ") + ",") for row in rows)
    assert {c.conv_layers for c in settings["table9"]} == {3}  # G.2
    betas = sorted({c.beta for c in settings["fig3"]})
    assert betas[0] == 0.4 and betas[-1] == 5.4 and 1 in betas and len(settings["fig3"]) == 2 * 10 * len(betas)
    ratios = np.diff(np.log(betas))
    assert ratios.max() < 1.15 * ratios.min()  # log-linear
    data = {n: {c.dataset for c in settings[f"fig{n}"]} for n in (4, *range(11, 21))}
    pairs = ("circles-xy", "circles-xh", "circles-rg")
    assert data == {4: {"circles-xy"}, 20: {"circles-xh:blank"}} | {
        11 + 3 * i + j: {pair + hole} for i, pair in enumerate(pairs)
        for j, hole in enumerate(("", ":hole-center", ":hole-corner"))}
    assert all({(c.decoder, c.model) for c in settings[f"fig{n}"]} == set(
        itertools.product(("broadcast", "deconv"), ("vae", "factorvae"))) for n in range(11, 21))
    # Table 4
    steps = {("sprites", "vae"): 15e5, ("sprites", "factorvae"): 1e6, ("chairs", "vae"): 7e5, ("objects", "vae"): 25e5}
    for job, c in ((job, c) for n in names for job, c in zip(runs[n], settings[n], strict=True)):
        assert job.steps == c.steps == steps.get((c.dataset, c.model), 5e5)
    used = {row for e in eval.EXPERIMENTS.values() for _, row in e["models"].values() if row}
    assert used == set(eval.PAPER)


def test_experiments_share_a_folder_exactly_when_they_share_a_run():
    runs = {}
    for name, steps in itertools.product(eval.EXPERIMENTS, (None, 30_000)):
        for job in eval.list_jobs(name, replicas=3, steps=steps):
            c = vars(sbvae.resolve(job.config))
            runs.setdefault(str(job.run), set()).add(tuple((k, v) for k, v in c.items() if k != "out"))
    assert all(len(different) == 1 for different in runs.values())
    assert len(set.union(*runs.values())) == len(runs)
    assert {str(job.run) for job in eval.list_jobs("fig2", 1)} == {"runs/sprites-deconv", "runs/sprites-broadcast"}
    assert {str(job.run) for job in eval.list_jobs("fig4", 2, 30_000)} == {
        "runs/circles-xy-deconv-steps30000", "runs/circles-xy-deconv-steps30000-seed1",
        "runs/circles-xy-broadcast-steps30000", "runs/circles-xy-broadcast-steps30000-seed1"}
    assert eval.list_jobs("fig4", 2, 500_000) == eval.list_jobs("fig4", 2)  # the paper's number is no other run
    with pytest.raises(sbvae.InputError, match="fig99 is unknown; choose from fig2, fig3, .*table10"):
        eval.list_jobs("fig99")


def test_only_some_models(tiny, trained, no_figures, monkeypatch, capsys):
    """--only trains no other, and the result says what it lacks; the same runs serve the whole later."""
    labels = [job.label for job in eval.list_jobs("fig12", 2, only=[" VAE"])]
    assert labels == ["DeConv VAE", "Spatial Broadcast VAE"] * 2
    assert {job.config.beta for job in eval.list_jobs("fig3", 1, only=["β = 0.4", "β = 5.4"])} == {0.4, 5.4}
    assert eval.list_jobs("fig3", 1, only=[""]) == eval.list_jobs("fig3", 1, only=[]) == eval.list_jobs("fig3", 1)
    assert len(eval.list_jobs("fig3", 1, only=["DeConv VAE, β = 1"])) == 1  # a whole label: neither 1.4 nor 1.96
    assert len(eval.list_jobs("fig3", 1, only=["DeConv VAE, β = 1", "β = 1"])) == 6
    with pytest.raises(sbvae.InputError, match="'β = 6' is in none of fig3's models: DeConv VAE, β = 0.4; "):
        eval.list_jobs("fig3", only=["β = 0.4", "β = 6"])
    eval.reproduce("tiny", steps=6, replicas=1, only=["Spatial Broadcast"], **QUICK)
    assert trained == [(folder("broadcast", 6), 0, 6)]
    text = (tiny / "results" / "tiny.md").read_text()
    assert "**Not all of its models**; without DeConv VAE." in text and "| DeConv VAE" not in text
    assert cells(text, "Spatial Broadcast VAE", "here")["n"] == "1"
    assert f"{folder('deconv', 6)}" not in text
    assert "--reproduce tiny --replicas 1 --steps 6 --only 'Spatial Broadcast' --votes 3" in text
    trained.clear()
    eval.reproduce("tiny", steps=6, replicas=1, **QUICK)
    assert trained == [(folder("deconv", 6), 0, 6)]
    threads = torch.get_num_threads()
    for beside, prefix in (("2", "-m torch.distributed.run --nproc-per-node 2 "), ("1", "")):  # "1": on two machines
        with monkeypatch.context() as m:
            for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE=beside).items():
                m.setenv(name, value)
            eval.reproduce("tiny", steps=6, replicas=1, **QUICK)
        assert f"python {prefix}eval.py --reproduce tiny" in (tiny / "results" / "tiny.md").read_text()
    torch.set_num_threads(threads)
    text = (tiny / "results" / "tiny.md").read_text()
    assert "Not all" not in text and "--only" not in text and cells(text, "DeConv VAE", "here")["n"] == "1"


def test_results_from_nothing_and_again(tiny, trained, no_figures, monkeypatch, capsys):
    """Means, deviations, steps and raw numbers are those of the runs; a second time nothing is trained."""
    eval.reproduce("tiny", steps=6, **QUICK)
    names = [folder(d, 6, seed) for seed in (0, 1) for d in ("deconv", "broadcast")]
    assert trained == [(name, 0, 6) for name in names]
    text = (tiny / "results" / "tiny.md").read_text()
    raw = {n: json.loads((tiny / "results" / "raw" / f"{n}.json").read_text()) for n in names}
    for label, decoder in (("DeConv VAE", "deconv"), ("Spatial Broadcast VAE", "broadcast")):
        row = cells(text, label, "here")
        mine = [json.loads((tiny / "runs" / folder(decoder, 6, seed) / "metrics.json").read_text()) for seed in (0, 1)]
        for title, key, digits in (("ELBO", "elbo", 1), ("KL", "kl", 2), ("MIG", "mig", 3), ("R²", "r2", 3)):
            values = [m[key] for m in mine]
            assert row[title] == f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
        assert row["n"] == "2" and row["steps"] == "6"
        assert [raw[folder(decoder, 6, s)]["elbo"] for s in (0, 1)] == [m["elbo"] for m in mine]
    paper = cells(text, "DeConv VAE", "paper, Table 6, 5 layers (1, 2)")
    assert (paper["ELBO"], paper["MIG"], paper["n"]) == ("340 ± 9.8", "0.056 ± 0.32", "25")
    assert "\n(1) " + eval.REMARKS["Table 6, 5 layers"] in text and "\n(2) An NLL below 320.4 nats" in text
    assert "R² held out" not in text  # no run has one
    assert "**Fewer steps than the paper's**" in text  # 6 of 500,000
    assert "python eval.py --reproduce tiny --steps 6 --votes 3 --samples 100" in text
    assert f"torch {torch.__version__}" in text and "device cpu" in text
    assert all("speed" not in line and "latents used  " not in line for line in capsys.readouterr().out.splitlines())
    assert "step         6  ELBO" in (tiny / "runs" / names[0] / "train.log").read_text()

    trained.clear()
    before = {n: (tiny / "runs" / n / "metrics.json").stat().st_mtime_ns for n in names}
    eval.reproduce("tiny", steps=6, **QUICK)
    assert before == {n: (tiny / "runs" / n / "metrics.json").stat().st_mtime_ns for n in names}
    assert not trained and (tiny / "results" / "tiny.md").read_text() == text
    with monkeypatch.context() as m:  # with as many steps as the paper's there is nothing to admit
        jobs = eval.list_jobs("tiny", steps=6)
        m.setattr(eval, "paper_steps", lambda _: 6)
        eval.write_results("tiny", jobs, eval.estimator(3, 100, 0), "command")
    assert "Fewer steps" not in (tiny / "results" / "tiny.md").read_text()
    with monkeypatch.context() as m:
        m.setattr(eval, "paper_steps", lambda _: 1000)
        eval.write_results("tiny", eval.list_jobs("tiny", steps=998), eval.estimator(3, 100, 0), "command")
    assert "99.8% of them" in (tiny / "results" / "tiny.md").read_text()
    eval.reproduce("tiny", steps=6, replicas=3, **QUICK)  # one seed more
    assert trained == [(folder(d, 6, 2), 0, 6) for d in ("deconv", "broadcast")]
    trained.clear()
    eval.reproduce("tiny", steps=6, **QUICK | dict(votes=4))  # another estimator: evaluated again, not trained
    how = json.loads((tiny / "runs" / names[0] / "metrics.json").read_text())["estimator"]
    assert not trained and how["votes"] == 4


def test_stages_and_interruptions_leave_no_trace_in_the_weights(tiny, trained, no_figures, monkeypatch, capsys):
    """--every evaluates on the way; a stage is never done twice, and what was begun is carried on."""
    monkeypatch.setitem(eval.EXPERIMENTS, "tiny", TINY | dict(models=dict([*MODELS.items()][1:])))
    plain, run = tiny / "plain", tiny / "runs" / folder("broadcast", 7)
    sbvae.train(sbvae.Config(**SMALL, steps=7, out=str(plain), device="cpu"))
    sbvae.train(sbvae.Config(**SMALL, steps=2, out=str(run), device="cpu"))  # as if it had been interrupted
    trained.clear()
    eval.reproduce("tiny", steps=7, replicas=1, every=3, **QUICK)
    assert trained == [(run.name, 2, 3), (run.name, 3, 6), (run.name, 6, 7)]
    assert_same_weights(plain, run)
    lines = eval.read_lines(run / "history.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 7] and len({line["elbo"] for line in lines}) == 3
    assert lines[-1]["elbo"] == json.loads((run / "metrics.json").read_text())["elbo"]
    raw = json.loads((tiny / "results" / "raw" / f"{run.name}.json").read_text())
    assert raw["history"] == lines and "tiny-trend.png" in (tiny / "results" / "tiny.md").read_text()
    trained.clear()
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))  # killed before the last
    evaluated = []
    monkeypatch.setattr(eval, "measure_loss", lambda *a: evaluated.append(a))
    eval.reproduce("tiny", steps=7, replicas=1, every=3, **QUICK)
    assert not trained and not evaluated and eval.read_lines(run / "history.jsonl") == lines
    assert "past step" not in capsys.readouterr().out  # of what has been evaluated
    (run / "metrics.json").unlink()
    monkeypatch.undo()  # of the line above, too
    monkeypatch.chdir(tiny)
    monkeypatch.setattr(eval, "draw_run", lambda *_: None)
    job = eval.Job("", sbvae.Config(**SMALL, steps=7), 7)
    eval.finish(job, 2, "cpu", eval.estimator(3, 100, 0), print)  # other stages: it is too late for them
    assert [line["step"] for line in eval.read_lines(run / "history.jsonl")] == [3, 6, 7]
    assert re.findall(r"past step (\d)", capsys.readouterr().out) == ["2", "4"]
    how, curves = eval.estimator(3, 99, 0), []  # another estimator: none of its curves has a stage of the first
    assert not eval.is_finished(job, 3, how)
    eval.finish(job, 3, "cpu", how, print)
    assert [(line["step"], line["estimator"]["samples"]) for line in eval.read_lines(run / "history.jsonl")] == [
        (3, 100), (6, 100), (7, 100), (7, 99)] and eval.is_finished(job, 3, how)
    monkeypatch.setitem(eval.EXPERIMENTS, "tiny", TINY | dict(models={"": (SMALL, None)}))
    monkeypatch.setattr(eval, "draw_results", lambda *_: None)
    monkeypatch.setattr(eval, "trend_figure", lambda evaluated, logged, _: curves.append(
        [[line["step"] for line in lines[""]] for lines in (evaluated, logged)]))
    for samples in (99, 100):
        eval.evaluate(run, "cpu", 3, samples)
        eval.write_results("tiny", [job], eval.estimator(3, samples, 0), "command")
    assert curves == [[[7], [2, 3, 6, 7]], [[3, 6, 7], [2, 3, 6, 7]]]
    assert "log" not in json.loads((tiny / "results" / "raw" / f"{run.name}.json").read_text())  # it may be long
    (run / "metrics.jsonl").write_text('{"step": 2, "images_per_s": 9.0}\n')  # a foreign log costs only what it told
    found = eval.collect(job, eval.estimator(3, 100, 0))
    assert found["log"] == [] and found["hours"] is None and len(found["history"]) == 4 and "elbo" in found


def test_a_run_that_diverges_is_counted_and_the_rest_goes_on(tiny, no_figures, monkeypatch, capsys):
    train, calls = sbvae.train, []

    def fails_for_seed_1(config):
        calls.append(config)
        if config.seed == 1 and config.decoder == "deconv":
            raise FloatingPointError("diverged: kl is nan at step 4")
        return train(config)

    monkeypatch.setattr(sbvae, "train", fails_for_seed_1)
    eval.reproduce("tiny", steps=3, replicas=3, **QUICK)
    assert len(calls) == 6
    text = (tiny / "results" / "tiny.md").read_text()
    assert cells(text, "DeConv VAE", "here")["n"] == "2 of 3, 1 diverged"
    assert cells(text, "Spatial Broadcast VAE", "here")["n"] == "3"
    lost = folder("deconv", 3, 1)
    assert f"runs/{lost} diverged: kl is nan at step 4." in text and "diverged: kl is nan" in capsys.readouterr().out
    values = [json.loads((tiny / "runs" / folder("deconv", 3, s) / "metrics.json").read_text())["elbo"] for s in (0, 2)]
    assert cells(text, "DeConv VAE", "here")["ELBO"] == f"{sum(values) / 2:.1f} ± {statistics.stdev(values):.1f}"
    assert json.loads((tiny / "results" / "raw" / f"{lost}.json").read_text())["diverged"].startswith("diverged: kl")
    calls.clear()
    eval.reproduce("tiny", steps=3, replicas=3, **QUICK)  # it is not tried again
    assert not calls


def test_all_of_them_may_diverge_for_good(tiny, monkeypatch):
    """No stub: a learning rate that does it, and no figure of nothing."""
    monkeypatch.setitem(eval.EXPERIMENTS, "tiny", TINY | dict(models={"wild": (SMALL | dict(lr=1e18), None)}))
    eval.reproduce("tiny", steps=20, replicas=1, **QUICK)
    text = (tiny / "results" / "tiny.md").read_text()
    assert cells(text, "wild", "here")["n"] == "0 of 1, 1 diverged" and "tiny.png" not in text
    assert not (tiny / "results" / "tiny.png").exists()


@pytest.mark.parametrize("change, message", [
    (dict(lr=1e-3), "is a run with --lr 0.001, not 0.0003; move it away"),
    (dict(steps=9), "has been trained for 9 steps, not 6"),
])
def test_a_folder_with_another_run_is_refused_before_anything_is_trained(tiny, trained, change, message):
    sbvae.train(sbvae.Config(**SMALL | dict(steps=6) | change, out=f"runs/{folder('broadcast', 6)}", device="cpu"))
    trained.clear()
    with pytest.raises(sbvae.InputError, match=message) as error:
        eval.reproduce("tiny", steps=6, **QUICK)
    assert "\n" not in str(error.value) and not trained
    assert [p.name for p in (tiny / "runs").iterdir()] == [folder("broadcast", 6)] and not (tiny / "results").exists()


def test_what_cannot_be_trained_is_told_at_the_end(tiny, no_figures, monkeypatch, capsys):
    models = {"lost": (SMALL | dict(dataset="gone.npz"), None), "Spatial Broadcast VAE": (SMALL, None)}
    monkeypatch.setitem(eval.EXPERIMENTS, "tiny", TINY | dict(models=models))
    with pytest.raises(sbvae.InputError, match=r"^1 of 2 runs failed, the first: --dataset gone.npz: ") as error:
        eval.reproduce("tiny", steps=3, replicas=1, **QUICK)
    assert "\n" not in str(error.value)
    text = (tiny / "results" / "tiny.md").read_text()
    assert cells(text, "lost", "here")["n"] == "0 of 1, 1 missing"
    assert cells(text, "Spatial Broadcast VAE", "here")["n"] == "1"
    (tiny / "runs" / folder("broadcast", 4)).write_text("in the way")  # what the system refuses stops no other either
    monkeypatch.setitem(eval.EXPERIMENTS, "tiny", TINY | dict(models=dict([*MODELS.items()][::-1])))
    with pytest.raises(sbvae.InputError, match=r"^1 of 2 runs failed, the first: .*File exists"):
        eval.reproduce("tiny", steps=4, replicas=1, **QUICK)
    assert cells((tiny / "results" / "tiny.md").read_text(), "DeConv VAE", "here")["n"] == "1"


def test_numbers_of_another_estimator_are_not_counted(tiny, monkeypatch, no_figures):
    """Seed 1 cannot be evaluated anew, so what its metrics.json says is of fewer images than what seed 0's says."""
    drawn = []
    monkeypatch.setattr(eval, "draw_results", lambda _, results, *__: drawn.append([len(v) for v in results.values()]))
    eval.reproduce("tiny", steps=3, **QUICK)
    lost = tiny / "runs" / folder("deconv", 3, 1) / "checkpoint.pt"
    data = bytearray(lost.read_bytes())
    data[len(data) // 2] ^= 255  # a weight
    lost.write_bytes(data)
    with pytest.raises(sbvae.InputError, match=rf"^1 of 4 runs failed, the first: .*{lost.parent.name}"):
        eval.reproduce("tiny", steps=3, **QUICK | dict(samples=120))
    text = (tiny / "results" / "tiny.md").read_text()
    assert cells(text, "DeConv VAE", "here")["n"] == "1 of 2, 1 missing" and "samples 120" in text
    assert cells(text, "Spatial Broadcast VAE", "here")["n"] == "2"
    assert drawn == [[2, 2], [1, 2]]


def test_only_the_first_process_fails(tiny, monkeypatch, capsys):
    """As torchrun ends all when one fails, the first perhaps while it writes the results."""
    monkeypatch.setitem(eval.EXPERIMENTS, "tiny", TINY | dict(models={"lost": (dict(SMALL, dataset="gone.npz"), None)}))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    eval.reproduce("tiny", steps=3, **QUICK)
    assert capsys.readouterr().out.count("error: --dataset gone.npz: ") == 2 and not Path("results").exists()


def test_results_outlive_a_failure_of_all_runs(tiny, monkeypatch):
    monkeypatch.setitem(eval.EXPERIMENTS, "tiny", TINY | dict(models={"lost": (dict(SMALL, dataset="gone.npz"), None)}))
    Path("results").mkdir()
    Path("results/tiny.md").write_text("of better days")
    with pytest.raises(sbvae.InputError, match=r"^2 of 2 runs failed"):
        eval.reproduce("tiny", steps=3, **QUICK)
    assert Path("results/tiny.md").read_text() == "of better days"


def test_a_damaged_history_is_not_written_anew(tiny, no_figures):
    """Its stages could not be evaluated again: the run is past them."""
    models = {"DeConv VAE": MODELS["DeConv VAE"]}
    eval.EXPERIMENTS["tiny"] = TINY | dict(models=models)  # the fixture puts it back
    eval.reproduce("tiny", steps=3, replicas=1, every=1, **QUICK)
    path = tiny / "runs" / folder("deconv", 3) / "history.jsonl"
    whole = path.read_bytes()
    assert whole.count(b"\n") == 3
    for damaged in (whole[:-5], whole + b"x\n", whole + b"[1]\n", whole + b"{}\n", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(sbvae.InputError, match="history.jsonl is damaged") as error:
            eval.reproduce("tiny", steps=3, replicas=1, every=1, **QUICK)
        assert path.read_bytes() == damaged and "\n" not in str(error.value)
    path.write_bytes(whole + b"\n")  # an empty line is none
    eval.reproduce("tiny", steps=3, replicas=1, every=1, **QUICK)
    assert len(eval.read_lines(path)) == 3


DEEP = "[" * 100_000
FOREIGN = [  # file of a run, content, whether the run can be carried on without it
    *(("metrics.json", text, True) for text in ("5", "[]", "{}", DEEP, '{"step": 3}', "\xff")),
    *(("metrics.jsonl", text, False) for text in ("1\n", "[]\n", "{}\n", '{"step": 1}\n', DEEP)),
    *(("diverged.json", text, False) for text in ("", "x", "5", "[]", "{}", '{"diverged": null, "elbo": 5}', DEEP)),
    *(("config.json", text, False) for text in ("5", "null", '{"config": 5}', DEEP)),
    *((name, None, False) for name in ("diverged.json", ".lock", "config.json", "checkpoint.pt", "train.log")),
    ("metrics.json", None, True),
]  # fmt: skip


@pytest.mark.parametrize("name, text, harmless", FOREIGN, ids=lambda x: ascii(str(x))[:30])
def test_foreign_files_in_a_run(name, text, harmless, tiny, no_figures, monkeypatch):
    """Also pipes (None), where one could wait for ever. One line with the run's name; or what can be made anew is."""
    monkeypatch.setitem(eval.EXPERIMENTS, "tiny", TINY | dict(models={"DeConv VAE": MODELS["DeConv VAE"]}))
    eval.reproduce("tiny", steps=3, replicas=1, **QUICK)
    run = tiny / "runs" / folder("deconv", 3)
    told = (run / "metrics.json").read_text()
    if name in (".lock", "config.json", "checkpoint.pt", "train.log"):
        (run / "metrics.json").unlink()  # else nothing is left to do and nobody looks at them
        before = eval.steps_done(run)
        monkeypatch.setattr(eval, "steps_done", lambda run, now=eval.steps_done: min(now(run) or 0, before - 1))
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name) if text is None else (run / name).write_text(text, "latin-1")
    old = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for ever"))
    signal.alarm(60)
    try:
        if harmless:
            eval.reproduce("tiny", steps=3, replicas=1, **QUICK)
            assert json.loads((run / "metrics.json").read_text())["elbo"] == json.loads(told)["elbo"]
            return
        if name == "metrics.jsonl":  # the hours are not known, then
            eval.reproduce("tiny", steps=3, replicas=1, **QUICK)
            assert cells((tiny / "results/tiny.md").read_text(), "DeConv VAE", "here")["n"] == "1"
            return
        with pytest.raises((sbvae.InputError, OSError)) as error:
            eval.reproduce("tiny", steps=3, replicas=1, **QUICK)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert "\n" not in str(error.value) and str(run.name) in str(error.value)


@pytest.mark.parametrize("name, value", [("RANK", ""), ("RANK", "x"), ("RANK", "3"), ("WORLD_SIZE", "0"),
                                         ("LOCAL_WORLD_SIZE", "-1"), ("RANK", "-1")])
def test_variables_that_do_not_come_from_torchrun(name, value, tiny, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(sbvae.InputError, match="torchrun"):
        eval.reproduce("tiny", steps=3, **QUICK)
    assert not Path("runs").exists()


def test_a_device_that_is_not_there_leaves_no_trace(tiny):
    with pytest.raises(sbvae.InputError, match="--device abacus cannot be used"):
        eval.reproduce("tiny", steps=3, **QUICK | dict(device="abacus"))
    assert [p.name for p in tiny.iterdir()] == ["tiny.npz"]


def test_results_are_utf_8_anywhere(tmp_path):
    code = "import eval; eval.write_results('fig4', eval.list_jobs('fig4', 1, 9), eval.estimator(9, 99, 0), 'c')"
    env = dict(os.environ, PYTHONPATH=str(ROOT), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    env.pop("PYTHONIOENCODING", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Mean ± standard deviation" in (tmp_path / "results" / "fig4.md").read_text(encoding="utf-8")


def test_claims(tmp_path):
    """One process at a time, and none while somebody trains there by hand."""
    run = tmp_path / "run"
    with eval.claim(run) as first, eval.claim(run) as second:
        assert first and not second
    with eval.claim(run) as again:
        assert again
    with open(run / "metrics.jsonl", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # as sbvae.open_log does
        with eval.claim(run) as during:
            assert not during
    with eval.claim(run) as after:
        assert after


def test_figures_show_the_runs_they_should(tiny, monkeypatch):
    """Every kind of figure, for real; the median of three for pictures, worst and best for geometry."""
    monkeypatch.setattr(eval, "trend_figure", lambda *_: None)
    eval.reproduce("tiny", steps=3, replicas=3, **QUICK)
    results = {label: [json.loads((tiny / "runs" / folder(d, 3, s) / "metrics.json").read_text()) for s in range(3)]
               for label, d in (("DeConv VAE", "deconv"), ("Spatial Broadcast VAE", "broadcast"))}
    for label in results:
        for value, m in zip((0.3, 0.1, 0.2), results[label], strict=True):
            m["mig"] = value
    opened, open_run = [], eval.open_run
    monkeypatch.setattr(eval, "open_run", lambda run, device: opened.append(run[-5:]) or open_run(run, device))
    for kind, seeds in [("MIG", []), ("median", ["seed2"] * 2), ("MIG and median", ["seed2"] * 2),
                        ("two seeds", ["size2", "seed1"]), ("geometry", ["size2", "seed1"] * 2), ("curves", [])]:
        opened.clear()
        eval.draw_results(TINY | dict(figure=kind), results, tiny / "figure.png", "cpu")
        assert opened == seeds, kind
        assert (tiny / "figure.png").read_bytes()[:4] == b"\x89PNG"
        (tiny / "figure.png").unlink()
    shown = {}
    monkeypatch.setattr(eval, "curves_figure", lambda curves, path: shown.update(curves))
    eval.draw_results(dict(figure="curves"), {f"DeConv VAE, β = {b}": [b] for b in (1, 2)}, None, "cpu")
    assert shown == {"DeConv VAE": [1, 2]}


def test_list(tiny, no_figures, monkeypatch, capsys):
    """Hours are what is left: steps not done yet times what a step takes."""
    monkeypatch.setattr(eval, "EXPERIMENTS", {"tiny": TINY, "half": TINY | dict(models=dict([*MODELS.items()][:1]))})
    monkeypatch.setattr(eval, "step_seconds", lambda config: 3600 if config.decoder == "deconv" else 36)
    eval.list_experiments(steps=6)
    out = capsys.readouterr().out
    assert re.search(r"^tiny +4 +0 +6 +12.1 +Tiny$", out, re.M) and re.search(r"^half +2 +0 +6 +12.0 +Tiny$", out, re.M)
    assert "4 are left to do, 12 hours" in out and "2 models" in out  # those of `half` are among the first four
    sbvae.train(sbvae.Config(**SMALL, decoder="deconv", steps=2, out=f"runs/{folder('deconv', 6)}", device="cpu"))
    capsys.readouterr()
    eval.list_experiments(steps=6, replicas=1)
    assert re.search(r"^half +1 +0 +6 +4.0 ", capsys.readouterr().out, re.M)
    eval.reproduce("half", replicas=1, steps=6, **QUICK)
    capsys.readouterr()
    eval.list_experiments(steps=6)
    assert re.search(r"^half +2 +1 +6 +6.0 ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("config", [dict(), dict(model="factorvae", decoder="deconv"), dict(dataset="chairs")])
def test_a_step_is_timed_for_every_kind_of_model(config, monkeypatch):
    steps, step = [], sbvae.training_step
    monkeypatch.setattr(sbvae, "training_step", lambda *a: steps.append(a) or step(*a))
    ticks = iter([0, 90, 100, 180, 200, 203, 300, 302, 400, 407])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert eval.step_seconds(sbvae.Config(**config, batch_size=2, device="cpu")) == 2  # after two to warm up
    assert len(steps) == 5 and len(steps[0]) == (7 if config.get("model") else 5)


WORKER = """
import os, sys, time
import torch, eval, sbvae
from tests_of_reproduce import TINY
eval.draw_run = eval.draw_results = sbvae.save_pictures = lambda *_: None
eval.EXPERIMENTS["tiny"] = TINY
steps, step = [], sbvae.training_step
def slow(*a, **k):
    steps.append(a)
    if os.environ["RANK"] == "1" and len(steps) == 50 and not os.path.exists("killed"):
        open("killed", "w").close()
        if "once" in sys.argv:
            os.kill(os.getpid(), 9)
        time.sleep(600)
    return step(*a, **k)
sbvae.training_step = slow
eval.reproduce("tiny", replicas=1, steps=60, device="cpu", votes=3, samples=100)
print("threads", torch.get_num_threads())
"""


def prepare_workers(path):
    """Write the script; -> environment for it."""
    (path / "worker.py").write_text(WORKER)
    (path / "tests_of_reproduce.py").write_text(f"TINY = {TINY!r}\n")
    places = [str(path), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, places)), OMP_NUM_THREADS="1")


def uninterrupted(path, decoder):
    """The same run, trained in one go with as many threads as a worker has."""
    threads, share = torch.get_num_threads(), max(1, len(os.sched_getaffinity(0)) // 2)
    torch.set_num_threads(share)
    try:
        sbvae.train(sbvae.Config(**SMALL, decoder=decoder, steps=60, out=str(path), device="cpu"))
    finally:
        torch.set_num_threads(threads)
    return path, share


def wait_for(condition, workers, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and all(worker.poll() is None for worker in workers)
        time.sleep(0.1)


def test_two_processes_share_the_runs_and_one_is_killed(tiny):
    """Each takes its own run; the first waits for the second's, takes it over from the checkpoint when the second is
    killed, and writes the results. Nothing of the killed run is lost but the steps since its checkpoint."""
    env = prepare_workers(tiny)
    workers = []
    for rank in ("0", "1"):
        with open(tiny / f"out{rank}", "w") as out:
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            workers.append(subprocess.Popen([sys.executable, "worker.py"], cwd=tiny, env=env | place, stdout=out,
                                            stderr=subprocess.STDOUT))
    first, second = tiny / "out0", tiny / "out1"
    try:
        wait_for(lambda: "waiting for other processes to finish 1 runs" in first.read_text(), workers)
        wait_for((tiny / "killed").exists, workers)
        mine, other = folder("deconv", 60), folder("broadcast", 60)
        assert eval.steps_done(tiny / "runs" / other) == 40 and workers[0].poll() is None
        assert mine in first.read_text() and other not in first.read_text()  # not touched while it was alive
        workers[1].send_signal(signal.SIGKILL)
        assert workers[1].wait(60) == -signal.SIGKILL and workers[0].wait(300) == 0, first.read_text()
        assert f"runs/{other} steps 40 to 60" in first.read_text() and mine not in second.read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    plain, threads = uninterrupted(tiny / "plain", "broadcast")
    assert_same_weights(plain, tiny / "runs" / other)
    text = (tiny / "results" / "tiny.md").read_text()
    assert [cells(text, label, "here")["n"] for label in MODELS] == ["1", "1"]
    assert f"threads {threads}" in first.read_text()


@pytest.mark.skipif(not os.environ.get("SBVAE_SLOW"), reason="slow: SBVAE_SLOW=1")
def test_torchrun_restarts_what_died(tiny):
    """torchrun ends all processes when one dies, and with --max-restarts starts them again: they carry on."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         "worker.py", "once"], cwd=tiny, env=prepare_workers(tiny), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tiny / "killed").exists() and f"runs/{folder('broadcast', 60)} steps 40 to 60" in done.stdout
    assert_same_weights(uninterrupted(tiny / "plain", "broadcast")[0], tiny / "runs" / folder("broadcast", 60))
    assert "| 1 | 60 |" in (tiny / "results" / "tiny.md").read_text()


def test_a_folder_with_another_seed_is_refused(tiny, trained):
    sbvae.train(sbvae.Config(**SMALL, steps=6, seed=1, out=f"runs/{folder('broadcast', 6)}", device="cpu"))
    trained.clear()
    with pytest.raises(sbvae.InputError, match="is a run with --seed 1, not 0; move it away"):
        eval.reproduce("tiny", steps=6, **QUICK)
    assert not trained


def test_figures_show_the_latents_that_the_numbers_tell_of(tiny, no_figures, monkeypatch):
    """Else the R² in a panel's title is of other latents than its axes."""
    geometry, panels = [], []
    eval.reproduce("tiny", steps=3, **QUICK)
    monkeypatch.undo()  # of `no_figures` and `tiny`, to draw for real
    monkeypatch.chdir(tiny)
    monkeypatch.setattr(eval, "geometry_figure", lambda results, *_: geometry.append(results))
    monkeypatch.setattr(eval, "samples_figure", lambda shown, path, scatter=None: panels.append((shown, scatter)))
    results = {label: [json.loads((tiny / "runs" / folder(d, 3, s) / "metrics.json").read_text()) for s in range(2)]
               for label, d in (("DeConv VAE", "deconv"), ("Spatial Broadcast VAE", "broadcast"))}
    eval.draw_results(TINY | dict(figure="geometry"), results, "a.png", "cpu")
    metrics = results["DeConv VAE"][0]
    eval.draw_run(metrics["run"], *eval.open_run(metrics["run"], "cpu")[:2], metrics)
    shown = [m for figure in geometry for models in figure.values() for m in models]
    assert len(shown) == 5 and all(len({m["r2"] for m in models}) == 2 for models in results.values())
    for m in shown:
        found = m["geometry"]
        assert list(found["latents"]) == [latent["index"] for latent in m["latents"][:2]]
        assert eval.affine_fit(found["factors"], found["codes"])[0] == pytest.approx(m["r2"], abs=1e-6)
    panels.clear()
    for kind in ("median", "two seeds", "MIG and median"):
        eval.draw_results(TINY | dict(figure=kind, rows=2), results, "a.png", "cpu")
    assert [scatter for _, scatter in panels] == [None, None, results]
    assert {len(panel["traversals"]) for shown, _ in panels for panel in shown.values()} == {2}  # the rows asked for


def test_the_command_of_a_result_makes_it_again(tiny, no_figures):
    asked = dict(replicas=1, steps=2, every=1, only=["Spatial Broadcast", "DeConv VAE"], seed=5, votes=3, samples=100)
    eval.reproduce("tiny", device="cpu", **asked)
    text = (tiny / "results" / "tiny.md").read_text()
    command = shlex.split(re.search("```sh\n(.*)\n```", text)[1])
    assert command[:2] == ["python", "eval.py"]
    assert vars(eval.parse(command[2:])) | asked | dict(reproduce="tiny") == vars(eval.parse(command[2:]))
    assert "seed 5, loss seed 1000000005" in text and cells(text, "DeConv VAE", "here")["n"] == "1"
    told = json.loads((tiny / "runs" / folder("deconv", 2) / "metrics.json").read_text())
    assert told["estimator"] == eval.estimator(votes=3, samples=100, seed=5)


def test_hours_curves_and_machines_are_those_of_the_training(tiny, no_figures):
    models = {"DeConv VAE": MODELS["DeConv VAE"]}
    eval.EXPERIMENTS["tiny"] = TINY | dict(models=models)  # the fixture puts it back
    eval.reproduce("tiny", steps=3, **QUICK)
    jobs, how = eval.list_jobs("tiny", steps=3), eval.estimator(3, 100, 0)
    for job, slower in zip(jobs, (1, 2), strict=True):  # 2 images a step: 4,000 + 3,200 s make 2 hours, and 4
        lines = [dict(step=1000, elbo=9.5, nll=7.0, kl=2.5, latents_used=2.0, images_per_s=0.5 / slower),
                 dict(step=3000, elbo=8.5, nll=7.5, kl=1.0, latents_used=1.5, images_per_s=1.25 / slower)]
        (job.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert eval.collect(jobs[0], how)["log"] == [
        dict(run=str(jobs[0].run), step=1000, elbo=9.5, latents_used=2.0),
        dict(run=str(jobs[0].run), step=3000, elbo=8.5, latents_used=1.5)]
    told = json.loads((jobs[1].run / "config.json").read_text())
    elsewhere = dict(hardware="Abacus", torch="9.9", python="4.0", commit="c0ffee")
    (jobs[1].run / "config.json").write_text(json.dumps(told | elsewhere))
    eval.write_results("tiny", jobs, how, "command")
    text = (tiny / "results" / "tiny.md").read_text()
    assert cells(text, "DeConv VAE", "here")["hours a run"] == "3.0 ± 1.4"
    machines = [line for line in text.splitlines() if line.startswith("Trained on ")]
    assert len(machines) == 2 and machines[0].startswith("Trained on Abacus, device cpu, ")
    assert machines[0].endswith("; torch 9.9, Python 4.0, commit c0ffee.")
    assert machines[1].endswith(f"; torch {torch.__version__}, Python {told['python']}, commit {told['commit']}.")


def test_the_papers_numbers_stand_in_their_columns():
    titles = ("ELBO", "NLL", "KL", "latents used", "MIG", "FactorVAE")
    steps, seen = dict(sprites="1,500,000", objects="2,500,000"), set()  # Table 4
    for name, experiment in eval.EXPERIMENTS.items():
        jobs = eval.list_jobs(name, 1, steps=9)
        ours = dict.fromkeys([*eval.COLUMNS.values(), "hours"], 1.0)
        text = eval.comparison(experiment["models"], jobs, [ours] * len(jobs))
        for label, (config, row) in experiment["models"].items():
            if row:
                start, = re.findall(rf"^\| {re.escape(label)} \| (paper, {re.escape(row)}[^|]*) \|", text, re.M)
                told = cells(text, label, start)
                expected = dict(zip(titles, re.split("  +", eval.PAPER[row]), strict=True))
                stated = not row.startswith(("Table 9", "Fig. 5"))
                expected |= dict(n="25" if stated else "not stated", steps=steps[config.get("dataset", "sprites")])
                expected |= {k: "" for k, v in expected.items() if v == "-"}
                assert {k: v for k, v in told.items() if v} == {"model": label, "": start} | {
                    k: v for k, v in expected.items() if v}
                seen.add(row)
                assert ("(ours 28)" in text and "(1)" in start) == row.startswith("Table 9")  # another likelihood?
            assert cells(text, label, "here")["steps"] == "9"
    assert seen == set(eval.PAPER)


def test_the_share_of_the_papers_steps_is_that_of_the_model_furthest_from_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eval.write_results("fig10", eval.list_jobs("fig10", 1, 500_000), eval.estimator(9, 99, 0), "command")
    assert "**Fewer steps than the paper's**, 20% of them" in (tmp_path / "results" / "fig10.md").read_text()


def test_links_of_a_result_lead_to_files(tiny):
    eval.reproduce("tiny", steps=20, replicas=1, **QUICK)
    links = re.findall(r"\]\((.*?)\)", (tiny / "results" / "tiny.md").read_text())
    assert len(links) == 4 and all((tiny / "results" / link).is_file() for link in links), links


def test_list_times_each_kind_of_model_by_itself(tiny, monkeypatch, capsys):
    kinds = [dict(), dict(decoder="deconv"), dict(model="factorvae"), dict(conv_layers=2), dict(mlp_layers=1),
             dict(upscales=1), dict(dataset="chairs"), dict(beta=2.0)]  # the last is as fast as the first
    monkeypatch.setattr(eval, "EXPERIMENTS", {"tiny": TINY | dict(models={str(k): (k, None) for k in kinds})})
    timed = []
    monkeypatch.setattr(eval, "step_seconds", lambda config: timed.append(config) or 3600 * 10 ** (len(timed) - 1))
    eval.list_experiments(replicas=1, steps=1)
    assert len(timed) == 7 and "8 are left to do, 1,111,112 hours" in capsys.readouterr().out


def test_only_curves_of_runs_that_did_not_diverge_are_drawn(tiny, no_figures, monkeypatch):
    eval.EXPERIMENTS["tiny"] = TINY | dict(models={"": (SMALL, None)})
    eval.reproduce("tiny", steps=20, every=10, **QUICK)
    jobs, how, curves = eval.list_jobs("tiny", steps=20), eval.estimator(3, 100, 0), []
    (jobs[1].run / "diverged.json").write_text(json.dumps(dict(diverged="diverged: kl is nan at step 15", step=10)))
    monkeypatch.setattr(eval, "trend_figure", lambda *given: curves.extend(given[:2]))
    eval.write_results("tiny", jobs, how, "command")
    assert [[(line["run"], line["step"]) for line in lines[""]] for lines in curves] == [
        [(str(jobs[0].run), 10), (str(jobs[0].run), 20)]] * 2


def test_what_a_run_that_diverges_tells(tiny, no_figures, monkeypatch):
    """The step of its last good checkpoint; and its log keeps all stages."""
    eval.EXPERIMENTS["tiny"] = TINY | dict(models={"": (SMALL, None)})
    train = sbvae.train

    def fails_late(config):
        if config.steps == 6:
            raise FloatingPointError("diverged: kl is nan at step 5")
        return train(config)

    monkeypatch.setattr(sbvae, "train", fails_late)
    eval.reproduce("tiny", replicas=1, steps=6, every=2, **QUICK)
    run = tiny / "runs" / folder("broadcast", 6)
    assert json.loads((run / "diverged.json").read_text()) == dict(diverged="diverged: kl is nan at step 5", step=4)
    assert re.findall(r"^step +(\d+) ", (run / "train.log").read_text(), re.M) == ["2", "4"]


def test_a_step_is_timed_with_a_whole_batch(monkeypatch):
    sizes, step = [], sbvae.training_step
    monkeypatch.setattr(sbvae, "training_step", lambda config, data, generator, *parts: sizes.append(
        len(data.sample(config.batch_size, generator))) or step(config, data, generator, *parts))
    eval.step_seconds(sbvae.Config(decoder="deconv", batch_size=3, device="cpu"))
    assert sizes == [3] * 5


@pytest.mark.parametrize("figure", ["MIG", "geometry"])
def test_runs_that_were_evaluated_under_another_name_are_told_by_their_own(tiny, figure):
    eval.EXPERIMENTS["tiny"] = TINY | dict(models={"": (SMALL, None)}, figure=figure)  # the fixture puts it back
    names = [folder("broadcast", 3, seed) for seed in (0, 1)]
    (tiny / "runs").mkdir()
    for seed, name in enumerate(names):  # as on two machines
        sbvae.train(sbvae.Config(**SMALL, steps=3, seed=seed, out="here-before", device="cpu"))
        eval.evaluate("here-before", "cpu", votes=3, samples=100)
        (tiny / "here-before").rename(tiny / "runs" / name)
    eval.reproduce("tiny", steps=3, **QUICK)
    assert sorted(path.stem for path in (tiny / "results" / "raw").iterdir()) == sorted(names)
    assert "here-before" not in (tiny / "results" / "tiny.md").read_text()


def test_a_run_that_is_renamed_and_trained_longer_stays_one_curve(tiny, no_figures):
    eval.EXPERIMENTS["tiny"] = TINY | dict(models={"": (SMALL, None)})
    eval.reproduce("tiny", replicas=1, steps=2, every=2, **QUICK)
    (tiny / "runs" / folder("broadcast", 2)).rename(tiny / "runs" / folder("broadcast", 4))
    eval.reproduce("tiny", replicas=1, steps=4, every=2, **QUICK)
    job, = eval.list_jobs("tiny", 1, 4)
    history = eval.collect(job, eval.estimator(3, 100, 0))["history"]
    assert [(line["run"], line["step"]) for line in history] == [(str(job.run), 2), (str(job.run), 4)]
