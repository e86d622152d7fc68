"""Speed of whole training steps: `python -m kernels.bench --step [--device cuda] [--out results]`.

One rung at a time from the plain way (fp32, NCHW, tile + concatenate + convolve, Adam without
fusion) to what `python sbvae.py` does by itself, and further to --cuda-graph on a GPU and to
--compile, which on a CPU is a step back: the data drawn, encoder, decoder, loss, backward
pass, Adam; for FactorVAE the discriminator too. All rungs are timed in turn, step by step, in one
run, so that a machine that slows down slows all of them; given are the median and the 20 % and 80 %
quantiles. `python sbvae.py` is a process of its own, as it keeps the memory that a step frees. On a
GPU a step ends with a synchronisation, but for the rung that replays a CUDA graph, which is also
timed as it is used: many replays, one wait.

The floor is what no plain implementation of these layers can avoid: the multiply-adds of the
convolutions and linear layers, without the first layer after the tile, which needs next to none
(see broadcast_conv.py), at the rate of a large matrix product in the same precision on the same
device in the same run; and the activations written and read once per pass, at the rate of `copy_`.
In fp32 on a CPU same_conv.py needs fewer and goes below: then a layer has more than 100% of the
rate. The split by layer times each convolution by itself, forward and backward; on a GPU that
includes its launch, so that little may be left for all else. `--replicas` trains several seeds at
once, each in a process of its own, and sums up their steps; on a GPU also in one process, each on a
stream of its own.

Results go to results/step_<device>.md. Needs sbvae.py beside kernels/.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

MODELS = {"broadcast": {}, "deconv": dict(decoder="deconv"), "FactorVAE": dict(model="factorvae")}
LAST, FIRST = torch.channels_last, torch.contiguous_format


def rungs(device, precision, broadcast):
    """label -> layout, which of kernels/, precision, and what else is used; each adds one thing."""
    naive = dict(layout=FIRST, kernel=False, same=False, precision="fp32", fused=False, graph=False,
                 compile=False)
    if device == "cpu":
        ladder = [("kernel", dict(kernel=True)), ("fused Adam", dict(fused=True))]
        if broadcast:  # channels last pays together with fewer multiplications, or with bf16
            ladder += [("same_conv, channels last", dict(same=True, layout=LAST))]
        ladder += [("bf16, channels last", dict(precision="bf16", layout=LAST))] * (precision == "bf16")
    else:
        ladder = [("channels last", dict(layout=LAST)), ("kernel", dict(kernel=True)), ("fused Adam", dict(fused=True)),
                  ("tf32", dict(precision="tf32")), ("bf16", dict(precision="bf16")),
                  ("CUDA graph", dict(graph=True))]
    ladder += [("torch.compile", dict(compile=True))]
    found = {"naive": naive}
    for name, change in ladder:
        naive = naive | change
        found["+ " + name] = naive
    return found


@contextlib.contextmanager
def settings(sbvae, kernel, precision, same=False, **_):
    """As `sbvae.train` sets them for this rung; without kernels/ it tiles, concatenates and convolves."""
    saved = sbvae.broadcast_conv2d, sbvae.same_conv2d
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    sbvae.broadcast_conv2d, sbvae.same_conv2d = saved[0] if kernel else None, saved[1] if same else None
    try:
        yield
    finally:
        sbvae.broadcast_conv2d, sbvae.same_conv2d = saved


def make_step(sbvae, config, device, rung):
    """-> a function that trains one step, in the state that a few warm-up steps leave."""
    config = sbvae.dataclasses.replace(config, precision=rung["precision"])
    model = sbvae.build_model(config).to(device, memory_format=rung["layout"])
    adam = functools.partial(torch.optim.Adam, fused=rung["fused"], capturable=rung["graph"],
                             foreach=None if rung["fused"] else False)
    parts = dict(model=model, optimizer=adam(model.parameters(), lr=config.lr))
    if config.model == "factorvae":
        discriminator = sbvae.build_discriminator(config.latents).to(device)
        parts |= dict(discriminator=discriminator, d_optimizer=adam(discriminator.parameters(), lr=2e-5))
    data, generator = sbvae.load_dataset(config.dataset, device), torch.Generator(device).manual_seed(0)
    with settings(sbvae, **rung):
        if rung["compile"]:
            parts["loss_function"] = sbvae.compile_parts(config, data, model, parts.get("discriminator"))
        step = functools.partial(sbvae.training_step, config, data, generator, **parts)
        with contextlib.ExitStack() as stream:
            if rung["graph"]:  # as in sbvae.train
                torch.cuda.synchronize()
                stream.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            for _ in range(4):
                step()
            if rung["graph"]:
                step, how = sbvae.capture(step, generator)
                if "none" in how:
                    raise RuntimeError(how)
    return step


def ladder(sbvae, config, device, precision, seconds):
    """-> rows (label, ms, 20 %, 80 %, steps/s, x naive) of one model."""
    from kernels.bench import quantiles

    found, steps, times = rungs(device, precision, config.decoder == "broadcast"), {}, {}
    for label, rung in found.items():
        try:
            steps[label] = make_step(sbvae, config, device, rung)
        except (RuntimeError, sbvae.InputError) as e:
            print(f"{label}: not run ({' '.join(str(e).split())[:200]})", flush=True)
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds * len(steps) or len(next(iter(times.values()))) < 7:
        for label, step in steps.items():
            with settings(sbvae, **found[label]):
                start = time.perf_counter()
                for _ in range(repeats := 100 if found[label]["graph"] else 1):
                    step()
                if device != "cpu":
                    torch.cuda.synchronize()
                times.setdefault(label, []).append(1e3 * (time.perf_counter() - start) / repeats)
    rows = []
    for label, ms in times.items():
        median, low, high = quantiles(ms)
        ratio = quantiles([a / b for a, b in zip(times["naive"], ms, strict=True)])[0]
        rows.append((label, median, low, high, 1e3 / median, ratio))
    return rows


def trained(sbvae, changes, device, steps):
    """Steps per second in the log of `python sbvae.py`, a process of its own: with logging, the device's own choices,
    and memory as the program keeps it. Raises RuntimeError where it fails, and when a graph that was asked for was not
    captured."""
    with tempfile.TemporaryDirectory() as folder:
        asked = changes | dict(device=device, steps=steps, log_every=max(steps // 4, 1), out=folder + "/run")
        flags = [[sbvae.flag(name)] + [str(value)] * (value is not True) for name, value in asked.items()]
        done = subprocess.run([sys.executable, sbvae.__file__, *sum(flags, [])], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
        if asked.get("cuda_graph") and "a step is one CUDA graph" not in done.stdout:
            raise RuntimeError("no graph was captured")
        log = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    # the last interval also holds a save; the first the warm-up
    return sorted(r["images_per_s"] for r in log[1:-1])[1] / sbvae.resolve(sbvae.Config(**changes)).batch_size


def layers(sbvae, config, device, precision):
    """Each convolution and linear layer of a step -> rows (name, shape of its input, multiply-adds forward, module,
    input). The first layer after the tile counts none: it is a sum over tap classes."""
    model, rows = sbvae.build_model(config).to(device), []
    names = {module: name for name, module in model.named_modules()}
    first = "decoder.convs.0" if config.decoder == "broadcast" else ""

    def note(module, inputs, output):
        spatial = output[0, 0].numel() if output.ndim == 4 else 1
        if isinstance(module, nn.ConvTranspose2d):  # each input value meets the kernel once
            spatial = inputs[0][0, 0].numel()
        rows.append((names[module], tuple(inputs[0].shape), len(output) * spatial * module.weight.numel(), module))

    hooks = [m.register_forward_hook(note) for m in model.modules()
             if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    with torch.no_grad(), settings(sbvae, kernel=False, precision="fp32"):
        model(torch.rand(config.batch_size, *config.image_shape, device=device))
    for hook in hooks:
        hook.remove()
    return [(name, shape, 0 if name == first else macs, module) for name, shape, macs, module in rows]


def rates(device, precision, seconds):
    """(multiply-adds per ms of a large matrix product, bytes per ms of a copy): what this device can do."""
    from kernels.bench import copy_bandwidth, timed

    dtype, n = torch.bfloat16 if precision == "bf16" else torch.float32, 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    ms = timed(lambda: a @ b, device, seconds)[0]
    return n**3 / ms, copy_bandwidth(2**26 if device != "cpu" else 2**24, dtype, device, seconds) * 1e6


def split(sbvae, config, device, precision, seconds):
    """-> (rows (layer, multiply-adds, forward ms, backward ms, share of the matrix rate), floor in ms by multiply-adds,
    floor in ms by bytes, matrix rate, copy rate)."""
    from kernels.bench import timed

    rate, bandwidth = rates(device, precision, seconds)
    low = dict(device_type=device, dtype=torch.bfloat16, enabled=precision == "bf16")
    layout = sbvae.choose_layout(sbvae.dataclasses.replace(config, precision=precision), torch.device(device))
    rows, macs, size = [], 0, 0
    for name, shape, forward_macs, module in layers(sbvae, config, device, precision):
        image = name == "encoder.convs.0"  # the image needs no gradient
        passes = 2 if image else 3
        macs += passes * forward_macs
        if forward_macs == 0 or len(shape) != 4:
            continue
        module = module.to(memory_format=layout)
        x = torch.randn(shape, device=device).to(memory_format=layout)
        x = x.to(torch.bfloat16) if precision == "bf16" and not image else x
        x.requires_grad_(not image)

        def forward(module=module, x=x):
            with torch.autocast(**low):
                return module(x)

        out = forward()
        upstream = torch.randn_like(out)
        wanted = [p for p in (x, *module.parameters()) if p.requires_grad]
        size += (x.numel() + out.numel()) * 2 * x.element_size()
        ms = [timed(forward, device, seconds)[0],
              timed(lambda o=out, w=wanted, u=upstream: torch.autograd.grad(o, w, u, retain_graph=True), device,
                    seconds)[0]]
        rows.append((name, forward_macs, *ms, passes * forward_macs / rate / sum(ms)))
    return rows, macs / rate, size / bandwidth, rate, bandwidth


def replicas(device, counts, steps, changes=()):
    """Rows (processes at once, steps/s of each, of all together). On a CPU each has its share of the threads."""
    rows = []
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            threads = max(1, torch.get_num_threads() // n)
            runs = [[sys.executable, Path(__file__).resolve().parent.parent / "sbvae.py", *changes, "--seed", str(seed),
                     "--steps", str(steps), "--log-every", str(max(steps // 6, 1)), "--device", device, "--out",
                     f"{folder}/{seed}"] + ["--cuda-graph"] * (device != "cpu") for seed in range(n)]
            environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
            started = [subprocess.Popen(run, stdout=subprocess.DEVNULL, env=environment) for run in runs]
            if any([process.wait() for process in started]):
                print(f"{n} replicas: not run", flush=True)
                continue
            speeds = []
            for seed in range(n):  # the middle of the run, when all of them are at it
                log = [json.loads(x) for x in Path(folder, str(seed), "metrics.jsonl").read_text().splitlines()]
                batch = json.loads(Path(folder, str(seed), "config.json").read_text())["config"]["batch_size"]
                speeds.append(sum(r["images_per_s"] for r in log[2:-1]) / len(log[2:-1]) / batch)
        rows.append((n, threads, sum(speeds) / n, sum(speeds)))
    return rows


def streams(sbvae, config, rung, counts, seconds):
    """Rows (models at once, steps/s of all together): captured steps, replayed in turn, each on a stream of its own."""
    rows = []
    for n in counts:
        configs = [sbvae.dataclasses.replace(config, seed=seed) for seed in range(n)]
        try:
            both = [(make_step(sbvae, c, "cuda", rung), torch.cuda.Stream()) for c in configs]
        except RuntimeError as e:
            print(f"{n} on streams: not run ({' '.join(str(e).split())[:200]})", flush=True)
            break
        torch.cuda.synchronize()
        begun, steps = time.perf_counter(), 0
        while (spent := time.perf_counter() - begun) < seconds:
            for _ in range(100):
                for step, stream in both:
                    with torch.cuda.stream(stream):
                        step()
            torch.cuda.synchronize()
            steps += 100 * n
        rows.append((n, steps / spent))
    return rows


def main(args, header, save):
    """Called by kernels.bench, with its arguments: `save(markdown)` as far as it is, after each line."""
    import sbvae

    lines = [header, ""]

    def say(*text):
        lines.extend(text)
        print(*text, sep="\n", flush=True)
        save("\n".join(lines) + "\n")

    for name, changes in MODELS.items():
        config = sbvae.resolve(sbvae.Config(**changes, device=args.device, image_shape=[3, 64, 64]))
        precision = sbvae.choose_device(sbvae.dataclasses.replace(config, precision=None))[1]
        rows = ladder(sbvae, config, args.device, precision, args.seconds * 10)
        say("", f"## {name}, batch {config.batch_size}, 64 x 64 colored sprites", "",
            "| step | ms | 20% | 80% | steps/s | images/s | x naive |", "|---|---|---|---|---|---|---|")
        for label, ms, low, high, rate, ratio in rows:
            say(f"| {label} | {ms:.4g} | {low:.4g} | {high:.4g} | {rate:.4g} | {rate * config.batch_size:.4g} | "
                f"{ratio:.3g} |")
        for flags in [[]] if args.device == "cpu" else [[], ["cuda_graph"], ["cuda_graph", "compile"]]:
            steps = 200 if args.device == "cpu" else 8000 if flags else 2000
            asked, flags = dict.fromkeys(flags, True), " ".join(["python sbvae.py", *map(sbvae.flag, flags)])
            try:
                rate = trained(sbvae, changes | asked, args.device, steps)
            except RuntimeError as e:
                print(f"{flags}: not run ({e})", flush=True)
                continue
            ms = 1e3 / rate
            say(f"| `{flags}`, by its own log | {ms:.4g} | | | {rate:.4g} | "
                f"{rate * config.batch_size:.4g} | {rows[0][1] * rate / 1e3:.3g} |")
        try:
            parts, by_macs, by_bytes, flops, bandwidth = split(sbvae, config, args.device, precision, args.seconds)
        except RuntimeError as e:
            say("", f"Layer by layer: not run ({' '.join(str(e).split())[:200]})")
            continue
        say("", f"Floor in {precision}: {by_macs:.3g} ms of multiply-adds at {2 * flops / 1e9:.3g} TFLOP/s (a matrix "
            f"product here), {by_bytes:.3g} ms of activations at {bandwidth / 1e6:.4g} GB/s (a copy here). The last "
            f"row's step takes {ms:.3g} ms: {max(by_macs, by_bytes) / ms:.0%} of it is the floor.", "",
            "| layer by itself | MMAC forward | forward ms | backward ms | of the matrix rate |",
            "|---|---|---|---|---|")
        for label, macs, forward, backward, share in parts:
            say(f"| {label} | {macs / 1e6:.4g} | {forward:.3g} | {backward:.3g} | {share:.0%} |")
        rest = ms - sum(row[2] + row[3] for row in parts)
        say(f"| all else | | | {rest:.3g} | |")
    if args.replicas:
        say("", "## Replicas, each in its own process", "",
            "| at once | threads each | steps/s each | steps/s in all |", "|---|---|---|---|")
        for n, threads, each, together in replicas(args.device, args.replicas, 60 if args.device == "cpu" else 6000):
            say(f"| {n} | {threads} | {each:.4g} | {together:.4g} |")
    if args.replicas and args.device != "cpu":
        config = sbvae.resolve(sbvae.Config(device=args.device, image_shape=[3, 64, 64]))
        rung = rungs(args.device, "bf16", True)["+ CUDA graph"]
        say("", "## Replicas, each on its own stream in one process", "", "| at once | steps/s in all |", "|---|---|")
        for n, together in streams(sbvae, config, rung, args.replicas, args.seconds * 10):
            say(f"| {n} | {together:.4g} |")
