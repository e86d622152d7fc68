"""Bad input, some hundreds of cases, most of them generated: each ends in one clear line and exit code 2, or for the
Python functions in the exception that their docstrings name. Never a traceback, a hang, a wrong answer in silence, or
half a file.

The cases are random but seeded, so a failure comes again. Damage to a file may hit a byte that nobody reads, such as
a time stamp: then what is read must be what was written, bit by bit.
"""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import gen_circles
import sbvae
from datasets import load_file
from kernels import SpatialBroadcastConv2d, broadcast_conv2d
from sbvae import Config, InputError

ROOT = Path(__file__).resolve().parent.parent
FIELDS = [f for f in dataclasses.fields(Config) if f.metadata]
MODEL = dict(latents=3, conv_layers=1, batch_size=2, steps=2, device="cpu", precision="fp32")


@pytest.fixture(autouse=True)
def no_hang():
    """A case that waits for ever fails, and the others go on."""
    def ring(number, frame):
        pytest.fail("hangs")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_line(text):
    assert text.strip() and len(text.strip().splitlines()) == 1 and "Traceback" not in text, text
    return text


# ------------------------------------------------------------------------------------- command line


def flag_cases():
    """(arguments, a word that the line must contain): wrong values, typing errors, wrong combinations."""
    rng = random.Random(7)
    flags = {f.name: sbvae.flag(f.name) for f in FIELDS}
    for f in FIELDS:
        name, kind = flags[f.name], f.metadata["kind"]
        if kind in (int, float):
            wrong = ["", " ", "x", "1,5", "1 2", "nan", "0x10", "--", "1e", "0.5.1", "9" * 5000, "½", "None", "[1]"]
            sure = [str(f.metadata["least"] - 1)]
            sure += ["1.5", "1e3", "9" * 40] if kind is int else ["inf", "-inf", "1e999"]
            for value in sure + rng.sample(wrong, 4):
                yield [name, value], name
        for choice in f.metadata["choices"] or ():
            i = rng.randrange(len(choice))
            for value in (choice.upper(), choice[:i] + rng.choice("qxy_") + choice[i + 1 :], choice + " "):
                yield [name, value], name
        if kind is bool:
            yield [f"{name}=yes"], name
        else:
            yield [name], name  # at the end, without its value
        i = rng.randrange(3, len(name))
        for typo in (name[:i] + name[i + 1 :], name[:i] + rng.choice("qx") + name[i:], name[:-1], "-" + name):
            if typo not in flags.values():
                yield [typo, "1"], typo
    for words in (["runs"], ["--"], ["-x4"], ["broadcast", "deconv"], ["--dataset", "sprites", "objects"], ["-"]):
        yield words, ""
    yield from [
        (["--gamma", "3"], "--gamma"), (["--lr", "0"], "--lr"), (["--conv-layers", "65"], "64"),
        (["--compile", "--deterministic"], "--compile"),
        (["--model", "factorvae", "--batch-size", "1"], "--batch-size"), (["--mlp-layers", "1000000"], "64"),
        (["--decoder", "deconv", "--shuffle-coords"], "--shuffle-coords"), (["--upscales", "4"], "--upscales"),
        (["--decoder", "coordconv", "--upscales", "1"], "--upscales"), (["--steps", "9" * 18], "--steps"),
        (["--decoder", "deconv", "--mlp-layers", "0"], "--mlp-layers"),
        (["--decoder", "deconv", "--kernel", "torch"], "--kernel"),
        (["--upscales", "1", "--kernel", "torch"], "--kernel"),
        (["--decoder", "deconv", "--conv-layers", "7"], "--conv-layers"),
        (["--upscales", "3", "--conv-layers", "2"], "--upscales"),
        (["--upscales", "7", "--conv-layers", "7"], "--upscales"),
        (["--device", "cpu", "--precision", "tf32"], "tf32"), (["--device", "cpu", "--kernel", "triton"], "triton"),
    ]  # fmt: skip
    for device in ("", "gpu", "cuda:99", "cuda:-1", "cuda:x", "cpu:1:2", "meta", "mkldnn", "CPU", "cpu\n", "xla"):
        yield ["--device", device], "--device"
    for name in ("--latents", "--batch-size"):  # more than any memory holds, then more than sizes can be counted in
        for power in (44, 50, 58, 61):
            yield [name, str(2**power)], name
    known = ["sprites", "objects", "chairs", "circles-xy", "circles-rg:blank", "circles-xyh-tiny:hole-corner"]
    for name in known:
        i = rng.randrange(len(name))
        for wrong in (name + ":", name + "s", name[:i] + "_" + name[i + 1 :], name.upper()):
            yield ["--dataset", wrong], ""
    for wrong in ("", ".", "..", "~", "~/x", "*.npz", "file", "file/x.npz", "two\nlines", "two\nlines.npz",
                  "\x1b[31mred.npz", "$(touch executed).npz", "; touch executed", "`touch executed`.tar", "a" * 300,
                  "/dev/null", "/dev/zero", "/dev/stdin", "pipe.npz", "folder", "folder.npz", "folder.h5", "empty.npz",
                  "empty.h5", "empty.tar", "loop.npz", "http://localhost/x.npz", "objects:blank"):  # fmt: skip
        yield ["--dataset", wrong], ""
    for wrong in ("file", "file/x", "/proc/x", "/dev/null", "a" * 300, "full", "pipe.npz",
                  "loop.npz", "busy"):  # fmt: skip
        yield ["--out", wrong], ""
    for wrong in ("", "nowhere", "file", "folder", "/", "/proc", "a" * 300, "two\nlines", "full", "pipes", "loop.npz"):
        yield ["--resume", wrong], ""
    yield ["--resume", "folder", "--out", "elsewhere"], ""


