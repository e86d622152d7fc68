"""Speed of the broadcast convolution: `python -m kernels.bench [--device cuda] [--out results]`.

Every implementation is first compared with float64; one that is wrong is not timed and the exit
code is 1. Then, per shape and dtype, forward alone, backward alone (gradients of z, weight, bias)
and both: the median and the 20 % and 80 % quantiles of the time, GB/s, and that as a share of the
bandwidth of `copy_` of an equally large tensor on the same device in the same run.

GB/s counts the bytes no implementation can avoid: the output written once, and in the backward pass
its gradient read once. A copy's GB/s counts its read and its write. Peak memory is what the call
allocates on top of its inputs (GPU only). On a GPU a buffer larger than the L2 cache is written
before each repetition, so that nothing is read from cache; times are between CUDA events.
`--graph` times replays of a CUDA graph, without the cost of launching. `--set NAME=VALUE` changes a
constant of broadcast_conv.py (_BLOCK, _BACKWARD_TILE, _PIXELS, _CHANNELS, _PROGRAMS, _MAX_IMAGES),
to tune it on a new GPU. `--step` times whole training steps instead (see step.py). kernels/gpu.sh
runs all of it.

Results go to results/kernel_<device>.csv and .md.
"""

import argparse
import csv
import functools
import gc
import io
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kernels import broadcast_conv, broadcast_conv2d, coordinates

# name: batch, latents, coordinate channels, output channels, height, width, kernel, padding
SHAPES = {
    "paper-16": (16, 10, 2, 64, 64, 64, 4, "same"),  # Watters et al. 2019, Table 1
    "paper-32": (32, 10, 2, 64, 64, 64, 4, "same"),
    "paper-256": (256, 10, 2, 64, 64, 64, 4, "same"),
    "monet": (448, 16, 2, 32, 72, 72, 3, "valid"),  # Burgess et al. 2019: 64 images x 7 slots
    "iodine": (28, 64, 2, 64, 128, 128, 3, "same"),  # Greff et al. 2019: 4 images x 7 slots
    "slots": (384, 64, 4, 32, 64, 64, 5, "same"),  # Locatello et al. 2020: 64 images x 6 slots
    "8x8": (64, 64, 4, 64, 8, 8, 5, "same"),  # too small to win
}
QUICK = ("paper-16", "8x8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIELDS = ["shape", "dtype", "layout", "pass", "implementation", "ms", "ms_20", "ms_80"]
FIELDS += ["gb_per_s", "share_of_copy", "peak_mb", "speedup"]  # speedup over the reference


def inputs(shape, dtype, device):
    """z, coords, weight, bias."""
    batch, latents, maps, channels, height, width, k, _ = shape
    g = torch.Generator().manual_seed(0)
    coords = coordinates(height, width)
    coords = torch.cat([coords, -coords])[:maps]
    weight = torch.randn(channels, latents + maps, k, k, generator=g) / (latents + maps) ** 0.5 / k
    bias = torch.randn(channels, generator=g) / 10
    tensors = torch.randn(batch, latents, generator=g), coords, weight, bias
    return [t.to(device, dtype) for t in tensors]


def implementations(args):
    """name -> (backend, compiled or not); the reference first."""
    names = {"reference": ("reference", False), "torch": ("torch", False)}
    if args.compile:
        names |= {"reference compiled": ("reference", True), "torch compiled": ("torch", True)}
    if args.device == "cuda":
        names |= {"triton": ("triton", False)}
    return names


def layer(backend, compiled, padding, layout):
    def run(z, coords, weight, bias):
        return broadcast_conv2d(
            z, coords, weight, bias, padding, "relu", backend=backend, out_format=layout
        )

    return torch.compile(run, fullgraph=True, dynamic=False) if compiled else run


def wrong(run, shape, dtype, device, layout):
    """None, or in words how a result is off by more than PyTorch's own error allows."""
    shape = (min(shape[0], 8), *shape[1:])
    tensors = inputs(shape, dtype, device)

    def results(function, tensors):
        tensors = [t.detach().requires_grad_(i != 1) for i, t in enumerate(tensors)]
        out = function(*tensors)
        g = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=g).to(dtype).to(out)
        wanted = [t for t in tensors if t.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]

    reference = layer("reference", False, shape[-1], layout)
    right = results(reference, [t.double() for t in tensors])
    plain = results(reference, tensors)
    for name, a, p, r in zip(
        ("output", "z's", "weight's", "bias's"), results(run, tensors), plain, right, strict=True
    ):
        # as in the tests: twice PyTorch's error plus one ulp, four for gradients
        ulps = torch.finfo(dtype).eps * r.abs().max() * (1 if name == "output" else 4)
        error, allowed = (a.double() - r).abs().max(), 2 * (p.double() - r).abs().max() + ulps
        if not error <= allowed:  # also when it is NaN
            return f"{name} error {error:.3g}, allowed {allowed:.3g}"
    return None


