"""Spatial Broadcast VAE in one file: models, losses, data and training loop of Watters et al. (2019),
"Spatial Broadcast Decoder: A Simple Architecture for Learning Disentangled Representations in VAEs".

    python sbvae.py --dataset sprites --decoder broadcast            # the paper's main model
    python sbvae.py --dataset sprites --decoder deconv               # its baseline
    python sbvae.py --dataset sprites --model factorvae              # appendix C
    python sbvae.py --dataset sprites --steps 20000                  # a first look, on a laptop
    python sbvae.py --resume runs/sprites-broadcast-steps20000       # carry on where it stopped
    torchrun --nproc-per-node 2 sbvae.py --seeds 0-24                # all seeds of a table, two at a time

Needs torch and numpy; matplotlib draws the pictures and tqdm the bar if they are there. Sprites are drawn
on the fly, as dSprites has them: no download. The file works when copied alone; `kernels/` makes it faster,
`gen_circles.py` and `datasets.py` bring the other data sets.

B batch, C image channels, H height, W width, K latents, N images, F factors. (A.3), (Table 1) and so on cite
the paper; "(ours 3)" marks a choice that it leaves open, by its number in the README.

MIT License, Copyright (c) 2026 The sbvae authors.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import gc
import json
import math
import os
import platform
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before torch is loaded, which reads the variable
    # A thread that waits for the others spins for a ms or so, then sleeps. To sleep at once costs a run up to a quarter
    # of its speed; to spin longer, as is usual, slows two on the same cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C while torch is loaded: no traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `prepare_process`

import torch
import torch.nn.functional as F
from torch import nn

try:  # broadcast and first convolution in one pass, the others in fewer multiplications; both are written out below
    from kernels import broadcast_conv2d, same_conv2d
except ImportError:
    broadcast_conv2d = same_conv2d = None
try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class InputError(ValueError):
    """What was asked for cannot be done. The message is one line: what is wrong and what to do."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # a file's name may have a line break


# ---------------------------------------------------------------------------------------------- configuration


def option(kind, help, choices=None, least=None):
    return dataclasses.field(default=None, metadata=dict(kind=kind, help=help, choices=choices, least=least))


@dataclasses.dataclass
class Config:
    """The command line's flags. None stands for the default, which `resolve` fills in."""

    dataset: str = option(str, "sprites (default), objects, chairs, circles-{xy,xh,rg,xyh-small,xyh-tiny}"
                               "[:hole-center|:hole-corner|:blank], or the path of a file (A.3)")
    decoder: str = option(str, "default broadcast; deconv is the baseline (Table 1), coordconv the same with "
                               "coordinates at every layer (E)", ("broadcast", "deconv", "coordconv"))
    model: str = option(str, "default vae (A.1); factorvae (A.2, Table 2)", ("vae", "factorvae"))
    likelihood: str = option(str, "default bernoulli; gaussian has variance 0.3 (A)", ("bernoulli", "gaussian"))
    beta: float = option(float, "weight of the KL; default 1 (A.1; Fig. 3 sweeps 0.4 to 5.4)", least=0)
    gamma: float = option(float, "factorvae: weight of the total correlation; default 35 (A.2)", least=0)
    latents: int = option(int, "default 10 (Table 1)", least=1)
    conv_layers: int = option(int, "decoder's convolutions; default broadcast 3, on objects 6; deconv and coordconv 5 "
                                   "(Tables 1, 5, 6)", least=1)
    mlp_layers: int = option(int, "linear layers before the tile, default 0 (Tables 7, 9), or before the reshape of "
                                  "deconv and coordconv, default 1 (Table 8)", least=0)
    upscales: int = option(int, "broadcast: convolutions, from the tile on, that become stride-2 deconvolutions; "
                                "default 0 (Table 10)", least=0)
    shuffle_coords: bool = option(bool, "broadcast: permute the coordinate pairs once (B)")
    steps: int = option(int, "default sprites 1.5M, factorvae 1M; chairs 700k; objects 2.5M; circles, other files 500k "
                             "(Table 4)", least=1)
    batch_size: int = option(int, "default 16 (A.1), factorvae 32 (A.2)", least=1)
    lr: float = option(float, "Adam's learning rate; default 3e-4 (A.1), factorvae 1e-4 (A.2)", least=0)
    seed: int = option(int, "of weights, data and noise; default 0", least=0)
    device: str = option(str, "cpu or cuda[:N]; default a GPU if there is one")
    precision: str = option(str, "of the convolutions; default bf16 where the device has units for it, else fp32",
                            ("fp32", "tf32", "bf16"))
    kernel: str = option(str, "of the first layer after the tile; default auto", ("auto", "triton", "torch"))
    cuda_graph: bool = option(bool, "on a GPU: replay each step as one captured graph, not kernel by kernel")
    compile: bool = option(bool, "fuse a step's small kernels with torch.compile, before step 1; does not pay on a "
                                 "CPU")
    deterministic: bool = option(bool, "the same bits from the same seed on a GPU too, slower; a CPU always gives them")
    out: str = option(str, "default runs/<data>-<decoder>-<whatever else was set>")
    resume: str = option(str, "carry on the run in this folder, on a CPU exactly")
    log_every: int = option(int, "steps between log lines; default 200", least=1)
    save_every: int = option(int, "steps between checkpoints with pictures; default 5000, on a GPU 50000", least=1)
    image_shape: list = None  # [C, H, W] of the data set; not a flag


GROUPS = {"dataset": "model and data", "latents": "architecture", "steps": "training", "device": "machine",
          "out": "run folder"}  # headings of --help, by their first flag
FREE_ON_RESUME = ("resume", "steps", "log_every", "save_every")  # the others would change the numbers


def flag(name):
    return "--" + name.replace("_", "-")


def family(dataset: str | None) -> str:
    """Which of the paper's data sets a name, or an official file, stands for: defaults depend on it."""
    name = dataset or "sprites"
    if name in ("sprites", "objects", "chairs") or (name.startswith("circles-") and not name.endswith(".npz")):
        return name.split("-")[0]
    official = {"dsprites": "sprites", "3dshapes": "objects", "rendered_chairs": "chairs"}
    return next((f for start, f in official.items() if Path(name).name.startswith(start)), "other")


def check_types(config: Config) -> Config:
    """A copy with paths as text. Raises InputError for values that are not of their flag's type."""
    c = dataclasses.replace(config)
    for f in dataclasses.fields(c):
        value, kind = getattr(c, f.name), f.metadata.get("kind")
        if isinstance(value, os.PathLike):
            setattr(c, f.name, value := os.fspath(value))
        if value is not None and kind and type(value) is not kind and (kind, type(value)) != (float, int):
            raise InputError(f"{flag(f.name)} must be a {kind.__name__}, not {value!r}")
        if kind is str and "\0" in (value or ""):
            raise InputError(f"{flag(f.name)} {value!r} has a zero byte, which no name can have")
    if (shape := c.image_shape) is not None:
        valid = isinstance(shape, (list, tuple)) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
        if not valid or math.prod(shape) > 10**8:
            raise InputError(f"image_shape must be [channels, height, width], 10^8 numbers at most, not {shape!r}")
        c.image_shape = list(shape)  # as JSON has it
    return c