COMMANDS = list(flag_cases())


@pytest.mark.parametrize("arguments, word", COMMANDS, ids=[ascii(" ".join(c[0]))[:60] for c in COMMANDS])
def test_commands(arguments, word, tmp_path, monkeypatch, capsys):
    """In one process, as a new one takes seconds; a few of the cases are run as commands in test_train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("file", "empty.npz", "empty.h5", "empty.tar"):
        Path(name).write_bytes(b"")
    for name in ("folder", "folder.npz", "folder.h5", "full", "busy", "pipes"):
        Path(name).mkdir()
    Path("full/metrics.jsonl").write_text("another program's\n")
    Path("busy/checkpoint.pt").write_text("another program's\n")
    os.symlink("loop.npz", "loop.npz")
    os.mkfifo("pipe.npz")
    for name in ("checkpoint.pt", "config.json", "metrics.jsonl"):
        os.mkfifo(f"pipes/{name}")
    names, before = sorted(Path().rglob("*")), contents(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sbvae.py", "--steps", "1", *arguments])
    with pytest.raises(SystemExit) as stop:
        sbvae.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.endswith("\n"), error
    assert word in one_line(error) and len(error) > 20
    assert sorted(Path().rglob("*")) == names and contents(tmp_path) == before


CIRCLES = [
    *([name] for name in ("", "circles", "xy", "circles-xy:", "circles-XY", "circles-xy:blank:blank", "../circles-xy")),
    *(["circles-xy", "--num", n] for n in ("", "x", "0", "-1", "1.5", "1e3", "nan", "100000001", "9" * 30)),
    *(["circles-xy", "--seed", n] for n in ("", "x", "-1", "1.5", str(2**63), "9" * 30)),
    *(["circles-xy", "--num", "5", "--out", o] for o in ("file", "file/x", "/proc/x", "/dev/null", "a" * 300)),
    [], ["circles-xy", "objects"], ["circles-xy", "--nun", "5"], ["circles-xy", "--num"], ["--num", "5"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", CIRCLES, ids=lambda a: " ".join(a)[:40])
def test_circles_commands(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    try:
        code = gen_circles.main(arguments)
    except SystemExit as stop:
        code = stop.code
    text = capsys.readouterr().err  # where it began to draw there are also the reason and a bar
    assert code == 2 and text.splitlines()[-1].startswith("error: ") and "Traceback" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ----------------------------------------------------------------------------- Config from Python


def config_cases():
    rng = random.Random(3)
    odd = [[], {}, b"1", object, 1j, np.int64(3), np.float32(1), torch.tensor(2.0), torch.zeros(3, 3), {1}, range(2)]
    for f in FIELDS:
        kind = f.metadata["kind"]
        wrong = rng.sample(odd, 2) + [[1]] + ([True] if kind is not bool else [1]) + (["1"] if kind is not str else [1])
        for value in wrong:
            yield {f.name: value}
    for shape in ([], [3], [3, 64], [3, 64, 64, 1], [0, 64, 64], [3, -1, 64], "abc", 5, [3, 64.0, 64], [3, "64", 64],
                  [None] * 3, [True, 64, 64], [3, math.nan, 64], {3, 64, 63}):  # fmt: skip
        yield {"image_shape": shape}
    for value in ("a\0b", "a\0b/c"):
        yield {"out": value}
        yield {"resume": value}
        yield {"dataset": value}


CONFIGS = list(config_cases())


@pytest.mark.parametrize("change", CONFIGS, ids=[ascii(str(c))[:60] for c in CONFIGS])
def test_configurations(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        sbvae.train(Config(**dict(steps=1) | change))
    (name,) = change
    assert name in one_line(str(error.value)).replace("-", "_") or name in ("out", "resume")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a data set, runs `a` and `b` (seeds 0 and 1), and run `a` as it is read back."""
    folder = tmp_path_factory.mktemp("tiny")
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8), np.uint8)
    np.savez(folder / "tiny.npz", images=images)
    for name, seed in (("a", 0), ("b", 1)):
        config = Config(dataset=str(folder / "tiny.npz"), seed=seed, log_every=1, out=str(folder / name), **MODEL)
        sbvae.train(config)
    return folder, sbvae.load(folder / "a").state_dict()