def timed(function, device, seconds, graph=False):
    """(median, 20 %, 80 %) in ms, and the peak of allocated MB above the start."""
    for _ in range(3):
        function()
    if device != "cuda":
        times, stop = [], time.perf_counter() + seconds
        while len(times) < 7 or time.perf_counter() < stop:
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e3)
        return *quantiles(times), float("nan")
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - start) / 2**20
    if graph:
        captured = torch.cuda.CUDAGraph()
        gc.collect()  # autograd nodes of the calls before, which would draw their stream into the capture
        with torch.cuda.graph(captured):
            function()
        function = captured.replay
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than any L2
    times, spent = [], 0.0
    while len(times) < 20 or spent < seconds * 1e3:
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(20)]
        for begin, end in events:
            flush.zero_()
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize()
        times += [begin.elapsed_time(end) for begin, end in events]
        spent = sum(times) + 0.1 * len(times)
    return *quantiles(times), peak


def quantiles(times):
    cuts = statistics.quantiles(times, n=10)
    return statistics.median(times), cuts[1], cuts[7]


def copy_bandwidth(numbers, dtype, device, seconds):
    """GB/s of `copy_` between two tensors of that many values, reads and writes counted."""
    source = torch.zeros(numbers, dtype=dtype, device=device)
    target = torch.empty_like(source)
    ms = timed(lambda: target.copy_(source), device, seconds)[0]
    return 2 * source.numel() * source.element_size() / ms / 1e6


def passes(run, tensors, graph):
    """The timed calls: forward without autograd, backward for a given gradient, and both."""
    leaves = [t.detach().requires_grad_(i != 1) for i, t in enumerate(tensors)]
    wanted = [t for t in leaves if t.requires_grad]
    with torch.no_grad():
        upstream = torch.randn_like(run(*tensors))

    def forward():
        with torch.no_grad():
            run(*tensors)

    calls = {"forward": forward}
    if not graph:  # a graph must hold the forward pass of the backward pass that it holds
        out = run(*leaves)
        calls["backward"] = lambda: torch.autograd.grad(out, wanted, upstream, retain_graph=True)
    calls["both"] = lambda: torch.autograd.grad(run(*leaves), wanted, upstream)
    return calls


def measure(run, tensors, shape, dtype, layout, args):
    """Size of the output and {pass: what `timed` returns}. Raises ValueError for a wrong result."""
    reason = wrong(run, shape, dtype, args.device, layout)
    if reason:
        raise ValueError(reason)
    torch.compiler.reset()
    with torch.no_grad():
        size = run(*tensors).numel()
    calls = passes(run, tensors, args.graph)
    return size, {k: timed(f, args.device, args.seconds, args.graph) for k, f in calls.items()}


def bench_layer(args, rows, save):
    """Fill `rows`, saved shape by shape; return the number of implementations that were wrong or
    failed, which costs their own rows only (the reference's: its shape's, as all are held to it)."""
    failures = 0
    for name in args.shapes:
        shape = SHAPES[name]
        for dtype_name in args.dtypes:
            dtype = DTYPES[dtype_name]
            for layout in args.layouts:
                tensors, base, copy = inputs(shape, dtype, args.device), {}, None
                for label, (backend, compiled) in implementations(args).items():
                    torch.compiler.reset()
                    run = layer(backend, compiled, shape[-1], layout)
                    try:
                        size, times = measure(run, tensors, shape, dtype, layout, args)
                        copy = copy or copy_bandwidth(size, dtype, args.device, args.seconds)
                    except Exception as e:  # a compiler's, too: the others are measured all the same
                        failures += 1
                        what = f"{name} {dtype_name} {layout} {label}"
                        print(f"FAILED {what}: {type(e).__name__}: {e}", flush=True)
                        continue
                    for key, (ms, low, high, peak) in times.items():
                        if label == "reference":
                            base[key] = ms
                        necessary = size * dtype.itemsize * (2 if key == "both" else 1)
                        rate = necessary / ms / 1e6
                        rows.append(
                            (name, dtype_name, layout, key, label, ms, low, high, rate, rate / copy)
                            + (peak, base.get(key, math.nan) / ms)
                        )
                        print(markdown_row(rows[-1]), flush=True)
                save()  # compiling takes long: who stops it keeps what there is
    return failures


