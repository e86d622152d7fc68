"""Loaders of official and user files: what they give back, what they refuse, what they never run.

Files are made here in the official layouts, with names and PNG images written byte by byte, and
what is read is compared with the arrays that went in."""

import importlib.util
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
import sbvae
from datasets import load_file

ROOT = Path(datasets.__file__).parent
CHAIR = "rendered_chairs/{}/renders/image_{:03d}_p{:03d}_t{:03d}_r096.png"


def pixels(dataset, index):
    """What `images` gives for these indices, back as (n, H, W, C) uint8; checks type and range."""
    images = dataset.images(torch.as_tensor(index))
    assert images.dtype == torch.float32 and images.is_contiguous()
    assert images.shape[1:] == (dataset.channels, dataset.height, dataset.width)
    assert images.min() >= 0 and images.max() <= 1
    back = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert torch.equal(images, torch.from_numpy(back).permute(0, 3, 1, 2) / 255)  # exactly k/255
    return back


def refused(path, match, kind=ValueError, **options):
    """Loading raises `kind` with one line that names the file and matches."""
    with pytest.raises(kind) as caught:
        load_file(path, **options)
    line = str(caught.value)
    missing = line.startswith("no such file or folder; names are sprites, objects, chairs, circles-{")
    assert "\n" not in line and (missing or line.startswith(f"{path}: ")), line
    assert missing != os.path.exists(path) or str(path).startswith("~")
    assert re.search(match, line), line


def python(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def random_images(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def evil_array(marker):
    array = np.empty(2, object)
    array[:] = [Evil(marker), Evil(marker)]
    return array


# ------------------------------------------------------------------------------ your own .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("max_bytes", [None, 0])  # on the device, from a memory map
@pytest.mark.parametrize("shape", [(7, 12, 20), (1, 4, 5), (9, 12, 20, 3), (6, 8, 4, 4)])
def test_npz_gives_back_what_went_in(tmp_path, monkeypatch, save, max_bytes, shape):
    monkeypatch.setattr(datasets, "CHUNK_BYTES", 1000)  # many pieces, the last one shorter
    images = random_images(np.random.default_rng(0), *shape)
    save(tmp_path / "mine.npz", images=images)
    dataset = load_file(tmp_path / "mine.npz", cache_dir=tmp_path / "cache", max_bytes=max_bytes)
    images = images.reshape(*shape[:3], -1)
    assert (dataset.name, dataset.size, len(dataset)) == ("mine", shape[0], shape[0])
    assert (dataset.height, dataset.width, dataset.channels) == images.shape[1:]
    assert dataset.on_device == (max_bytes is None)
    assert dataset.factors is dataset.factor_names is dataset.factor_sizes is dataset.draw is None
    order = np.random.default_rng(1).permutation(shape[0])
    assert (pixels(dataset, order) == images[order]).all()
    # A plain copy is kept only of compressed images that do not fit.
    assert (tmp_path / "cache").exists() == (save is np.savez_compressed and max_bytes == 0)


@pytest.mark.parametrize("max_bytes", [None, 0])
def test_sample_is_uniform_and_resumes_exactly(tmp_path, max_bytes):
    n = 10  # image i is i * 20 everywhere
    images = np.full((n, 4, 6), 20, np.uint8) * np.arange(n, dtype=np.uint8)[:, None, None]
    np.savez(tmp_path / "a.npz", images=images)
    dataset = load_file(tmp_path / "a.npz", max_bytes=max_bytes)
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    globally = torch.get_rng_state()
    first = dataset.sample(20_000, generator)
    counts = torch.bincount((first[:, 0, 0, 0] * 255 / 20).round().long(), minlength=n)
    assert len(counts) == n and (counts - 2000).abs().max() < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    state = generator.get_state()
    second = dataset.sample(50, generator)
    assert torch.equal(torch.get_rng_state(), globally)  # no other source of randomness
    generator.set_state(state)
    assert torch.equal(dataset.sample(50, generator), second)
    again = load_file(tmp_path / "a.npz", max_bytes=None if max_bytes == 0 else 0)
    generator.set_state(state)
    assert torch.equal(again.sample(50, generator), second)  # however the images are kept


@pytest.mark.parametrize("seed", range(5))
def test_draw_looks_up_a_shuffled_grid(tmp_path, seed):
    rng = np.random.default_rng(seed)
    sizes = tuple(int(size) for size in rng.integers(1, 5, 3))
    values = [np.sort(rng.choice(np.arange(-50, 50), size, replace=False)) / 7 for size in sizes]
    grid = np.stack(np.meshgrid(*values, indexing="ij"), -1).reshape(-1, 3)
    order = rng.permutation(len(grid))
    images = random_images(rng, len(grid), 5, 8, 3)
    fortran = np.asfortranarray(grid[order])  # what np.stack(columns).T makes
    np.savez(tmp_path / "a.npz", images=images[order], factors=fortran, factor_names=list("abc"))
    dataset = load_file(tmp_path / "a.npz", max_bytes=None if seed % 2 else 0)
    assert dataset.factor_sizes == sizes and dataset.factor_names == ("a", "b", "c")
    assert (dataset.factors == grid[order]).all()
    classes = np.stack(np.unravel_index(np.arange(len(grid)), sizes), -1)  # last factor fastest
    drawn = dataset.draw(torch.from_numpy(classes)).permute(0, 2, 3, 1).mul(255).round().numpy()
    assert (drawn == images).all()
    assert not (drawn[::-1] == images).all() or len(grid) == 1
    assert dataset.draw(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 5, 8)


def test_draw_refuses_factors_that_are_none(tmp_path):
    grid = np.stack(np.meshgrid(range(2), range(3), indexing="ij"), -1).reshape(-1, 2)
    np.savez(tmp_path / "a.npz", images=np.zeros((6, 4, 5), np.uint8), factors=grid)
    dataset = load_file(tmp_path / "a.npz")
    assert dataset.factor_names == ("factor 0", "factor 1")
    for bad, match in [
        ([[0, 3]], r"factors\[0, 1\] is 3, but factor 1 has classes 0..2"),
        ([[0, 0], [-1, 0]], r"factors\[1, 0\] is -1"),
        ([[0, 0, 0]], r"\(N, 2\), got torch.int64 \(1, 3\)"),
        ([0, 0], r"\(N, 2\)"),
        ([[0.0, 1.0]], "torch.float32"),
        ([[True, False]], "torch.bool"),
    ]:
        with pytest.raises(ValueError, match=match):
            dataset.draw(torch.tensor(bad))
    with pytest.raises(ValueError, match="integer tensor"):
        dataset.draw([[0, 0]])


def test_incomplete_grids_have_factors_but_no_draw(tmp_path):
    images = np.zeros((6, 4, 5), np.uint8)
    for factors, sizes in [
        (np.random.default_rng(0).random((6, 2)), (6, 6)),  # continuous
        (np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 1]]), (2, 3)),  # one twice
    ]:
        np.savez(tmp_path / "a.npz", images=images, factors=factors)
        dataset = load_file(tmp_path / "a.npz")
        assert (dataset.factors == factors).all() and dataset.factor_sizes == sizes
        assert dataset.draw is None
        with pytest.raises(ValueError, match="no complete grid"):
            dataset.index(torch.zeros(1, 2, dtype=torch.int64))


