"""Circles data sets of the Spatial Broadcast decoder paper (A.3, Table 3, Figures 4, 7, 8, 11-20).

    python gen_circles.py circles-xy                             # 500,000 images -> data/, seconds
    python gen_circles.py circles-xh:hole-center --num 10000 --seed 1 --out data/
    python gen_circles.py circles-rg:hole-corner --preview       # and a picture of the data set

Five sets: `circles-xy`, `circles-xh`, `circles-rg`, `circles-xyh-small` and `circles-xyh-tiny`;
each also with `:hole-center` or `:hole-corner` (a quarter of factor space held out) or `:blank`
(half of the images entirely black). Images are 64x64 RGB. Positions are shares of the frame: x to
the right, y downwards like the rows of an image, (0.5, 0.5) the middle. Size is the diameter, also
as a share of the frame (captions of Figures 7 and 8: "0.1 times the frame-width").

Why half a million images take a second and 8-10 MB. As in the paper, circles are drawn with
PyGame at 5x and averaged down. PyGame puts them at whole pixels, here fifths of an image pixel, and
draws the same circle wherever it stands. So one PyGame drawing serves a whole data set, and an
image is three things: `coverage`, that drawing with its 5x5 sums taken; where the centre is; and
the colour. The tests compare the result, bit by bit, with drawing every frame by itself: 320x320 in
PyGame, averaged down.

Row i of a data set depends on (name, seed, i) alone, through a counter-based random generator: any
part of it can be drawn again, in any order and in any number of processes, and the first 1,000
images of 500,000 are those of a set of 1,000.

The .npz (np.load, no pickle) holds
    coverage      (D, D) uint8    how much of a pixel, in 25ths, is circle; see `images`
    centers       (N, 2) int16    centre of the circle, x and y, in fifths of a pixel
    colors        (N, 3) uint8    colour of the circle, 0 when the image is blank
    factors       (N, F) float32  generative factors, in the units of Table 3
    factor_names  (F,) str        their names
    blank         (N,) bool       the image is blank; its factors are those of the circle left out
    name, num, seed, version      what the file was made from
and `images("data/circles-xy.npz", range(16))` returns images from it, (16, 64, 64, 3) uint8.
"""

import argparse
import fcntl
import os
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

FRAME = 64  # images are FRAME x FRAME pixels (A.3)
SCALE = 5  # "rendered with an anti-aliasing factor of 5" (A.3)
BINS = 32  # classes per factor in `Circles.draw`: the factors are continuous, metrics want classes
VERSION = 1  # raise it when the same (name, num, seed) would give another file

# Table 3. A pair is a range, drawn uniformly: a generative factor. A number is fixed.
TABLE_3 = {
    "circles-xy": dict(x=(0.2, 0.8), y=(0.2, 0.8), size=0.2, red=1.0, green=1.0, blue=1.0),
    "circles-xh": dict(x=(0.2, 0.8), y=0.5, size=0.3, hue=(0.2, 0.8), saturation=1.0, value=1.0),
    "circles-rg": dict(x=0.5, y=0.5, size=0.5, red=(0.4, 0.8), green=(0.4, 0.8), blue=1.0),
    "circles-xyh-small": dict(
        x=(0.2, 0.8), y=(0.2, 0.8), size=0.1, hue=(0.2, 0.8), saturation=1.0, value=1.0
    ),
    "circles-xyh-tiny": dict(
        x=(0.2, 0.8), y=(0.2, 0.8), size=0.075, hue=(0.2, 0.8), saturation=1.0, value=1.0
    ),
}

# What is held out (A.3): half of the range of each of two factors, so a quarter of the data; here
# as shares of the range. The pairs are (x, y), (x, hue), (red, green): a set's first two factors.
# Our choices: the corner, which the paper doesn't name, is the one where both factors are large;
# and the x-y-h sets, which it has without holes, lack the same (x, y) at every hue.
HOLES = {"hole-center": (0.25, 0.75), "hole-corner": (0.5, 1.0)}


def split_name(name):
    """'circles-xh:blank' -> ('circles-xh', 'blank'). ValueError for a name that doesn't exist."""
    base, colon, variant = str(name).partition(":")
    if base not in TABLE_3 or (colon and variant not in (*HOLES, "blank")):
        raise ValueError(
            f"no circles data set {str(name)!r}: take one of {', '.join(TABLE_3)}, "
            f"and after it nothing or one of :{', :'.join(HOLES)}, :blank"
        )
    return base, variant