def resolve(config: Config) -> Config:
    """A copy with a default for every None, the paper's where it has one (Tables 1 to 4); precision and image_shape
    wait for device and data. Raises InputError for values and combinations that make no sense."""
    c = check_types(config)
    data, factor, broadcast = family(c.dataset), c.model == "factorvae", c.decoder in (None, "broadcast")
    cuda = torch.cuda.is_available() if c.device is None else c.device.startswith("cuda")
    # Table 4 has no FactorVAE on chairs and objects: as many steps as the VAE there (ours 12).
    steps = {"sprites": 1_000_000 if factor else 1_500_000, "chairs": 700_000, "objects": 2_500_000}
    defaults = dict(
        dataset="sprites", decoder="broadcast", model="vae", likelihood="bernoulli", beta=1.0,
        gamma=35.0 if factor else 0.0, latents=10, mlp_layers=0 if broadcast else 1, upscales=0,
        conv_layers=(6 if data == "objects" else 3) if broadcast else 5, shuffle_coords=False,
        steps=steps.get(data, 500_000), batch_size=32 if factor else 16, lr=1e-4 if factor else 3e-4, seed=0,
        device="cuda" if cuda else "cpu", kernel="auto", cuda_graph=False, compile=False,
        deterministic=False, out=default_out(c), log_every=200,
        save_every=50_000 if cuda else 5_000)
    for f in dataclasses.fields(c):
        if getattr(c, f.name) is None:
            setattr(c, f.name, defaults.get(f.name))
        value, meta = getattr(c, f.name), f.metadata
        if value is None or not meta:
            continue
        if meta["choices"] and value not in meta["choices"]:
            raise InputError(f"{flag(f.name)} {value!r} is unknown; choose from {', '.join(meta['choices'])}")
        if meta["least"] is not None and not meta["least"] <= value < 2**63 - 1:  # NaN fails too
            raise InputError(f"{flag(f.name)} must be finite and at least {meta['least']}, not {value!r}")
    for wrong, message in [
        (c.lr == 0, "--lr must be above 0"),
        (max(c.conv_layers, c.mlp_layers) > 64, "--conv-layers and --mlp-layers go up to 64"),
        (c.steps > 10**12, "--steps goes up to 10^12"),
        (max(c.latents, c.batch_size) > 10**6, "--latents and --batch-size go up to 1,000,000"),
        (c.gamma and not factor, "--gamma weighs FactorVAE's penalty; add --model factorvae"),
        (factor and c.batch_size < 2, "--model factorvae permutes over the batch; --batch-size must be at least 2"),
        (c.shuffle_coords and not broadcast, f"--shuffle-coords needs --decoder broadcast, not {c.decoder}"),
        (c.upscales and not broadcast, f"--upscales needs --decoder broadcast; {c.decoder} always upscales"),
        (c.upscales > c.conv_layers, f"--upscales {c.upscales} is more than --conv-layers {c.conv_layers}"),
        (not (broadcast or c.mlp_layers), f"--mlp-layers must be at least 1: {c.decoder} needs one to fill its map"),
        (c.kernel != "auto" and (not broadcast or c.upscales),
         f"--kernel {c.kernel} is for the convolution after the tile, and this model has none; drop it"),
        (c.compile and c.deterministic, "--compile chooses kernels by timing them; drop it, or --deterministic"),
    ]:
        if wrong:
            raise InputError(message)
    return c


def default_out(config: Config) -> str:
    """runs/<data>-<decoder>, then whatever else was set but for device, folder, and what only logs and saves."""
    parts = [Path(config.dataset or "sprites").stem.replace(":", "-"), config.decoder or "broadcast"]
    silent = ("dataset", "decoder", "device", "out", "resume", "log_every", "save_every", "image_shape")
    for name, value in vars(config).items():
        if name not in silent and value is not None and value is not False:
            parts.append(value if name == "model" else name.replace("_", "") + str(value))
    return "runs/" + "-".join(parts)


# ------------------------------------------------------------------------------------------------------- data

SPRITE_SIZES = (3, 6, 40, 32, 32)  # shape (square, ellipse, heart), scale, orientation, x, y


@functools.cache
def sprite_edges(device: torch.device) -> torch.Tensor:
    """The edges of dSprites' 3 x 6 x 40 outlines around 0: (3, 6, 40, 150, 5) float64 x0, y0, x1, y1, row.

    In pixels, y down. An entry stands for one scanline that an edge may meet, `row` counting them from the
    edge's top: edges of the ellipse (a 100-gon) and the heart (a 150-gon) are shorter than a pixel and meet
    one at most; the four of the square meet up to 20, so each has 20 entries.
    """
    f64 = dict(dtype=torch.float64)
    square = 9.6 * torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], **f64)
    t = torch.arange(100, **f64) * (2 * math.pi / 100)
    ellipse = torch.stack([9.6 * 1.33 * t.cos(), 9.6 / 1.33 * t.sin()], -1)
    t = torch.arange(150, **f64) * (2 * math.pi / 150)
    lobes = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
    heart = torch.stack([9.6 * t.sin() ** 3, -(19.2 / 29 * lobes + 1.44)], -1)
    angle = torch.arange(40, **f64) * (2 * math.pi / 39)  # orientation 39 repeats orientation 0
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1).view(40, 2, 2)
    scale = 0.5 + 0.1 * torch.arange(6, **f64)
    table = torch.zeros(3, 6, 40, 150, 5, **f64)  # edges of no extent meet no scanline
    for shape, (outline, rows) in enumerate([(square, 20), (ellipse, 1), (heart, 1)]):
        start = scale.view(6, 1, 1, 1) * (outline @ turn.mT)  # (6, 40, vertices, 2)
        edges = torch.cat([start, start.roll(-1, dims=2)], -1).repeat_interleave(rows, dim=2)
        row = torch.arange(rows, **f64).repeat(len(outline)).expand(6, 40, -1).unsqueeze(-1)
        table[shape, :, :, : edges.shape[2]] = torch.cat([edges, row], -1)
    return table.to(device)


def draw_sprites(factors: torch.Tensor, edges: torch.Tensor | None = None) -> torch.Tensor:
    """dSprites (Matthey et al. 2017), drawn: equal in every pixel to all published frames we compared.

    factors (N, 5) int: classes of shape, scale, orientation, x, y -> (N, 64, 64) bool, on their device and
    without host synchronisation. edges: `sprite_edges`, where they are at hand. Raises ValueError for a wrong
    shape or dtype and, on a CPU, class.
    """
    if factors.ndim != 2 or factors.shape[1] != 5:
        raise ValueError(f"factors must have shape (N, 5), not {tuple(factors.shape)}")
    check_classes(factors, SPRITE_SIZES)
    return words_to_pixels(sprite_words(factors, sprite_edges(factors.device) if edges is None else edges))


def sprite_words(factors, edges):
    """`draw_sprites` -> (N, 64) int64, the rows from top to bottom, each a word of 64 pixels.

    The outline's vertices are snapped to 1/256 pixel; a pixel is on when its centre lies inside. Walking
    round the outline, an edge that meets a scanline at column c adds 2**c going down and takes it away
    going up. What remains per row is 2**right - 2**left: in a 64-bit word, the bits left to right - 1.
    """
    shape, scale, orientation = factors[:, :3].long().unbind(1)
    edges = edges[shape, scale, orientation]  # (N, 150, 5)
    centre = 16 + 32 * factors[:, 3:].double() / 31
    x0, y0, x1, y1 = ((edges[..., :4] + centre.repeat(1, 2)[:, None]) * 256).round().unbind(-1)
    # Pixel centres lie at 256 i + 128. An edge meets scanlines with top < 256 row + 128 <= bottom: a centre
    # on a top edge is out, on a bottom edge in.
    row = ((torch.minimum(y0, y1) - 128) / 256).floor() + 1 + edges[..., 4]
    line = 256 * row + 128
    met = (line <= torch.maximum(y0, y1)) & (y0 != y1)
    crossing = x0 + (line - y0) * (x1 - x0) / torch.where(met, y1 - y0, 1)
    # The first pixel whose centre is at the crossing or right of it: on a left edge in, on a right edge out.
    column = torch.where(met, ((crossing - 128) / 256).ceil(), 0).long()
    ends = torch.where(met, (y1 - y0).sign().long() << column, 0)
    place = torch.where(met, row, 0).long() + 64 * torch.arange(len(factors), device=factors.device)[:, None]
    words = torch.zeros(64 * len(factors), dtype=torch.int64, device=factors.device)
    words.scatter_add_(0, place.flatten(), ends.flatten())
    return words.view(-1, 64)


def words_to_pixels(words):
    bits = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((words.view(torch.uint8)[..., None] >> bits) & 1).view(-1, 64, 64).bool()  # little-endian


@functools.cache
def sprite_table(device: torch.device) -> torch.Tensor:
    """`sprite_words` of all 737,280 sprites: (3, 6, 40, 32, 32, 64) int64, 377 MB."""
    factors = torch.cartesian_prod(*(torch.arange(n, device=device) for n in SPRITE_SIZES))
    table = torch.empty(len(factors), 64, dtype=torch.int64, device=device)
    for some, rows in zip(factors.split(1024), table.split(1024)):
        rows.copy_(sprite_words(some, sprite_edges(device)))
    return table.view(*SPRITE_SIZES, 64)


