"""gen_circles.py against PyGame frame by frame, closed forms, colorsys and Table 3 written out."""

import colorsys
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gen_circles  # noqa: E402

# Table 3, written out a second time: diameter as a share of the frame, then each factor's range.
SIZE = {"xy": 0.2, "xh": 0.3, "rg": 0.5, "xyh-small": 0.1, "xyh-tiny": 0.075}
FACTORS = {
    "xy": {"x": (0.2, 0.8), "y": (0.2, 0.8)},
    "xh": {"x": (0.2, 0.8), "hue": (0.2, 0.8)},
    "rg": {"red": (0.4, 0.8), "green": (0.4, 0.8)},
    "xyh-small": {"x": (0.2, 0.8), "y": (0.2, 0.8), "hue": (0.2, 0.8)},
    "xyh-tiny": {"x": (0.2, 0.8), "y": (0.2, 0.8), "hue": (0.2, 0.8)},
}
SETS = list(SIZE)
VARIANTS = ["", ":hole-center", ":hole-corner", ":blank"]


def describe(key, row):
    """A row of factors -> (x, y, (r, g, b)), everything as a share, by the text of Table 3."""
    factor = dict(zip(FACTORS[key], (float(v) for v in row), strict=True))
    if "hue" in factor:
        rgb = colorsys.hsv_to_rgb(factor["hue"], 1.0, 1.0)
    else:
        rgb = (factor.get("red", 1.0), factor.get("green", 1.0), 1.0)
    return factor.get("x", 0.5), factor.get("y", 0.5), rgb


