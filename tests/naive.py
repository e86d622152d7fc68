"""The broadcast VAE of Table 1 written out the plainest way: an independent reference for the tests, and the
baseline for speed. fp32, NCHW, expand + cat + conv2d, Adam without fusion.

    python tests/naive.py [--turns 12]     # steps per second of this and of sbvae.py, in turn, in one run
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sbvae  # noqa: E402


def encode(w, x):
    for i in range(4):  # k=4, s=2; even sizes: one row of zeros on each side
        x = F.relu(F.conv2d(x, w[f"encoder.convs.{i}.weight"], w[f"encoder.convs.{i}.bias"], stride=2, padding=1))
    x = F.relu(F.linear(x.flatten(1), w["encoder.mlp.0.weight"], w["encoder.mlp.0.bias"]))
    return F.linear(x, w["encoder.latents.weight"], w["encoder.latents.bias"]).chunk(2, dim=1)


def decode(w, z, height, width):
    x = torch.linspace(-1, 1, width).view(1, 1, 1, width).expand(len(z), 1, height, width)
    y = torch.linspace(-1, 1, height).view(1, 1, height, 1).expand(len(z), 1, height, width)
    h = torch.cat([z[:, :, None, None].expand(-1, -1, height, width), x, y], dim=1)
    for i in range(3):
        h = F.pad(h, (1, 2, 1, 2))  # left, right, top, bottom
        h = F.conv2d(h, w[f"decoder.convs.{i}.weight"], w[f"decoder.convs.{i}.bias"])
        h = F.relu(h) if i < 2 else h
    return h


def loss(w, x, noise):
    mu, logvar = encode(w, x)
    z = mu + torch.exp(0.5 * logvar) * noise
    logits = decode(w, z, *x.shape[2:])
    nll = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3)).mean()
    return nll + (0.5 * (mu**2 + logvar.exp() - 1 - logvar)).sum(1).mean()


def naive_step():
    weights = {k: v.detach().clone().requires_grad_() for k, v in sbvae.build_model(sbvae.Config()).named_parameters()}
    adam = torch.optim.Adam(weights.values(), lr=3e-4, foreach=False)
    data, generator = sbvae.Sprites(), torch.Generator().manual_seed(0)

    def step():
        x = data.sample(16, generator)
        adam.zero_grad()
        loss(weights, x, torch.randn(16, 10, generator=generator)).backward()
        adam.step()

    return step


def our_step():
    """A step of `sbvae.train` on a CPU, in its default precision."""
    config = sbvae.resolve(sbvae.Config(device="cpu"))
    config.precision = sbvae.choose_device(config)[1]
    model = sbvae.build_model(config).to(memory_format=sbvae.choose_layout(config, torch.device("cpu")))
    adam = torch.optim.Adam(model.parameters(), lr=3e-4, fused=True)
    data, generator = sbvae.Sprites(), torch.Generator().manual_seed(0)
    return lambda: sbvae.training_step(config, data, generator, model, adam)


STEPS = {"naive": naive_step, "sbvae": our_step}


def serve(name):
    """For each line of input five steps, after one that fills the caches; the answer is the mean in seconds."""
    if name == "sbvae":
        sbvae.prepare_process()  # as the program does
    step = STEPS[name]()
    for _ in sys.stdin:
        step()
        begun = time.perf_counter()
        for _ in range(5):
            step()
        print((time.perf_counter() - begun) / 5, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=12, help="of five steps each")
    parser.add_argument("--serve", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turns < 1:
        parser.error("--turns must be at least 1")
    if arguments.serve:
        return serve(arguments.serve)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # A process each, for how they use memory is part of what differs; neither's threads spin long after its turn
    environment = {"GOMP_SPINCOUNT": "30000"} | os.environ
    workers = {name: subprocess.Popen([sys.executable, __file__, "--serve", name], env=environment, **pipes)
               for name in STEPS}
    times = {name: [] for name in STEPS}
    for i in range(arguments.turns + 2):  # in turn, so that a machine that slows down slows both; two to warm up
        for name, worker in workers.items():
            print(file=worker.stdin, flush=True)
            times[name] += [float(worker.stdout.readline())] * (i > 1)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    for name, seconds in times.items():
        median = sorted(seconds)[len(seconds) // 2]
        print(f"{name}: {1e3 * median:6.1f} ms a step, {1 / median:5.2f} steps/s (median of {len(seconds)} turns)")
    ratios = sorted(a / b for a, b in zip(*times.values(), strict=True))
    print(f"sbvae is {ratios[len(ratios) // 2]:.2f} x as fast (20-80%: {ratios[len(ratios) // 5]:.2f} to "
          f"{ratios[-len(ratios) // 5]:.2f}), {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