def look_up_sprites(factors, table):
    """`draw_sprites` of valid classes, from `sprite_table`: 5 kernels, not 53, and in a short step each counts."""
    return words_to_pixels(table[factors.long().unbind(1)])


def check_classes(factors, sizes):
    """ValueError unless factors (N, F) are integers and, asked on a CPU only as a GPU would have to wait, in range."""
    if factors.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"factors must be integers, not {factors.dtype}")
    if factors.device.type == "cpu" and ((factors < 0) | (factors >= torch.tensor(sizes))).any():
        raise ValueError(f"factors {factors.amin(0).tolist()} to {factors.amax(0).tolist()} exceed sizes {sizes}")


def hsv_to_rgb(hsv: torch.Tensor) -> torch.Tensor:
    """(..., 3) hue, saturation, value in [0, 1] -> (..., 3) red, green, blue in [0, 1]."""
    h, s, v = hsv.split(1, -1)
    k = (torch.arange(5, 0, -2, device=hsv.device) + 6 * h) % 6  # round the hue circle, a third on for each channel
    return v - v * s * torch.minimum(k, 4 - k).clamp(0, 1)  # a trapezoid


class Sprites:
    """Colored sprites (A.3): dSprites times a colour uniform in H [0, 1], S and V [0.3, 0.7], without end.

    masks: factors (N, 5) -> (N, 64, 64) bool, of an official file, in place of the drawing above. For the
    metrics, colour is cut into 10 bins each of H, S and V, and `draw` takes their centres (ours 9).
    """

    name, size, channels, height, width, on_device = "sprites", None, 3, 64, 64, True
    factor_names = ("shape", "scale", "orientation", "x", "y", "hue", "saturation", "value")
    factor_sizes = (*SPRITE_SIZES, 10, 10, 10)

    def __init__(self, device="cpu", masks=None):
        self.sizes = torch.tensor(SPRITE_SIZES, device=device)
        self.low, self.range = torch.tensor([[0.0, 0.3, 0.3], [1.0, 0.4, 0.4]], device=device)
        self.device = self.sizes.device
        # Tables are made here: copies from the host cannot be captured in a CUDA graph, nor compiled.
        if self.device.type == "cuda":
            self.masks = masks or functools.partial(look_up_sprites, table=sprite_table(self.device))
        else:
            self.masks = masks or functools.partial(draw_sprites, edges=sprite_edges(self.device))

    def paint(self, factors, color):  # (N, 5) int, (N, 3) in [0, 1] -> (N, 3, 64, 64) in [0, 1]
        rgb = hsv_to_rgb(self.low + self.range * color)
        return self.masks(factors)[:, None] * rgb[:, :, None, None]

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        u = torch.rand(n, 8, generator=generator, device=self.device)
        return self.paint((u[:, :5] * self.sizes).long(), u[:, 5:])

    def draw(self, factors: torch.Tensor) -> torch.Tensor:
        if factors.ndim != 2 or factors.shape[1] != 8:
            raise ValueError(f"factors must have shape (N, 8), not {tuple(factors.shape)}")
        check_classes(factors, self.factor_sizes)
        factors = factors.to(self.device)
        return self.paint(factors[:, :5], (factors[:, 5:] + 0.5) / 10)


def load_dataset(name_or_path, device="cpu", data_dir="data"):
    """The data set of that name or file (A.3). Raises InputError when it cannot be had.

    The object has `name`, `channels`, `height`, `width`, `size` (None: drawn without end) and `sample(n,
    generator)` -> (n, C, H, W) float32 in [0, 1] on the device, and where the ground truth is known (else None)
    `factor_names`, `factor_sizes` and `draw(factors)` -> (N, C, H, W) from integer classes (N, F).
    """
    name, device = str(name_or_path), find_device(device)
    if name == "sprites":
        return Sprites(device)
    try:
        if family(name) == "circles":
            from gen_circles import load as load_circles

            return load_circles(name, device, data_dir=data_dir)
        from datasets import Objects, find_chairs, load_file

        if name == "objects":
            return Objects(device)
        data = load_file(find_chairs(data_dir) if name == "chairs" else name, device, cache_dir=data_dir)
        dsprites = hasattr(data, "mask") and data.draw is not None and data.factor_sizes == SPRITE_SIZES
        return Sprites(device, data.mask) if dsprites else data  # the official file is coloured, too
    except (ValueError, OSError, ImportError) as e:
        alone = isinstance(e, ImportError) and not (Path(__file__).parent / "datasets.py").exists()
        needs = "needs gen_circles.py and datasets.py beside sbvae.py; sprites needs no other file" if alone else e
        raise InputError(" ".join(f"--dataset {name}: {needs}".split())) from e


# ----------------------------------------------------------------------------------------------------- models


def coordinate_grid(height: int, width: int, device=None) -> torch.Tensor:
    """(2, H, W): x, from -1 at the left to 1 at the right, then y, from -1 at the top to 1 at the bottom."""
    x = torch.linspace(-1, 1, width, device=device).expand(height, -1)
    y = torch.linspace(-1, 1, height, device=device)[:, None].expand(-1, width)
    return torch.stack([x, y])


def spatial_broadcast(z: torch.Tensor, height: int, width: int, coords=None) -> torch.Tensor:
    """Algorithm 1: tile the latents over the image and append the coordinate channels.

    z (B, K) -> (B, K + 2, H, W) in the order z, x, y. Algorithm 1 as printed builds y with the width; it must
    be the height (ours 1). coords (2, H, W) stands in for the linear grid (B).
    """
    coords = coordinate_grid(height, width, z.device) if coords is None else coords
    z_b = z[:, :, None, None].expand(-1, -1, height, width)  # (B, K, H, W)
    xy_b = coords.to(z).expand(len(z), -1, -1, -1)  # (B, 2, H, W)
    return torch.cat([z_b, xy_b], dim=1)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, which these networks were defined with: ceil(size /
    stride) outputs, and an odd row of zeros goes to the end: 1 before and 2 after for k=4, s=1 (ours 4)."""

    def forward(self, x):
        if same_conv2d is not None and self.stride == (1, 1):
            return same_conv2d(x, self.weight, self.bias)
        pads = []
        for n, k, s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):  # width, then height
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pads += [total // 2, total - total // 2]  # left, right, top, bottom
        if pads[0] == pads[1] and pads[2] == pads[3]:  # the convolution pads without a copy
            return F.conv2d(x, self.weight, self.bias, self.stride, (pads[2], pads[0]))
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


def deconv(c_in, c_out):
    """Transposed convolution k=4, s=2; cutting one row at each side is TensorFlow's "same": H -> 2 H."""
    return nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)


def mlp(*sizes):
    return nn.Sequential(*(m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())))


def float32(x):
    """Autocast off, for linear layers and what latents enter: near 2, bf16 has steps of 1/64, about as wide as the
    posterior of a position."""
    return torch.autocast(x.device.type, enabled=False)


class Encoder(nn.Module):
    """Tables 1 and 2: images (B, C, H, W) -> mu, logvar, each (B, K) float32. Convolutions k=4, s=2, FC 256, FC
    2 K. That the second half is the log-variance is our reading (ours 3)."""

    def __init__(self, channels, height, width, latents, widths=(64, 64, 64, 64)):
        super().__init__()
        self.shape = (channels, height, width)
        sizes, shrink = (channels, *widths), 2 ** len(widths)
        self.convs = nn.ModuleList(SameConv2d(a, b, 4, stride=2) for a, b in zip(sizes, sizes[1:]))
        self.mlp = mlp(widths[-1] * math.ceil(height / shrink) * math.ceil(width / shrink), 256)
        self.latents = nn.Linear(256, 2 * latents)

    def forward(self, h):
        if h.ndim != 4 or h.shape[1:] != self.shape:
            raise ValueError(f"images must be (B, {', '.join(map(str, self.shape))}), not {tuple(h.shape)}")
        for conv in self.convs:
            h = F.relu(conv(h))
        with float32(h):
            return self.latents(self.mlp(h.float().flatten(1))).chunk(2, dim=1)