def test_cache_of_compressed_images_follows_its_source(tmp_path):
    path, cache = tmp_path / "a.npz", tmp_path / "cache"
    rng = np.random.default_rng(0)
    first, second = random_images(rng, 5, 8, 6), random_images(rng, 5, 8, 6)

    def load():
        return load_file(path, cache_dir=cache, max_bytes=0)

    np.savez_compressed(path, images=first, factors=np.arange(5)[:, None], factor_names=["k"])
    dataset = load()
    assert dataset.draw is not None and dataset.factor_names == ("k",) and dataset.name == "a"
    (kept,) = cache.iterdir()
    with np.load(kept, allow_pickle=False) as arrays:  # anyone can open it
        assert (arrays["images"][..., 0] == first).all()
    made = kept.stat().st_mtime_ns
    load()
    assert kept.stat().st_mtime_ns == made  # taken as it is
    np.savez_compressed(path, images=second)
    assert (pixels(load(), range(5))[..., 0] == second).all()
    assert (pixels(dataset, range(5))[..., 0] == first).all()  # an open one keeps its images
    whole = kept.read_bytes()
    # A copy that a crash cut short, one with a damaged header, one that is another array.
    for damage in (whole[:-30], b"", whole.replace(b"NUMPY", b"NUMPX", 1),
                   whole.replace(b"(5, 8, 6, 1)", b"(5, 8, 5, 1)", 1)):  # fmt: skip
        kept.write_bytes(damage)
        assert (pixels(load(), range(5))[..., 0] == second).all()
        assert kept.read_bytes() == whole
    assert list(cache.iterdir()) == [kept]


def test_one_file_of_a_folder_that_changed_is_noticed(tmp_path):
    """The chairs' cache: any file of the folder, not only the oldest, and without another size."""
    files = [tmp_path / name for name in "abc"]
    for age, path in enumerate(files):
        path.write_text("x")
        os.utime(path, (1000 + age, 1000 + age))
    cache, stamp = datasets._cache(tmp_path, tmp_path / "data", files)
    assert datasets._cache(tmp_path, tmp_path / "data", files) == (cache, stamp)
    for path in files:
        before = path.stat().st_mtime_ns
        os.utime(path, (2000, 2000))
        assert datasets._cache(tmp_path, tmp_path / "data", files)[1] != stamp
        os.utime(path, ns=(before, before))


def test_images_take_half_of_the_memory_at_most(tmp_path, monkeypatch):
    images = random_images(np.random.default_rng(0), 5, 8, 6)
    np.savez(tmp_path / "a.npz", images=images)
    for free, on_device in ((2 * images.size, True), (2 * images.size - 2, False)):
        monkeypatch.setattr(datasets, "free_memory", lambda device, free=free: free)
        assert datasets.load_file(tmp_path / "a.npz").on_device == on_device