def pygame_frame(key, x, y, rgb):
    """One image in the plainest way: a 320x320 frame drawn by PyGame, averaged over 5x5 blocks."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame

    frame = pygame.Surface((320, 320), depth=32)
    frame.fill((0, 0, 0))
    center = (math.floor(320 * x + 0.5), math.floor(320 * y + 0.5))
    pygame.draw.circle(frame, [round(255 * c) for c in rgb], center, round(160 * SIZE[key]))
    pixels = np.swapaxes(pygame.surfarray.array3d(frame), 0, 1).astype(np.float64)
    return np.rint(pixels.reshape(64, 5, 64, 5, 3).mean((1, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("circles")


def make(folder, name, num=400, seed=3):
    return gen_circles.generate(f"circles-{name}", num, seed, folder, progress=False)


# --- Images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("key", SETS)
def test_images_are_those_of_pygame_drawn_one_by_one(folder, key, variant):
    path = make(folder, key + variant)
    with np.load(path, allow_pickle=False) as npz:
        factors, blank = npz["factors"], npz["blank"]
    images = gen_circles.images(path, slice(20))
    assert images.shape == (20, 64, 64, 3) and images.dtype == np.uint8
    for i, image in enumerate(images):
        x, y, rgb = describe(key, factors[i])
        if blank[i]:
            assert variant == ":blank" and not image.any()
            continue
        np.testing.assert_array_equal(image, pygame_frame(key, x, y, rgb))
        if i < 4:  # and the comparison tells wrong images from right ones: a fifth of a pixel off
            assert not np.array_equal(image, pygame_frame(key, x + 1 / 320, y, rgb))
            assert key == "rg" or not np.array_equal(image, pygame_frame(key, y, x, rgb))


def test_circles_cut_by_the_frame_are_those_of_pygame(folder):
    data = gen_circles.Circles(gen_circles.read(make(folder, "xy")))
    values = torch.tensor([[0, 0], [1, 0], [0.03, 0.97], [0.5, 1], [0.999, 0.4], [0.1, 0.9]])
    for image, (x, y) in zip(data.draw_values(values), values.tolist(), strict=True):
        expected = pygame_frame("xy", x, y, (1, 1, 1))
        np.testing.assert_array_equal((image * 255).round().byte().permute(1, 2, 0), expected)


@pytest.mark.parametrize("key", SETS)
def test_area_and_centroid_have_their_closed_forms(folder, key):
    data = gen_circles.Circles(gen_circles.read(make(folder, key)))
    generator = np.random.default_rng(5)
    rows = np.stack([generator.uniform(*limits, 300) for limits in FACTORS[key].values()], 1)
    images = data.draw_values(torch.from_numpy(rows)).double().numpy()
    center = np.arange(64) + 0.5  # of the pixels
    ratios = []
    for row, image in zip(rows, images, strict=True):
        x, y, rgb = describe(key, row)
        channel = int(np.argmax(rgb))
        share = image[channel] * 255 / round(255 * rgb[channel])  # of each pixel in the circle
        area = share.sum()
        ratios.append(area / (math.pi * (64 * SIZE[key] / 2) ** 2))
        # The centre was moved to a fifth of a pixel, by 0.1 at most; bytes add a few thousandths.
        assert abs((share.sum(0) * center).sum() / area - 64 * x) < 0.11
        assert abs((share.sum(1) * center).sum() / area - 64 * y) < 0.11
        assert (share.max(0) > 0).sum() == pytest.approx(64 * SIZE[key], abs=1.7)  # the diameter
    # PyGame's circles are a little small. A disc with a radius off by half a sub-pixel fails.
    low, high = {"xy": (0.985, 0.989), "xh": (0.991, 0.994), "rg": (0.993, 0.996),
                 "xyh-small": (0.966, 0.973), "xyh-tiny": (0.968, 0.977)}[key]  # fmt: skip
    assert low < min(ratios) and max(ratios) < high


def test_centroids_are_unbiased(folder):
    """Cutting the fraction off, as PyGame does, would give -0.1 pixels in both directions."""
    data = gen_circles.Circles(gen_circles.read(make(folder, "xyh-small")))
    values = torch.from_numpy(gen_circles.draw_rows("circles-xyh-small", 0, 3000, 9)["factors"])
    light = data.draw_values(values).amax(1).double()
    center = torch.arange(64) + 0.5
    for axis, coordinate in ((1, values[:, 0]), (2, values[:, 1])):
        error = (light.sum(axis) * center).sum(1) / light.sum((1, 2)) - 64 * coordinate
        assert abs(error.mean()) < 0.005  # standard error 0.058 / sqrt(3000) = 0.001
        assert error.abs().max() < 0.11


def test_x_runs_to_the_right_and_y_downwards(folder):
    data = gen_circles.Circles(gen_circles.read(make(folder, "xy")))
    (image,) = data.draw_values(torch.tensor([[0.8, 0.3]]))
    assert image.shape == (3, 64, 64)
    assert image[:, 19, 51].min() == 1 and image[:, 51, 19].max() == 0  # row 64 y, column 64 x


def test_colours_are_those_of_colorsys(folder):
    data = gen_circles.Circles(gen_circles.read(make(folder, "xh")))
    hues = np.linspace(0, 1, 241)
    values = torch.from_numpy(np.stack([np.full_like(hues, 0.5), hues], 1))
    drawn = data.draw_values(values)[:, :, 32, 32].double().numpy()  # (241, 3) in mid-circle
    expected = np.array([colorsys.hsv_to_rgb(hue, 1, 1) for hue in hues])
    assert np.abs(drawn - expected).max() <= 0.5001 / 255
    assert np.abs(drawn - expected[:, [1, 0, 2]]).max() > 0.5  # two channels swapped

    data = gen_circles.Circles(gen_circles.read(make(folder, "rg")))
    values = torch.tensor([[0.4, 0.8], [0.8, 0.4], [0.53, 0.61]])
    drawn = data.draw_values(values)[:, :, 32, 32]
    expected = torch.cat([values, torch.ones(3, 1)], 1)
    assert (drawn - expected).abs().max() <= 0.5001 / 255


# --- The distribution of factors -----------------------------------------------------------------


def chi_square(counts):
    """Of counts that should be equal; as a number of standard deviations from its mean."""
    counts = np.asarray(counts, float).ravel()
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return (statistic - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("key", SETS)
def test_factors_are_uniform_outside_the_hole_and_absent_inside(key, variant):
    rows = gen_circles.draw_rows(f"circles-{key}{variant}", 0, 200_000, seed=1)
    factors = rows["factors"].astype(np.float64)
    assert factors.shape == (200_000, len(FACTORS[key])) and rows["factors"].dtype == np.float32
    shares = []
    for column, (low, high) in zip(factors.T, FACTORS[key].values(), strict=True):
        assert low - 1e-7 <= column.min() < low + 1e-4 and high - 1e-4 < column.max() <= high + 1e-7
        shares.append((column - low) / (high - low))
    # An 8x8 histogram of the first two factors; the holes are made of whole cells of it.
    counts, _, _ = np.histogram2d(*shares[:2], bins=8, range=((0, 1), (0, 1)))
    held_out = np.zeros((8, 8), bool)
    if variant == ":hole-center":
        held_out[2:6, 2:6] = True
    elif variant == ":hole-corner":
        held_out[4:, 4:] = True
    assert held_out.sum() in (0, 16)
    assert counts[held_out].sum() == 0
    assert abs(chi_square(counts[~held_out])) < 4
    if len(shares) == 3:
        pairs = [
            np.histogram2d(s, shares[2], bins=8, range=((0, 1), (0, 1)))[0] for s in shares[:2]
        ]
        by_hue = np.histogram(shares[2], bins=8, range=(0, 1))[0]
        assert abs(chi_square(by_hue)) < 4
        for pair in pairs:  # independent of the hue: same profile in each of its bins
            assert abs(chi_square(pair / pair.mean(1, keepdims=True) * pair.mean())) < 4


def test_the_uniformity_test_can_fail():
    generator = np.random.default_rng(0)
    counts = generator.multinomial(200_000, np.full(48, 1 / 48))
    assert abs(chi_square(counts)) < 4
    assert chi_square(counts * np.linspace(0.97, 1.03, 48)) > 4


@pytest.mark.parametrize("key", ["xy", "xh", "rg"])
@pytest.mark.parametrize("hole", ["hole-center", "hole-corner"])
def test_no_image_of_half_a_million_is_held_out(folder, key, hole):
    data = gen_circles.Circles(gen_circles.read(make(folder, f"{key}:{hole}")))
    factors = gen_circles.draw_rows(data.name, 0, 500_000)["factors"]
    assert not data.in_hole(torch.from_numpy(factors)).any()
    plain = gen_circles.draw_rows(f"circles-{key}", 0, 500_000)["factors"]
    assert data.in_hole(torch.from_numpy(plain)).double().mean() == pytest.approx(0.25, abs=0.003)


def test_half_of_the_images_are_blank(folder):
    rows = gen_circles.draw_rows("circles-xh:blank", 0, 100_000, seed=2)
    blank = rows["blank"]
    assert blank.mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(100_000))
    assert abs(np.corrcoef(blank[1:], blank[:-1])[0, 1]) < 0.013  # in no order
    for column in rows["factors"].T:  # nor by any factor
        assert abs(np.corrcoef(blank, column)[0, 1]) < 0.013
    path = make(folder, "xh:blank")
    dark = ~gen_circles.images(path).any((1, 2, 3))
    np.testing.assert_array_equal(dark, gen_circles.read(path)["blank"])
    assert 0.4 < dark.mean() < 0.6
    assert gen_circles.images(make(folder, "xh")).any((1, 2, 3)).all()


# --- Reproducibility -----------------------------------------------------------------------------


def joined(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_same(a, b):
    for key in ("factors", "blank", "centers", "colors"):
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize(
    "name", ["circles-xyh-small", "circles-xh:hole-corner", "circles-rg:blank"]
)
def test_any_part_can_be_drawn_again(name):
    whole = gen_circles.draw_rows(name, 0, 1000, seed=11)
    for edges in ([0, 1, 2, 999, 1000], [0, 333, 334, 1000]):
        pairs = list(zip(edges, edges[1:], strict=False))
        assert_same(joined([gen_circles.draw_rows(name, *pair, seed=11) for pair in pairs]), whole)
    other = gen_circles.draw_rows(name, 0, 1000, seed=12)
    assert not (other["factors"] == whole["factors"]).all(1).any()
    assert len(np.unique(whole["factors"], axis=0)) == 1000


def test_the_number_of_processes_does_not_matter():
    name = "circles-xyh-tiny:hole-center"
    starts = range(0, 1000, 100)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        parts = pool.map(
            gen_circles.draw_rows, [name] * 10, starts, [s + 100 for s in starts], [4] * 10
        )
        assert_same(joined(list(parts)), gen_circles.draw_rows(name, 0, 1000, seed=4))


def test_the_same_images_on_every_machine(tmp_path):
    """Values fixed when the file was written: rows 0 and 499,999, and 16 images, of seed 0."""
    rows = [gen_circles.draw_rows("circles-xyh-small", i, i + 1) for i in (0, 499_999)]
    expected = [[0.2069281, 0.3449295, 0.2668555], [0.2232123, 0.260998, 0.7190552]]
    np.testing.assert_allclose(joined(rows)["factors"], expected, rtol=0, atol=1e-6)
    path = make(tmp_path, "xyh-small", num=16, seed=0)
    digest = hashlib.sha256(gen_circles.images(path, range(16)).tobytes()).hexdigest()
    assert digest == "0a8f734a5af23fb57bd0f9ee37d2ffbf71da288b74c6ec1b0d6440e396b0adec"


def test_a_short_set_is_the_start_of_a_long_one(folder, tmp_path):
    name = "xh:hole-center"
    long = gen_circles.images(make(folder, name), slice(50))
    np.testing.assert_array_equal(gen_circles.images(make(tmp_path, name, num=50)), long)


# --- The file ------------------------------------------------------------------------------------


def test_file_contents(folder):
    path = make(folder, "xyh-small:hole-center")
    assert path == folder / "circles-xyh-small-hole-center.npz"
    with np.load(path, allow_pickle=False) as npz:
        assert npz["factors"].shape == (400, 3) and npz["factors"].dtype == np.float32
        assert list(npz["factor_names"]) == ["x", "y", "hue"]
        assert npz["blank"].shape == (400,) and not npz["blank"].any()
        assert (npz["name"], npz["num"], npz["seed"]) == ("circles-xyh-small:hole-center", 400, 3)
    everything = gen_circles.images(path)
    for indices in ([7, 2, 2], slice(5, 9), range(3), np.array([399]), 8):
        expected = np.atleast_1d(np.arange(400)[indices])
        np.testing.assert_array_equal(gen_circles.images(path, indices), everything[expected])


def test_a_right_file_is_reused_and_any_other_replaced(tmp_path, monkeypatch):
    path = make(tmp_path, "xy", num=50, seed=0)
    good = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    assert make(tmp_path, "xy", num=50, seed=0) == path and path.stat().st_mtime_ns == stamp

    def expect(num, seed):
        make(tmp_path, "xy", num, seed)
        found = gen_circles.read(path)
        assert (found["num"], found["seed"], len(found["factors"])) == (num, seed, num)
        assert_same(found, gen_circles.draw_rows("circles-xy", 0, num, seed))

    expect(50, 1)
    expect(60, 1)
    other = make(tmp_path, "xy:blank", num=50, seed=0).read_bytes()
    np.savez(tmp_path / "foreign.npz", images=np.zeros((2, 64, 64), np.uint8))
    foreign = (tmp_path / "foreign.npz").read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    for wrong in (b"", b"\0" * 1000, good[:middle], flipped, other, foreign):
        path.write_bytes(wrong)
        expect(50, 0)
        assert path.read_bytes() == good
    monkeypatch.setattr(gen_circles, "VERSION", gen_circles.VERSION + 1)
    assert "version" in gen_circles.look(path, "circles-xy", 50, 0)[1]
    expect(50, 0)
    assert path.read_bytes() != good
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".npz"] * 3  # and nothing left over


@pytest.mark.parametrize(
    "change",
    [
        dict(centers=np.zeros((50, 3), np.int16)),
        dict(colors=np.zeros((50, 3), np.float32)),
        dict(coverage=np.zeros((70, 10), np.uint8)),
        dict(coverage=np.full((70, 70), 26, np.uint8)),
        dict(factors=np.zeros((49, 2), np.float32)),
        dict(factor_names=np.array(["y", "x"])),
        dict(num=np.int64(10**12)),
        dict(name=np.array("circles-xyz")),
    ],
)
def test_a_file_whose_arrays_do_not_fit_is_refused(tmp_path, change):
    path = make(tmp_path, "xy", num=50)
    with np.load(path) as npz:
        arrays = dict(npz)
    np.savez(path, **{**arrays, **change})
    with pytest.raises(ValueError) as caught:
        gen_circles.read(path)
    assert "\n" not in str(caught.value)


def test_sizes_are_checked_before_anything_is_inflated(tmp_path):
    """150 MB of zeros, a few hundred kB in the file: once as an array, once as the name."""
    path = make(tmp_path, "xy", num=50)
    with np.load(path) as npz:
        arrays = dict(npz)
    bombs = dict(colors=np.zeros(150_000_000, np.uint8), name=np.zeros((), "U37500000"))
    for key, bomb in bombs.items():
        np.savez_compressed(tmp_path / f"{key}.npz", **{**arrays, key: bomb})
    code = """
