"""The Triton form of kernels/broadcast_conv.py: in the interpreter, compiled offline, on a GPU.

Without a GPU, the tests marked `runs` are skipped here and run in a process of their own, in
Triton's interpreter, by `test_in_the_interpreter`. With one they run on it, and `gpu` tests too.
Interpreter by hand: TRITON_INTERPRET=1 python -m pytest tests/test_kernels_triton.py
"""

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import (
    LAYOUTS,
    SLOW,
    assert_as_exact,
    exact,
    has_output,
    random_case,
    tensors,
    with_gradients,
    wrong_answers,
)

from kernels import SpatialBroadcastConv2d, broadcast_conv2d
from kernels import broadcast_conv as module

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs in test_in_the_interpreter")
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
offline = pytest.mark.skipif(INTERPRETED or GPU, reason="compiled for real, or not at all")


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """The reference is asked for float32 itself, not for TensorFloat-32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def poison(monkeypatch):
    """Memory not yet written holds NaN: a value the kernels leave out shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def check(sizes, options, dtype, seed=0):
    arguments = tensors(sizes, seed, dtype, DEVICE)
    actual = with_gradients(arguments, backend="triton", **options)
    assert actual[0].is_contiguous(memory_format=LAYOUTS[options.get("out_format", "contiguous")])
    reference = with_gradients(arguments, backend="reference", **options)
    assert_as_exact(actual, reference, exact(arguments, **options))


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.skipif(GPU or INTERPRETED, reason="is that process")
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 20


@runs
@pytest.mark.parametrize("seed", range(400 if SLOW or GPU else 8))
def test_random_shapes(seed, poison):
    sizes, options = random_case(random.Random(seed))
    if has_output(sizes, options["padding"]):
        check(sizes, options, torch.float32, seed)


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "height, width, kernel, padding",
    [
        (1, 1, (4, 4), "same"),
        (3, 1, (3, 3), "same"),
        (63, 3, (5, 4), "same"),
        (65, 33, (4, 4), "same"),  # several bands of rows, several tiles of pixels
        (33, 65, (3, 3), "valid"),
    ],
)
def test_odd_sizes(height, width, kernel, padding, layout, poison):
    sizes = dict(
        batch=2, latents=2, maps=1, channels=2, height=height, width=width, kernel=kernel
    )
    options = dict(padding=padding, activation="relu", out_format=layout)
    check(sizes, options, torch.float32)


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_images_than_one_program_takes(layout, monkeypatch, poison):
    """Several chunks of images, the last one not full, and edges longer than one tile of pixels."""
    monkeypatch.setattr(module, "_MAX_IMAGES", 2)
    monkeypatch.setattr(module, "_PROGRAMS", 1)
    monkeypatch.setattr(module, "_BACKWARD_TILE", 64)
    monkeypatch.setattr(module, "_PIXELS", 4)
    sizes = dict(batch=5, latents=3, maps=2, channels=5, height=9, width=11, kernel=(4, 3))
    check(sizes, dict(activation="elu", out_format=layout), torch.float32)


# The interpreter rounds towards zero when it stores bfloat16; the ulp in the comparator covers it.
@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu", "elu"] if SLOW or GPU else ["relu"])
def test_low_precision(dtype, layout, activation, poison):
    sizes = dict(batch=2, latents=3, maps=2, channels=4, height=5, width=8, kernel=(4, 3))
    check(sizes, dict(activation=activation, out_format=layout), dtype)


@runs
def test_comparator_rejects_wrong_answers():
    sizes = dict(batch=3, latents=4, maps=2, channels=4, height=7, width=9, kernel=(4, 4))
    arguments = tensors(sizes, dtype=torch.float32, device=DEVICE)
    wanted = exact(arguments)[:1]
    reference = [broadcast_conv2d(*arguments, backend="reference")]
    assert_as_exact([broadcast_conv2d(*arguments, backend="triton")], reference, wanted)
    for name, wrong in wrong_answers(arguments, backend="triton"):
        with pytest.raises(AssertionError, match="off by"):
            assert_as_exact([wrong], reference, wanted)
            pytest.fail(f"accepted: {name}")


