"""Data sets for the Spatial Broadcast VAE: official files, your own files, 3D Object-in-Room.

    dataset = load_file("dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz")    # binary sprites
    dataset = load_file("3dshapes.h5", device="cuda")                        # needs h5py
    dataset = load_file("rendered_chairs.tar")                  # or the folder it unpacks to
    dataset = load_file("mine.npz")     # images (N,H,W) or (N,H,W,C) uint8, factors (N,F) or none

    generator = torch.Generator(dataset.device).manual_seed(0)
    images = dataset.sample(16, generator)                        # (16, C, H, W) float32 in [0, 1]

The data sets are those of the paper's Appendix A.3. Files are data and nothing else: no pickle
is ever loaded (the one in the dSprites file, `metadata`, is not even opened), nothing is unpacked
to disk, every size that a header claims is checked before memory is asked for. A file that is
refused raises ValueError, FileNotFoundError, OSError or ImportError with one line that says why.

Letters in shapes: N images, H height, W width, C channels, F factors of variation.
"""

import colorsys
import contextlib
import errno
import functools
import hashlib
import io
import math
import os
import re
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from gen_circles import atomic, import_pygame, progress_bar

CHUNK_BYTES = 8 << 20  # files are read in pieces of about this size
MAX_SMALL_BYTES = 1 << 30  # no array but the images may be larger than this
MAX_PNG_BYTES = 16 << 20  # a raw 600 x 600 RGBA image has 1.4 MB
CACHE_VERSION = 1  # raise it when the content of cache files changes
CGROUP = Path("/sys/fs/cgroup")  # where a container finds its limits
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, tarfile.TarError, OSError)  # what parsers raise


# ---------------------------------------------------------------------------------------------
# Images in memory or in a memory map
# ---------------------------------------------------------------------------------------------


class ArrayDataset:
    """A fixed set of uint8 images, with ground-truth factors where the file has them.

    name                     "dsprites", "3dshapes", "chairs", or the stem of your file's name
    channels, height, width  of an image
    size                     number of images N
    device                   where `sample` and `draw` put what they return
    on_device                True if the images lie there, so that sampling never waits for the
                             host; False if each batch is read from a memory map
    factors                  (N, F) numpy array, or None
    factor_names             F names, or None
    factor_sizes             how many distinct values each factor takes, or None
    draw                     None unless the factors form a complete grid (see there)
    """

    def __init__(self, name, rows, shape, device="cpu", factors=None, factor_names=None):
        """rows: (N, H, W, C) uint8, a tensor on `device` or a numpy memory map on the host.
        shape: (N, H, W, C). factors: (N, F) numbers."""
        self.name, self.device, self._rows = name, torch.device(device), rows
        self.size, self.height, self.width, self.channels = shape
        self.on_device = isinstance(rows, torch.Tensor)
        self.factors, self.factor_names = factors, factor_names
        self.factor_sizes, self._lookup = None, None
        if factors is not None:
            self.factor_sizes, lookup = factor_grid(factors)
            if lookup is not None:
                self._lookup = torch.from_numpy(lookup).to(self.device)

    def __len__(self):
        return self.size

    def images(self, index):
        """index (n,) int64 on the device → (n, C, H, W) float32 in [0, 1]."""
        if self.on_device:
            pixels = self._rows.index_select(0, index)
        else:  # the one place that waits for the host
            pixels = torch.from_numpy(self._rows[index.cpu().numpy()]).to(self.device)
        pixels = pixels.permute(0, 3, 1, 2)
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)

    def sample(self, n, generator):
        """n images drawn uniformly, with replacement → (n, C, H, W) float32 in [0, 1].

        generator: a torch.Generator on the data set's device; nothing else is random here."""
        return self.images(torch.randint(self.size, (n,), generator=generator, device=self.device))

    def index(self, factors):
        """Integer factor classes (n, F) → (n,) int64, which images they are.

        Class k of a factor is its k-th smallest value in the file. ValueError if the grid is
        incomplete, or if `factors` has a wrong shape, or (on the CPU only: elsewhere looking
        would wait for the device) a class out of range."""
        if self._lookup is None:
            raise ValueError(f"{self.name}: the file has no complete grid of factors to draw from")
        check_classes(factors, self.factor_sizes)
        flat = torch.zeros(len(factors), dtype=torch.int64, device=factors.device)
        for column, size in zip(factors.unbind(1), self.factor_sizes, strict=True):
            flat = flat * size + column
        return self._lookup[flat.to(self.device)]

    @property
    def draw(self):
        """`draw(factors)`: integer factor classes (n, F) → (n, C, H, W) float32 in [0, 1].

        None where the file holds no factors, or where it does not hold every combination of their
        values exactly once: then there is no image, or no single one, to give back."""
        return None if self._lookup is None else lambda factors: self.images(self.index(factors))


class MaskDataset(ArrayDataset):
    """Binary images, eight pixels in a byte: dSprites takes 377 MB in place of 3 GB.

    rows: (N, H·W/8) uint8, a tensor on `device`; the first pixel in the highest bit."""

    def __init__(self, name, rows, shape, device="cpu", factors=None, factor_names=None):
        super().__init__(name, rows, shape, device, factors, factor_names)
        # What to shift a byte by to bring each of its pixels to the lowest bit. Made here, because
        # a copy from the host has no place in a captured CUDA graph.
        self._shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.device)

    def mask(self, which):
        """Images (n,) int64 by index, or factor classes (n, F) → (n, H, W) bool."""
        index = which if which.ndim == 1 else self.index(which)
        bits = (self._rows.index_select(0, index)[..., None] >> self._shifts) & 1  # (n, H·W/8, 8)
        return bits.view(-1, self.height, self.width).bool()

    def images(self, index):
        """index (n,) int64 on the device → (n, 1, H, W) float32, 0 or 1."""
        return self.mask(index)[:, None].to(torch.float32)