import resource, sys, gen_circles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        gen_circles.read(path)
    except ValueError as error:
        print("damaged" in str(error), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    paths = [str(tmp_path / f"{key}.npz") for key in bombs]
    command = [sys.executable, "-c", code, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    for line in done.stdout.splitlines():
        damaged, grown = line.split()
        assert damaged == "True" and int(grown) < 50_000 * (1024 if sys.platform == "darwin" else 1)
    assert len(done.stdout.splitlines()) == 2


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("key", ["blank", "factor_names", "name"])
def test_nothing_is_unpickled(tmp_path, key):
    path = make(tmp_path, "xy", num=50)
    with np.load(path) as npz:
        arrays = dict(npz)
    arrays[key] = np.array([Payload(tmp_path / "executed")], dtype=object)
    np.savez(path, **arrays)
    for use in (gen_circles.read, gen_circles.images):
        with pytest.raises(ValueError, match="damaged"):
            use(path)
    make(tmp_path, "xy", num=50)  # drawn anew
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed"))).close()  # a payload that works
    assert (tmp_path / "executed").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = make(tmp_path, "xy", num=50, seed=0)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    def not_renamed(source, target):
        raise OSError(1, "Operation not permitted")

    for target, name, fails in ((np, "savez", full_disk), (os, "replace", not_renamed)):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(target, name, fails)
            make(tmp_path, "xy", num=50, seed=1)
        assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_what_a_killed_process_leaves_is_overwritten(tmp_path):
    code = """
import os, sys, gen_circles
with gen_circles.atomic(sys.argv[1]) as file:
    file.write(bytes(100_000))
    file.flush()
    os._exit(9)
"""
    path = gen_circles.file_path("circles-xy", tmp_path)
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == 9
    assert [p.name for p in tmp_path.iterdir()] == [f".{path.name}.tmp"]
    assert make(tmp_path, "xy", num=50) == path
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and path.stat().st_size < 20_000


def test_writers_at_the_same_time_never_mix(tmp_path):
    path, lengths = tmp_path / "file", [3000, 1000, 2000, 4000]

    def write(k):
        for _ in range(10):
            with gen_circles.atomic(path) as file:
                for _ in range(lengths[k] // 1000):
                    file.write(bytes([k]) * 1000)
                    file.flush()
                    time.sleep(0.001)

    whole = [bytes([k]) * length for k, length in enumerate(lengths)]
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, k) for k in range(4)]
        while not all(writer.done() for writer in writers):
            assert not path.exists() or path.read_bytes() in whole
    assert [writer.result() for writer in writers] == [None] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=function: (done.append(n), f(*a)))
    make(tmp_path, "xy", num=50)
    assert done == ["fsync", "replace"]