class BroadcastDecoder(nn.Module):
    """The Spatial Broadcast decoder (Table 1): z (B, K) -> logits (B, C, H, W). Tile, append coordinates, then
    `conv_layers` convolutions k=4, s=1 with 64 channels, C in the last.

    mlp_layers: FC 256 before the tile (Tables 7, 9). upscales: how many convolutions, from the tile on, become
    stride-2 deconvolutions; the tile shrinks (Table 10). shuffle: one fixed permutation of the coordinate
    pairs, drawn from `generator` (B). kernel: the code for the first layer, auto, triton or torch.
    """

    def __init__(self, latents, channels, height, width, conv_layers=3, mlp_layers=0, upscales=0, shuffle=False,
                 kernel="auto", generator=None):
        super().__init__()
        self.mlp = mlp(latents, *[256] * mlp_layers)
        sizes = [(256 if mlp_layers else latents) + 2, *[64] * (conv_layers - 1), channels]
        self.convs = nn.ModuleList(deconv(a, b) if i < upscales else SameConv2d(a, b, 4)
                                   for i, (a, b) in enumerate(zip(sizes, sizes[1:])))
        coords = coordinate_grid(height >> upscales, width >> upscales)
        if shuffle:  # x and y of a pair stay together
            coords = coords.flatten(1)[:, torch.randperm(coords[0].numel(), generator=generator)].view_as(coords)
        self.register_buffer("coords", coords)  # in the checkpoint: a shuffled grid is part of the model
        self.kernel = kernel

    def forward(self, z):
        with float32(z):
            z = self.mlp(z)
        first, *rest = self.convs
        if broadcast_conv2d is not None and isinstance(first, SameConv2d):
            channels_last = first.weight.is_contiguous(memory_format=torch.channels_last)  # then h is, too
            h = broadcast_conv2d(z, self.coords, first.weight, first.bias, "same", "relu" if rest else None,
                                 self.kernel, out_format="channels_last" if channels_last else "contiguous")
        else:
            # Latents must not be rounded, for which a CPU's bf16 step takes 1.6 times as long; an MLP's features may
            with contextlib.nullcontext() if len(self.mlp) else float32(z):
                z = z.to(first.weight.dtype)
                h = first(spatial_broadcast(z, *self.coords.shape[1:], self.coords))
            h = F.relu(h) if rest else h
        return output_layers(rest, h)


class DeconvDecoder(nn.Module):
    """The baseline (Tables 1, 2): z (B, K) -> logits (B, C, H, W). FC, reshape, deconvolutions k=4, s=2.

    widths: channels into each deconvolution, so their number is the depth and the first map has H / 2**depth
    rows: 2 x 2 for 5, 1 x 1 for 6. The last linear layer fills that map (256 units for 2 x 2 x 64), those
    before it have 256 (ours 7). coords: CoordConv VAE (E), x and y appended before each deconvolution.
    """

    def __init__(self, latents, channels, height, width, mlp_layers=1, widths=(64,) * 5, coords=False):
        super().__init__()
        self.shape = (widths[0], height >> len(widths), width >> len(widths))
        self.mlp = mlp(latents, *[256] * (mlp_layers - 1), math.prod(self.shape))
        self.convs = nn.ModuleList(deconv(a + 2 * coords, b) for a, b in zip(widths, (*widths[1:], channels)))
        self.coords = coords

    def forward(self, z):
        with float32(z):
            h = self.mlp(z).view(-1, *self.shape)
        return output_layers(self.convs, h, append_coords if self.coords else None)


def append_coords(h):
    """(B, C, H, W) -> (B, C + 2, H, W)."""
    return torch.cat([h, coordinate_grid(*h.shape[2:], h.device).to(h).expand(len(h), -1, -1, -1)], dim=1)


def output_layers(convs, h, before=None):
    """Layers with a ReLU between them and none at the end."""
    for i, conv in enumerate(convs, 1):
        h = conv(before(h) if before else h)
        h = F.relu(h) if i < len(convs) else h
    return h


def reparameterize(mu, logvar, generator=None):
    """A sample of N(mu, exp(logvar)), differentiable in both."""
    return mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator, device=mu.device)


class Output(NamedTuple):
    logits: torch.Tensor  # (B, C, H, W); with the Gaussian likelihood the mean
    mu: torch.Tensor  # (B, K)
    logvar: torch.Tensor  # (B, K)
    z: torch.Tensor  # (B, K), a sample of the posterior