def check_classes(factors, sizes):
    """ValueError unless `factors` is an integer tensor (n, F) with 0 <= class < size.

    The range is checked on the CPU only: on a GPU the check would wait for the device."""
    integer = isinstance(factors, torch.Tensor) and factors.dtype in (
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not integer or factors.ndim != 2 or factors.shape[1] != len(sizes):
        got = f"{factors.dtype} {tuple(factors.shape)}" if hasattr(factors, "shape") else factors
        raise ValueError(f"factors must be an integer tensor (N, {len(sizes)}), got {got}")
    if factors.device.type == "cpu":
        bad = (factors < 0) | (factors >= torch.tensor(sizes))
        if bad.any():
            row, column = (int(i) for i in bad.nonzero()[0])
            raise ValueError(f"factors[{row}, {column}] is {int(factors[row, column])}, but factor "
                             f"{column} has classes 0..{sizes[column] - 1}")


def factor_grid(factors):
    """Factors (N, F) → (sizes, lookup).

    sizes: how many distinct values each factor takes. lookup: (N,) int64, the index of the image
    for each combination of classes, last factor fastest; None unless each combination occurs
    exactly once."""
    columns = [np.unique(column, return_inverse=True) for column in factors.T]
    sizes = tuple(len(values) for values, _ in columns)
    if math.prod(sizes) != len(factors):
        return sizes, None
    flat = np.ravel_multi_index([classes for _, classes in columns], sizes)
    lookup = np.full(len(factors), -1, np.int64)
    lookup[flat] = np.arange(len(factors))
    return sizes, lookup if lookup.min() >= 0 else None


# ---------------------------------------------------------------------------------------------
# Any file
# ---------------------------------------------------------------------------------------------


def load_file(path, device="cpu", cache_dir="data", max_bytes=None):
    """Open an image data set → ArrayDataset.

    path: the dSprites .npz, `3dshapes.h5`, `rendered_chairs.tar` or its folder, or any .npz with
        `images` (N, H, W) or (N, H, W, C) uint8 and optionally `factors` (N, F) and
        `factor_names` (F,).
    cache_dir: where the chairs, shrunk to 64 x 64, are kept for the next time; and the plain copy
        of compressed images that are too many for the device.
    max_bytes: images of more bytes than this are read from a memory map, batch by batch; the rest
        live on the device as uint8. Default: half of the memory that is free there. dSprites is
        on the device always, as bits: 377 MB.

    Raises FileNotFoundError, OSError (it cannot be read, no room for the cache), ImportError (no
    h5py), ValueError (its content is not what it should be), each with one line."""
    path, device = Path(path), torch.device(device)
    where = f"{path}: "
    try:
        path = path.expanduser()
        if not path.exists():
            where = ""  # as likely a mistyped name, which who asked for it knows
            raise FileNotFoundError("no such file or folder; names are sprites, objects, chairs, "
                                    "circles-{xy,xh,rg,xyh-small,xyh-tiny}")
        if not (path.is_file() or path.is_dir()):
            raise ValueError("neither a file nor a folder")  # to open a pipe could take for ever
        if max_bytes is None:
            max_bytes = free_memory(device) // 2
        if path.is_dir() or path.suffix == ".tar":
            return _load_chairs(path, device, Path(cache_dir), max_bytes)
        if path.suffix in (".h5", ".hdf5"):
            return _load_3dshapes(path, device, Path(cache_dir), max_bytes)
        if path.suffix == ".npz":
            return _load_npz(path, device, Path(cache_dir), max_bytes)
        raise ValueError("expected an .npz, 3dshapes.h5, rendered_chairs.tar or the chairs' folder")
    except Exception as error:
        # The parsers of broken files raise all sorts of things (BadZipFile, zlib.error, TarError,
        # EOFError, OverflowError, ...): what the caller is told has one of four types, one line.
        text = str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError | ImportError):
            kind = FileNotFoundError if isinstance(error, OSError) else ImportError
        elif isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            kind = OSError  # from the operating system; the others are HDF5's, and wild seeks
        else:
            kind = ValueError
            if isinstance(error, DAMAGE):
                text = f"incomplete or damaged, was the download cut short? ({text})"
        raise kind(" ".join(f"{where}{text}".split())) from error


def find_chairs(data_dir="data"):
    """The path of the chairs' archive or folder in `data_dir`, or FileNotFoundError."""
    for name in ("rendered_chairs.tar", "rendered_chairs"):
        if (path := Path(data_dir) / name).exists():
            return path
    raise FileNotFoundError(
        f"no rendered_chairs.tar in {data_dir}: get it from "
        "https://www.di.ens.fr/willow/research/seeing3Dchairs/data/rendered_chairs.tar"
    )