def test_caches_lie_in_the_data_folder_one_for_each_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "free_memory", lambda device: 0)
    for name, seed in (("a", 0), ("b", 1)):
        Path(name).mkdir()
        np.savez_compressed(f"{name}/same.npz", images=random_images(np.random.default_rng(seed), 5, 8, 6))
        sbvae.load_dataset(f"{name}/same.npz", data_dir="kept")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "kept"]
    made = {p: p.stat().st_mtime_ns for p in Path("kept").iterdir()}
    assert len(made) == 2
    for name in "ab":
        sbvae.load_dataset(f"{name}/same.npz", data_dir="kept")
    assert made == {p: p.stat().st_mtime_ns for p in Path("kept").iterdir()}


def test_a_cache_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "CHUNK_BYTES", 4800)
    path, cache = tmp_path / "a.npz", tmp_path / "cache"
    np.savez_compressed(path, images=random_images(np.random.default_rng(0), 5000, 8, 6))
    usage = datasets.shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.shutil, "disk_usage", lambda folder: usage)
        refused(path, "240000 bytes, but only 100 are free", OSError, cache_dir=cache, max_bytes=0)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.os, "replace", lambda *names: os.stat("/no such file"))
        refused(path, "No such file", OSError, cache_dir=cache, max_bytes=0)
    refused(path, "File exists|Not a directory", OSError, cache_dir=path, max_bytes=0)
    whole, begun = path.read_bytes(), []
    path.write_bytes(whole[:150_000] + bytes([whole[150_000] ^ 1]) + whole[150_001:])
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "_write_npz", lambda *a, write=datasets._write_npz, **b: (
            begun.append(a), write(*a, **b)))  # fmt: skip
        refused(path, "incomplete or damaged", cache_dir=cache, max_bytes=0)
    assert begun and list(cache.iterdir()) == []  # it was found half-way


# ------------------------------------------------------------------------------ what is refused


def write_member(path, header, data, key="images"):
    """An .npz of one array whose header says what it likes."""
    text = (header + "\n").encode()
    with zipfile.ZipFile(path, "w") as archive:
        magic = b"\x93NUMPY\1\0" + struct.pack("<H", len(text))
        archive.writestr(f"{key}.npy", magic + text + data)