def flip(data, rng):
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]


def damage(data, rng):
    """Bytes with something wrong: a bit, a piece lost, doubled or zeroed, the end missing or other."""
    kind, (i, j) = rng.choice("bbbblzdtte"), sorted(rng.randrange(len(data) + 1) for _ in "ij")
    return {"b": flip(data, rng), "l": data[:i] + data[j:], "z": data[:i] + bytes(j - i) + data[j:], "t": data[:i],
            "d": data[:j] + data[i:], "e": data + rng.randbytes(rng.randrange(1, 100))}[kind]  # fmt: skip


def refused_or_the_same(run, weights):
    """Resuming and loading: InputError, and nothing changed; or the weights are those that were saved."""
    before = contents(run)
    with torch.random.fork_rng():
        for attempt in (lambda: sbvae.load(run).state_dict(), lambda: sbvae.train(Config(resume=str(run), steps=2))):
            try:
                result = attempt()
            except InputError as error:
                one_line(str(error))
                assert contents(run) == before
            else:
                if "step" not in result:
                    assert result.keys() == weights.keys() and all(torch.equal(result[k], weights[k]) for k in weights)
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
def test_damaged_run_folders(name, seed, tiny, tmp_path):
    folder, weights = tiny
    run = shutil.copytree(folder / "a", tmp_path / "a")
    rng = random.Random(f"{name} {seed}")
    data = (run / name).read_bytes()
    if name == "checkpoint.pt" and seed % 2:  # where a zip has no checksums: the directory at its end, the first header
        start, end = rng.choice([(len(data) - 4000, len(data)), (0, 200)])
    else:
        start, end = 0, len(data)
    (run / name).write_bytes(data[:start] + damage(data[start:end], rng) + data[end:])
    refused_or_the_same(run, weights)


def edits():
    """Checkpoints of sound files and wrong content: of other versions, or made up."""
    def put(value, *path):
        def edit(c):
            *way, last = path
            for key in way:
                c = c[key]
            if value is None:
                del c[last]
            else:
                c[last] = value
        return edit

    for key in ("config", "step", "logged", "sums", "generator", "model", "optimizer"):
        for value in (None, "x", [1], {"a": 1}, torch.zeros(3), -5, math.nan, 2**70):
            yield f"{key}={str(value)[:9]}", put(value, key)
    for value in (0, torch.zeros(3, dtype=torch.float64), torch.zeros(4, dtype=torch.complex64), torch.zeros(4, 4)):
        yield f"sums={str(value)[:9]}", put(value, "sums")
    for value in (None, 5, "x", {0: {}}, [{}], {1: {}}):
        yield f"optimizer.state={value}", put(value, "optimizer", "state")
    for name in ("exp_avg", "exp_avg_sq", "step"):
        for value in (None, torch.zeros(1, 2, 3), "x", 7):
            yield f"optimizer.state.0.{name}={str(value)[:9]}", put(value, "optimizer", "state", 0, name)
    for value in (None, torch.zeros(2), 5):
        yield f"model.bias={str(value)[:9]}", put(value, "model", "encoder.latents.bias")
    for key, value in (("steps", "x"), ("decoder", "x"), ("image_shape", [3]), ("image_shape", [3, 10**6, 10**6]),
                       ("image_shape", "abc"), ("seed", -1), ("dataset", 5), ("latents", 4), ("latents", 2**55),
                       ("beta", math.nan), ("later_flag", 1)):
        yield f"config.{key}={value}", put(value, "config", key)


EDITS = list(edits())