def free_memory(device):
    """Bytes of memory that are free on a device, or on the host where `device` is no GPU.

    In a container: at most what is left of its limit (cgroup v2)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(s.split()[1]) << 10 for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 << 30  # not Linux: `max_bytes` can tell better
    with contextlib.suppress(OSError, ValueError, KeyError):  # no cgroups, or no limit: "max"
        limit, used = (int((CGROUP / f"memory.{key}").read_text()) for key in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(stat["inactive_file"])  # cached files, which make way when memory is asked for
        free = min(free, max(limit - used, 0))
    return free


def _pieces(n, step):
    """(start, stop) for n images, `step` at a time, with a progress bar if it takes long."""
    bar = progress_bar(total=n, unit=" images", unit_scale=True, delay=2, mininterval=0.5, leave=False)
    with bar as progress:
        for start in range(0, n, step):
            stop = min(start + step, n)
            yield start, stop
            progress.update(stop - start)


def _at_once(shape, multiple=1):
    """How many images (N, H, W, C) to hold at a time: a multiple, about CHUNK_BYTES."""
    return math.ceil(CHUNK_BYTES / math.prod(shape[1:]) / multiple) * multiple


def _check_images(key, shape, fortran, dtype):
    """The shape (N, H, W, C) of an array of images, or ValueError with the line that mends it."""
    if dtype != np.uint8:
        mend = {
            "f": f"np.round({key} * 255).astype(np.uint8) if they lie in [0, 1], "
            f"np.round({key}).astype(np.uint8) if they lie in [0, 255]",
            "b": f"{key}.astype(np.uint8) * 255",
        }.get(dtype.kind, f"{key}.astype(np.uint8) if the values lie in 0..255")
        raise ValueError(f"`{key}` must be uint8 in 0..255, is {dtype}: save {mend}")
    if len(shape) not in (3, 4):
        raise ValueError(f"`{key}` must be (N, H, W) or (N, H, W, C), is {shape}")
    if len(shape) == 3 and shape[-1] <= 4:  # gray images of 4 columns, or one colored image?
        raise ValueError(f"`{key}` {shape} looks like a single image (H, W, C): save {key}[None]; if "
                         f"it is many gray ones, {key}[..., None]")
    n, height, width, channels = shape if len(shape) == 4 else (*shape, 1)
    if not 1 <= channels <= 4:
        mend = f": save np.moveaxis({key}, 1, -1)" if 1 <= height <= 4 else ""
        raise ValueError(f"`{key}` {shape} must have 1 to 4 channels, on the last axis{mend}")
    if n < 1:
        raise ValueError(f"`{key}` {shape} holds no image")
    if not (4 <= height <= 4096 and 4 <= width <= 4096):
        raise ValueError(f"`{key}` {shape} must have a height and a width of 4 to 4096 pixels")
    if fortran:  # the first axis varies fastest: no image could be read without all the others
        raise ValueError(f"`{key}` is in Fortran order: save np.ascontiguousarray({key})")
    return n, height, width, channels


def _check_factors(key, factors, n):
    """ValueError unless factors is (n, F) with F >= 1, numeric and finite."""
    if factors.ndim != 2 or len(factors) != n or factors.shape[1] < 1:
        raise ValueError(f"`{key}` must be ({n}, F), a row per image, is {factors.shape}")
    if factors.dtype.kind not in "biuf":
        raise ValueError(f"`{key}` must hold numbers, is {factors.dtype}")
    if not np.isfinite(factors).all():
        raise ValueError(f"`{key}` holds values that are not finite")
    return factors


def _check_brightest(value):
    """ValueError for images that look like 0/1 masks, which 0..255 would show as black."""
    if value == 1:
        raise ValueError("`images` holds 0 and 1 only, where white is 255: save images * 255")


def _fill(chunks, shape, device):
    """(start, stop, uint8 (stop - start, H, W, C)) of all images → one tensor on the device."""
    images, brightest = torch.empty(shape, dtype=torch.uint8, device=device), 0
    for start, stop, chunk in chunks:
        images[start:stop] = torch.from_numpy(chunk)
        brightest = max(brightest, int(chunk.max()))
    _check_brightest(brightest)
    return images


# ---------------------------------------------------------------------------------------------
# .npz: dSprites and your own. numpy.load would read a compressed member in one piece, 3 GB for
# dSprites, and map none into memory, so the members are read here; numpy parses their headers.
# ---------------------------------------------------------------------------------------------


def _load_npz(path, device, cache_dir, max_bytes, name=None):
    with zipfile.ZipFile(path) as archive:
        keys = {entry.removesuffix(".npy") for entry in archive.namelist()}
        if "images" not in keys and "imgs" in keys:
            return _load_dsprites(archive, keys, device)
        if {"coverage", "centers"} <= keys:
            raise ValueError("holds circles of gen_circles.py: ask for them by name, as in "
                             "--dataset circles-xy, not by file")
        if "images" not in keys:
            raise ValueError(f"has no `images`; it has {sorted(keys)[:10]}")
        stream, *header = _open_array(archive, "images")
        shape = _check_images("images", *header)
        factors, names = None, None
        if "factors" in keys:
            factors = _check_factors("factors", _read_array(archive, "factors"), shape[0])
            names = tuple(f"factor {i}" for i in range(factors.shape[1]))
            if "factor_names" in keys:
                names = _read_array(archive, "factor_names")
                if names.dtype.kind != "U" or names.shape != factors.shape[1:]:
                    raise ValueError(f"`factor_names` must be {factors.shape[1]} strings, "
                                     f"is {names.dtype} {names.shape}")
                names = tuple(names.tolist())
                if any("\ud800" <= letter <= "\udfff" for letter in "".join(names)):
                    raise ValueError("`factor_names` are no text: half of a surrogate pair is in them")
        if math.prod(shape) <= max_bytes:
            rows = _fill(_read_rows(stream, shape), shape, device)
        elif archive.getinfo("images.npy").compress_type == zipfile.ZIP_STORED:
            rows = _map_rows(path, archive.getinfo("images.npy"), stream.tell(), shape)
        else:  # compressed and too large: keep a plain copy, which can be mapped
            more = {} if factors is None else {"factors": factors, "factor_names": names}
            return _load_cached(path, device, cache_dir, max_bytes, name or path.stem,
                                lambda: (shape, _read_rows(stream, shape), more))
    return ArrayDataset(name or path.stem, rows, shape, device, factors, names)


def _load_dsprites(archive, keys, device):
    """dSprites: `imgs` (N, 64, 64) uint8 of 0 and 1, 3 GB when inflated, kept as 377 MB of bits.

    `latents_classes` (N, 6): color (always 0, left out here), shape, scale, orientation, x, y.
    `metadata` is a pickle: it is not read, and holds nothing that is needed."""
    if "latents_classes" not in keys:
        raise ValueError("has `imgs` but no `latents_classes`: not the dSprites file")
    stream, *header = _open_array(archive, "imgs")
    shape, key = _check_images("imgs", *header), "latents_classes"
    if shape[1:] != (64, 64, 1):
        raise ValueError(f"`imgs` must be (N, 64, 64), is {shape}")
    classes = _check_factors(key, _read_array(archive, key), shape[0])
    if classes.shape[1] != 6 or classes.dtype.kind not in "iu":
        raise ValueError(f"`{key}` must be (N, 6) integers, is {classes.shape} {classes.dtype}")
    packed = torch.empty((shape[0], 64 * 64 // 8), dtype=torch.uint8, device=device)
    for start, stop, chunk in _read_rows(stream, shape):
        if chunk.max() > 1:
            raise ValueError("`imgs` must hold 0 and 1 only")
        packed[start:stop] = torch.from_numpy(np.packbits(chunk.reshape(stop - start, -1), axis=1))
    names = ("shape", "scale", "orientation", "x", "y")
    return MaskDataset("dsprites", packed, shape, device, classes[:, 1:], names)


def _open_array(archive, key):
    """Open an array → (stream at its first value, shape, Fortran order?, dtype), size checked."""
    info = archive.getinfo(f"{key}.npy")
    stream = archive.open(info)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
    except DAMAGE:
        raise
    except Exception as error:
        raise ValueError(f"`{key}` has no valid .npy header: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"`{key}` is a pickle of Python objects, which is never loaded")
    claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
    if min(shape, default=0) < 0 or claimed != held:
        raise ValueError(f"`{key}` claims {shape} {dtype}, {claimed} bytes, but holds {held}")
    return stream, shape, fortran, dtype


def _read_array(archive, key):
    """A whole member, for all arrays but the images."""
    stream, shape, fortran, dtype = _open_array(archive, key)
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_SMALL_BYTES:
        raise ValueError(f"`{key}` {shape} {dtype} has {size} bytes, more than {MAX_SMALL_BYTES}")
    values = np.frombuffer(stream.read(size), dtype)
    return values.reshape(shape, order="F" if fortran else "C")


def _read_rows(stream, shape):
    """Images of shape (N, H, W, C) from a stream, in pieces (start, stop, array)."""
    for start, stop in _pieces(shape[0], _at_once(shape)):
        chunk = np.empty((stop - start, *shape[1:]), np.uint8)
        view, done = memoryview(chunk).cast("B"), 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise EOFError("the data ends early")
            done += count
        yield start, stop, chunk


def _map_rows(path, info, offset, shape):
    """A memory map of a member that is stored without compression. offset: of its values.

    Mapped images are read when they are sampled, so their checksum alone goes unverified."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)  # the local header: the lengths of its name and extra field vary
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise zipfile.BadZipFile("a member is not where the directory says")
        offset += info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if offset + math.prod(shape) > os.fstat(file.fileno()).st_size:
            raise EOFError("the data ends early")
    rows = np.memmap(path, np.uint8, "r", offset, shape)
    brightest = 0
    for start, stop in _pieces(shape[0], _at_once(shape)):
        brightest = max(brightest, int(rows[start:stop].max()))
        if brightest > 1:
            break  # as a rule after the first piece
    _check_brightest(brightest)
    return rows