GOOD = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)
BAD_ARRAYS = {
    "float01": ({"images": GOOD / 255}, r"is float64: save np.round\(images \* 255\).astype"),
    "float255": ({"images": GOOD.astype("f4")}, r"np.round\(images\).astype\(np.uint8\) if .*255"),
    "int32": ({"images": GOOD.astype("i4")}, r"is int32: save images.astype\(np.uint8\)"),
    "bool": ({"images": GOOD > 9}, r"is bool: save images.astype\(np.uint8\) \* 255"),
    "text": ({"images": np.array(["a"])}, "must be uint8"),
    "0/1": ({"images": GOOD % 2}, r"save images \* 255"),
    "2-d": ({"images": GOOD[0]}, r"must be \(N, H, W\) or \(N, H, W, C\), is \(4, 6\)"),
    "5-d": ({"images": GOOD[..., None, None]}, r"must be \(N, H, W\)"),
    "one image": ({"images": np.ones((64, 64, 3), np.uint8)}, r"single image.*save images\[None\]"),
    "one RGBA": ({"images": np.ones((64, 64, 4), np.uint8)}, r"single image.*save images\[None\]"),
    "narrow": ({"images": np.ones((9, 64, 3, 1), np.uint8)}, "width of 4 to 4096"),
    "circles": ({"coverage": GOOD, "centers": GOOD}, "by name, as in --dataset circles-xy"),
    "none": ({"images": GOOD[:0]}, "holds no image"),
    "5 channels": ({"images": np.ones((2, 8, 8, 5), "u1")}, "1 to 4 channels, on the last axis$"),
    "channels first": ({"images": np.ones((2, 3, 8, 8), "u1")}, r"np.moveaxis\(images, 1, -1\)"),
    "Fortran": ({"images": np.asfortranarray(GOOD)}, r"np.ascontiguousarray\(images\)"),
    "no images": ({"pictures": GOOD, "x": GOOD}, r"has no `images`; it has \['pictures', 'x'\]"),
    "empty": ({}, "has no `images`"),
    "rows": ({"images": GOOD, "factors": np.ones((4, 2))}, r"must be \(5, F\).* is \(4, 2\)"),
    "1-d factors": ({"images": GOOD, "factors": np.ones(5)}, r"must be \(5, F\)"),
    "no factors": ({"images": GOOD, "factors": np.ones((5, 0))}, r"must be \(5, F\)"),
    "text factors": ({"images": GOOD, "factors": [["a"]] * 5}, "must hold numbers"),
    "nan": ({"images": GOOD, "factors": [[np.nan]] * 5}, "not finite"),
    "names": ({"images": GOOD, "factors": np.ones((5, 2)), "factor_names": ["a"]}, "2 strings"),
    "bytes": ({"images": GOOD, "factors": np.ones((5, 1)), "factor_names": [b"a"]}, "1 strings"),
    "no classes": ({"imgs": GOOD}, "no `latents_classes`"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_wrong_arrays_are_refused(tmp_path, case):
    arrays, match = BAD_ARRAYS[case]
    np.savez(tmp_path / "a.npz", **arrays)
    for max_bytes in (None, 0):
        refused(tmp_path / "a.npz", match, cache_dir=tmp_path / "cache", max_bytes=max_bytes)
    assert not (tmp_path / "cache").exists()


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    refused(path, "no such file or folder", FileNotFoundError)
    np.savez_compressed(path, images=random_images(np.random.default_rng(0), 50, 16, 16))
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:-1], b"", b"<html>404</html>\n" * 99):
        path.write_bytes(data)
        refused(path, "incomplete or damaged, was the download cut short")
    for position in (200, len(whole) // 2):  # inside the compressed images
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        refused(path, "damaged")
    for name in ("a.npy", "a.tar.gz", "a"):
        (tmp_path / name).write_bytes(whole)
        refused(tmp_path / name, "expected an .npz, 3dshapes.h5, rendered_chairs.tar")
    # One folder of a path is a file: nothing of the operating system's own words is lost.
    refused(path / "b.npz", "no such file|Not a directory", OSError)
    refused("~nosuchuser/x.npz", "home directory")
    os.mkfifo(tmp_path / "pipe.npz")
    refused(tmp_path / "pipe.npz", "neither a file nor a folder")  # and does not wait for a writer


def test_headers_are_checked_before_memory_is_asked_for(tmp_path, monkeypatch):
    path, header = tmp_path / "a.npz", "{{'descr': '{}', 'fortran_order': False, 'shape': {}}}"
    for kind, shape, match in [
        ("|u1", (10**15, 64, 64), "claims .* but holds 64"),
        ("|u1", (2, 4, 4), "32 bytes, but holds 64"),
        ("|u1", (-1, 8, -8), "claims"),
        ("|u1", (1.0, 8, 8), "shape is not valid"),
        ("|O", (2, 4, 4), "pickle of Python objects, which is never loaded"),
        ("[('a', 'O')]", (2, 4, 4), "descr is not a valid|Header|header"),
        ("|u1", "__import__('os')", "header"),
    ]:
        write_member(path, header.format(kind, shape), bytes(64))
        refused(path, match)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\3\0" + bytes(64))
    refused(path, "no valid .npy header")
    # Header and directory agree on 4 GB; the file has 64 bytes of them.
    write_member(path, header.format("|u1", (2**26 - 2, 8, 8)), bytes(64))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    held = int.from_bytes(data[entry + 24 : entry + 28], "little")
    for field in (entry + 20, entry + 24):
        data[field : field + 4] = (held - 64 + 64 * (2**26 - 2)).to_bytes(4, "little")
    path.write_bytes(data)
    for max_bytes in (2**40, 0):
        refused(path, "ends early|damaged", cache_dir=tmp_path / "cache", max_bytes=max_bytes)
    monkeypatch.setattr(datasets, "MAX_SMALL_BYTES", 79)
    np.savez(path, images=GOOD, factors=np.ones((5, 2)))
    refused(path, "80 bytes, more than 79")


@pytest.mark.parametrize("key", ["images", "factors", "factor_names", "imgs", "latents_classes"])
@pytest.mark.parametrize("raw", [False, True])  # an array of objects, a bare pickle
def test_no_pickle_is_ever_loaded(tmp_path, key, raw):
    marker, path = tmp_path / "marker", tmp_path / "a.npz"
    arrays = {"images": GOOD, "factors": np.ones((5, 1)), "factor_names": np.array(["a"])}
    if key in ("imgs", "latents_classes"):
        arrays = {"imgs": np.zeros((2, 64, 64), np.uint8), "latents_classes": np.zeros((2, 6), int)}
    arrays[key] = evil_array(marker)
    np.savez(path, **arrays)
    with np.load(path, allow_pickle=True) as file:
        file[key]
    assert marker.exists()  # the trap works,
    marker.unlink()
    if raw:
        del arrays[key]
        np.savez(path, **arrays)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{key}.npy", pickle.dumps(Evil(marker)))
    refused(path, "magic string" if raw else f"`{key}` is a pickle of Python objects")
    assert not marker.exists()  # and is not stepped on


# ------------------------------------------------------------------------------ dSprites


def write_dsprites(path, sizes=(2, 2, 3, 4, 5), marker=None, **change):
    """A small file in the official layout, metadata and all → its images (*sizes, 64, 64)."""
    images = (np.random.default_rng(0).random((*sizes, 64, 64)) < 0.3).astype(np.uint8)
    classes = np.stack(np.meshgrid([0], *map(np.arange, sizes), indexing="ij"), -1).reshape(-1, 6)
    arrays = {
        "metadata": np.array({"evil": Evil(marker)} if marker else {}, dtype=object),
        "imgs": images.reshape(-1, 64, 64),
        "latents_classes": classes,
        "latents_values": classes.astype(float),
    }
    np.savez_compressed(path, **arrays | change)
    return images


def test_dsprites(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "CHUNK_BYTES", 7 * 4096)
    marker, path = tmp_path / "marker", tmp_path / "dsprites.npz"
    images = write_dsprites(path, marker=marker)
    dataset = load_file(path)
    assert not marker.exists()
    with np.load(path, allow_pickle=True) as file:
        file["metadata"]
    assert marker.exists()  # the trap works
    assert (dataset.name, dataset.size) == ("dsprites", 240)
    assert dataset.factor_names == ("shape", "scale", "orientation", "x", "y")
    assert dataset.factor_sizes == images.shape[:5]
    assert dataset._rows.nbytes == 240 * 4096 // 8
    index = torch.randperm(240)
    assert (dataset.mask(index).numpy() == images.reshape(-1, 64, 64)[index]).all()
    assert dataset.mask(index).dtype == torch.bool
    factors = torch.from_numpy(np.argwhere(np.ones(images.shape[:5])))[index]
    expected = images[tuple(factors.T)]
    assert (dataset.mask(factors).numpy() == expected).all()
    assert (dataset.draw(factors)[:, 0].numpy() == expected).all()
    assert dataset.images(index).shape == (240, 1, 64, 64)
    a, b = (dataset.sample(9, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b) and set(a.unique().tolist()) == {0.0, 1.0}
    assert not (dataset.mask(factors.flip(1).clamp(max=1)).numpy() == expected).all()


def test_broken_dsprites_are_refused(tmp_path):
    path, masks = tmp_path / "d.npz", np.zeros((240, 64, 64), np.uint8)
    for change, match in [
        ({"imgs": masks[:, :32]}, r"must be \(N, 64, 64\), is \(240, 32, 64, 1\)"),
        ({"imgs": masks + 255}, "must hold 0 and 1 only"),
        ({"imgs": masks.astype(bool)}, "must be uint8"),
        ({"imgs": masks / 255}, "must be uint8"),
        ({"imgs": masks[:239]}, r"must be \(239, F\)"),
        ({"latents_classes": np.zeros((240, 5), int)}, r"must be \(N, 6\) integers"),
        ({"latents_classes": np.zeros((240, 6))}, r"must be \(N, 6\) integers"),
    ]:
        write_dsprites(path, **change)
        refused(path, match)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_dsprites_never_lie_in_memory_as_bytes(tmp_path):
    path, n = tmp_path / "d.npz", 30_000
    imgs = np.zeros((n, 64, 64), np.uint8)  # 123 MB
    np.savez_compressed(path, imgs=imgs, latents_classes=np.zeros((n, 6), int))
    np.savez_compressed(tmp_path / "small.npz", imgs=imgs[:2], latents_classes=np.zeros((2, 6), int))
    code = (
        "import sys, datasets\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith('VmHWM')) << 10\n"
        "datasets.load_file(sys.argv[2])\n"  # code that is loaded on first use does not count
        "before = peak(); kept = datasets.load_file(sys.argv[1]); print(peak() - before)\n"
    )
    run = python(code, path, tmp_path / "small.npz")
    assert run.returncode == 0, run.stderr
    assert n * 4096 // 8 < int(run.stdout) < 60e6  # the bits and a piece or two; not the bytes


# ------------------------------------------------------------------------------ 3dshapes.h5


def write_3dshapes(path, sizes=(2, 3, 1, 2, 4, 5), **change):
    import h5py

    images = random_images(np.random.default_rng(0), *sizes, 64, 64, 3)
    values = [np.linspace(lo, hi, n) for n, lo, hi in zip(sizes, [0, 0, 0, 0.75, 0, -30],
              [0.9, 0.9, 0.9, 1.25, 3, 30], strict=True)]  # fmt: skip
    labels = np.stack(np.meshgrid(*values, indexing="ij"), -1).reshape(-1, 6)
    labels += np.random.default_rng(1).normal(0, 1e-9, labels.shape)  # rounding, as in real files
    with h5py.File(path, "w") as file:
        arrays = {"images": images.reshape(-1, 64, 64, 3), "labels": labels} | change
        for key, array in arrays.items():
            if array is not None:
                many = key == "images" and np.ndim(array) == 4
                more = {"chunks": (7, 16, 16, 1), "compression": "gzip"} if many else {}
                file.create_dataset(key, data=array, **more)
    return images


@pytest.mark.parametrize("max_bytes", [None, 0])
def test_3dshapes(tmp_path, monkeypatch, max_bytes):
    pytest.importorskip("h5py")
    monkeypatch.setattr(datasets, "CHUNK_BYTES", 10 * 64 * 64 * 3)
    images = write_3dshapes(tmp_path / "3dshapes.h5")
    for _ in range(2):  # the second time from the cache
        dataset = load_file(tmp_path / "3dshapes.h5", cache_dir=tmp_path / "c", max_bytes=max_bytes)
        names = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
        assert dataset.factor_names == names and dataset.name == "3dshapes"
        assert dataset.factor_sizes == images.shape[:6]
        assert dataset.on_device == (max_bytes is None)
        factors = np.argwhere(np.ones(images.shape[:6]))[np.random.default_rng(2).permutation(240)]
        drawn = dataset.draw(torch.from_numpy(factors)).permute(0, 2, 3, 1).mul(255).round()
        assert (drawn.numpy() == images[tuple(factors.T)]).all()
    assert (tmp_path / "c").exists() == (max_bytes == 0)


def test_broken_3dshapes_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "3dshapes.h5"
    for change, match in [
        ({"images": None}, r"has no readable `images` among \['labels'\]"),
        ({"labels": None}, "has no readable `labels`"),
        ({"images": np.zeros((240, 64, 64, 3), np.float32)}, "must be uint8"),
        ({"images": np.zeros((240, 64, 64, 7), np.uint8)}, "1 to 4 channels"),
        ({"labels": np.zeros((239, 6))}, r"must be \(240, 6\), is \(239, 6\)"),
        ({"labels": np.full((240, 6), np.nan)}, "not finite"),
        ({"labels": np.full((240, 6), b"x")}, "must hold numbers"),
    ]:
        write_3dshapes(path, **change)
        refused(path, match)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, "incomplete or damaged.*truncated")
    path.write_bytes(b"no HDF5")
    refused(path, "incomplete or damaged.*signature")
    # HDF5 can show the bytes of any file as an array, and follow links out of its own.
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(256)) * 16)
    with h5py.File(path, "w") as file:
        file["labels"] = np.zeros((1, 6))
        file.create_dataset("images", (1, 64, 64), "u1", external=[(str(secret), 0, 4096)])
    refused(path, "`images` lies in another file")
    write_3dshapes(tmp_path / "other.h5")
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "images")
        file["labels"] = np.zeros((240, 6))
    refused(path, "`images` is not an array inside this file")