class VAE(nn.Module):
    """Encoder and decoder, with the configuration they were built from."""

    def __init__(self, config: Config, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder, decoder

    def encode(self, images):  # (B, C, H, W) in [0, 1] -> mu (B, K), logvar (B, K)
        return self.encoder(images)

    def decode(self, z):  # (B, K) -> logits (B, C, H, W) float32
        if z.ndim != 2 or z.shape[1] != self.config.latents:
            raise ValueError(f"z must be (B, {self.config.latents}), not {tuple(z.shape)}")
        return self.decoder(z).float()

    def forward(self, images, generator=None) -> Output:
        mu, logvar = self.encode(images)
        z = reparameterize(mu, logvar, generator)
        return Output(self.decode(z), mu, logvar, z)

    def pixels(self, logits):
        """The mean image, in [0, 1]."""
        return logits.sigmoid() if self.config.likelihood == "bernoulli" else logits.clamp(0, 1)


def init_weights(module: nn.Module, generator=None):
    """Truncated normal weights and zero biases (A). The paper gives no scale; Sonnet 1, probably its authors'
    library, had sigma = 1 / sqrt(fan in), cut at 2 sigma, fan in = kernel area x input channels, also for transposed
    convolutions (ours 2)."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            linear = isinstance(m, nn.Linear)
            std = (m.in_features if linear else m.in_channels * math.prod(m.kernel_size)) ** -0.5
            nn.init.trunc_normal_(m.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            nn.init.zeros_(m.bias)


def build_model(config: Config) -> VAE:
    """The VAE of a configuration, on the CPU, initialised from its seed. Raises InputError when the images do
    not go with the layers. Without `image_shape` they are 64 x 64, of one channel for chairs and else three."""
    c = resolve(config)
    channels, height, width = c.image_shape or (1 if family(c.dataset) == "chairs" else 3, 64, 64)
    doublings = c.upscales if c.decoder == "broadcast" else c.conv_layers
    if height % 2**doublings or width % 2**doublings:
        raise InputError(f"{doublings} upscaling layers make images whose sides are multiples of {2**doublings}, not "
                         f"{height} x {width}; lower {'--upscales' if c.upscales else '--conv-layers'}")
    # Table 1; for FactorVAE Table 2, whose encoder widens from the image to the latents, as Kim and Mnih's.
    down, up = ((32, 32, 64, 64), (64, 64, 64, 32, 32)) if c.model == "factorvae" else ((64,) * 4, (64,) * 5)
    up = (64,) * (c.conv_layers - 5) + up[max(5 - c.conv_layers, 0):]  # more or fewer next to the latents (ours 8)
    generator = torch.Generator().manual_seed(c.seed)
    encoder = Encoder(channels, height, width, c.latents, down)
    if c.decoder == "broadcast":
        decoder = BroadcastDecoder(c.latents, channels, height, width, c.conv_layers, c.mlp_layers, c.upscales,
                                   c.shuffle_coords, c.kernel, generator)
    else:
        decoder = DeconvDecoder(c.latents, channels, height, width, c.mlp_layers, up, c.decoder == "coordconv")
    model = VAE(c, encoder, decoder)
    init_weights(model, generator)
    return model


def build_discriminator(latents: int, seed: int = 0) -> nn.Module:
    """FactorVAE's judge of z (B, K) -> logits (B, 2): six layers of 1000 units, leaky ReLU 0.2, as Kim and Mnih's,
    to whom A.2 leaves it (ours 10)."""
    sizes = (latents, *[1000] * 6)
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
    discriminator = nn.Sequential(*layers, nn.Linear(1000, 2))
    init_weights(discriminator, torch.Generator().manual_seed(seed + 1))
    return discriminator


# ----------------------------------------------------------------------------------------------------- losses


def vae_loss(logits, images, mu, logvar, beta=1.0, likelihood="bernoulli"):
    """-> loss, NLL, KL: in nats, summed over pixels and channels or latents, averaged over the batch.

    NLL of a Bernoulli with these logits (pixels between 0 and 1 count as probabilities), or of a Gaussian with
    this mean and variance 0.3 (A says variance, so sigma is 0.548), its constant included (ours 6).
    KL(N(mu, sigma^2) || N(0, 1)) = sum(mu^2 + sigma^2 - 1 - log sigma^2) / 2. loss = NLL + beta KL; the
    paper's "ELBO" is the loss at beta = 1. Raises ValueError for another likelihood, integer images, an empty batch,
    shapes that disagree and, on a CPU, pixels outside [0, 1] with the Bernoulli.
    """
    if likelihood not in ("bernoulli", "gaussian") or not images.is_floating_point():
        raise ValueError(f"likelihood must be bernoulli or gaussian, not {likelihood!r}, and images floating point, "
                         f"not {images.dtype}")
    if logits.shape != images.shape or mu.shape != logvar.shape or mu.ndim != 2 or not len(mu) == len(images) > 0:
        raise ValueError(f"logits {tuple(logits.shape)} do not match images {tuple(images.shape)}, or mu "
                         f"{tuple(mu.shape)} logvar {tuple(logvar.shape)}, (B, K) with B > 0")
    if likelihood == "bernoulli":
        check_pixels(images)
        nll = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
    else:
        squares = F.mse_loss(logits, images, reduction="sum") / len(images)
        nll = 0.5 * (squares / 0.3 + images[0].numel() * math.log(2 * math.pi * 0.3))
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
    return nll + beta * kl, nll, kl


def check_pixels(images):
    """ValueError unless images lie in [0, 1], on a CPU: a GPU would have to wait. NaN passes, and shows later."""
    if images.device.type == "cpu" and ((images < 0) | (images > 1)).any():
        raise ValueError(f"images must lie in [0, 1], not {images.min():g} to {images.max():g}")


def permute_latents(z: torch.Tensor, generator=None) -> torch.Tensor:
    """Permute each latent over the batch by itself: (B, K) from the product of the marginals."""
    return z.gather(0, torch.rand(z.shape, generator=generator, device=z.device).argsort(dim=0))


def total_correlation(logits: torch.Tensor) -> torch.Tensor:
    """KL(q(z) || prod_k q(z_k)) by E log(D / (1 - D)), from the discriminator's logits (B, 2), class 0 being q(z)."""
    return (logits[:, 0] - logits[:, 1]).mean()


def discriminator_loss(joint: torch.Tensor, permuted: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of telling q(z), class 0, from permuted latents, class 1; logits (B, 2) each."""
    labels = torch.zeros(len(joint), dtype=torch.long, device=joint.device)
    return 0.5 * (F.cross_entropy(joint, labels) + F.cross_entropy(permuted, labels + 1))


# ------------------------------------------------------------------------------------------------- run folder


@contextlib.contextmanager
def atomically(path: Path):
    """Yield a temporary path in the same folder and rename it to `path` when all went well: a reader sees the
    old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed; or a link, which could lead to any file
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain_file(name, flags):
    """An `opener` for plain files only: a link could lead to any file, a pipe could wait for ever."""
    number = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a file", name)
    return number


def read_checkpoint(run: Path) -> tuple[Config, dict]:
    """Configuration and checkpoint of a run folder. Raises InputError when missing, damaged or mixed up."""
    try:
        for name in ("checkpoint.pt", "config.json"):
            if (run / name).exists() and not (run / name).is_file():  # to open a pipe could take for ever
                raise ValueError("not a file")
        if zipfile.ZipFile(run / "checkpoint.pt").testzip():  # torch itself does not look at the checksums
            raise ValueError("wrong checksum")
        checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        config = resolve(Config(**checkpoint["config"]))
        step, logged = checkpoint["step"], checkpoint["logged"]
        if not (type(step) is type(logged) is int and 0 <= logged <= step):
            raise ValueError("wrong step")
        sums = checkpoint["sums"]
        if (sums.shape, sums.dtype) != ((6 if config.model == "factorvae" else 4,), torch.float64):
            raise ValueError("wrong sums")
        told = json.loads((run / "config.json").read_text())["config"]
        free = (*FREE_ON_RESUME, "out")
        differ = [n for n, v in checkpoint["config"].items() if n not in free and told.get(n) != v]
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{run} holds no run ({e.filename} is missing); check the path, or train with --out") from e
    except Exception as e:  # torch.load raises whatever the damaged bytes lead it to
        raise InputError(f"{run} holds damaged files or those of another version ({type(e).__name__}); restore them, "
                         "or train anew with another --out") from e
    if differ:
        raise InputError(f"{run}: checkpoint.pt and config.json are not of one run, they differ in "
                         f"{', '.join(differ)}; restore them, or train anew with another --out")
    return config, checkpoint


def load(run_dir) -> VAE:
    """The trained model of a run folder, in eval mode on the CPU, with `.config`. Raises InputError."""
    config, checkpoint = read_checkpoint(Path(run_dir))
    model = build_model(dataclasses.replace(config, kernel="auto"))  # "auto" runs on any machine
    restore({"model": model}, checkpoint, run_dir)
    return model.eval()


def restore(parts: dict, checkpoint: dict, run_dir):
    """Put a checkpoint's states back into what they came from. Raises InputError when they do not fit."""
    try:
        for name, part in parts.items():
            if name.endswith("optimizer"):
                load_moments(part, checkpoint[name]["state"])
            elif name == "generator":
                part.set_state(checkpoint[name])
            else:
                part.load_state_dict(checkpoint[name])
    except Exception as e:  # they raise whatever the content leads them to
        raise InputError(f"{run_dir}/checkpoint.pt is damaged or of another version ({type(e).__name__} in {name}); "
                         "restore it, or train anew with another --out") from e


def load_moments(optimizer, state: dict):
    """Adam's moments from a checkpoint; its settings are the configuration's. Raises an exception unless they are of
    these weights: `load_state_dict` takes any shape and any strides, and the fused step would read and write past the
    ends."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if state and list(state) != list(range(len(weights))):  # empty before the first step
        raise ValueError("other weights")
    own = {}
    for i, (weight, moments) in enumerate(zip(weights, state.values())):
        like = dict(step=torch.zeros((), device=weight.device), exp_avg=weight, exp_avg_sq=weight)
        if {n: (v.shape, v.dtype) for n, v in moments.items()} != {n: (v.shape, v.dtype) for n, v in like.items()}:
            raise ValueError("other shapes")
        own[i] = {name: torch.empty_like(like[name]).copy_(value) for name, value in moments.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": own})


def read_run(config: Config) -> tuple[Config, dict | None]:
    """What to train -> resolved config, checkpoint (None for a new run). Raises InputError; writes nothing."""
    config = check_types(config)
    if config.resume is None:
        run = Path(config.out or default_out(config))
        if (run / "checkpoint.pt").exists():
            raise InputError(f"{run} already holds a run; carry it on with --resume {run}, or choose another --out")
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size:
            raise InputError(f"{run} holds a metrics.jsonl without a checkpoint.pt; choose another --out")
        return resolve(dataclasses.replace(config, out=str(run))), None
    run = Path(config.resume)
    saved, checkpoint = read_checkpoint(run)
    asked = {name: value for name, value in vars(config).items() if value is not None}
    if asked.get("out") == str(run):  # the folder may have been moved
        asked["out"] = saved.out
    for name, value in asked.items():
        if name not in FREE_ON_RESUME and value != getattr(saved, name):
            raise InputError(f"{run} was trained with {flag(name)} {getattr(saved, name)}, not {value}; drop the "
                             "flag, or train anew with another --out")
    cut_short = checkpoint["step"] < saved.steps  # then a step is left to do: the last one logs and draws
    if asked.get("steps", saved.steps) < checkpoint["step"] + cut_short:
        raise InputError(f"{run} is at step {checkpoint['step']} already; --steps must be more")
    changes = {n: v for n, v in asked.items() if n in FREE_ON_RESUME}
    return resolve(dataclasses.replace(saved, **changes | {"out": str(run), "resume": None})), checkpoint


def open_log(run: Path, checkpoint: dict | None):
    """Claim a run folder -> metrics.jsonl, open, locked and cut to where the checkpoint was made; its last record.
    Raises InputError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        log = open(run / "metrics.jsonl", "ab+", opener=plain_file)  # noqa: SIM115 (it stays open, and locked)
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it with the process, however it dies
    except BlockingIOError as e:
        raise InputError(f"another process is training in {run}; wait for it, or choose another --out") from e
    except OSError as e:
        raise InputError(f"cannot write to the run folder {run} ({e.strerror}); choose another --out") from e
    before = checkpoint["step"] if checkpoint else None
    now = read_checkpoint(run)[1]["step"] if (run / "checkpoint.pt").exists() else None
    if before != now:
        raise InputError(f"another process has just trained in {run}; --resume {run} to carry on from there")
    log.seek(0)
    try:
        *lines, half = log.read().split(b"\n")  # a process that was killed may leave half a line
        if not half.startswith(b'{"step": '[: len(half)]):
            raise ValueError("not a log")
        steps = [json.loads(line)["step"] for line in lines]
        lines = [line + b"\n" for line, step in zip(lines, steps) if step <= (before or 0)]
        if checkpoint and steps and checkpoint["logged"] not in (0, *steps):
            raise ValueError("lines are missing")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{run}/metrics.jsonl is damaged ({type(e).__name__}); restore or remove it") from e
    log.truncate(sum(map(len, lines)))  # later lines will come again; the last one may be half written
    for name in ("checkpoint.pt", "config.json", "reconstructions.png", "traversals.png"):
        (run / f".{name}.tmp").unlink(missing_ok=True)  # of a process that was killed
    return log, json.loads(lines[-1]) if lines else {}


def not_black(images: torch.Tensor) -> torch.Tensor:
    """(N,) bool: the images (N, ...) that show something; all of them where none does. What a latent tells is
    judged on these: on Figure 20's blank images x and hue have nothing to tell, and would seem unused (ours 24)."""
    lit = images.flatten(1).any(1)
    return lit | ~lit.any()


def save_pictures(run: Path, model: VAE, images: torch.Tensor):
    """From images (N, C, H, W): reconstructions.png, data above, and traversals.png, as in Figures 2 and 5 to 10: each
    latent from -2 to 2 around the mean nearest to the prior's (ours 24), rows sorted by mean variance. Images over 128
    pixels are shrunk as they are made, and no batch is larger than training's, which memory holds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:  # a run needs no pictures
        return
    batch, shrink = model.config.batch_size, math.ceil(max(images.shape[2:]) / 128)

    def decode(z):
        return torch.cat([small(model.pixels(model.decode(part))) for part in z.split(batch)])

    def small(images):
        return F.avg_pool2d(images, shrink, ceil_mode=True)

    with torch.no_grad():
        encoded = [model.encode(part) for part in images.split(batch)]
        mu, logvar = (torch.cat(parts) for parts in zip(*encoded))
        lit = not_black(images)
        variance, centers = logvar[lit].exp().mean(0), mu[lit]
        order = variance.argsort()[:20].tolist()  # the most informative latent first
        z = centers[centers.square().sum(1).argmin()].repeat(len(order), 11, 1)  # (rows, columns, K)
        for row, k in enumerate(order):
            z[row, :, k] = torch.linspace(-2, 2, 11)
        sweeps = torch.stack([decode(row) for row in z])
        pairs = torch.stack([small(images[:10]), decode(mu[:10])])
    labels = [f"z{k}   mean σ² {variance[k]:.2g}" for k in order]
    for name, grid, names in (("reconstructions", pairs, ["data", "model"]), ("traversals", sweeps, labels)):
        rows, columns, _, h, w = grid.shape
        tiles = F.pad(grid, (1, 1, 1, 1), value=1.0).permute(0, 3, 1, 4, 2)  # a white line around each
        canvas = tiles.reshape(rows * (h + 2), columns * (w + 2), -1).cpu().numpy()
        canvas = canvas[:, :, [0, 1, 2] if canvas.shape[2] > 2 else [0, 0, 0]]  # gray when it is not RGB
        figure = Figure(figsize=(canvas.shape[1] / 80, canvas.shape[0] / 80), dpi=160)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(canvas, interpolation="nearest")
        axes.set_yticks([(h + 2) * (i + 0.5) for i in range(rows)], names)
        ends = {"-2": 0.5, "0": 5.5, "2": 10.5} if name == "traversals" else {}
        axes.set_xticks([(w + 2) * i for i in ends.values()], ends)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        with atomically(run / f"{name}.png") as path:
            figure.savefig(path, format="png", bbox_inches="tight")


# --------------------------------------------------------------------------------------------------- training


def find_device(name) -> torch.device:
    """The device of that name. Raises InputError when it can't be used."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as e:
        raise InputError(f"--device {name} cannot be used ({str(e).splitlines()[0]}); choose cpu, or cuda[:N] where "
                         "there is a GPU") from e


def choose_device(config: Config) -> tuple[torch.device, str, str]:
    """-> device, precision, why this precision. Raises InputError."""
    device = find_device(config.device)
    cuda = device.type == "cuda"
    if not cuda and (device.type != "cpu" or config.precision == "tf32" or config.kernel == "triton"
                     or config.cuda_graph):
        raise InputError("--precision tf32, --kernel triton, --cuda-graph and devices other than cpu need a GPU: "
                         "--device cuda")
    if config.precision:
        return device, config.precision, "as asked, or as the run began"
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private to torch, which may drop them
    if cuda:
        units = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        units = any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in names)
    if units:
        return device, "bf16", "the device has bf16 units"
    return device, "fp32", "the device has no bf16 units"


def choose_layout(config: Config, device) -> torch.memory_format:
    """Matrix units want channels last, as same_conv2d does; a CPU's other fp32 convolutions may be faster without."""
    fast = same_conv2d is not None and config.decoder == "broadcast"
    last = device.type == "cuda" or config.precision == "bf16" or fast
    return torch.channels_last if last else torch.contiguous_format


def choose_kernel(config: Config, device) -> str:
    """Which code runs the layers after the tile, and why, in words; `broadcast_conv2d` and `same_conv2d` choose."""
    if config.decoder != "broadcast":
        return "none, as this model has no convolution after a tile"
    if broadcast_conv2d is None:
        return "plain tile, append, convolve, as kernels/ is not beside sbvae.py"
    others = "; the others same_conv2d, where it is faster" * (device.type == "cpu" and not config.compile)
    if config.upscales:
        return "plain tile, append, deconvolve" + others
    if config.kernel != "auto":
        return f"{config.kernel}, as asked" + others
    return ("triton where it can, else torch" if device.type == "cuda" else "torch, the factorised layer") + others


def training_step(config, data, generator, model, optimizer, discriminator=None, d_optimizer=None,
                  loss_function=vae_loss) -> torch.Tensor:
    """Draw a batch, encode, sample, decode, step down the gradient: the whole of training. -> ELBO, NLL, KL, latents
    used; FactorVAE adds total correlation and the discriminator's loss. No line of it waits for the device."""
    device = next(model.parameters()).device
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bf16")
    images = data.sample(config.batch_size, generator)
    with autocast():
        out = model(images, generator)
    loss, nll, kl = loss_function(out.logits, images, out.mu, out.logvar, config.beta, config.likelihood)
    terms = [nll + kl, nll, kl, (out.logvar < 2 * math.log(0.5)).sum(1).float().mean()]  # sigma < 0.5
    if discriminator:
        discriminator.requires_grad_(False)  # here it judges and does not learn
        tc = total_correlation(discriminator(out.z))
        loss = loss + config.gamma * tc
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if discriminator:  # Kim and Mnih, algorithm 2: a second batch gives the permuted latents (ours 10)
        with torch.no_grad(), autocast():
            other = reparameterize(*model.encode(data.sample(config.batch_size, generator)), generator)
        discriminator.requires_grad_(True)
        d_loss = discriminator_loss(discriminator(out.z.detach()), discriminator(permute_latents(other, generator)))
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        terms += [tc, d_loss]
    return torch.stack([term.detach() for term in terms])


def compile_parts(config, data, model, discriminator=None):
    """torch.compile for what a step calls, so that its many small kernels become few -> the compiled `vae_loss`. On a
    CPU, where nothing is launched, it does not pay. Raises InputError where it does not work."""
    device = next(model.parameters()).device
    try:
        if isinstance(data, Sprites):
            data.paint = torch.compile(data.paint, dynamic=False)
        for module in (model.encoder, model.decoder, *([discriminator] if discriminator else [])):
            module.forward = torch.compile(module.forward, dynamic=False)  # names of weights stay
        loss_function = torch.compile(vae_loss, dynamic=False)
        # It compiles what is called: now, before anything is written.
        images = data.sample(config.batch_size, torch.Generator(device).manual_seed(0))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            out = model(images)
        loss_function(out.logits, images, out.mu, out.logvar, config.beta, config.likelihood)[0].backward()
        model.zero_grad()
    except Exception as e:  # a missing compiler, say; it comes as many things
        if lacks_memory(e):
            raise
        first = str(e).partition("\n")[0]
        raise InputError(f"--compile does not work here ({type(e).__name__}: {first[:200]}); drop it") from e
    return loss_function


def capture(one_step, generator):
    """-> a function that does what `one_step` does, and what it is, in words. As a CUDA graph a step is launched
    as a whole: this model's kernels are shorter than it takes to launch them one by one. Weights, optimizer
    state, sums and the generator's offset live on the device, and each replay moves them on. To be called on another
    stream than the default one, on which a few steps have run."""
    before = generator.clone_state()
    gc.collect()  # a leftover autograd graph would pull the next one to the stream that it ran on
    try:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)  # else replays would draw the same numbers again
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            one_step()
    except RuntimeError as e:
        generator.graphsafe_set_state(before)  # else it may believe that the capture goes on
        return one_step, f"none, kernels are launched one by one ({' '.join(str(e).split())[:300]})"

    def replay(keep=one_step):  # the graph knows where the weights were, but does not keep them
        graph.replay()

    return replay, "a step is one CUDA graph"