# ---------------------------------------------------------------------------------------------
# Cache files: plain .npz of `images`, `factors`, `factor_names`, which anyone can open
# ---------------------------------------------------------------------------------------------


def _cache(path, cache_dir, files=None):
    """Where the cache of `path` lies, and the stamp of the state in which the path's files are."""
    stats = [file.stat() for file in files or [path]]
    size, time = sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    stamp = f"version {CACHE_VERSION}, {len(stats)} files, {size} bytes, changed at {time} ns"
    return cache_dir / f"{path.resolve().stem}-{key}.npz", stamp


def _load_cached(path, device, cache_dir, max_bytes, name, make, files=None):
    """The data set in the cache of `path`. Where it is missing, old or damaged, `make()` →
    (shape, chunks, other arrays) gives what to write there first."""
    cache, stamp = _cache(path, cache_dir, files)
    if _is_current(cache, stamp):
        try:
            return _load_npz(cache, device, cache_dir, max_bytes, name)
        except (ValueError, NotImplementedError, *DAMAGE):
            cache.unlink(missing_ok=True)  # it is damaged, not the user's file: make it again, once
    shape, chunks, arrays = make()
    _write_npz(cache, shape, chunks, source=stamp, **arrays)
    del chunks  # the chairs' are all in memory
    return _load_npz(cache, device, cache_dir, max_bytes, name)


def _is_current(cache, stamp):
    try:
        with zipfile.ZipFile(cache) as archive:
            return str(_read_array(archive, "source")) == stamp
    except Exception:
        return False  # missing or damaged: it is made again


