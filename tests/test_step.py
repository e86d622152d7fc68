"""The benchmark of whole steps: what it counts, and that its rungs train what they say."""

import gc
import time
import weakref

import pytest
import torch

import sbvae
from kernels import step

CONFIG = dict(device="cpu", image_shape=[3, 64, 64])


def test_multiply_adds_are_those_of_table_1():
    """By hand, for one image: output pixels x kernel area x channels in x channels out."""
    config = sbvae.resolve(sbvae.Config(**CONFIG, batch_size=1))
    macs = {name: n for name, _, n, _ in step.layers(sbvae, config, "cpu", "fp32")}
    assert macs == {
        "encoder.convs.0": 32 * 32 * 16 * 3 * 64, "encoder.convs.1": 16 * 16 * 16 * 64 * 64,
        "encoder.convs.2": 8 * 8 * 16 * 64 * 64, "encoder.convs.3": 4 * 4 * 16 * 64 * 64,
        "encoder.mlp.0": 1024 * 256, "encoder.latents": 256 * 20,
        "decoder.convs.0": 0,  # a sum over tap classes
        "decoder.convs.1": 64 * 64 * 16 * 64 * 64, "decoder.convs.2": 64 * 64 * 16 * 64 * 3}
    config = sbvae.resolve(sbvae.Config(**CONFIG, decoder="deconv", batch_size=2))
    macs = {name: n for name, _, n, _ in step.layers(sbvae, config, "cpu", "fp32")}
    assert macs["decoder.convs.4"] == 2 * 32 * 32 * 16 * 64 * 3  # at stride 2 by input pixels
    assert macs["decoder.convs.0"] == 2 * 2 * 2 * 16 * 64 * 64


@pytest.mark.parametrize("model", ["vae", "factorvae"])
def test_every_rung_trains_the_same_model(model, monkeypatch):
    """From one seed, all rungs end near the same weights; one that skips the optimizer does not."""
    kernels, ends = (sbvae.broadcast_conv2d, sbvae.same_conv2d), {}
    config = sbvae.resolve(sbvae.Config(**CONFIG, model=model, batch_size=2, conv_layers=2))
    built = []
    monkeypatch.setattr(sbvae, "build_model", lambda c, build=sbvae.build_model: built.append(build(c)) or built[-1])
    for label, rung in step.rungs("cpu", "bf16", broadcast=True).items():
        step.make_step(sbvae, config, "cpu", rung)()
        ends[label] = torch.cat([p.detach().flatten() for p in built[-1].parameters()])
    begin = torch.cat([p.detach().flatten() for p in sbvae.build_model(config).parameters()])
    moved = (ends["naive"] - begin).norm()
    assert list(ends) == ["naive", "+ kernel", "+ fused Adam", "+ same_conv, channels last", "+ bf16, channels last",
                          "+ torch.compile"]
    assert moved > 0
    assert all((end - ends["naive"]).norm() < 0.35 * moved for end in ends.values())
    for label in ("+ fused Adam", "+ same_conv, channels last"):
        assert (ends[label] - ends["naive"]).norm() < 0.05 * moved
    assert (sbvae.broadcast_conv2d, sbvae.same_conv2d) == kernels


def test_a_captured_step_outlives_the_names_of_its_parts(fake_cuda, monkeypatch):
    """A graph knows where weights and moments lie and does not keep them: its replay must, and it is captured on the
    stream that has seen the steps before."""
    built = []

    def build(config, build=sbvae.build_model):
        model = build(config)
        built.extend(weakref.ref(p) for p in model.parameters())
        return model

    monkeypatch.setattr(sbvae, "build_model", build)
    config = sbvae.resolve(sbvae.Config(**CONFIG, batch_size=2, conv_layers=1))
    rung = dict(step.rungs("cpu", "bf16", broadcast=True)["+ fused Adam"], graph=True)
    advance = step.make_step(sbvae, config, "cpu", rung)
    gc.collect()
    assert built and all(p() is not None for p in built)
    advance()
    assert fake_cuda == [*["step on side"] * 4, "registered", "captured on side", "step on side", "replayed on usual"]
    del advance
    gc.collect()
    assert not any(p() is not None for p in built)  # nothing else keeps them


def test_the_ladder_is_relative_to_naive(monkeypatch):
    monkeypatch.setattr(step, "make_step", lambda sbvae, config, device, rung: lambda: time.sleep(
        0.01 if rung["kernel"] else 0.05))
    rows = step.ladder(sbvae, sbvae.resolve(sbvae.Config(decoder="deconv")), "cpu", "fp32", 0.05)
    assert [r[0] for r in rows] == ["naive", "+ kernel", "+ fused Adam", "+ torch.compile"] and rows[0][5] == 1
    assert all(3 < r[5] < 6 and r[2] <= r[1] <= r[3] and r[4] == 1e3 / r[1] for r in rows[1:])


def test_replicas_train_side_by_side():
    (n, threads, each, together), = step.replicas("cpu", [2], 8, ["--conv-layers", "1", "--batch-size", "2"])
    assert n == 2 and threads >= 1 and together == pytest.approx(2 * each) and each > 0


def test_the_program_is_timed_in_a_process_of_its_own():
    changes = dict(decoder="deconv", batch_size=2)
    assert step.trained(sbvae, changes, "cpu", 8) > 0
    with pytest.raises(RuntimeError, match="error: .*--cuda-graph"):
        step.trained(sbvae, changes | dict(cuda_graph=True), "cpu", 8)