def versions(device=None) -> dict:
    """What a result depends on besides the configuration."""
    here, commit = Path(__file__).resolve(), None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=here.parent)
        git(["git", "ls-files", "--error-unmatch", here.name], check=True)  # else it is somebody else's repository
        commit = git(["git", "describe", "--always", "--abbrev=12"], check=True).stdout.strip()
        changed = git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode  # code: eval.py writes results/
        commit += "-dirty" * bool(changed)
    hardware = platform.machine()
    if device and device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:  # Linux alone tells it
            hardware = next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
        threads = torch.get_num_threads()
        hardware += f", {threads} thread" + "s" * (threads > 1)
    return dict(commit=commit, torch=torch.__version__, python=platform.python_version(),
                platform=platform.platform(), hardware=hardware)


def clock(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h" if hours >= 2 else f"{hours * 60:.1f} min"


def train(config: Config) -> dict:
    """Train one model; return its last log record: step, elbo, nll, kl, latents_used, ...

    Writes config.json, metrics.jsonl, checkpoint.pt and two pictures into the run folder. Raises InputError,
    before the first step, for what cannot be done, and FloatingPointError when loss or weights are no longer
    finite, or the KL explodes. Told to stop by Ctrl-C or SIGTERM it saves and raises KeyboardInterrupt or SystemExit.
    """
    config, checkpoint = read_run(config)
    if config.deterministic:  # read by cuBLAS when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    run, factor = Path(config.out), config.model == "factorvae"
    device, precision, why = choose_device(config)
    data = load_dataset(config.dataset, device)
    shape = [data.channels, data.height, data.width]
    if config.image_shape not in (None, shape):
        raise InputError(f"{config.dataset} has images {shape}; {run} was trained on {config.image_shape}")
    config = dataclasses.replace(config, precision=precision, image_shape=shape)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.use_deterministic_algorithms(config.deterministic)  # cuDNN's gradients else add up in any order
    torch.backends.cudnn.benchmark = not config.deterministic  # time its algorithms once, as shapes stay the same
    model = build_model(config).to(device, memory_format=choose_layout(config, device))
    adam = functools.partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
    optimizer = adam(model.parameters(), lr=config.lr)
    generator = torch.Generator(device=device).manual_seed(config.seed)  # of data and noise
    parts, names = {"model": model, "optimizer": optimizer}, ["elbo", "nll", "kl", "latents_used"]
    if factor:
        discriminator = build_discriminator(config.latents, config.seed).to(device)
        # A.2's learning rate; the betas are Kim and Mnih's
        d_optimizer = adam(discriminator.parameters(), lr=2e-5, betas=(0.5, 0.9))
        parts |= {"discriminator": discriminator, "d_optimizer": d_optimizer}
        names += ["tc", "d_loss"]
    step, logged = 0, 0  # steps done; the step of the last log line
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)  # what has added up since
    most = math.prod(shape) * math.log(256)  # nats of the raw image: a posterior that costs more is of no use
    if checkpoint:
        restore(parts | {"generator": generator}, checkpoint, run)
        step, logged = checkpoint["step"], checkpoint["logged"]
        sums.copy_(checkpoint["sums"])
    added = torch.tensor(step - logged, device=device)  # steps in the sums
    pictured = data.sample(max(10, min(64, 2**24 // math.prod(shape))), torch.Generator(device=device).manual_seed(0))
    loss_function = compile_parts(config, data, model, parts.get("discriminator")) if config.compile else vae_loss

    def save():
        os.fsync(log.fileno())  # the checkpoint counts on its lines
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= dict(config=dataclasses.asdict(config), step=step, logged=logged, sums=sums,
                      generator=generator.get_state())
        with atomically(run / "checkpoint.pt") as path:
            try:
                torch.save(state, path)
            except RuntimeError as e:  # torch's way to say that the disk is full
                raise OSError(f"cannot write {path}: {str(e).splitlines()[0]}") from e

    log, record = open_log(run, checkpoint)
    with atomically(run / "config.json") as path:
        path.write_text(json.dumps(dict(config=dataclasses.asdict(config), **versions(device)), indent=1) + "\n")
    if not checkpoint:
        save()
    modules = {"encoder": model.encoder, "decoder": model.decoder, "discriminator": parts.get("discriminator")}
    print(f"data     {config.dataset}, {' x '.join(map(str, shape))}, "
          + ("drawn without end" if data.size is None else f"{data.size:,} images"))
    print(f"model    {config.model}, {config.decoder} decoder, {config.latents} latents, {config.likelihood}, beta "
          f"{config.beta:g}" + f", gamma {config.gamma:g}" * factor)
    print(f"layers   decoder of {config.conv_layers} {'de' * (config.decoder != 'broadcast')}convolutions"
          + f", {config.upscales} of them upscaling" * bool(config.upscales)
          + f", after an MLP of {config.mlp_layers}" * bool(config.mlp_layers)
          + ", coordinates shuffled" * config.shuffle_coords)
    print("weights ", ", ".join(f"{k} {sum(p.numel() for p in m.parameters()):,}" for k, m in modules.items() if m))
    print(f"device   {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}, {precision} ({why})")
    print(f"kernel   {choose_kernel(config, device)}" + "; the parts of a step compiled" * config.compile)
    print(f"run      {run}, steps {step:,} to {config.steps:,}, batch {config.batch_size}, lr {config.lr:g}, seed "
          f"{config.seed}", flush=True)

    def one_step():
        terms = training_step(config, data, generator, **parts, loss_function=loss_function)
        healthy = sums.isfinite().all()  # else the sums stay frozen, to tell what happened first, and when
        sums.copy_(torch.where(healthy, sums + terms, sums))
        added.add_(healthy)

    stopped = []  # signals that came
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {n: h for n in numbers if (h := signal.getsignal(n)) != signal.SIG_IGN}  # nohup asks to ignore some

    def stop(number, frame):  # finish the step, save, leave; a second signal ends it at once
        stopped.append(number)
        signal.signal(number, handlers[number])

    several = "RANK" in os.environ  # torchrun's processes share the terminal
    bar = tqdm(total=config.steps, initial=step, unit="step") if tqdm and sys.stderr.isatty() and not several else None
    say = bar.write if bar else functools.partial(print, flush=True)
    first, advance = step, one_step
    begun, begun_at = time.perf_counter(), step  # of the steps whose speed is told
    stream = contextlib.ExitStack()
    try:
        for number in handlers:
            signal.signal(number, stop)
        if config.cuda_graph:
            # A graph needs another stream than the default one, and the steps before it are to be on the same, as
            # autograd and cuBLAS go back to what they have seen.
            side = torch.cuda.Stream(device)
            usual = torch.cuda.current_stream(device)
            side.wait_stream(usual)
            stream.callback(usual.wait_stream, side)
            stream.enter_context(torch.cuda.stream(side))
        leaving = False
        while step < config.steps and not leaving:
            if config.cuda_graph and step == first + 3:  # libraries and memory are warm now
                advance, how = capture(one_step, generator)
                say(f"graph    {how}")
            if step == first + 4 and device.type == "cuda":  # what is compiled and captured once does not count
                torch.cuda.synchronize(device)
                begun, begun_at = time.perf_counter(), step
            advance()
            step += 1

            if bar:
                bar.update()
            if step == first + 20:
                sums.sum().item()  # waits for the device
                rate = (step - begun_at) / (time.perf_counter() - begun)
                left = (config.steps - step) / rate
                say(f"speed    {rate:.3g} steps/s; {clock(left)} to go, until "
                    + time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left)))
            ending = step == config.steps
            to_log, to_save = ending or step % config.log_every == 0, ending or step % config.save_every == 0
            leaving = bool(stopped)  # asked once a step: a signal that comes later is heeded in the next
            if not (to_log or to_save or leaving):
                continue
            means = dict(zip(names, (sums / added).tolist(), strict=True))  # waits, too
            weights = [p for m in modules.values() if m for p in m.parameters()]
            cause = ", ".join(f"{n} is {v}" for n, v in means.items() if not math.isfinite(v))
            if cause:
                cause += f" at step {logged + added.item():,}"
            elif not all(torch.isfinite(p).all() for p in weights):
                cause = f"a weight is NaN or infinite at step {step:,}"
            elif means["kl"] > most:
                cause = (f"the KL has exploded to {means['kl']:.3g} nats between steps {logged:,} and {step:,}, more "
                         f"than the {most:,.0f} of the raw image")
            if cause:
                raise FloatingPointError(f"diverged: {cause}; {run}/checkpoint.pt is the last good state")
            if to_log:
                rate = (step - begun_at) / (time.perf_counter() - begun)
                record = dict(step=step, **means,
                              images_per_s=rate * config.batch_size, seconds_left=(config.steps - step) / rate)
                log.write(json.dumps(record).encode() + b"\n")
                log.flush()
                say(f"seed {config.seed:<4} " * several + f"step {step:>9,}  "
                    f"ELBO {record['elbo']:8.2f}  NLL {record['nll']:8.2f}  KL {record['kl']:6.2f}  "
                    f"latents used {record['latents_used']:5.2f}  "
                    + (f"TC {record['tc']:6.3f}  D loss {record['d_loss']:.4f}  " if factor else "")
                    + f"{record['images_per_s']:7,.0f} images/s  {clock(record['seconds_left'])} left")
                sums.zero_()
                added.zero_()
                logged, begun, begun_at = step, time.perf_counter(), step
            if to_save:  # pictures first: a run whose checkpoint says that it is done has them
                autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
                try:
                    with autocast, torch.compiler.set_stance("force_eager"):  # not worth compiling for these batches
                        save_pictures(run, model, pictured)
                except (MemoryError, RuntimeError) as e:
                    if not lacks_memory(e):
                        raise
                    say("note: no new pictures, as memory does not suffice for them; the run goes on")
            if to_save or leaving:
                save()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if bar:
            bar.close()
        log.close()
        stream.close()
    if step < config.steps:
        print(f"stopped at step {step:,}; carry on with: python sbvae.py --resume {run}")
    else:
        print(f"done     {step:,} steps; what it made is in {run}")
    if stopped:  # in the last step, too: the caller may have more to train
        raise KeyboardInterrupt if stopped[0] == signal.SIGINT else SystemExit(128 + stopped[0])
    return record


def share_machine() -> tuple[int, int]:
    """-> rank, number of processes, as torchrun tells them (0, 1 without it). Takes this process's GPU, or its share
    of the cores."""
    told = {name: os.environ.get(name, usual) for name, usual in (
        ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))}
    try:
        rank, world, local, beside = map(int, told.values())
        if not (0 <= rank < world and 0 <= local < beside):
            raise ValueError("ranks count from 0")
    except ValueError as e:
        raise InputError(f"these variables do not come from torchrun, unset them: {told}") from e
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())  # "cuda" is from now on this one
    if beside > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))
    return rank, world