def _write_npz(path, shape, chunks, **arrays):
    """Write images piece by piece, uncompressed. The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if size > free:
        text = f"the cache {path} takes {size} bytes, but only {free} are free there"
        raise OSError(errno.ENOSPC, text)
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for _, _, chunk in chunks:
                member.write(chunk)
        for key, value in arrays.items():
            with archive.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(value), allow_pickle=False)


# ---------------------------------------------------------------------------------------------
# 3dshapes.h5
# ---------------------------------------------------------------------------------------------


def _load_3dshapes(path, device, cache_dir, max_bytes):
    """`images` (480000, 64, 64, 3) uint8 and `labels` (480000, 6), the last factor fastest."""
    try:
        import h5py
    except ImportError:
        raise ImportError("reading it needs the package h5py: pip install h5py") from None
    names = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
    with h5py.File(path, "r") as file:
        for key in ("images", "labels"):
            item, link = file.get(key), file.get(key, getlink=True)
            if item is None:
                raise ValueError(f"has no readable `{key}` among {sorted(file)[:10]}")
            # HDF5 can make an array out of any other file on the machine: take none of that.
            if not (isinstance(item, h5py.Dataset) and isinstance(link, h5py.HardLink)):
                raise ValueError(f"`{key}` is not an array inside this file")
            if item.external or item.is_virtual:
                raise ValueError(f"`{key}` lies in another file")
        images, labels = file["images"], file["labels"]
        shape = _check_images("images", images.shape, False, images.dtype)
        if labels.shape != (shape[0], 6) or labels.nbytes > MAX_SMALL_BYTES:
            raise ValueError(f"`labels` must be ({shape[0]}, 6), is {labels.shape}")
        factors = _check_factors("labels", labels[:], shape[0])
        factors = factors.astype(np.float64).round(4)  # 0.1 + 0.2 is 0.3 here
        # Compressed images lie in blocks of so many: take whole blocks, to inflate each once.
        block = images.chunks[0] if images.chunks else 1
        step = _at_once(shape, block if block * math.prod(shape[1:]) <= 256 << 20 else 1)
        chunks = ((a, b, images[a:b].reshape(-1, *shape[1:])) for a, b in _pieces(shape[0], step))
        if math.prod(shape) <= max_bytes:
            rows = _fill(chunks, shape, device)
            return ArrayDataset("3dshapes", rows, shape, device, factors, names)
        return _load_cached(path, device, cache_dir, max_bytes, "3dshapes",
                            lambda: (shape, chunks, {"factors": factors, "factor_names": names}))


# ---------------------------------------------------------------------------------------------
# Chairs: 1,393 models x 62 views = 86,366 PNG images of 600 x 600 on white (Aubry et al., 2014)
# ---------------------------------------------------------------------------------------------

CHAIRS = 86_366  # images in the official archive
CHAIR = re.compile(r"(?:.*/)?([^/]+)/renders/image_(\d+)_p(\d+)_t(\d+)_r\d+\.png")


def _load_chairs(path, device, cache_dir, max_bytes):
    """Gray images of 64 x 64, white background kept; factors model, elevation, azimuth.

    The first time, all images are decoded and shrunk (4 ms each and thread, so some minutes in
    all), and kept as one .npz in `cache_dir`: 354 MB."""
    if path.is_dir():
        members = [(str(file.relative_to(path)), file, 0, None) for file in path.rglob("*.png")]
        files = [file for _, file, _, _ in members]
    else:
        members, files = None, [path]

    def make():
        # Sorted by name, that is by model, elevation, azimuth: a tar and its folder agree.
        found = sorted((m.groups(), member) for member in (_list_tar(path) if members is None else members)
                       if (m := CHAIR.fullmatch(member[0].replace(os.sep, "/"))))
        if not found:
            raise ValueError("holds no <model>/renders/image_*_p*_t*_r*.png of the chairs")
        ids = {model: i for i, model in enumerate(sorted({m[0] for m, _ in found}))}
        factors = np.array([(ids[m], int(p), int(t)) for (m, _, p, t), _ in found], np.int32)
        # All in memory before a file is begun: whoever is killed in these minutes leaves nothing
        # behind. Killed in the second of writing it leaves a .tmp, which the next time overwrites.
        images = _read_chairs([member for _, member in found])
        names = ("model", "elevation", "azimuth")
        return images.shape, [(0, len(images), images)], {"factors": factors, "factor_names": names}

    dataset = _load_cached(path, device, cache_dir, max_bytes, "chairs", make, files)
    if dataset.size < CHAIRS:
        print(f"{path}: found {dataset.size:,} of the {CHAIRS:,} images of chairs", file=sys.stderr)
    return dataset


def _list_tar(path):
    """(name, file, offset, size) of each regular file in a tar, or ValueError for a hostile one.

    Nothing is ever unpacked, so no name could lead anywhere; but an archive with such names is
    not the official one."""
    members, length = [], path.stat().st_size
    with tarfile.open(path, "r:") as tar:  # no compression, as published
        for member in tar:
            name = member.name
            if name.startswith("/") or ".." in name.split("/") or "\\" in name:
                raise ValueError(f"the name {name!r} leads out of the archive")
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise ValueError(f"{name!r} is a link or a special file, not a plain one")
            if not 0 <= member.size <= length - member.offset_data:
                raise EOFError(f"{name!r} claims {member.size} bytes, more than there are")
            if member.isreg():
                members.append((name, path, member.offset_data, member.size))
        # tarfile takes a damaged header for the end. A real end is a block of zeros.
        with open(path, "rb") as file:
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise EOFError(f"no header and no end at byte {tar.offset}")
    return members


def _read_chairs(members):
    """The images of these members, in order → (N, 64, 64) uint8."""
    import_pygame()  # here, before the threads start
    images = np.empty((len(members), 64, 64), np.uint8)
    weights = area_weights(600, 64)
    # Threads: pygame and numpy let go of the interpreter's lock while they work. In blocks, so
    # that one bad image among 86,366 is told within seconds.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start, stop in _pieces(len(members), 256):
            block = pool.map(lambda member: _read_chair(member, weights), members[start:stop])
            images[start:stop] = list(block)
    return images


def _read_chair(member, weights):
    """One PNG of 600 x 600 → (64, 64) uint8."""
    import pygame

    name, path, offset, size = member
    if not path.is_file():  # to open a pipe could take for ever
        raise ValueError(f"{name!r} is not a file")
    size = path.stat().st_size if size is None else size
    if size > MAX_PNG_BYTES:
        raise ValueError(f"{name!r} has {size} bytes, more than an image of 600 x 600 takes")
    with open(path, "rb") as file:
        file.seek(offset)
        png = file.read(size)
    try:
        _check_png(png)
        picture = pygame.image.load(io.BytesIO(png), "chair.png")
    except (ValueError, pygame.error) as error:
        raise ValueError(f"{name!r}: {error}") from error
    # Whatever the PNG is (gray, palette, RGB, transparent), this makes it RGB on white.
    page = pygame.Surface((600, 600), 0, 32)
    page.fill("white")
    page.blit(picture, (0, 0))
    rgb = pygame.surfarray.pixels3d(page)  # (x, y, channel)
    # Luma of ITU-R BT.601, the usual gray; the paper does not say how it made one channel.
    gray = sum(rgb[..., i] * np.float32(w) for i, w in enumerate((0.299, 0.587, 0.114)))
    return np.rint(weights @ gray.T @ weights.T).astype(np.uint8)  # .T: rows are y


def _check_png(png):
    """ValueError unless these bytes are a whole PNG of 600 x 600, each checksum right.

    The decoder checks too, but prints to stderr, and would ask for any memory that it is told."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError("not a PNG image")
    position, kind = 8, b""
    while kind != b"IEND":  # chunks: length, kind, data, checksum of kind and data
        end = position + 8 + int.from_bytes(png[position : position + 4], "big")
        chunk, check = png[position + 4 : end], png[end : end + 4]
        if len(check) < 4 or zlib.crc32(chunk) != int.from_bytes(check, "big"):
            raise ValueError("the PNG image is cut short or damaged")
        kind, position = chunk[:4], end + 4
    width, height = struct.unpack(">II", png[16:24])
    if (width, height) != (600, 600):
        raise ValueError(f"{width} x {height} pixels; the official images have 600 x 600 (for "
                         "other images, pass an .npz)")