def factor_ranges(name):
    """{factor: (lowest, highest)} of a data set, in the order of its columns (Table 3)."""
    columns = TABLE_3[split_name(name)[0]]
    return {factor: entry for factor, entry in columns.items() if isinstance(entry, tuple)}


def hole_bounds(name):
    """((lowest, highest), (lowest, highest)): the first two factors in the hole. None without one.

    Rounded to float32, like the factors: comparing the two is exact.
    """
    base, variant = split_name(name)
    if variant not in HOLES:
        return None
    (low_a, high_a), (low_b, high_b) = list(factor_ranges(base).values())[:2]
    return tuple(
        tuple(float(np.float32(low + (high - low) * share)) for share in HOLES[variant])
        for low, high in ((low_a, high_a), (low_b, high_b))
    )


# --- Drawing -------------------------------------------------------------------------------------


def radius_of(name):
    """Radius of a set's circles in fifths of a pixel: 32, 48, 80, 16, 12 in Table 3's order."""
    return round(TABLE_3[split_name(name)[0]]["size"] * FRAME * SCALE / 2)


def import_pygame():
    """The module, without its greeting. ImportError with the line that mends it."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyGame's, about setuptools
            import pygame
    except ImportError as error:
        raise ImportError(f"PyGame is needed here: pip install pygame ({error})") from error
    return pygame


def draw_disc(radius, center, side):
    """A circle drawn by PyGame, without a display, at (center, center): (side, side) uint8, 0 or 1.

    Both are whole numbers, as PyGame cuts fractions off. How its circles differ from ideal ones,
    measured on PyGame 2.6: not in position, for `center` is an edge between pixels and the circle
    exactly symmetric about it; a little in area, below pi r^2 by 1.3% for circles-xy, 0.7% xh,
    0.5% rg, 3.0% xyh-small and 2.7% xyh-tiny. The paper's circles came from PyGame: we keep that.
    """
    pygame = import_pygame()
    surface = pygame.Surface((side, side), depth=32)
    surface.fill((0, 0, 0))
    pygame.draw.circle(surface, (255, 255, 255), (center, center), radius)
    return (pygame.surfarray.array2d(surface).T & 1).astype(np.uint8)  # PyGame's arrays are (x, y)


def draw_coverage(name):
    """(D, D) uint8, 0..25, D = 2 radius + 6: what a pixel sees of the circle, wherever it stands.

    Entry [j, i] is the sum over the pixel's 5x5 sub-pixels when the first of them lies j - D/2 - 2
    below the circle's centre and i - D/2 - 2 to the right of it. The outermost entries are zero,
    and stand for all pixels farther away.
    """
    radius = radius_of(name)
    disc = draw_disc(radius, center=radius + SCALE, side=2 * (radius + SCALE))
    blocks = np.lib.stride_tricks.sliding_window_view(disc, (SCALE, SCALE))
    return blocks.sum(axis=(2, 3)).astype(np.uint8)


def place(name, values):
    """Factors (N, F) float32 -> centers (N, 2) int16 in fifths of a pixel, colors (N, 3) uint8."""
    names = list(factor_ranges(name))
    column = {
        key: values[:, names.index(key)] if key in names else torch.full_like(values[:, 0], entry)
        for key, entry in TABLE_3[split_name(name)[0]].items()
    }
    # To the nearest fifth of a pixel. The paper is silent; PyGame itself would cut the fraction
    # off, and so move circles up and to the left by 0.1 pixels on average.
    centers = torch.stack([column["x"], column["y"]], 1).mul(FRAME * SCALE).add(0.5).floor()
    if "hue" in column:  # HSV to RGB: three trapezoids over the hue, a third of a turn apart
        pure = [((column["hue"] * 6 + k) % 6 - 3).abs().sub(1).clamp(0, 1) for k in (0, 4, 2)]
        rgb = [column["value"] * (1 - column["saturation"] * (1 - channel)) for channel in pure]
    else:
        rgb = [column["red"], column["green"], column["blue"]]
    colors = torch.stack(rgb, 1).mul(255).round()  # PyGame's colours are bytes
    return centers.to(torch.int16), colors.to(torch.uint8)


def expand(coverage, centers, colors):
    """(D, D) float, (N, 2), (N, 3) -> images (N, 3, FRAME, FRAME) float32 in [0, 1], same device.

    Rounded to bytes as in `images`, then divided by 255. Nothing here waits for the device.
    """
    half = coverage.shape[0] // 2
    pixels = torch.arange(FRAME, device=coverage.device) * SCALE + half + 2
    at = (pixels - centers.unsqueeze(2)).clamp(0, 2 * half - 1)  # (N, 2, FRAME)
    share = coverage[at[:, 1, :, None], at[:, 0, None, :]]  # (N, FRAME, FRAME) in 0..25
    images = share.unsqueeze(1) * colors[:, :, None, None]
    return images.div_(SCALE * SCALE).round_().div_(255)


# --- The file ------------------------------------------------------------------------------------


def draw_rows(name, start, stop, seed=0):
    """Rows start..stop-1 of a data set: dict of `factors`, `blank`, `centers`, `colors` (numpy).

    Row i depends on (name, seed, i) alone. Philox is counter-based: counter i gives the four
    random words of row i, whatever came before. The first ones are the factors'; the fourth decides
    whether the image is blank, or on which side of the hole it lies. All sets share the words of a
    seed: a `:blank` set is the plain one with images left out.
    """
    base, variant = split_name(name)
    words = np.random.Philox(key=seed, counter=start).random_raw(4 * (stop - start)).reshape(-1, 4)
    uniform = (words >> np.uint64(11)) * 2.0**-53  # (rows, 4) float64 in [0, 1)
    ranges = list(factor_ranges(base).values())
    shares = uniform[:, : len(ranges)].copy()  # of each factor's range
    if variant in HOLES:
        # Uniform outside the hole, without rejection: in a 4x4 grid over the two factors each hole
        # is four cells; choose one of the other twelve, then a place in it.
        low, high = HOLES[variant]
        inside = [low <= a / 4 < high for a in range(4)]
        cells = [(a, b) for a in range(4) for b in range(4) if not (inside[a] and inside[b])]
        cell = np.array(cells)[(uniform[:, 3] * len(cells)).astype(int)]
        shares[:, :2] = (cell + shares[:, :2]) / 4
    factors = np.stack(
        [low + (high - low) * shares[:, f] for f, (low, high) in enumerate(ranges)], 1
    ).astype(np.float32)
    centers, colors = (t.numpy() for t in place(base, torch.from_numpy(factors)))
    blank = (uniform[:, 3] < 0.5) if variant == "blank" else np.zeros(len(factors), bool)
    colors[blank] = 0
    return dict(factors=factors, blank=blank, centers=centers, colors=colors)


def file_path(name, out="data"):
    """data/circles-xy-hole-center.npz for circles-xy:hole-center (no colons in file names)."""
    split_name(name)
    return Path(out) / (str(name).replace(":", "-") + ".npz")


def read(path):
    """A circles file as a dict: arrays, name, num, seed. ValueError if it is damaged or no such."""
    names, found, expected, arrays = (), {}, None, {}
    if Path(path).exists() and not Path(path).is_file():  # to open a pipe could take for ever
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as npz:
                name, num, seed, version = (
                    read_scalar(npz, key) for key in ("name", "num", "seed", "version")
                )
                if version == VERSION:
                    names = tuple(factor_ranges(name))
                    expected = layout(name, num)
                    found = {key: read_header(npz, key) for key in expected}
                if found == expected:  # only now are they inflated: their sizes are as they should
                    arrays = {key: npz[key] for key in expected}
        except Exception as error:  # a damaged zip raises about ten different things
            raise ValueError(
                f"{path} is damaged or not written by gen_circles.py ({type(error).__name__})"
            ) from error
    if version != VERSION:
        raise ValueError(f"{path} is of version {version} of gen_circles.py, this is {VERSION}")
    if not arrays or tuple(arrays["factor_names"]) != names:
        raise ValueError(f"{path} is damaged: its arrays don't fit each other")
    if arrays["coverage"].max() > SCALE * SCALE:
        raise ValueError(f"{path} is damaged: its coverage goes beyond {SCALE * SCALE}")
    return dict(arrays, name=name, num=num, seed=seed)


def layout(name, num):
    """{key: (dtype, shape)} of the arrays of a file."""
    side, names = 2 * radius_of(name) + 6, np.array(list(factor_ranges(name)))
    return dict(
        coverage=(np.dtype(np.uint8), (side, side)), centers=(np.dtype(np.int16), (num, 2)),
        colors=(np.dtype(np.uint8), (num, 3)), factors=(np.dtype(np.float32), (num, len(names))),
        factor_names=(names.dtype, names.shape), blank=(np.dtype(np.bool_), (num,)),
    )  # fmt: skip


def read_header(npz, key):
    """(dtype, shape) of an array of an open .npz, without its values."""
    with npz.zip.open(f"{key}.npy") as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{key} has an unknown header")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    return dtype, shape


def read_scalar(npz, key):
    dtype, shape = read_header(npz, key)
    if shape != () or dtype.itemsize > 1000:
        raise ValueError(f"{key} is not one value")
    return npz[key].item()


def look(path, name, num, seed):
    """(arrays, None) when the file holds this data set, otherwise (None, why it doesn't)."""
    if not Path(path).exists():
        return None, f"{path} does not exist yet"
    try:
        found = read(path)
    except ValueError as error:
        return None, str(error)
    if (found["name"], found["num"], found["seed"]) == (name, num, seed):
        return found, None
    return None, f"{path} holds {found['name']} with num {found['num']}, seed {found['seed']}"


def generate(name, num=500_000, seed=0, out="data", progress=True):
    """Writes a data set to a file in the folder `out` and returns its path.

    A file that is there and right (name, num, seed, version) is reused; any other is replaced. It
    appears under its name only when it is complete. `num` is the number of images (A.3: 500,000);
    `progress` says on stderr why it is drawn, with a bar. Raises ValueError for a bad name, num or
    seed, ImportError without PyGame, OSError when the file can't be written.
    """
    return obtain(name, num, seed, out, progress)[0]


def obtain(name, num, seed, out, progress=True):
    """As `generate`, which see -> (path, the arrays in the file as `read` gives them)."""
    path, name = file_path(name, out), str(name)
    if not (isinstance(num, (int, np.integer)) and 1 <= num <= 10**8):
        raise ValueError(f"num must be a whole number from 1 to 100,000,000, not {num!r}")
    if not (isinstance(seed, (int, np.integer)) and 0 <= seed < 2**63):
        raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}")
    arrays, reason = look(path, name, num, seed)
    if arrays is not None:
        return path, arrays
    if progress:
        print(f"{reason}: drawing it", file=sys.stderr)
    coverage, parts = draw_coverage(name), []
    with progress_bar(total=num, desc=f"drawing {name}", unit=" images", disable=not progress) as bar:
        for start in range(0, num, 50_000):
            stop = min(start + 50_000, num)
            parts.append(draw_rows(name, start, stop, seed))
            bar.update(stop - start)
    rows = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    arrays = dict(
        coverage=coverage, **rows, factor_names=np.array(list(factor_ranges(name))),
        name=name, num=int(num), seed=int(seed),
    )  # fmt: skip

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:  # 16-20 bytes an image: not worth compressing
        np.savez(file, **arrays, version=VERSION)
    return path, arrays