def test_h5_without_h5py_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "3dshapes.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    refused(tmp_path / "3dshapes.h5", "pip install h5py", ImportError)


# ------------------------------------------------------------------------------ chairs


def encode_png(image, kind, extra=b""):
    """(H, W, C) uint8 or uint16 → PNG of this color type, by the letter of the specification."""
    height, width = image.shape[:2]
    depth = 8 * image.itemsize
    rows = image.astype(image.dtype.newbyteorder(">")).reshape(height, -1)

    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows), 1)
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def shrink(gray):
    """(600, 600) float64 → (64, 64): 8 x 600 = 75 x 64, so repeat 8 times and average 75."""
    rows = gray.repeat(8, 0).reshape(64, 75, 600).mean(1)
    return rows.repeat(8, 1).reshape(64, 64, 75).mean(2)


def luma(rgb):
    return rgb.astype(np.float64) @ [0.299, 0.587, 0.114]


def picture(seed):
    """(600, 600, 3) uint8: white, with a colored patch off the center, in no way symmetric."""
    rng = np.random.default_rng(seed)
    image = np.full((600, 600, 3), 255, np.uint8)
    top, left = rng.integers(0, 300, 2)
    patch = random_images(rng, 30, 40, 3).repeat(7, 0).repeat(5, 1)
    image[top : top + 210, left : left + 200] = patch
    return image