def area_weights(size, smaller):
    """(smaller, size) float32, rows sum to 1: each output pixel averages what it covers.

    An exact box filter where `size` is no multiple of `smaller`: 600 / 64 = 9.375."""
    step, left = size / smaller, np.arange(size)
    start = np.arange(smaller)[:, None] * step
    covered = np.minimum(left + 1, start + step) - np.maximum(left, start)
    return (covered.clip(0) / step).astype(np.float32)


# ---------------------------------------------------------------------------------------------
# 3D Object-in-Room, drawn (Kim & Mnih, 2018; appendix A.3 of the paper)
#
# The official 480,000 images are a grid over six factors, and no picture needs more than a few
# rays against planes, a box, a cylinder and spheres. What follows is a look-alike of them: camera,
# room, lights and shapes were fitted to published pictures. Mean absolute differences, in [0, 1]:
# from 53 frames of the published gif 0.008 (worst frame 0.014), from 50 frames of the published
# notebook, whose colors are truer, 0.023 (worst 0.031). It is not the official file bit by bit
# (which `load_file` reads).
#
# Lengths are in heights of the camera above the floor. x runs to the right along the back wall,
# y up from the floor, z into the room; the object stands at (0, 0, 0). The camera circles the axis
# x = z = 0 and looks horizontally at it, the lamp hangs still. What a ray meets does not depend on
# hues: we trace once for each of the 8 x 4 x 15 scales, shapes and orientations, and paint all
# images from the result. The paper tells the factors and their numbers; all else is measured.
# ---------------------------------------------------------------------------------------------

SAMPLES = 3  # rays per pixel are SAMPLES x SAMPLES, averaged: anti-aliasing
FOCAL, HORIZON = 71.0, 32.30  # pixels; the horizon counted from the top edge of the image
ORBIT = 3.51  # from the axis to the camera
WALL_X, WALL_Z, WALL_HEIGHT = 4.88, 5.0, 2.75  # axis to side walls, to back wall; floor to top
SCALES = [0.75 + 0.5 * k / 7 for k in range(8)]  # of the object
ANGLES = [-30 + 60 * k / 14 for k in range(15)]  # degrees; at positive ones the camera is at x > 0
# Shapes at scale 1: half width (radius), half height. Order of the official file.
CUBE, CYLINDER, SPHERE, CAPSULE = range(4)
EXTENT = {CUBE: (0.476, 0.476), CYLINDER: (0.529, 0.506), SPHERE: (0.574, 0.574),
          CAPSULE: (0.438, 0.880)}
SKY = (153 / 255, 226 / 255, 249 / 255)
LAMP = (-2.06, 10.05, 0.83)  # a spotlight that shines straight down: cos(angle)^FALLOFF
FALLOFF = 10
# A hue's brightness: everywhere, + from a light that shines along the camera's axis, + from the
# lamp. Above 1 it saturates, as in the official images. Walls and floor have a faint texture.
AMBIENT, FRONT, SPOT = 0.358, 0.592, 1.011
GLOSS = 0.114  # white, added wherever the object faces the lamp, whatever the angle


def draw_objects(factors):
    """3D Object-in-Room: factor classes (N, 6) → images (N, 64, 64, 3) float32 in [0, 1].

    factors: integer tensor; its columns, in the order of the official file, are floor hue, wall
        hue, object hue (10 classes each: hue k/10 at full saturation and value), scale (8, of
        0.75 to 1.25), shape (4: cube, cylinder, sphere, capsule) and orientation (15, of -30 to
        30 degrees). The images are on its device; height, width, RGB is the order of the file.

    The first call on a device traces the rays (some seconds, 63 MB kept); each further one only
    paints. ValueError for a wrong dtype or shape, or on the CPU for a class out of range.

    The paper speaks of "a continuous set of hues in the range [0.0, 0.9]", and of 480,000 images
    with 10 hues for each part: these are the 10 of the official file, 0, 0.1, ... 0.9."""
    check_classes(factors, Objects.factor_sizes)
    return _paint(factors.long()).permute(0, 2, 3, 1)


