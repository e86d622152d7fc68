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

import errno
import hashlib
import io
import math
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

CHUNK_BYTES = 8 << 20  # files are read in pieces of about this size
MAX_SMALL_BYTES = 1 << 30  # no array but the images may be larger than this
MAX_PNG_BYTES = 16 << 20  # a raw 600 x 600 RGBA image has 1.4 MB
CACHE_VERSION = 1  # raise it when the content of cache files changes
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
    path, device = Path(path).expanduser(), torch.device(device)
    try:
        if not path.exists():
            raise FileNotFoundError("no such file or folder")
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
        raise kind(" ".join(f"{path}: {text}".split())) from error


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
    """Bytes of memory that are free on a device, or on the host where `device` is no GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(s.split()[1]) << 10 for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 << 30  # not Linux: `max_bytes` can tell better


def _pieces(n, step):
    """(start, stop) for n images, `step` at a time, with a progress bar if it takes long."""
    bar = tqdm(total=n, unit=" images", unit_scale=True, delay=2, mininterval=0.5, leave=False)
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
        if math.prod(shape) <= max_bytes:
            rows = _fill(_read_rows(stream, shape), shape, device)
        elif archive.getinfo("images.npy").compress_type == zipfile.ZIP_STORED:
            rows = _map_rows(path, archive.getinfo("images.npy"), stream.tell(), shape)
        else:  # compressed and too large: keep a plain copy, which can be mapped
            cache, stamp = _cache(path, cache_dir)
            if not _is_current(cache, stamp):
                more = {} if factors is None else {"factors": factors, "factor_names": names}
                _write_npz(cache, shape, _read_rows(stream, shape), source=stamp, **more)
            return _load_npz(cache, device, cache_dir, max_bytes, name or path.stem)
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("images.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for _, _, chunk in chunks:
                    member.write(chunk)
            for key, value in arrays.items():
                with archive.open(f"{key}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(value), allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        cache, stamp = _cache(path, cache_dir)
        if not _is_current(cache, stamp):
            _write_npz(cache, shape, chunks, source=stamp, factors=factors, factor_names=names)
    return _load_npz(cache, device, cache_dir, max_bytes, "3dshapes")


# ---------------------------------------------------------------------------------------------
# Chairs: 1,393 models x 62 views = 86,366 PNG images of 600 x 600 on white (Aubry et al., 2014)
# ---------------------------------------------------------------------------------------------

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
    cache, stamp = _cache(path, cache_dir, files)
    if not _is_current(cache, stamp):
        if members is None:
            members = _list_tar(path)
        # Sorted by name, that is by model, elevation, azimuth: a tar and its folder agree.
        found = sorted((m.groups(), member) for member in members
                       if (m := CHAIR.fullmatch(member[0].replace(os.sep, "/"))))
        if not found:
            raise ValueError("holds no <model>/renders/image_*_p*_t*_r*.png of the chairs")
        ids = {model: i for i, model in enumerate(sorted({m[0] for m, _ in found}))}
        factors = np.array([(ids[m], int(p), int(t)) for (m, _, p, t), _ in found], np.int32)
        # All in memory before a file is begun: a pass that is killed leaves nothing behind.
        images = _read_chairs([member for _, member in found])
        names = ("model", "elevation", "azimuth")
        _write_npz(cache, images.shape, [(0, len(images), images)], source=stamp,
                   factors=factors, factor_names=names)
    return _load_npz(cache, device, cache_dir, max_bytes, "chairs")


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
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame

    name, path, offset, size = member
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
        end = position + 8 + int.from_bytes(png[position : position + 4])
        chunk, check = png[position + 4 : end], png[end : end + 4]
        if len(check) < 4 or zlib.crc32(chunk) != int.from_bytes(check):
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