def add(tar, name, data=b"", kind=tarfile.REGTYPE, link="", size=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data) if size is None else size
    tar.addfile(info, io.BytesIO(data))


VIEWS = [(0, 20, 11), (1, 20, 130), (2, 30, 11), (3, 30, 130)]  # number, elevation, azimuth


def write_chairs(path, models=("b2", "a1"), data=None):
    """The official layout, members out of order → {name: image}."""
    images = {}
    with tarfile.open(path, "w") as tar:
        add(tar, "rendered_chairs", kind=tarfile.DIRTYPE)
        add(tar, "rendered_chairs/all_chair_names.mat", b"MATLAB")
        for model in models:
            add(tar, f"rendered_chairs/{model}/renders/._{model}.png", b"not an image, and no name")
            for view in VIEWS[::-1]:
                name = CHAIR.format(model, *view)
                images[name] = picture(len(images))
                add(tar, name, encode_png(images[name], 2) if data is None else data)
    return images


def test_chairs(tmp_path, monkeypatch, capsys):
    path, cache = tmp_path / "rendered_chairs.tar", tmp_path / "data"
    images = write_chairs(path)
    dataset = load_file(path, cache_dir=cache)
    assert (dataset.name, dataset.size, dataset.channels) == ("chairs", 8, 1)
    assert (dataset.height, dataset.width) == (64, 64)
    assert dataset.factor_names == ("model", "elevation", "azimuth")
    assert dataset.factor_sizes == (2, 2, 2)
    assert dataset.factors.tolist()[:5] == [[0, 20, 11], [0, 20, 130], [0, 30, 11], [0, 30, 130],
                                            [1, 20, 11]]  # fmt: skip
    expected = np.stack([shrink(luma(images[name])) for name in sorted(images)])
    found = pixels(dataset, range(8))[..., 0]
    assert np.abs(found - expected).max() <= 0.501  # nothing but the rounding to 8 bits
    assert (found[expected == 255] == 255).all()  # white stays white
    for wrong in (expected.transpose(0, 2, 1), expected[::-1], 255 - expected):
        assert np.abs(found - wrong).max() > 50
    factors = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert torch.equal(dataset.draw(factors), dataset.images(torch.tensor([5, 2])))
    # Nothing but the cache was written; it serves the next time, and opens with plain numpy.
    assert sorted(os.listdir(tmp_path)) == ["data", "rendered_chairs.tar"]
    (kept,) = cache.iterdir()
    with np.load(kept, allow_pickle=False) as arrays:
        assert (arrays["images"] == found).all()
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "_read_chairs", None)
        again = load_file(path, cache_dir=cache, max_bytes=0)
    assert not again.on_device and (pixels(again, range(8))[..., 0] == found).all()
    # A damaged cache is made again, and the archive is not blamed.
    whole = kept.read_bytes()
    middle = whole.index(found.tobytes()) + 5000
    kept.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert (pixels(load_file(path, cache_dir=cache), range(8))[..., 0] == found).all()
    assert kept.read_bytes() == whole
    assert capsys.readouterr().err.splitlines()[-1] == f"{path}: found 8 of the 86,366 images of chairs"
    # A changed archive is read again.
    write_chairs(path, models=("c3",))
    assert load_file(path, cache_dir=cache).size == 4
    assert list(cache.iterdir()) == [kept]