@pytest.mark.parametrize("edit", [e for _, e in EDITS], ids=[name for name, _ in EDITS])
def test_checkpoints_of_other_content(edit, tiny, tmp_path):
    """Sound files as far as checksums tell. Refused before anything is changed, whatever is in them."""
    run = shutil.copytree(tiny[0] / "a", tmp_path / "a")
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, run / "checkpoint.pt")
    told = json.loads((run / "config.json").read_text())
    if isinstance(checkpoint.get("config"), dict):
        (run / "config.json").write_text(json.dumps(told | {"config": checkpoint["config"]}))
    before = contents(run)
    with pytest.raises(InputError) as error:
        sbvae.train(Config(resume=str(run), steps=4))
    one_line(str(error.value))
    assert contents(run) == before


def test_moments_and_sums_of_odd_strides(tiny, tmp_path):
    """Views that stand in one place, or lie otherwise in memory: of the right shapes, but the fused step walks through
    memory. It must give what plain ones give."""
    ends = []
    for odd in (lambda t: t, lambda t: t.mT.contiguous().mT if t.ndim > 1 else torch.stack([t, t], -1)[..., 0]):
        run = shutil.copytree(tiny[0] / "a", tmp_path / str(len(ends)))
        checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
        for moments in checkpoint["optimizer"]["state"].values():
            moments |= {name: odd(moments[name]) for name in ("exp_avg", "exp_avg_sq")}
        torch.save(checkpoint, run / "checkpoint.pt")
        sbvae.train(Config(resume=str(run), steps=4))
        ends.append(sbvae.load(run).state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    run = shutil.copytree(tiny[0] / "a", tmp_path / "one place")
    for moments in checkpoint["optimizer"]["state"].values():
        moments |= {n: torch.zeros(1).expand(moments[n].shape) for n in ("exp_avg", "exp_avg_sq")}
    checkpoint["sums"] = torch.zeros(1, dtype=torch.float64).expand(4)
    torch.save(checkpoint, run / "checkpoint.pt")
    assert sbvae.train(Config(resume=str(run), steps=8))["step"] == 8
    assert all(value.isfinite().all() for value in sbvae.load(run).state_dict().values())


@pytest.mark.parametrize("content", ["null", "5", "[]", '{"config": null}', '{"config": 5}', '{"config": []}'])
def test_a_config_json_of_other_content(content, tiny, tmp_path):
    run = shutil.copytree(tiny[0] / "a", tmp_path / "a")
    (run / "config.json").write_text(content)
    for attempt in (lambda: sbvae.load(run), lambda: sbvae.train(Config(resume=str(run), steps=4))):
        with pytest.raises(InputError, match="damaged") as error:
            attempt()
        one_line(str(error.value))


def test_a_log_that_an_editor_has_been_at(tiny, tmp_path):
    """Other ends of lines, letters beyond ASCII: their bytes stay, and what comes is behind them."""
    for i, edit in enumerate((lambda s: s.replace("\n", "\r\n"), lambda s: s.replace("}", ', "note": "grün"}'))):
        run = shutil.copytree(tiny[0] / "a", tmp_path / str(i))
        edited = edit((run / "metrics.jsonl").read_text()).encode()
        (run / "metrics.jsonl").write_bytes(edited)
        sbvae.train(Config(resume=str(run), steps=4))
        now = (run / "metrics.jsonl").read_bytes()
        assert now.startswith(edited) and [json.loads(x)["step"] for x in now.splitlines()] == [1, 2, 3, 4]


def test_losses_of_other_arguments():
    x, m = torch.rand(2, 1, 4, 5), torch.zeros(2, 3)
    sbvae.vae_loss(x, x, m, m)
    for args, more in [((x, x, m, m), dict(likelihood="Bernoulli")), ((x, x, m, m), dict(likelihood=None)),
                       ((x, x, m[..., None], m[..., None]), {}), ((x, x, m[:, 0], m[:, 0]), {}),
                       ((x[:0], x[:0], m[:0], m[:0]), {}), ((x, x.bool(), m, m), {}), ((x, x.byte(), m, m), {}),
                       ((x, x, m[:1], m[:1]), {})]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            sbvae.vae_loss(*args, **more)
        one_line(str(error.value))


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("other", ["checkpoint.pt", "config.json", "metrics.jsonl", "traversals.png", "../tiny.npz"])
def test_swapped_files(name, other, tiny, tmp_path):
    """A file of another run, or of another kind, in the place of one."""
    run = shutil.copytree(tiny[0] / "a", tmp_path / "a")
    (run / name).write_bytes((tiny[0] / "b" / other).read_bytes())
    if name == other == "metrics.jsonl":
        return  # another run's log looks like this one's
    before = contents(run)
    with pytest.raises(InputError) as error:
        sbvae.train(Config(resume=str(run), steps=4))
    one_line(str(error.value))
    assert contents(run) == before


LOGS = [
    b"\xff\xfe", b"[" * 100_000 + b"}\n", b'{"step": "x"}\n', b'{"step": [1]}\n', b'{"step": nan}\n', b'{"step": 1}}\n',
    b"{}\n", b"null}\n", b"1}\n", b"[1]\n", b'"step"}\n', b"# mine\n{}\n", b"\0" * 300, b"\0" * 300 + b"}\n",
    b"garbage\n", b"garbage without an end",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(len(LOGS)))
@pytest.mark.parametrize("where", ["instead", "before", "after"])
def test_damaged_logs(where, seed, tiny, tmp_path):
    """Lines that this program has not written are never thrown away in silence. Only at the end half a line may be."""
    run = shutil.copytree(tiny[0] / "a", tmp_path / "a")
    lines = (run / "metrics.jsonl").read_bytes()
    after = lines + (b'{"step": 3, "el' if LOGS[seed].startswith(b"garbage without") else LOGS[seed])
    data = {"instead": LOGS[seed], "before": LOGS[seed] + lines, "after": after}[where]
    (run / "metrics.jsonl").write_bytes(data)
    if where == "after" and LOGS[seed].startswith(b"garbage without"):
        assert sbvae.train(Config(resume=str(run), steps=3))["step"] == 3
        assert (run / "metrics.jsonl").read_bytes().startswith(lines)
        return
    with pytest.raises(InputError, match="metrics.jsonl") as error:
        sbvae.train(Config(resume=str(run), steps=3))
    one_line(str(error.value))
    assert (run / "metrics.jsonl").read_bytes() == data


def test_an_image_larger_than_the_model(tiny, tmp_path):
    """A run whose data set has been replaced by one of larger images, of other channels, or by none at all."""
    run = shutil.copytree(tiny[0] / "a", tmp_path / "a")
    old = (tiny[0] / "tiny.npz").read_bytes()
    try:
        for shape in ((9, 16, 16), (9, 8, 8, 3), (9, 8, 9)):
            np.savez(tiny[0] / "tiny.npz", images=np.full(shape, 9, np.uint8))
            with pytest.raises(InputError, match=r"has images \[.*trained on \[1, 8, 8\]") as error:
                sbvae.train(Config(resume=str(run), steps=4))
            one_line(str(error.value))
        (tiny[0] / "tiny.npz").unlink()
        with pytest.raises(InputError, match="no such file"):
            sbvae.train(Config(resume=str(run), steps=4))
    finally:
        (tiny[0] / "tiny.npz").write_bytes(old)


# -------------------------------------------------------------------------------------- data files


def refused_or_equal(path, expected, cache):
    """load_file: one of its four exceptions with one line, or these images in this order -> was it refused?"""
    try:
        dataset = load_file(path, cache_dir=cache)
    except (ValueError, OSError, ImportError) as error:
        one_line(str(error))
        return True
    assert torch.equal(dataset.images(torch.arange(dataset.size)).mul(255).round().to(torch.uint8), expected)
    return False


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("seed", range(40))
def test_damaged_npz(save, seed, tmp_path):
    images = np.random.default_rng(seed).integers(0, 256, (6, 8, 12, 3), np.uint8)
    path, rng = tmp_path / "a.npz", random.Random(seed)
    save(path, images=images, factors=np.arange(6.0)[:, None], factor_names=["a"])
    path.write_bytes(damage(path.read_bytes(), rng))
    refused_or_equal(path, torch.from_numpy(images).permute(0, 3, 1, 2), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_a_flip_in_the_pixels_is_noticed(tmp_path):
    """So that the test above can fail: whatever bit of an image or of a factor is flipped, the file is refused."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 12, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, factors=np.arange(6.0)[:, None])
    data = (tmp_path / "a.npz").read_bytes()
    for array in (images, np.arange(6.0)):
        start, rng = data.index(array.tobytes()), random.Random(0)
        for _ in range(10):
            flipped = data[:start] + flip(data[start : start + array.nbytes], rng) + data[start + array.nbytes :]
            (tmp_path / "a.npz").write_bytes(flipped)
            assert refused_or_equal(tmp_path / "a.npz", None, tmp_path)


def png(image):
    """(600, 600) uint8 -> a gray PNG, by its specification."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in image), 1)
    head = struct.pack(">IIBBBBB", 600, 600, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def chairs(tmp_path_factory):
    """A tar and its folder of two chairs, and the images."""
    folder = tmp_path_factory.mktemp("chairs")
    for i in range(2):
        path = folder / f"rendered_chairs/m{i}/renders/image_000_p020_t01{i}_r096.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(np.random.default_rng(i).integers(0, 256, (1, 600), np.uint8).repeat(600, 0)))
    with tarfile.open(folder / "rendered_chairs.tar", "w") as tar:
        tar.add(folder / "rendered_chairs", "rendered_chairs")
    dataset = load_file(folder / "rendered_chairs.tar", cache_dir=folder / "cache")
    return folder, dataset.images(torch.arange(2)).mul(255).round().to(torch.uint8)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_chairs(seed, chairs, tmp_path):
    """Even seeds an archive, odd ones a folder. A name may be hit, too: then a chair less is found."""
    folder, images = chairs
    rng = random.Random(seed)
    if seed % 2:
        path = shutil.copytree(folder / "rendered_chairs", tmp_path / "rendered_chairs")
        victim = rng.choice(sorted(path.rglob("*.png")))
    else:
        path = victim = Path(shutil.copy(folder / "rendered_chairs.tar", tmp_path))
    data = victim.read_bytes()
    cut = 3000 if rng.random() < 0.6 else len(data)  # more often than not the headers
    victim.write_bytes(damage(data[:cut], rng) + data[cut:])
    refused = refused_or_equal(path, images, tmp_path / "cache")
    assert not refused or not (tmp_path / "cache").exists()


@pytest.mark.parametrize("cache", ["damaged", "of a pickle", "of other images"])
def test_a_damaged_cache_is_made_again(cache, chairs, tmp_path):
    folder, images = chairs
    path, cached = folder / "rendered_chairs.tar", next((folder / "cache").iterdir())
    (tmp_path / "cache").mkdir()
    copy = tmp_path / "cache" / cached.name
    if cache == "damaged":
        data = cached.read_bytes()
        copy.write_bytes(data[:5000] + bytes(50) + data[5050:])
    elif cache == "of a pickle":
        np.savez(copy, images=np.array([{}]), source=np.array([{}]))
    else:
        np.savez(copy, images=np.ones((2, 64, 64), np.uint8), source=np.array("version 0"))
    assert not refused_or_equal(path, images, tmp_path / "cache")


def test_damaged_h5(tmp_path):
    """In a process of its own: HDF5 is a large library in C. It keeps no checksums, so wrong pixels can't be told; a
    crash, a hang or another exception can."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "3dshapes.h5", "w") as file:
        random_images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
        file.create_dataset("images", data=random_images, chunks=(2, 8, 8, 3), compression="gzip")
        file["labels"] = np.arange(36.0).reshape(6, 6)
    code = f"""
import random, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from datasets import load_file
from test_bad_input import damage, one_line
data, path, refused = Path("3dshapes.h5").read_bytes(), Path("damaged.h5"), 0
for seed in range(40):
    rng = random.Random(seed)
    cut = rng.choice([2000, len(data)])
    path.write_bytes(damage(data[:cut], rng) + data[cut:])
    try:
        assert load_file(path, cache_dir=".").images is not None
    except (ValueError, OSError) as error:
        one_line(str(error))
        refused += 1
print("refused", refused)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 20


# ----------------------------------------------------------------------------------------- kernels


def kernel_case(seed):
    """Sound arguments with one thing made wrong -> arguments, which one, for a layer of random sizes."""
    rng = random.Random(seed)
    b, k, m, c, h, w, s = (rng.randint(low, 6) for low in (1, 1, 1, 1, 4, 4, 1))
    s = min(s, 4)
    z, coords, weight, bias = torch.randn(b, k), torch.randn(m, h, w), torch.randn(c, k + m, s, s), torch.randn(c)
    good = dict(z=z, coords=coords, weight=weight, bias=bias)
    name = rng.choice([*good] * 4 + ["padding", "activation", "backend", "out_format"])
    if name in good:
        t = good[name]
        others = [t[None], t[..., 0], t.long(), t.double(), t.bool(), t.to("meta"), t.to(torch.complex64)]
        if name != "z" or t.shape[1] > 0:
            d = 1 if name in ("z", "weight") else 0  # the number of images or of filters is free
            others += [torch.cat([t, t], d), t.narrow(d, 0, 0)] * 2
        wrong = rng.choice(others)
    else:
        wrong = rng.choice({"padding": ["full", -1, (1,), (1, -1), 1.0, None, "SAME", [1, 2, 3], (1.5, 2), "1"],
                            "activation": ["gelu", "RELU", True, 0, torch.relu], "backend": ["cuda", None, "TRITON", 1],
                            "out_format": ["nhwc", None, torch.channels_last, 0]}[name])  # fmt: skip
    return good | {name: wrong}, name


@pytest.mark.parametrize("seed", range(80))
def test_kernel_arguments(seed):
    arguments, name = kernel_case(seed)
    with pytest.raises(ValueError) as error:
        broadcast_conv2d(**arguments)
    text = one_line(str(error.value))
    if name in ("z", "coords", "weight") and "dtype" not in text and "floating" not in text and "device" not in text:
        assert any(str(n) in text for n in arguments[name].shape), text  # what was given is told


@pytest.mark.parametrize("change", [
    dict(latents=0), dict(latents=-1), dict(out_channels=0), dict(kernel_size=0), dict(height=0), dict(width=-2),
    dict(coords=torch.zeros(2, 5, 6)), dict(coords=torch.zeros(6, 5)), dict(coords=torch.zeros(0, 6, 5)),
    dict(padding="full"), dict(padding=-1), dict(activation="gelu"), dict(backend="cuda"), dict(out_format="nhwc"),
    dict(kernel_size=9, padding="valid"), dict(latents=2.5), dict(kernel_size=(3, 3, 3)),
], ids=str)  # fmt: skip
def test_kernel_module_arguments(change):
    with pytest.raises((ValueError, TypeError)) as error:
        layer = SpatialBroadcastConv2d(**dict(latents=3, out_channels=4, kernel_size=3, height=6, width=5) | change)
        layer(torch.zeros(2, 3))
    one_line(str(error.value))


@pytest.mark.parametrize("seed", range(12))
def test_kernel_takes_what_is_laid_out_otherwise(seed):
    """float64, strided, expanded, transposed, empty: legal, and the result is that of the plain arrays."""
    rng = random.Random(seed)
    b, k, m, c, h, w = (rng.randint(2, 5) for _ in range(6))
    z, coords = torch.randn(b, 2 * k)[:, ::2], torch.randn(m, w + 2, h + 2).mT
    weight, bias = torch.randn(3, 3, k + m, c).permute(3, 2, 0, 1), torch.randn(1).expand(c)
    plain = [t.contiguous() for t in (z, coords, weight, bias)]
    for backend in ("auto", "torch", "reference"):
        result = broadcast_conv2d(z, coords, weight, bias, backend=backend)
        torch.testing.assert_close(result, broadcast_conv2d(*plain, backend=backend))
        exact = broadcast_conv2d(*(t.double() for t in plain), backend=backend)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(result.double(), exact, atol=1e-5, rtol=1e-5)
        assert broadcast_conv2d(plain[0][:0], *plain[1:], backend=backend).shape == (0, *result.shape[1:])


# ------------------------------------------------------------------------------- Python functions


@pytest.fixture(scope="module")
def model():
    return sbvae.build_model(Config(image_shape=[3, 16, 24], latents=4, conv_layers=1, precision="fp32"))


IMAGES = {"channels": (2, 1, 16, 24), "larger": (2, 3, 32, 48), "smaller": (2, 3, 8, 8), "turned": (2, 3, 24, 16),
          "channels last": (2, 16, 24, 3), "one image": (3, 16, 24), "flat": (2, 1152),
          "five axes": (1, 2, 3, 16, 24)}  # fmt: skip


@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
def test_images_that_do_not_fit_the_model(shape, model):
    for call in (model, model.encode):
        with pytest.raises(ValueError) as error:
            call(torch.zeros(shape))
        assert str(tuple(shape)) in one_line(str(error.value)) and "(B, 3, 16, 24)" in str(error.value)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 5), (2, 4, 1), (1, 2, 4), ()], ids=str)