def decoder_line(args):
    """Whole decoder of Table 1 (B=16, 3 colours), forward + backward, by first layer: a line, and
    how many failed."""
    dtype, layout = DTYPES[args.dtypes[0]], args.layouts[0]
    shape = SHAPES["paper-16"]
    memory_format = {"contiguous": torch.contiguous_format}.get(layout, torch.channels_last)
    convs = [nn.Conv2d(64, 64, 4), nn.Conv2d(64, 3, 4)]
    rest = nn.ModuleList(convs).to(args.device, dtype, memory_format=memory_format)
    tensors = inputs(shape, dtype, args.device)
    leaves = [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]
    wanted = [t for t in leaves if t.requires_grad] + list(rest.parameters())
    times, failures = {}, 0
    for label, (backend, compiled) in implementations(args).items():
        first = layer(backend, compiled, "same", layout)

        def step(first=first):
            h = first(*leaves)
            h = rest[0](F.pad(h, (1, 2, 1, 2))).relu()
            out = rest[1](F.pad(h, (1, 2, 1, 2)))
            torch.autograd.grad(out, wanted, torch.ones_like(out))

        try:
            times[label] = timed(step, args.device, args.seconds)[0]
        except Exception as e:  # as above
            failures += 1
            print(f"FAILED decoder {label}: {type(e).__name__}: {e}", flush=True)
    slowest = times.get("reference", math.nan)
    parts = [f"{label} {ms:.3g} ms ({slowest / ms:.2f} x)" for label, ms in times.items()]
    precision = f"{args.dtypes[0]}, {layout}"
    line = f"Decoder of Table 1, B = 16, {precision}, forward + backward: " + ", ".join(parts)
    return line + "not measured" * (not parts), failures


def markdown_row(row):
    ms = [f"{v:.4g}" for v in row[5:8]]
    peak = "" if math.isnan(row[10]) else f"{row[10]:.4g}"
    rest = [f"{row[8]:.4g}", f"{row[9]:.0%}", peak, f"{row[11]:.3g}"]
    return "| " + " | ".join([*row[:5], *ms, *rest]) + " |"


def write(path, text):
    """Whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_text(text, newline="")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    units = torch.backends.cpu.get_cpu_capability()  # many a virtual machine tells no more of its CPU
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():  # private to torch, which may drop it
        units += " and AMX"
    return f"{name}, {units}, {torch.get_num_threads()} threads"


def commit():
    """["commit <hash>"], [] where there is none or kernels/ was copied alone."""
    try:
        from sbvae import versions
    except ImportError:
        return []
    told = versions()["commit"]
    return [f"commit {told}"] if told else []


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all; on a CPU two")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--layouts", nargs="+", default=["contiguous", "channels_last"],
        choices=("contiguous", "channels_last"),
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement (default 0.3)")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    parser.add_argument("--step", action="store_true", help="time whole training steps (step.py)")
    parser.add_argument("--replicas", type=int, nargs="+", default=[], metavar="N", help="with --step")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="see above")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    parser.add_argument("--out", default="results", help="folder of the tables (default results)")
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if cuda else "cpu")
    if args.device == "cuda" and not cuda:
        parser.exit(2, "error: --device cuda, but PyTorch finds no GPU; use --device cpu\n")
    args.graph = args.graph and args.device == "cuda"
    for setting in args.set:
        name, _, value = setting.partition("=")
        if not isinstance(getattr(broadcast_conv, name, None), int) or not value.isdigit():
            parser.exit(2, f"error: --set {setting}: not NAME=VALUE with a constant and an int\n")
        setattr(broadcast_conv, name, int(value))
    args.shapes = args.shapes or list(SHAPES if args.device == "cuda" else QUICK)

    # float32 is meant: TensorFloat-32 would make the reference faster and wrong
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    name = device_name(args.device)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    header = "; ".join([name, versions, *commit(), *["CUDA graphs"] * args.graph, *args.set])
    slug = "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    if args.step:
        from kernels import step

        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        step.main(args, header, functools.partial(write, out / f"step_{slug}.md"))
        print(f"wrote {out}/step_{slug}.md")
        return 0
    columns = "| " + " | ".join(FIELDS) + " |\n|" + "---|" * len(FIELDS)
    print(header + "\n\n" + columns, flush=True)
    rows, out = [], Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"kernel_{slug}" + ("_graph" if args.graph else "")

    def save(line="stopped before its end"):
        table = [columns, *(markdown_row(row) for row in rows)]
        write(out / f"{stem}.md", "\n".join([header, "", *table, "", line, ""]))
        text = io.StringIO(newline="")
        csv.writer(text).writerows([FIELDS, *rows])
        write(out / f"{stem}.csv", text.getvalue())

    failures = bench_layer(args, rows, save)
    line, more = decoder_line(args)
    print("\n" + line)
    save(line)
    print(f"wrote {out / stem}.csv and .md")
    return 1 if failures + more else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # rows measured so far are written
        sys.exit(130)