def test_chairs_folder_equals_archive(tmp_path):
    path, folder = tmp_path / "rendered_chairs.tar", tmp_path / "unpacked"
    for name, image in write_chairs(path).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_png(image, 2))
    archive = load_file(path, cache_dir=tmp_path / "data")
    for start in (folder, folder / "rendered_chairs"):
        dataset = load_file(start, cache_dir=tmp_path / "data")
        assert (pixels(dataset, range(8)) == pixels(archive, range(8))).all()
        assert (dataset.factors == archive.factors).all() and dataset.name == "chairs"
    (folder / CHAIR.format("b2", *VIEWS[0])).unlink()
    dataset = load_file(folder, cache_dir=tmp_path / "data")
    assert dataset.size == 7 and dataset.factor_sizes == (2, 2, 2) and dataset.draw is None
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "holds no <model>/renders/image_")


def test_chairs_without_pygame_name_it(tmp_path, monkeypatch):
    write_chairs(tmp_path / "a.tar", models=("m",), data=encode_png(picture(0), 2))
    monkeypatch.setitem(sys.modules, "pygame", None)
    refused(tmp_path / "a.tar", "pip install pygame", ImportError, cache_dir=tmp_path / "c")


def test_find_chairs(tmp_path):
    with pytest.raises(FileNotFoundError, match="rendered_chairs.tar.*https://") as caught:
        datasets.find_chairs(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "rendered_chairs").mkdir()
    assert datasets.find_chairs(tmp_path) == tmp_path / "rendered_chairs"
    (tmp_path / "rendered_chairs.tar").touch()
    assert datasets.find_chairs(str(tmp_path)) == tmp_path / "rendered_chairs.tar"


def test_every_kind_of_png(tmp_path):
    rgb = picture(7)
    gray = rgb[..., :1]
    alpha = random_images(np.random.default_rng(8), 60, 60, 1).repeat(10, 0).repeat(10, 1)
    palette = random_images(np.random.default_rng(9), 256, 3)
    chunk = struct.pack(">I", 768) + b"PLTE" + palette.tobytes()
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))

    def on_white(image):
        return luma(image) * (alpha[..., 0] / 255) + 255 - alpha[..., 0]

    for png, expected in {
        encode_png(gray, 0): gray[..., 0],
        encode_png(gray.astype(np.uint16) * 257, 0): gray[..., 0],
        encode_png(gray, 3, chunk): luma(palette[gray[..., 0]]),
        encode_png(np.concatenate([rgb, alpha], 2), 6): on_white(rgb),
        encode_png(np.concatenate([gray, alpha], 2), 4): on_white(gray.repeat(3, 2)),
    }.items():
        write_chairs(tmp_path / "a.tar", models=("m",), data=png)
        found = pixels(load_file(tmp_path / "a.tar", cache_dir=tmp_path / "c"), [0])[0, ..., 0]
        assert np.abs(found - shrink(expected.astype(np.float64))).max() < 2  # blending rounds
        assert found.std() > 5


def test_area_weights_are_exact():
    for size, smaller in [(600, 64), (10, 4), (7, 7), (128, 64), (9, 2)]:
        weights = datasets.area_weights(size, smaller)
        assert weights.shape == (smaller, size) and weights.dtype == np.float32
        expected = np.eye(size).repeat(smaller, 0).reshape(smaller, size, size).mean(1)
        np.testing.assert_allclose(weights, expected, atol=1e-7)


LINKS = {
    "symlink": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
}


@pytest.mark.parametrize("name, kind", [
    ("rendered_chairs/../../evil/renders/image_000_p020_t011_r096.png", tarfile.REGTYPE),
    ("../evil.png", tarfile.REGTYPE),
    ("/tmp/evil/renders/image_000_p020_t011_r096.png", tarfile.REGTYPE),
    ("..", tarfile.DIRTYPE),
    ("a\\..\\..\\evil.png", tarfile.REGTYPE),
    *((CHAIR.format("m", 0, 20, 11), kind) for kind in LINKS.values()),
], ids=["dots", "dots first", "absolute", "folder", "backslash", *LINKS])  # fmt: skip
@pytest.mark.parametrize("late", [False, True])
def test_hostile_tars_are_refused(tmp_path, name, kind, late):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = inside / "rendered_chairs.tar"
    good = encode_png(picture(0), 2)
    with tarfile.open(path, "w") as tar:
        if late:
            add(tar, CHAIR.format("good", 0, 20, 11), good)
        add(tar, name, good if kind == tarfile.REGTYPE else b"", kind, link="/etc/passwd")
    refused(path, r"is a link or a special file" if kind in LINKS.values() else "leads out",
            cache_dir=inside / "data")  # fmt: skip
    assert os.listdir(tmp_path) == ["inside"] and os.listdir(inside) == ["rendered_chairs.tar"]