@pytest.mark.parametrize("decoder", ["broadcast", "deconv", "coordconv"])
def test_latents_that_do_not_fit_the_model(decoder, shape):
    model = sbvae.build_model(Config(image_shape=[3, 16, 24], latents=4, conv_layers=1, decoder=decoder))
    with pytest.raises(ValueError) as error:
        model.decode(torch.zeros(shape))
    assert str(tuple(shape)) in one_line(str(error.value)) and "(B, 4)" in str(error.value)


def test_strided_images_are_the_same_images(model):
    images = torch.rand(2, 24, 16, 3).permute(0, 3, 2, 1)
    assert not images.is_contiguous()
    for given, plain in zip(model.encode(images), model.encode(images.contiguous())):
        torch.testing.assert_close(given, plain)
    assert model.encode(images[:0])[0].shape == (0, 4)


@pytest.mark.parametrize("low, high", [(-0.1, 1.0), (0.0, 1.1), (0.0, 255.0), (-1.0, 1.0), (0.0, math.inf)])
def test_pixels_out_of_range(low, high):
    """A Bernoulli of probability 255 has a likelihood that is not one; a Gaussian may have any mean."""
    images, z = torch.linspace(0, 1, 12).view(1, 3, 2, 2), torch.zeros(1, 4)
    images[0, 0, 0, 0], images[0, 2, 1, 1] = low, high
    with pytest.raises(ValueError, match=r"\[0, 1\]") as error:
        sbvae.vae_loss(images, images, z, z)
    one_line(str(error.value))
    assert math.isinf(high) or math.isfinite(sbvae.vae_loss(images, images, z, z, likelihood="gaussian")[0])