@runs
def test_strided_and_expanded(poison):
    sizes = dict(batch=4, latents=3, maps=2, channels=3, height=6, width=5, kernel=(3, 4))
    z, coords, weight, bias = (t.detach() for t in tensors(sizes, 0, torch.float32, DEVICE))
    z = z[:1].expand(4, -1).requires_grad_()
    weight = weight.mT.contiguous().mT.requires_grad_()
    coords = coords.mT.contiguous().mT
    for layout in LAYOUTS:
        grads = []
        for backend in ("triton", "reference"):
            options = dict(activation="relu", backend=backend, out_format=layout)
            out = broadcast_conv2d(z, coords, weight, bias, **options)
            grads.append(torch.autograd.grad(out.sum(), [z, weight]))  # strides of zero
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@runs
def test_runs_agree_to_the_bit(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the gradient of coords is cuDNN's
    sizes = dict(batch=4, latents=3, maps=2, channels=5, height=9, width=9, kernel=(4, 4))
    arguments = tensors(sizes, 0, torch.float32, DEVICE)
    first, second = (with_gradients(arguments, backend="triton", activation="relu") for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@runs
def test_nan_stays_nan_and_infinity_infinity():
    sizes = dict(batch=3, latents=2, maps=1, channels=2, height=4, width=4, kernel=(3, 3))
    z, coords, weight, bias = (t.detach() for t in tensors(sizes, 0, torch.float32, DEVICE))
    z[1, 0], z[2, 1] = float("nan"), float("inf")
    for activation in (None, "relu", "elu"):
        out = broadcast_conv2d(z, coords, weight, bias, activation=activation, backend="triton")
        assert out[0].isfinite().all() and out[1].isnan().all() and out[2].isinf().any()


# --- as an operator -------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    sizes = dict(batch=2, latents=2, maps=1, channels=2, height=3, width=4, kernel=(2, 3))
    sizes["bias"] = bias
    arguments = tensors(sizes, 0, torch.float32, DEVICE) + ([] if bias else [None])
    options = [1, 1, 0, 1], "relu", not bias, bias, torch.float32
    torch.library.opcheck(module._operator, (*arguments, *options))


@runs
def test_second_derivative():
    sizes = dict(batch=2, latents=2, maps=1, channels=2, height=3, width=4, kernel=(2, 3))
    grads = []
    for backend in ("triton", "reference"):
        z, *rest = tensors(sizes, 0, torch.float32, DEVICE)
        out = broadcast_conv2d(z, *rest, activation="elu", backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), z, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), [z, *rest]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


@runs
@pytest.mark.parametrize("half", [False, True])
def test_compiles_exports_and_autocasts(half):
    layer = SpatialBroadcastConv2d(3, 4, 4, 5, 6, activation="relu", backend="triton").to(DEVICE)
    z = torch.randn(2, 3, requires_grad=True, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=half):
        results = [
            (out, *torch.autograd.grad(out.float().square().sum(), [z, layer.weight]))
            for out in (layer(z), compiled(z))
        ]
    assert results[0][0].dtype == (torch.bfloat16 if half else torch.float32)
    torch.testing.assert_close(*results)
    program = torch.export.export(layer, (z.detach(),))
    torch.testing.assert_close(program.module()(z), layer(z))
    assert "sbvae_kernels_broadcast_conv.broadcast_conv2d" in str(program.graph)


@runs
def test_copies_in_one_process(tmp_path, monkeypatch):
    """People copy the file into several packages; the operator of one must not replace the others'."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the gradient of coords is cuDNN's
    (tmp_path / "their-größe").mkdir()
    copies = [module]
    for name, path in {"copied": "copied.py", "their-größe.copied": "their-größe/copied.py", "": "copied.py"}.items():
        (tmp_path / path).write_text(Path(module.__file__).read_text())
        spec = importlib.util.spec_from_file_location(name or "copied", tmp_path / path)  # the last one's name is taken
        copies.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(copies[-1])
    sizes = dict(batch=2, latents=3, maps=2, channels=2, height=5, width=6, kernel=(4, 4))
    arguments = tensors(sizes, 0, torch.float32, DEVICE)
    results = [(out := one.broadcast_conv2d(*arguments, backend="triton"),
                *torch.autograd.grad(out.square().sum(), arguments)) for one in copies]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@runs
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
def test_transforms_of_torch_func_take_the_torch_form():
    """The operator has no rules for them: compiled, it would say that a forward-mode derivative is 0."""
    # ELU, as ReLU's derivative jumps where a sum that rounding decides is 0
    layer = SpatialBroadcastConv2d(3, 64, 4, 64, 64, activation="elu").to(DEVICE)
    z, tangent = torch.randn(2, 3, device=DEVICE), torch.randn(2, 3, device=DEVICE)

    def derivative(z, tangent):
        return torch.func.jvp(layer, (z,), (tangent,))[1]

    calls = [
        lambda: torch.func.vmap(layer)(z[None])[0],
        lambda: torch.func.grad(lambda z: layer(z).square().sum())(z),
        lambda: torch.jit.trace(layer, z)(z),
        lambda: derivative(z, tangent),
    ]
    results = {}
    for layer.backend in ("auto", "reference"):
        results[layer.backend] = [call() for call in calls]
    torch.testing.assert_close(results["auto"], results["reference"], rtol=1e-4, atol=1e-4)
    layer.backend = "auto"
    compiled = torch.compile(derivative, backend="eager")
    torch.testing.assert_close(compiled(z, tangent), results["reference"][-1], rtol=1e-4, atol=1e-4)
    layer.backend = "triton"
    calls += [lambda: compiled(z, tangent)]
    for call in calls:
        with pytest.raises(Exception, match="has no rules for torch.func"):
            call()


@runs
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batches_of_gradients():
    """autograd.grad(..., is_grads_batched=True), as jacobian(..., vectorize=True) does it: one by one."""
    sizes = dict(batch=2, latents=3, maps=2, channels=2, height=5, width=6, kernel=(4, 4))
    arguments = tensors(sizes, 0, torch.float32, DEVICE)
    stack = torch.randn(2, 2, 2, 5, 6, device=DEVICE)
    got, expected = (
        torch.autograd.grad(broadcast_conv2d(*arguments, activation="elu", backend=backend), arguments, stack,
                            is_grads_batched=True)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert all(g.abs().sum() > 0 for g in got)


@runs
def test_saves_its_arguments_only():
    saved = []
    layer = SpatialBroadcastConv2d(2, 2, 4, 5, 6, activation="relu", backend="triton").to(DEVICE)
    z = torch.randn(3, 2, requires_grad=True, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(z)
    given = {t.data_ptr() for t in (z, layer.coords, layer.weight, layer.bias)}
    assert saved and {t.data_ptr() for t in saved} <= given


@runs
def test_refuses_by_name_and_falls_back_by_itself():
    sizes = dict(batch=1, latents=2, maps=1, channels=2, height=3, width=3, kernel=(3, 3))
    arguments = tensors(sizes, device=DEVICE)  # float64
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, got torch.float64"):
        broadcast_conv2d(*arguments, backend="triton")
    auto, reference = (broadcast_conv2d(*arguments, backend=b) for b in ("auto", "reference"))
    torch.testing.assert_close(auto, reference)


# --- compiled offline -----------------------------------------------------------------------------

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Records the launches of one forward and backward pass instead of running them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_INTERPRETED", True)  # lets tensors on a CPU through
    recorded = []

    def record(self, *args, grid, warmup, num_warps=4, **kwargs):
        recorded.append((self, args, kwargs, num_warps))

    monkeypatch.setattr(triton.JITFunction, "run", record)

    def both_passes(sizes, dtype, padding, last):
        recorded.clear()
        arguments = [t.detach() for t in tensors(sizes, 0, dtype)]
        options = module._pads(padding, *sizes["kernel"]), "relu", False, last
        out = module._triton_forward(*arguments, *options, dtype)
        module._triton_backward(torch.zeros_like(out), *arguments, *options, False)
        return {launch[0].__name__: launch for launch in recorded}

    return both_passes


def compile_offline(launch, backend, arch, warp):
    """What Triton would compile for this launch on a machine with that GPU."""
    function, args, kwargs, num_warps = launch
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = args[i] if i < len(args) else kwargs[parameter.name]
        signature[parameter.name] = "i32"
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        triton.compiler.ASTSource(function, signature, constants, attributes),
        target=triton.backends.compiler.GPUTarget(backend, arch, warp),
        options={"num_warps": num_warps},
    )


def spilled_bytes(kernel, tmp_path):
    """Local memory per thread, as the assembler reports it."""
    if "amdgcn" in kernel.asm:
        found = re.findall(r"[sv]gpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])
        assert found
        return sum(map(int, found))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file = tmp_path / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage.stdout).groups()
    return int(stack) + int(local)


PAPER = dict(batch=64, latents=10, maps=2, channels=64, height=64, width=64, kernel=(4, 4))
MONET = dict(batch=64, latents=16, maps=2, channels=32, height=72, width=72, kernel=(3, 3))
SLOTS = dict(batch=64, latents=64, maps=4, channels=32, height=64, width=64, kernel=(5, 5))


@offline
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sizes, padding", [(PAPER, "same"), (MONET, "valid")])
def test_hopper_forward_writes_and_backward_reads_16_bytes(
    sizes, padding, last, dtype, launches, tmp_path
):
    launched = launches(sizes, dtype, padding, last)
    forward = compile_offline(launched["_forward_kernel"], "cuda", 90, 32)
    assert set(re.findall(r"st\.global\S*", forward.asm["ptx"])) == {"st.global.v4.b32"}
    assert spilled_bytes(forward, tmp_path) == 0
    backward = compile_offline(
        launched["_backward_last_kernel" if last else "_backward_kernel"], "cuda", 90, 32
    )
    assert "ld.global.v4.b32" in backward.asm["ptx"]
    assert spilled_bytes(backward, tmp_path) == 0


@offline
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "backend, arch, warp",
    [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)],
)
def test_all_kernels_compile_without_spills(backend, arch, warp, last, launches, tmp_path):
    for sizes in (PAPER, SLOTS) if SLOW else (SLOTS,):
        launched = launches(sizes, torch.bfloat16, "same", last)
        assert len(launched) == 4, list(launched)
        for name, launch in launched.items():
            kernel = compile_offline(launch, backend, arch, warp)
            assert spilled_bytes(kernel, tmp_path) == 0, name


# --- on a GPU -------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes, padding", [(PAPER, "same"), (MONET, "valid"), (SLOTS, "same")])
def test_shapes_of_published_models(sizes, padding, layout, dtype, poison):
    check(sizes, dict(padding=padding, activation="relu", out_format=layout), dtype)


@gpu
def test_more_than_2_to_the_31_values():
    layer = SpatialBroadcastConv2d(1, 64, 3, 128, 128, activation="relu", backend="triton").cuda()
    z = torch.randn(2**11 + 1, 1, device="cuda", dtype=torch.bfloat16)
    out = layer.bfloat16()(z)
    assert out.numel() > 2**31
    torch.testing.assert_close(out[-1:], layer(z[-1:]))


@gpu
def test_in_a_cuda_graph():
    layer = SpatialBroadcastConv2d(10, 64, 4, 64, 64, activation="relu", backend="triton").cuda()
    z = torch.randn(16, 10, device="cuda", requires_grad=True)

    def step():
        layer.zero_grad(set_to_none=True)
        out = layer(z)
        out.square().sum().backward()
        return out.detach(), layer.weight.grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
    graph.replay()
    replayed = [t.clone() for t in captured]
    torch.testing.assert_close(replayed, list(step()))