class Objects:
    """3D Object-in-Room, drawn on the device: see `draw_objects`. No file, no download."""

    name, size, channels, height, width = "objects", 480_000, 3, 64, 64
    on_device = True  # `sample` never waits for the host
    factor_names = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
    factor_sizes = (10, 10, 10, 8, 4, 15)

    def __init__(self, device="cpu"):
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        _object_tables(self.device)  # now, so that `sample` can be captured in a CUDA graph

    def __len__(self):
        return self.size

    def draw(self, factors):
        """Integer factor classes (N, 6) → (N, 3, 64, 64) float32 in [0, 1]."""
        check_classes(factors, self.factor_sizes)
        return _paint(factors.to(self.device, torch.int64))

    def sample(self, n, generator):
        """n images drawn uniformly from the grid, with replacement → (n, 3, 64, 64) float32.

        generator: a torch.Generator on the data set's device; nothing else is random here."""
        columns = [torch.randint(size, (n,), generator=generator, device=self.device)
                   for size in self.factor_sizes]
        return self.draw(torch.stack(columns, 1))


def _paint(factors):
    """Valid factor classes (N, 6) int64 → (N, 3, 64, 64) float32 in [0, 1]."""
    if len(factors) > 32 and factors.device.type == "cpu":  # what stays in the cache is faster
        return torch.cat([_paint(block) for block in factors.split(32)])
    maps, hues, sky = _object_tables(factors.device)
    scale, shape, orientation = factors[:, 3:].unbind(1)
    maps = maps[(scale * 4 + shape) * 15 + orientation]  # (N, 8, 64, 64)
    image = maps[:, :1] * sky  # (N, 3, 64, 64)
    for share, column in ((1, 1), (3, 0), (5, 2)):  # wall, floor, object
        color = hues[factors[:, column]][:, :, None, None] * maps[:, share + 1, None]
        if column == 2:
            color += maps[:, 7:]  # gloss
        image += torch.minimum(color, maps[:, share, None])
    return image