def test_nan_pixels_give_a_nan(model):
    images = torch.rand(2, 3, 16, 24)
    images[1, 0, 3, 3] = math.nan
    out = model(images)
    assert sbvae.vae_loss(out.logits, images, out.mu, out.logvar)[0].isnan()


@pytest.mark.parametrize("shapes", [
    ((2, 3, 4, 4), (2, 3, 4, 5), (2, 3), (2, 3)), ((2, 3, 4, 4), (2, 1, 4, 4), (2, 3), (2, 3)),
    ((2, 3, 4, 4), (1, 3, 4, 4), (2, 3), (2, 3)), ((2, 3, 4, 4), (2, 3, 4, 4), (2, 3), (2, 4)),
    ((2, 3, 4, 4), (2, 3, 4, 4), (2, 3), (2, 1)), ((2, 3, 4, 4), (2, 3, 4, 4), (3, 3), (3, 3)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_losses_of_other_shapes(shapes, likelihood):
    with pytest.raises(ValueError) as error:
        sbvae.vae_loss(*(torch.zeros(s) for s in shapes), likelihood=likelihood)
    assert str(shapes[0]) in one_line(str(error.value)) or str(shapes[2]) in str(error.value)


@pytest.mark.parametrize("factors", [
    torch.zeros(5, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64),
    torch.zeros(1, 2, 5, dtype=torch.int64), torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.bool),
    torch.tensor([[3, 0, 0, 0, 0]]), torch.tensor([[0, 6, 0, 0, 0]]), torch.tensor([[0, 0, 40, 0, 0]]),
    torch.tensor([[0, 0, 0, 32, 0]]), torch.tensor([[0, 0, 0, 0, -1]]), torch.tensor([[0, 0, 0, 0, 2**62]]),
], ids=lambda f: f"{tuple(f.shape)} {f.dtype} {f.tolist()}"[:50])  # fmt: skip
def test_factors_of_sprites(factors):
    for call in (sbvae.draw_sprites, lambda f: sbvae.Sprites().draw(f)):
        with pytest.raises(ValueError) as error:
            call(factors)
        one_line(str(error.value))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integers_of_any_size_draw_the_same_sprites(dtype):
    factors = torch.stack([torch.randint(n, (30,)) for n in sbvae.SPRITE_SIZES], 1)
    strided = factors.to(dtype).T.contiguous().T
    assert torch.equal(sbvae.draw_sprites(strided), sbvae.draw_sprites(factors))
    assert sbvae.draw_sprites(factors[:0]).shape == (0, 64, 64)


def test_a_set_of_one_image(tmp_path):
    """Legal: it is what every sample is."""
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8), np.uint8)
    np.savez(tmp_path / "one.npz", images=image)
    dataset = sbvae.load_dataset(tmp_path / "one.npz")
    assert dataset.size == 1
    expected = torch.from_numpy(image).float().div(255).expand(5, 1, 8, 8)
    assert torch.equal(dataset.sample(5, torch.Generator().manual_seed(0)), expected)
    assert sbvae.train(Config(dataset=str(tmp_path / "one.npz"), out=str(tmp_path / "r"), **MODEL))["step"] == 2


@pytest.mark.parametrize("device", ["gpu", "cuda:999", "", "cpu:x", "hpu", "privateuseone"])
def test_devices_that_are_not_there(device):
    with pytest.raises(sbvae.InputError, match="cannot be used"):
        sbvae.load_dataset("sprites", device)
    with pytest.raises(sbvae.InputError, match="cannot be used"):
        sbvae.load_dataset("circles-xy", device, data_dir="not-even-looked-at")


def test_there_are_enough_cases():
    parametrized = len(COMMANDS) + len(CIRCLES) + len(CONFIGS) + len(EDITS) + 3 * len(LOGS) + 80 + 80 + 30 + 80
    assert parametrized >= 300 and len({re.sub(r"\W", "", str(c)) for c in COMMANDS}) > 200