def test_broken_tars_are_refused(tmp_path, monkeypatch):
    path, cache = tmp_path / "rendered_chairs.tar", tmp_path / "c"
    good = encode_png(picture(0), 2)
    damaged = good[:3000] + bytes([good[3000] ^ 1]) + good[3001:]
    # Checksums in order, but the pixels are not there: only the decoder can tell.
    hollow = encode_png(np.zeros((1, 600, 3), np.uint8), 2).replace(
        encode_png(np.zeros((1, 600, 3), np.uint8), 2)[8:33], good[8:33])  # fmt: skip
    for data, match in [
        (good[:-5], "cut short or damaged"),
        (good[: len(good) // 2], "cut short or damaged"),
        (good[:20], "cut short or damaged"),
        (damaged, "cut short or damaged"),
        (hollow, "Error reading|PNG"),
        (b"", "not a PNG"),
        (b"GIF89a" + bytes(99), "not a PNG"),
        (encode_png(picture(0)[:500], 2), "600 x 500 pixels; the official images have 600 x 600"),
        (encode_png(np.zeros((64, 64, 3), np.uint8), 2), "64 x 64 pixels"),
    ]:
        write_chairs(path, data=data)
        refused(path, f"'rendered_chairs/a1/renders/image_000_p020_t011_r096.png'.*{match}"
                if data != hollow else match, cache_dir=cache)  # fmt: skip
    write_chairs(path)
    whole = path.read_bytes()
    end = whole.rindex(b"IEND") + 8
    end += -end % 512
    middle = whole.index(b"rendered_chairs/a1/renders/image_003")
    for data in (whole[: len(whole) // 2], whole[:end], whole[: middle + 100], b"", bytes(10), good,
                 whole[:middle] + b"#" + whole[middle + 1 :]):  # fmt: skip
        path.write_bytes(data)
        refused(path, "incomplete or damaged", cache_dir=cache)
    with tarfile.open(path, "w") as tar:
        add(tar, "readme.txt", b"no chairs")
    refused(path, "holds no <model>/renders", cache_dir=cache)
    for size in (2**60, -512):  # in the header; the file itself is small
        info = tarfile.TarInfo(CHAIR.format("m", 0, 20, 11))
        info.size = size
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        refused(path, f"claims {size} bytes, more than there are", cache_dir=cache)
    monkeypatch.setattr(datasets, "MAX_PNG_BYTES", 1000)
    write_chairs(path)
    refused(path, "bytes, more than an image of 600 x 600 takes", cache_dir=cache)
    assert not cache.exists()


def test_an_interrupted_pass_leaves_nothing(tmp_path, monkeypatch):
    path, cache, seen = tmp_path / "rendered_chairs.tar", tmp_path / "data", []
    write_chairs(path)
    read = datasets._read_chair

    def interrupted(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(datasets, "_read_chair", interrupted)
        load_file(path, cache_dir=cache)
    assert not cache.exists()
    assert load_file(path, cache_dir=cache).size == 8


# ------------------------------------------------------------------------------ anywhere


def test_free_memory_heeds_the_limit_of_a_container(tmp_path, monkeypatch):
    free = lambda: datasets.free_memory(torch.device("cpu"))
    monkeypatch.setattr(datasets, "CGROUP", tmp_path)  # no cgroups
    everything = free()
    assert everything > 1 << 20
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 500000\n")
    for limit, expected in (("3500000", 1_000_000), ("2000000", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free() == expected
    for limit in ("max", str(1 << 60)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free() == pytest.approx(everything, rel=0.5)


def test_import_opens_nothing():
    code = "import sys, datasets; print({'pygame', 'h5py', 'matplotlib'} & set(sys.modules))"
    run = python(code)
    assert (run.stdout, run.stderr, run.returncode) == ("set()\n", "", 0)
    assert importlib.util.find_spec("sbvae") is None or "import sbvae" not in Path(
        datasets.__file__).read_text()  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    images = write_dsprites(tmp_path / "d.npz")
    colors = random_images(np.random.default_rng(0), 50, 8, 6, 3)
    np.savez_compressed(tmp_path / "a.npz", images=colors)
    masks = load_file(tmp_path / "d.npz", "cuda")
    mine = load_file(tmp_path / "a.npz", "cuda")
    mapped = load_file(tmp_path / "a.npz", "cuda", cache_dir=tmp_path / "c", max_bytes=0)
    index = torch.randperm(50, device="cuda")
    assert (masks.mask(index).cpu().numpy() == images.reshape(-1, 64, 64)[index.cpu()]).all()
    assert torch.equal(mine.images(index), mapped.images(index)) and mapped.images(index).is_cuda
    generator = torch.Generator("cuda").manual_seed(0)
    factors = torch.zeros(4, 5, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")  # sampling must never wait for the host
    try:
        mine.sample(16, generator)
        masks.sample(16, generator)
        masks.draw(factors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