def test_pygame_is_needed_for_drawing_alone(tmp_path, monkeypatch):
    make(tmp_path, "xy", num=50, seed=0)
    monkeypatch.setitem(sys.modules, "pygame", None)
    data = gen_circles.load("circles-xy", data_dir=tmp_path, num=50, seed=0)
    assert data.draw(torch.tensor([[3, 4]])).max() == 1
    with pytest.raises(ImportError, match="pip install pygame"):
        gen_circles.load("circles-xh", data_dir=tmp_path, num=50, seed=0)


def test_a_name_may_be_a_path(tmp_path):
    path = gen_circles.generate(Path("circles-xy:blank"), 5, out=tmp_path)
    assert path == gen_circles.generate("circles-xy:blank", 5, out=str(tmp_path)) and gen_circles.read(path)["num"] == 5


def test_half_a_million_images(tmp_path):
    """Time, file size and peak memory, in a process of its own as a user starts it."""
    code = """
import json, resource, sys, time
import gen_circles
start = time.perf_counter()
path = gen_circles.generate("circles-xyh-small:hole-center", out=sys.argv[1])
seconds = time.perf_counter() - start
try:  # of this program alone; ru_maxrss may be that of the process that started it
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([seconds, path.stat().st_size, peak]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    seconds, size, peak = json.loads(done.stdout)
    assert seconds < 180 and size < 250e6 and peak < 3e9
    assert "500000/500000" in done.stderr  # the progress bar


# --- The data set --------------------------------------------------------------------------------


def test_samples_are_the_images_of_the_file(folder):
    for name in ("xyh-small:hole-corner", "xh:blank"):
        path = make(folder, name)
        data = gen_circles.load(f"circles-{name}", "cpu", folder, 400, 3)
        assert (data.name, data.size, len(data)) == (f"circles-{name}", 400, 400)
        assert data.on_device is True and data.device == torch.device("cpu")
        assert (data.channels, data.height, data.width) == (3, 64, 64)
        sample = data.sample(100, torch.Generator().manual_seed(6))
        assert sample.shape == (100, 3, 64, 64) and sample.dtype == torch.float32
        index = torch.randint(400, (100,), generator=torch.Generator().manual_seed(6))
        expected = torch.from_numpy(gen_circles.images(path, index.numpy())).permute(0, 3, 1, 2)
        assert torch.equal(sample, expected / 255)
        generator = torch.Generator().manual_seed(6)
        assert torch.equal(data.sample(100, generator), sample)
        assert not torch.equal(data.sample(100, generator), sample)


@pytest.mark.parametrize("key", SETS)
def test_factors_of_the_file_give_its_images(folder, key):
    arrays = gen_circles.read(make(folder, key))
    drawn = gen_circles.Circles(arrays).draw_values(torch.from_numpy(arrays["factors"]))
    expected = torch.from_numpy(gen_circles.images(make(folder, key))).permute(0, 3, 1, 2)
    assert torch.equal(drawn, expected / 255)


def test_classes_are_the_centres_of_bins(folder):
    data = gen_circles.Circles(gen_circles.read(make(folder, "xyh-small:hole-center")))
    assert data.factor_names == ("x", "y", "hue") and data.factor_sizes == (32, 32, 32)
    classes = torch.tensor([[0, 31, 7], [12, 3, 31]])
    values = data.values(classes)
    expected = [[0.2 + (k + 0.5) * 0.6 / 32 for k in row] for row in classes.tolist()]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=1e-6)
    images = data.draw(classes)
    for image, row in zip(images, expected, strict=True):
        literal = pygame_frame("xyh-small", *describe("xyh-small", row))
        difference = (image * 255).permute(1, 2, 0).numpy() - literal
        assert np.abs(difference).max() <= 1.001  # a colour may round either way


@pytest.mark.parametrize("key", SETS)
def test_a_quarter_of_the_classes_is_held_out(folder, key):
    number = len(FACTORS[key])
    grid = torch.cartesian_prod(*[torch.arange(32)] * number)
    first, second = grid[:, 0], grid[:, 1]
    inside = {
        ":hole-center": (first >= 8) & (first < 24) & (second >= 8) & (second < 24),
        ":hole-corner": (first >= 16) & (second >= 16),
    }
    for variant in VARIANTS:
        data = gen_circles.Circles(gen_circles.read(make(folder, key + variant)))
        held_out = data.held_out(grid)
        assert torch.equal(held_out, inside.get(variant, torch.zeros(len(grid), dtype=torch.bool)))
        assert (data.hole is None) == (variant not in inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_of_the_hole(folder, dtype):
    data = gen_circles.Circles(gen_circles.read(make(folder, "xy:hole-center")))
    values = torch.tensor([[0.35, 0.5], [0.65, 0.5], [0.36, 0.64], [0.5, 0.7]], dtype=dtype)
    assert data.in_hole(values).tolist() == [False, False, True, False]
    data = gen_circles.Circles(gen_circles.read(make(folder, "xy:hole-corner")))
    # Training images may lie on the inner edge, none on the outer one.
    values = torch.tensor([[0.5, 0.7], [0.8, 0.8], [0.51, 0.8], [0.8, 0.2]], dtype=dtype)
    assert data.in_hole(values).tolist() == [False, True, True, False]
    assert data.draw_values(values).amax((1, 2, 3)).eq(1).all()  # and they can all be drawn


def test_the_blank_image(folder):
    data = gen_circles.Circles(gen_circles.read(make(folder, "xh:blank")))
    assert data.blank.shape == (3, 64, 64) and not data.blank.any()
    assert gen_circles.Circles(gen_circles.read(make(folder, "xh"))).blank is None


def test_sampling_and_drawing_never_wait_for_the_device(folder):
    """On the meta device there are no values: reading one back raises."""
    data = gen_circles.Circles(gen_circles.read(make(folder, "xyh-small:hole-center")), "meta")
    assert data.sample(5, None).shape == (5, 3, 64, 64)
    assert data.draw(torch.zeros(7, 3, dtype=torch.int64, device="meta")).shape == (7, 3, 64, 64)
    images = data.draw(torch.zeros(7, 3, dtype=torch.int64))  # from the CPU, to where the data is
    assert images.shape == (7, 3, 64, 64) and images.is_meta
    assert data.held_out(torch.zeros(7, 3, dtype=torch.int64, device="meta")).shape == (7,)
    with pytest.raises(RuntimeError):
        data.sample(5, None).sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_bytes_on_a_gpu(folder):
    pytest.importorskip("pygame")
    arrays = gen_circles.read(make(folder, "xyh-small"))
    values = torch.from_numpy(arrays["factors"])
    on_cpu = gen_circles.Circles(arrays).draw_values(values)
    data = gen_circles.Circles(arrays, "cuda")
    on_gpu = data.draw_values(values.cuda()).cpu()
    assert torch.equal((on_cpu * 255).round(), (on_gpu * 255).round())
    graph = torch.cuda.CUDAGraph()
    generator = torch.Generator("cuda").manual_seed(0)
    graph.register_generator_state(generator)
    data.sample(16, generator)
    with torch.cuda.graph(graph):
        sample = data.sample(16, generator)
    graph.replay()
    first = sample.clone()
    graph.replay()
    assert not torch.equal(first, sample) and first.amax((1, 2, 3)).gt(0.9).all()


# --- Errors and the command line -----------------------------------------------------------------


def one_line(caught):
    text = str(caught.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize(
    "name",
    ["circles", "circles-xyz", "circles-xy:", "circles-xy:hole", "circles-xy:blank:blank", ""],
)
def test_unknown_names(tmp_path, name):
    with pytest.raises(ValueError) as caught:
        gen_circles.load(name, data_dir=tmp_path)
    assert "circles-xyh-tiny" in one_line(caught) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "num, seed",
    [(0, 0), (-5, 0), (2.5, 0), ("9", 0), (10**9, 0), (5, -1), (5, 2**63), (5, 0.0)],
)
def test_bad_numbers(tmp_path, num, seed):
    with pytest.raises(ValueError) as caught:
        gen_circles.generate("circles-xy", num, seed, tmp_path)
    assert "whole number" in one_line(caught) and not list(tmp_path.iterdir())


def test_bad_factors(folder):
    data = gen_circles.Circles(gen_circles.read(make(folder, "xyh-small")))
    for classes in ([[0, 0]], [[0, 0, 32]], [[-1, 0, 0]], [0, 0, 0], [[0.0, 0.0, 0.0]]):
        with pytest.raises(ValueError) as caught:
            data.draw(torch.tensor(classes))
        assert "classes" in one_line(caught)
    for values in ([[0.5, 0.5]], [[0.5, 0.5, 1.1]], [[0.5, float("nan"), 0.5]], [[0, 0, 0]]):
        with pytest.raises(ValueError) as caught:
            data.draw_values(torch.tensor(values))
        assert "values" in one_line(caught)
    assert data.draw(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 64, 64)


def test_importing_does_nothing_and_drawing_opens_nothing(tmp_path):
    code = """