def train_seeds(config: Config, seeds: str) -> int:
    """A run for each seed of "A-B", one after the other, in the folders that `--seed` gives them (the usual one for
    seed 0), or <out>-seed<n>. What is there is carried on, what is finished left alone. Under torchrun each process
    takes its share of them. A run that diverges, or is refused when its turn comes, does not stop the others; what they
    would all meet, a full disk or too little memory, does. -> the exit code. Raises InputError, before it trains any,
    when a run of its share is refused."""
    try:
        first, last = map(int, seeds.split("-"))
    except ValueError:
        first, last = 0, -1
    if not first <= last < first + 10_000:
        raise InputError(f"--seeds must be the first and the last, such as 0-24, 10,000 at most, not {seeds!r}")
    if config.seed is not None or config.resume is not None:
        raise InputError("--seeds gives each run its own seed and folder, and resumes it; drop --seed and --resume")
    rank, world = share_machine()
    share, code = range(first + rank, last + 1, world), 0

    def unfinished(seed):  # what to train, or None; asked anew when its turn comes, as it may be hours later
        c = dataclasses.replace(config, seed=seed)
        run = f"{Path(c.out)}-seed{seed}" if c.out else default_out(dataclasses.replace(c, seed=seed or None))
        there = (Path(run) / "checkpoint.pt").exists()
        c = dataclasses.replace(c, out=None, resume=run) if there else dataclasses.replace(c, out=run)
        full, checkpoint = read_run(c)
        return None if checkpoint and checkpoint["step"] == full.steps else c

    for seed in share:
        unfinished(seed)
    for seed in share:
        try:
            if c := unfinished(seed):
                train(c)
            else:
                print(f"seed {seed}: done before")
        except (FloatingPointError, InputError) as e:
            print(f"error: seed {seed}: {e}", file=sys.stderr)
            code = max(code, 1 if isinstance(e, FloatingPointError) else 2)
    return code