def progress_bar(**options):
    """tqdm's, or one that shows nothing where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext(SimpleNamespace(update=lambda n: None))
    return tqdm(**options)


@contextmanager
def atomic(path):
    """A file to write to, which takes the name `path` when all went well and else vanishes.

    Meanwhile it is `.{name}.tmp`. What a killed process leaves there the next one overwrites; a
    process that finds another one at work there waits for it, then writes its own.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    safely = os.O_NOFOLLOW | os.O_NONBLOCK  # links lead anywhere, pipes wait for ever
    keep = lambda name, flags: os.open(name, flags & ~os.O_TRUNC | safely, 0o666)  # another one's
    while True:
        with open(temporary, "wb", opener=keep) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed, or we die
            try:
                ours = os.path.samestat(os.fstat(file.fileno()), os.stat(temporary))
            except FileNotFoundError:
                ours = False
            if not ours:  # while we waited its writer gave it the final name, or removed it
                continue
            try:
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(file.fileno())  # a power cut must not leave the name without the content
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            return


def images(path, indices=slice(None)):
    """Images of a file -> (n, FRAME, FRAME, 3) uint8. `indices`: list, slice, ...; all take 6 GB.

    To use the files elsewhere copy what follows; it needs numpy alone. A pixel is colour x coverage
    / 25, rounded to the nearest byte. ValueError when it is no circles file.
    """
    arrays = read(path)
    coverage, centers, colors = arrays["coverage"], arrays["centers"], arrays["colors"]
    rows = np.atleast_1d(np.arange(len(centers))[indices])
    half = len(coverage) // 2
    # Along x and along y: the place of each pixel in `coverage`, 5 (its index) - centre + half + 2.
    at = SCALE * np.arange(FRAME) - centers[rows, :, None] + half + 2  # (n, 2, FRAME)
    at = at.clip(0, 2 * half - 1)
    share = coverage[at[:, 1, :, None], at[:, 0, None, :]].astype(np.uint16)  # (n, FRAME, FRAME)
    return ((share[..., None] * colors[rows, None, None] + 12) // 25).astype(np.uint8)


# --- The data set --------------------------------------------------------------------------------


class Circles:
    """A circles data set on a device, from the arrays of `read`: `sample` trains, `draw` evaluates.

    name, size (number of images), channels, height, width;
    factor_names (F,), factor_ranges (F,) of (lowest, highest), factor_sizes (F,) of BINS;
    hole        bounds of the first two factors in the held-out quarter, or None
    blank       the black image (3, FRAME, FRAME) of a `:blank` set, or None
    device      where `sample` and `draw` put what they return; on_device: the data lies there too
    """

    channels, height, width = 3, FRAME, FRAME
    on_device = True

    def __init__(self, arrays, device="cpu"):
        self.name, self.size = arrays["name"], arrays["num"]
        ranges = factor_ranges(self.name)
        self.factor_names = tuple(ranges)
        self.factor_ranges = tuple(ranges.values())
        self.factor_sizes = (BINS,) * len(ranges)
        self.hole = hole_bounds(self.name)
        self.device = torch.device(device)
        # 7 bytes an image and one small table: the whole set lives on the device.
        self.coverage = torch.from_numpy(arrays["coverage"]).to(self.device, torch.float32)
        self.centers = torch.from_numpy(arrays["centers"]).to(self.device)
        self.colors = torch.from_numpy(arrays["colors"]).to(self.device)
        self.lowest, self.highest = torch.tensor(
            self.factor_ranges, dtype=torch.float32, device=self.device
        ).T
        black = torch.zeros(self.channels, self.height, self.width, device=self.device)
        self.blank = black if self.name.endswith(":blank") else None

    def __len__(self):
        return self.size

    def sample(self, n, generator):
        """n images of the set, with replacement -> (n, 3, FRAME, FRAME) float32 in [0, 1].

        All randomness comes from `generator`, on this device; nothing waits for the device.
        """
        index = torch.randint(self.size, (n,), generator=generator, device=self.device)
        return expand(self.coverage, self.centers[index], self.colors[index])

    def values(self, classes):
        """Classes (N, F) integer -> factors (N, F) float32: the centres of BINS bins a range."""
        self._check(classes, "classes", not (classes.is_floating_point() or classes.is_complex()))
        if classes.device.type == "cpu" and ((classes < 0) | (classes >= BINS)).any():
            raise ValueError(f"classes must be in 0..{BINS - 1}")
        return self.lowest + (classes.to(self.device) + 0.5) * ((self.highest - self.lowest) / BINS)

    def draw_values(self, values):
        """Factors (N, F) float in Table 3's units -> (N, 3, FRAME, FRAME) float32 in [0, 1].

        All of [0, 1] can be drawn, the hole and what lies beyond Table 3's ranges included. The
        rows of a file's `factors` give that file's images (but for the blank ones).
        """
        self._check(values, "values", values.is_floating_point())
        if values.device.type == "cpu" and not ((values >= 0) & (values <= 1)).all():
            raise ValueError("values must be in [0, 1]: positions, hues and colours are shares")
        return expand(self.coverage, *place(self.name, values.to(self.device, torch.float32)))

    def draw(self, classes):
        """Classes (N, F) integer in 0..BINS-1 -> (N, 3, FRAME, FRAME) float32 in [0, 1]."""
        return self.draw_values(self.values(classes))

    def in_hole(self, values):
        """Factors (N, F) float -> (N,) bool: in the held-out quarter.

        An edge shared with the rest is not part of it, an edge at the end of a range is.
        """
        self._check(values, "values", values.is_floating_point())
        values = values.to(torch.float32)
        inside = torch.full_like(values[:, 0], self.hole is not None, dtype=torch.bool)
        for f, (low, high) in enumerate(self.hole or ()):
            ends_here = high == np.float32(self.factor_ranges[f][1])
            inside &= values[:, f] > low
            inside &= values[:, f] <= high if ends_here else values[:, f] < high
        return inside

    def held_out(self, classes):
        """Classes (N, F) integer -> (N,) bool: held out of training (a quarter of all classes)."""
        return self.in_hole(self.values(classes))

    def _check(self, tensor, what, right_type):
        """ValueError unless the tensor is of the right type and has a column for each factor."""
        columns = len(self.factor_names)
        if not right_type or tensor.ndim != 2 or tensor.shape[1] != columns:
            raise ValueError(
                f"{what} of {self.name} must be {'integers' if what == 'classes' else 'floats'} of "
                f"shape (N, {columns}) for {', '.join(self.factor_names)}; "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )


def load(name, device="cpu", data_dir="data", num=500_000, seed=0):
    """A data set as `Circles` on a device. Its file is drawn first where `generate` would do so."""
    return Circles(obtain(name, num, seed, data_dir)[1], device)


# --- Command line --------------------------------------------------------------------------------


def preview(path):
    """Writes a picture of a file beside it, as in the figures of Appendix H, and returns its path.

    Left: the first two factors of 2,000 images in the colours of the circles, the hole dashed.
    Right: the first 16 images.
    """
    from matplotlib.figure import Figure  # not pyplot: opens no window
    from matplotlib.patches import Rectangle

    arrays = read(path)
    name, names = arrays["name"], arrays["factor_names"]
    shown = np.flatnonzero(~arrays["blank"][:2000])  # a blank image has no factors
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    figure.suptitle(f"{name}   {arrays['num']:,} images, seed {arrays['seed']}")
    left, right = figure.subfigures(1, 2)

    axes = left.subplots()
    first, second = arrays["factors"][shown, :2].T
    axes.scatter(first, second, s=5, c=arrays["colors"][shown] / 255, linewidths=0)
    if hole_bounds(name):
        (x0, x1), (y0, y1) = hole_bounds(name)
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", ls="--"))
    axes.set(xlabel=names[0], ylabel=names[1], facecolor="black", box_aspect=1)
    if names[1] == "y":
        axes.invert_yaxis()  # downwards, as in the images

    for axes, image in zip(right.subplots(4, 4).flat, images(path, slice(16)), strict=False):
        axes.imshow(image)
    for axes in right.axes:
        axes.set_axis_off()
    picture = Path(path).with_suffix(".png")
    with atomic(picture) as file:
        figure.savefig(file, format="png", dpi=120)
    return picture


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line like every other error, without the usage
        self.exit(2, f"error: {' '.join(message.split())}\n")


def main(argv=None):
    variants = ", ".join(f":{variant}" for variant in (*HOLES, "blank"))
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help=f"{', '.join(TABLE_3)}; after it nothing or one of {variants}")
    parser.add_argument("--num", type=int, default=500_000, help="number of images (500000, A.3)")
    parser.add_argument("--seed", type=int, default=0, help="0 or more (0)")
    parser.add_argument("--out", default="data", help="folder to write to (data)")
    parser.add_argument("--preview", action="store_true", help="also a picture of the data set")
    # Output goes on where a stream is closed, and where a folder's name is no text.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        path = generate(args.name, args.num, args.seed, args.out)
        seconds, size = time.perf_counter() - start, path.stat().st_size / 1e6
        print(f"{path}: {args.num:,} images, {size:.1f} MB, {seconds:.1f} s")
        if args.preview:
            print(preview(path))
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print("error:", *str(error).split(), file=sys.stderr)  # a name may have a line break
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