import sys
import gen_circles
assert not {"pygame", "matplotlib"} & set(sys.modules)
gen_circles.main(["circles-xy:hole-center", "--num", "100", "--out", sys.argv[1], "--preview"])
import pygame, torch
assert not (pygame.display.get_init() or pygame.mixer.get_init() or torch.cuda.is_initialized())
assert "matplotlib.pyplot" not in sys.modules
"""
    unset = ("DISPLAY", "WAYLAND_DISPLAY", "PYGAME_HIDE_SUPPORT_PROMPT")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path, picture = done.stdout.splitlines()  # and nothing else: no greeting by PyGame
    assert "100 images" in path and picture == str(tmp_path / "circles-xy-hole-center.png")
    assert (tmp_path / "circles-xy-hole-center.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["circles-rg", "circles-xyh-tiny:hole-corner", "circles-xh:blank"])
def test_previews_of_small_sets(tmp_path, name):
    for num in ("1", "20"):
        assert gen_circles.main([name, "--num", num, "--out", str(tmp_path), "--preview"]) == 0
        assert next(tmp_path.glob("*.png")).stat().st_size > 5000


def test_a_preview_shows_factors_in_their_colours_the_hole_and_images(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: drawn.append(self))
    path = gen_circles.generate("circles-xyh-small:hole-corner", num=40, out=tmp_path, progress=False)
    gen_circles.preview(path)
    left, right = drawn[0].subfigs
    axes, arrays = left.axes[0], np.load(path, allow_pickle=False)
    dots = axes.collections[0]
    np.testing.assert_array_equal(dots.get_offsets(), arrays["factors"][:, :2])
    np.testing.assert_allclose(dots.get_facecolors()[:, :3] * 255, arrays["colors"])
    assert np.ptp(arrays["colors"].astype(int), axis=0).max() > 100  # the hues differ
    assert axes.patches[0].get_bbox().extents == pytest.approx((0.5, 0.5, 0.8, 0.8))
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # y points down, as in the images
    shown = [axes.images[0].get_array() for axes in right.axes]
    np.testing.assert_array_equal(shown, gen_circles.images(path)[:16])
    assert all(image.any() for image in shown)


def test_errors_of_the_command_line(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "circles-xh.npz").mkdir()
    for arguments in (
        ["circles-pq"],
        ["circles-xy", "--num", "0"],
        ["circles-xy", "--seed", "-1"],
        ["circles-xy", "--out", str(tmp_path / "file")],
        ["circles-xh", "--num", "9", "--out", str(tmp_path)],
    ):
        assert gen_circles.main(arguments) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("error: ")
    assert (tmp_path / "file").read_text() == "in the way"
    for arguments in (["circles-xy", "--num", "many"], [], ["circles-xy", "--nope"]):
        with pytest.raises(SystemExit) as caught:
            gen_circles.main(arguments)
        (line,) = capsys.readouterr().err.splitlines()  # without the usage
        assert caught.value.code == 2 and line.startswith("error: ")


def test_an_interrupted_command_line(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gen_circles, "draw_rows", interrupted)
    assert gen_circles.main(["circles-xy", "--out", str(tmp_path)]) == 130
    assert "Traceback" not in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_large_set_is_drawn_row_by_row_too(tmp_path):
    """Beyond the 50,000 that are drawn at once."""
    found = gen_circles.read(gen_circles.generate("circles-xy", 100_007, 3, tmp_path, progress=False))
    expected = gen_circles.draw_rows("circles-xy", 0, 100_007, 3)
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values)
    assert len(np.unique(found["factors"], axis=0)) > 99_000


def test_the_same_holes_and_blanks_on_every_machine():
    """Values fixed when the test was written, of seed 0."""
    blank = gen_circles.draw_rows("circles-xh:blank", 0, 16)["blank"]
    assert "".join(map(str, blank.astype(int))) == "0010100111100000"
    for name, first in (("hole-center", [0.5017320, 0.2362324]), ("hole-corner", [0.3517320, 0.5362324])):
        expected = [first, [0.7253569, 0.6916409 - 0.3 * (name == "hole-corner")], [0.2380734, 0.3792576]]
        factors = gen_circles.draw_rows(f"circles-xy:{name}", 0, 3)["factors"]
        np.testing.assert_allclose(factors, expected, rtol=0, atol=1e-6)


def test_half_a_million_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def obtain(name, num, *_):
        asked.append((name, num))
        raise ValueError("enough")

    monkeypatch.setattr(gen_circles, "obtain", obtain)
    assert gen_circles.main(["circles-xy"]) == 2
    for call in (gen_circles.load, gen_circles.generate):
        with pytest.raises(ValueError, match="enough"):
            call("circles-xy")
    assert asked == [("circles-xy", 500_000)] * 3