# ----------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line like every other error, without the usage
        raise InputError(f"{message}; see --help")


def parse(arguments=None) -> tuple[Config, str | None]:
    """The command line as a Config, and --seeds. Raises InputError."""
    parser = Parser(
        prog="sbvae.py", allow_abbrev=False, description="Train the Spatial Broadcast VAE (Watters et al. 2019) and "
        "its relatives. Defaults are the paper's; brackets say where they stand in it.")
    group = parser
    for f in dataclasses.fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if kind := f.metadata.get("kind"):
            choices = f.metadata["choices"]
            how = dict(action="store_true", default=None) if kind is bool else dict(
                type=kind, choices=choices, metavar=None if choices else kind.__name__)
            group.add_argument(flag(f.name), help=f.metadata["help"], **how)
            if f.name == "seed":
                group.add_argument("--seeds", metavar="A-B", help="a run for each of them, one after the other, or "
                                   "through torchrun as many at once as it has processes")
    given = vars(parser.parse_args(arguments))
    seeds = given.pop("seeds")
    return Config(**given), seeds


def prepare_process():
    """Printing survives closed streams, and names of folders that are no text. Ctrl-C raises KeyboardInterrupt.
    The memory that a step frees is kept for the next."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it. By itself it gives large tensors
        mallopt = ctypes.CDLL(None).mallopt  # back to the system; to get them page by page took a quarter of a step
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap keeps up to 2 GB that are free
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: tensors below 32 MB are in it; larger ones would leave gaps
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")


def lacks_memory(e: Exception) -> bool:
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or isinstance(e, RuntimeError) and "allocate" in str(e)


def main():
    prepare_process()
    try:
        config, seeds = parse()
        if seeds is None:
            train(config)
        elif (code := train_seeds(config, seeds)) and "RANK" not in os.environ:  # torchrun would end the others
            sys.exit(code)
    except (InputError, OSError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1 if isinstance(e, FloatingPointError) else 2)
    except (MemoryError, RuntimeError) as e:
        if not lacks_memory(e):
            raise
        print("error: out of memory; lower --batch-size, and choose another --out", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