@functools.cache
def _object_tables(device):
    """maps (480, 8, 64, 64), the 10 hues as RGB (10, 3), and the sky (3, 1, 1), on the device.

    maps hold per pixel: 0 the share of it that is sky; 1 the share that is wall, 2 the mean
    brightness there x share; 3, 4 the same for the floor; 5, 6 for the object; 7 the gloss on it.
    A pixel is sky · share + Σ_part min(hue · brightness (+ gloss), share): parts saturate."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small steps: on a busy machine threads wait for one another
    try:
        rooms = [_Room(angle) for angle in ANGLES]
        maps = torch.stack([_trace(room, shape, scale)
                            for scale in SCALES for shape in range(4) for room in rooms])
    finally:
        torch.set_num_threads(threads)
    hues = torch.tensor([colorsys.hsv_to_rgb(k / 10, 1, 1) for k in range(10)])
    sky = torch.tensor(SKY)[:, None, None]
    return tuple(table.to(device, torch.float32) for table in (maps, hues, sky))


class _Room:
    """The empty room as seen at one orientation, by P = (64 · SAMPLES)² rays in rows."""

    def __init__(self, angle):
        sin, cos = math.sin(math.radians(angle)), math.cos(math.radians(angle))
        grid = (torch.arange(64 * SAMPLES) + 0.5) / SAMPLES
        right, up = (grid - 32) / FOCAL, (HORIZON - grid[:, None]) / FOCAL
        x, y, z = torch.broadcast_tensors(cos * right - sin, up, sin * right + cos)
        self.axis = _column(-sin, 0, cos)  # where the camera looks
        self.origin = _column(0, 1, 0) - ORBIT * self.axis  # (3, 1)
        self.ray = torch.stack([x, y, z]).flatten(1)  # (3, P)
        x, y, z = self.ray
        # A ray ends at one of the walls, unless it meets the floor before.
        to_x = (x.sign() * WALL_X - self.origin[0]) / x
        to_z = (z.sign() * WALL_Z - self.origin[2]) / z
        to_floor = torch.where(y < 0, -1 / y, torch.inf)
        self.distance = torch.minimum(torch.minimum(to_x, to_z), to_floor)  # in lengths of `ray`
        self.point = self.origin + self.distance * self.ray
        self.is_floor = self.distance == to_floor
        self.is_wall = ~self.is_floor & (self.point[1] < WALL_HEIGHT)
        side = ~self.is_floor & (to_x < to_z)
        back = ~self.is_floor & ~side
        normal = torch.stack([-x.sign() * side, self.is_floor.float(), -z.sign() * back])
        head_on, facing, lamp = _shine(self.point, normal, self.axis)
        # Walls and floor have the same faint pattern; `along` runs to the right on each wall.
        along = torch.where(side, -x.sign() * self.point[2], self.point[0])
        along = torch.where(self.is_floor, self.point[2], along)
        height = torch.where(self.is_floor, self.point[0], self.point[1])
        pattern = _pattern(along, height, self.is_wall)
        self.light = (AMBIENT + FRONT * head_on + SPOT * lamp) * pattern
        self.shadow = (AMBIENT + FRONT * head_on) * pattern


def _trace(room, shape, scale):
    """Put the object into the room → (8, 64, 64), see `_object_tables`."""
    t, normal = _meet(shape, scale, room.origin, room.ray)
    is_object = t < room.distance
    is_floor, is_wall = room.is_floor & ~is_object, room.is_wall & ~is_object
    # The floor alone is in shadow: shapes are convex, and the lamp is above the walls, inside.
    lamp, room_light = _column(*LAMP), room.light.clone()
    reached, _ = _meet(shape, scale, lamp, room.point[:, is_floor] - lamp)
    room_light[is_floor] = torch.where(reached < 1, room.shadow[is_floor], room.light[is_floor])
    point = room.origin + t[is_object] * room.ray[:, is_object]
    head_on, facing, spot = _shine(point, normal[:, is_object], room.axis)
    light, gloss = torch.zeros_like(t), torch.zeros_like(t)
    light[is_object] = AMBIENT + FRONT * head_on + SPOT * spot
    # Where the lamp's side ends, the official pictures fade within a few degrees.
    gloss[is_object] = GLOSS * (facing * 18 + 0.8).clamp(0, 1)
    is_sky = ~(is_wall | is_floor | is_object)
    layers = torch.stack([is_sky, is_wall, is_wall * room_light, is_floor, is_floor * room_light,
                          is_object, light, gloss])
    layers = layers.unflatten(1, (64 * SAMPLES, 64 * SAMPLES))
    return torch.nn.functional.avg_pool2d(layers, SAMPLES)


def _column(x, y, z):
    return torch.tensor([[x], [y], [z]], dtype=torch.float32)


def _shine(point, normal, axis):
    """Points and normals (3, P) → how bright each light is there, (P,) each.

    head_on: the camera's own light. facing: the cosine under which the lamp is seen, negative
    behind. lamp: its light where nothing blocks it."""
    to_lamp = _column(*LAMP) - point
    to_lamp = to_lamp / to_lamp.norm(dim=0)
    head_on, facing = -(normal * axis).sum(0), (normal * to_lamp).sum(0)
    return head_on.clamp(min=0), facing, facing.clamp(min=0) * to_lamp[1] ** FALLOFF


def _meet(shape, scale, origin, ray):
    """Where origin + t · ray enters the object → t (inf where it misses) and the normal there."""
    radius, half = (scale * length for length in EXTENT[shape])
    center = _column(0, half, 0)
    if shape == CUBE:  # inside of three slabs at once
        near = (-ray.sign() * radius - (origin - center)) / ray
        far = (ray.sign() * radius - (origin - center)) / ray
        t, side = near.max(0)
        normal = -ray.sign() * (side == _column(0, 1, 2))
        return torch.where(t < far.amin(0), t, torch.inf), normal
    # The round ones are a cylinder along y, closed by a disc, or by half spheres. A sphere is one
    # without a cylinder in between. The bottom of a cylinder is never seen.
    flat = _column(1, 0, 1)
    body = half if shape == CYLINDER else half - radius
    t = _solve((origin - center) * flat, ray * flat, radius)
    t = torch.where((origin[1] + t * ray[1] - half).abs() <= body, t, torch.inf)
    normal = (origin + t * ray) * flat / radius
    if shape == CYLINDER:
        lid = (2 * half - origin[1]) / ray[1]
        inside = (((origin + lid * ray) * flat) ** 2).sum(0) < radius**2
        cap = [(torch.where(inside, lid, torch.inf), _column(0, 1, 0))]
    else:
        cap = []
        for height in (radius, 2 * half - radius):
            offset = origin - _column(0, height, 0)
            there = _solve(offset, ray, radius)
            cap.append((there, (offset + there * ray) / radius))
    for there, its_normal in cap:
        normal = torch.where(there < t, its_normal, normal)
        t = torch.minimum(t, there)
    return t, normal


def _solve(offset, ray, radius):
    """The smaller t with |offset + t · ray| = radius, inf if there is none."""
    a, b = (ray * ray).sum(0), (offset * ray).sum(0)
    square = b * b - a * ((offset * offset).sum(0) - radius**2)
    return torch.where(square > 0, -(b + square.clamp(min=0).sqrt()) / a, torch.inf)


def _pattern(along, height, is_wall):
    """Brightness of the texture, about 1: hexagons of 2 %, and on walls a darker patch per tile."""
    k = 2 * math.pi * 1.82
    hexagons = (2 * k * along).cos() + 2 * (k * along).cos() * (1.63 * k * (height - 0.05)).cos()
    a = (along - 0.28 + WALL_HEIGHT / 2) % WALL_HEIGHT - WALL_HEIGHT / 2  # a tile is a square
    b = height - 1.37
    patch = 1 - ((0.6 * a - 0.8 * b) / 0.72) ** 2 - ((0.8 * a + 0.6 * b) / 0.30) ** 2
    return 0.983 + 0.008 * hexagons - 0.045 * is_wall * (2 * patch).clamp(0, 1)


def preview(path):
    """Writes a picture of 3D Object-in-Room: a row for each factor, the others fixed."""
    from matplotlib.figure import Figure  # not pyplot: opens no window

    data, base = Objects(), torch.tensor([0, 6, 3, 5, 0, 3])
    figure = Figure(figsize=(13, 5), dpi=100)
    rows = figure.subplots(len(base), max(data.factor_sizes), gridspec_kw=dict(wspace=0.03, hspace=0.03))
    for axes in rows.flat:
        axes.set_axis_off()
    for column, (name, row) in enumerate(zip(data.factor_names, rows, strict=True)):
        factors = base.repeat(data.factor_sizes[column], 1)
        factors[:, column] = torch.arange(len(factors))
        for axes, image in zip(row, data.draw(factors), strict=False):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        row[0].text(-8, 32, name, ha="right", va="center")
    with atomic(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight")


def main(argv):
    if len(argv) != 1:
        print("error: give the picture of 3D Object-in-Room to draw: python datasets.py PICTURE.png", file=sys.stderr)
        return 2
    try:
        preview(argv[0])
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":  # python datasets.py results/objects.png
    sys.exit(main(sys.argv[1:]))
