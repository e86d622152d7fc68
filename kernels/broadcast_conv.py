"""The spatial broadcast decoder's first layer as one pass over memory, forward and backward.

    out = act(conv2d(pad(concat([tile(z), coords])), weight, bias))

z (B,K) is a batch of latents, coords (M,H,W) the coordinate channels, weight (C,K+M,kh,kw): step by
step Algorithm 1 and the first convolution of Watters et al. 2019. Each tile is constant, so its
convolution is, too, except near the borders, and that can be used.

How. Convolution is linear, so it can be done on each part of the concatenation by itself:

    conv(concat([tile(z), coords])) + bias = S + P        P = conv(coords) + bias

P (C,Ho,Wo) is one map for the whole batch. For S, take the tile of z[b,k], the number z[b,k] at
every pixel and zeros around:

    S[b,c,y,x] = sum_k z[b,k] * sum over the taps (i,j) that fall inside the image of w[c,k,i,j]

and which taps are inside depends on y and x only near the border. For k=4 "same" (one row of zeros
before, two after), the first row of pixels lacks tap 0, the last but one tap 3, the last taps 2 and
3, and all others have all four: 4 classes of rows, 4 of columns, 16 sums of taps per (c,k). For k=3
"same" there are 9, for k=5 25, for "valid" 1. So, r(y) and q(x) being the classes,

    out[b,c,y,x] = act(P[c,y,x] + S[b,c,r(y),q(x)])       S = z @ taps, tiny: (B,K) by (K,C*R*Q)

Backward, with g the gradient before the activation: P and S tell its mask, so no activation need
be saved. The two sums over g

    dP[c,y,x] = sum_b g[b,c,y,x]                          dS[b,c,r,q] = sum over the class of g

come from one read of g, and all else is small again: dP gives the gradient of the coordinates'
weights and of the bias, dS that of z (dS @ taps^T) and of the latents' weights (z^T @ dS, spread
over the taps of each class). Saved for it: z, coords, weight and bias. The PyTorch form also
saves P and S (C*Ho*Wo and B*C*R*Q numbers), the windows of up to 100 taps on the coordinates and, in
bfloat16 on a CPU, the output for its ReLU's mask: as after F.relu, it must not change until then.

What it costs, for the paper's layer (B=16, K=10, M=2, C=64, 64x64, k=4), float32, millions:

                forward: numbers moved               multiply-adds    backward: moved, multiply-adds
    reference   16 (tile and append 0.8, pad 1.7,               805    24 (activation 12.6,   1610
                convolve 5.1, activation 8.4)                          convolution 11)
    torch       13 (P + S 4.7, activation 8.4)                  8.6    25 (the same, eagerly)   17
    on a CPU    4.7: in pieces that stay in cache               8.6    4.7                      17
    triton      4.7 (the output 4.2, P twice 0.3)               8.6    4.7 (read g 4.2, dP)     17

that is 64 MB against 19 forward. The output or its gradient alone, 17 MB, is the floor, and the
bytes that kernels/bench.py counts. In bfloat16 a CPU's backward pass goes eagerly through the whole
batch, 25 million numbers of half the size: in pieces it took longer, as a sum over few images does.

Where it does not pay. On an 8x8 grid with k=5, 25 classes for 64 pixels, S has 0.4 times the
numbers of the output, and launching the kernels costs more than running them. And this layer is 15%
of the multiply-adds of the paper's decoder (12,288 of 80,896 per pixel), so a free one makes the
decoder's forward pass at most 1 / (1 - 0.152) = 1.18 times as fast.

Three forms, chosen by `backend`:
    reference   the formula above, two lines of it
    torch       factorised, in PyTorch: any device and dtype, any number of derivatives
    triton      factorised, in Triton: float32, bfloat16, float16 on a GPU
"auto" takes triton on a GPU where it can and torch otherwise; on a CPU it takes the reference for
layers of less than 16 million multiply-adds (52 million of bfloat16), where that is quicker.
Measured on one core of a Zen 4 CPU (AVX512-BF16, no AMX), forward + backward of the paper's layer,
torch is 9 times as fast as the reference in float32 and 4 times in bfloat16; on a Xeon with AMX,
whose plain bfloat16 convolution is faster, still 2.1 (NCHW) and 2.5 times (channels last). Under
torch.compile on a CPU the torch form is handed to the compiler as plain sums, which come out slower
than the eager form. Plain sums are taken for torch.func's transforms, forward-mode derivatives and
torch.jit.trace, too, which must see every step.

The Triton kernels sum in float32, never TensorFloat-32 (S = z @ taps and its gradients are PyTorch
matrix products and follow its setting), and round once, on writing. Under autocast the output has
autocast's dtype while P and S stay in float32, as does the plain convolution that "auto" takes for
the smallest on a CPU: closer to the float32 result than rounding latents and weights. No atomics:
same input, same bits.

MIT License, Copyright (c) 2026 The sbvae authors. Tested with PyTorch 2.11, 2.13 and 2.14.
"""

import contextlib
import numbers
import re
from typing import List, NamedTuple, Optional, Tuple  # noqa: UP035 - the operator schema wants them

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # the other two implementations don't need it
    triton = None

_FORMATS = ("contiguous", "channels_last")
_ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "elu": F.elu}
_BACKENDS = ("auto", "reference", "torch", "triton")


# --- reference: the operation as the paper writes it ----------------------------------------------


def _reference(z, coords, weight, bias, pads, activation):
    """Tile, concatenate, pad, convolve: Algorithm 1 and the first layer of Table 1, literally."""
    tiled = z[:, :, None, None].expand(-1, -1, *coords.shape[1:])  # (B, K, H, W)
    image = torch.cat([tiled, coords.expand(z.shape[0], -1, -1, -1)], 1)  # (B, K+M, H, W)
    return _ACTIVATIONS[activation](F.conv2d(F.pad(image, pads), weight, bias))


# --- torch: factorised ----------------------------------------------------------------------------


def _constant_map(coords, weight, bias, pads, channels_last=False):
    """P (C,Ho,Wo): what the coordinates and the bias contribute; the same for every image.

    As a matrix product it comes out in either format, and so do its gradients; libraries have no
    fast convolution of two channels and one image. Of many channels they have, without the windows.
    """
    kh, kw = weight.shape[2:]
    padded = F.pad(coords, pads)
    if len(coords) * kh * kw > 100:
        return F.conv2d(padded[None], weight, bias)[0]
    windows = F.unfold(padded[None], (kh, kw))[0]  # (M*kh*kw, Ho*Wo)
    taps = weight.flatten(1)
    if channels_last:
        P = windows.t() @ taps.t() if bias is None else torch.addmm(bias, windows.t(), taps.t())
        P = P.t()
    else:
        P = taps @ windows if bias is None else torch.addmm(bias[:, None], taps, windows)
    return P.unflatten(1, (padded.shape[1] - kh + 1, padded.shape[2] - kw + 1))


def _class_map(z, weight, pads, height, width):
    """S (B,C,R,Q): what the latents contribute, one value per class of rows and of columns.

    A constant image convolved is constant wherever the same taps fall inside the image. The
    smallest image that has every such class is as large as the kernel (or as the image, if that is
    smaller), so the sums of taps are the convolution of an image of ones of that size.
    """
    channels, latents, kh, kw = weight.shape
    ones = F.pad(weight.new_ones(1, 1, min(height, kh), min(width, kw)), pads)
    inside = F.unfold(ones, (kh, kw))[0]  # (kh*kw, R*Q), 1 where a class has the tap
    taps = weight.reshape(channels * latents, kh * kw) @ inside
    sizes = channels, latents, ones.shape[2] - kh + 1, ones.shape[3] - kw + 1
    return torch.einsum("bk,ckrq->bcrq", z, taps.view(sizes))


def _spread(x, dim, before, repeats):
    """Repeat the entry at index `before` of `dim` `repeats` times: from classes to pixels."""
    head, middle, tail = x.split([before, 1, x.shape[dim] - before - 1], dim)
    shape = list(x.shape)
    shape[dim] = repeats
    return torch.cat([head, middle.expand(shape), tail], dim)


class _BroadcastAdd(torch.autograd.Function):
    """act(P[c,y,x] + S[b,c,r(y),q(x)]): the one large pass; saves P and S, which are small.

    On a CPU it goes through the batch in pieces that stay in the second-level cache, so that the
    additions, the activation and the change of dtype together touch memory once; the few rows at
    the edges come after it. In bfloat16 the backward pass goes through whole batches, half the
    bytes: the mask comes from the output, which is saved as the next layer keeps it anyway, and the
    sums over images and rows are taken in float32 and rounded to bfloat16. So the gradients' errors
    are bfloat16's own, 1.6e-3 of their rms in the paper's layer (the reference's are 3e-2).
    """

    @staticmethod
    def forward(ctx, P, S, before, repeats, activation, dtype, memory_format):
        ctx.arguments = before, repeats, activation, memory_format
        shape = len(S), *P.shape
        out = torch.empty(shape, dtype=dtype, device=P.device, memory_format=memory_format)
        ctx.whole = dtype == torch.bfloat16 and P.device.type == "cpu" and activation != "elu"
        ctx.save_for_backward(P, S, *[out] * (ctx.whole and activation == "relu"))
        P, wide = _rows(P[None], memory_format), _wide(S, before[1], repeats[1], memory_format)
        target, chunks = _rows(out, memory_format), _chunks(P, len(S))
        # float32 until the last step: a half-precision sum of halves would round three times
        # (on a GPU the addition rounds once, into the output, by itself)
        buffers = None
        if chunks and dtype != P.dtype and P.device.type == "cpu":
            buffers = torch.empty_like(target[chunks[0]], dtype=P.dtype)
        top, end = before[0], before[0] + repeats[0]
        middle = wide[:, :, top : top + 1]
        for chunk in chunks:
            here = target[chunk]
            buffer = here if buffers is None else buffers[: len(here)]
            torch.add(P, middle[chunk], out=buffer)  # as if every row were of this class
            if activation == "relu":
                buffer.relu_()
            elif activation == "elu":
                F.elu(buffer, inplace=True)
            if buffer is not here:
                here.copy_(buffer)
        for rows, classes in (slice(top), slice(top)), (slice(end, None), slice(top + 1, None)):
            target[:, :, rows] = _ACTIVATIONS[activation](P[:, :, rows] + wide[:, :, classes])
        return out

    @staticmethod
    def backward(ctx, grad):
        aten = torch.ops.aten
        P, S, *out = ctx.saved_tensors
        before, repeats, activation, memory_format = ctx.arguments
        if torch.is_grad_enabled() or _batched(grad):  # a second derivative is wanted, or many at once
            g, pre = grad.to(P.dtype), _broadcast_add(P, S, before, repeats)
            if activation == "relu":
                g = aten.threshold_backward(g, pre, 0)
            elif activation == "elu":
                g = aten.elu_backward(g, 1, 1, 1, False, pre)
            grad_S = _gather(_gather(g, 2, before[0], repeats[0]), 3, before[1], repeats[1])
            return g.sum(0), grad_S, None, None, None, None, None
        if out:  # which also makes it dense
            grad = aten.threshold_backward(grad, out[0], 0)
        P, grad = _rows(P[None], memory_format), _rows(grad, memory_format)
        top, repeats_y = before[0], repeats[0]
        if ctx.whole:
            grad_P = grad.sum(0).to(P.dtype)
            grad_wide = _gather(grad, 2, top, repeats_y).to(P.dtype)
        else:
            wide = _wide(S, before[1], repeats[1], memory_format)
            grad_P, grad_wide = torch.zeros_like(P[0]), torch.empty_like(wide)
            chunks = _chunks(P, len(S))
            buffers = torch.empty_like(grad[chunks[0]], dtype=P.dtype) if chunks else None
            for chunk in chunks:
                g = grad[chunk].to(P.dtype)
                if activation is not None:  # the mask is computed again, not saved
                    pre = buffers[: len(g)]
                    _add_rows(P, wide[chunk], top, repeats_y, pre)
                    if activation == "relu":
                        aten.threshold_backward(g, pre, 0, grad_input=pre)
                    else:
                        aten.elu_backward(g, 1, 1, 1, False, pre, grad_input=pre)
                    g = pre
                grad_P += g.sum(0) if len(g) > 1 else g[0]
                classes = grad_wide[chunk]
                classes[:, :, :top] = g[:, :, :top]
                torch.sum(g[:, :, top : top + repeats_y], 2, out=classes[:, :, top])
                classes[:, :, top + 1 :] = g[:, :, top + repeats_y :]
        if memory_format == torch.channels_last:  # back from rows to (C,y,x)
            grad_P = grad_P[0].unflatten(1, (-1, S.shape[1])).permute(2, 0, 1)
        grad_S = _narrow(grad_wide, S.shape[1], before[1], repeats[1], memory_format)
        return grad_P, grad_S, None, None, None, None, None


def _rows(x, memory_format):
    """(N,C,Y,X) as memory holds it: as it is, or (N,1,Y,X*C) in channels_last; may copy."""
    x = x.contiguous(memory_format=memory_format)
    last = memory_format == torch.channels_last
    return x.permute(0, 2, 3, 1).flatten(2)[:, None] if last else x


def _wide(S, before, repeats, memory_format):
    """S (B,C,R,Q) with its columns repeated from classes to pixels, as `_rows`."""
    if memory_format == torch.channels_last:
        return _spread(S.permute(0, 2, 3, 1).contiguous(), 2, before, repeats).flatten(2)[:, None]
    return _spread(S, 3, before, repeats)


def _narrow(rows, channels, before, repeats, memory_format):
    """The transpose of `_wide`."""
    if memory_format == torch.channels_last:
        rows = rows[:, 0].unflatten(2, (-1, channels))
        return _gather(rows, 2, before, repeats).permute(0, 3, 1, 2)
    return _gather(rows, 3, before, repeats)


def _chunks(P, batch):
    """Slices of the batch of about a megabyte on a CPU; the whole batch elsewhere."""
    step = max(1, 2**20 // (P.numel() * P.element_size())) if P.device.type == "cpu" else batch
    return [slice(b, b + step) for b in range(0, batch, max(step, 1))]


def _add_rows(P, wide, top, repeats, out):
    """out[b,c,y,x] = P[c,y,x] + wide[b,c,r(y),x], in place."""
    end = top + repeats
    torch.add(P[:, :, :top], wide[:, :, :top], out=out[:, :, :top])
    torch.add(P[:, :, top:end], wide[:, :, top : top + 1], out=out[:, :, top:end])
    torch.add(P[:, :, end:], wide[:, :, top + 1 :], out=out[:, :, end:])


def _gather(x, dim, before, repeats):
    """The transpose of `_spread`: sum over the pixels of each class."""
    head, middle, tail = x.split([before, repeats, x.shape[dim] - before - repeats], dim)
    return torch.cat([head, middle.sum(dim, keepdim=True), tail], dim)


def _broadcast_add(P, S, before, repeats):
    """P + S, S repeated from classes to pixels: the plain form, for autograd and the compiler."""
    return P + _spread(_spread(S, 3, before[1], repeats[1]), 2, before[0], repeats[0])


def _laid_out(out, channels_last):
    """NCHW or channels_last in memory; torch.func.vmap has no `contiguous(memory_format=...)`."""
    if channels_last:
        return out.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return out.contiguous()


def _torch(z, coords, weight, bias, pads, activation, coords_first, channels_last, dtype):
    """The factorised layer in PyTorch."""
    (maps, height, width), latents = coords.shape, z.shape[1]
    accumulate = torch.promote_types(dtype, torch.float32)
    z, coords, weight = (t.to(accumulate) for t in (z, coords, weight))
    bias = None if bias is None else bias.to(accumulate)
    if coords_first:
        w_coords, w_z = weight.split([maps, latents], 1)
    else:
        w_z, w_coords = weight.split([latents, maps], 1)
    S = _class_map(z, w_z, pads, height, width)
    P = _constant_map(coords, w_coords, bias, pads, channels_last)
    repeats = max(height - weight.shape[2] + 1, 1), max(width - weight.shape[3] + 1, 1)
    before = min(pads[2], S.shape[2] - 1), min(pads[0], S.shape[3] - 1)
    if torch.compiler.is_compiling() or _stepwise():  # a compiler fuses the plain form itself
        out = _ACTIVATIONS[activation](_broadcast_add(P, S, before, repeats)).to(dtype)
        return _laid_out(out, channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return _BroadcastAdd.apply(P, S, before, repeats, activation, dtype, memory_format)


def _stepwise():
    """Whether every step must be an operation that PyTorch knows: in torch.func's transforms (grad,
    vmap, jvp), compiled or not, in forward-mode derivatives and in torch.jit.trace."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or torch.autograd.forward_ad._current_level >= 0


def _batched(grad):
    """Whether this is a stack of gradients, of autograd.grad(..., is_grads_batched=True) and so of
    jacobian(..., vectorize=True), or of torch.vmap: PyTorch slices it only for its own operations."""
    keys = torch._C._dispatch_keys(grad)
    return any(keys.has(torch._C._dispatch_key_parse(k)) for k in ("Batched", "FuncTorchBatched"))


# --- triton: one write forward, one read backward -------------------------------------------------


class _Geometry(NamedTuple):
    """Sizes of one call. Rows of class `top` (columns of class `left`) have every tap inside the
    image and come `ny` (`nx`) times; every other row (column) is a class of its own."""

    batch: int
    latents: int
    maps: int
    channels: int
    height: int
    width: int
    kh: int
    kw: int
    pad_y: int
    pad_x: int
    out_height: int
    out_width: int
    top: int
    left: int
    ny: int
    nx: int
    rows: int  # classes of rows, R
    cols: int  # classes of columns, Q

    @property
    def size(self):
        """Values in one output image."""
        return self.channels * self.out_height * self.out_width

    @property
    def sums(self):
        """Values of S for one image."""
        return self.channels * self.rows * self.cols


def _geometry(z, coords, weight, pads):
    (batch, latents), (maps, height, width) = z.shape, coords.shape
    channels, _, kh, kw = weight.shape
    out_height, out_width = height + pads[2] + pads[3] - kh + 1, width + pads[0] + pads[1] - kw + 1
    ny, nx = max(height - kh + 1, 1), max(width - kw + 1, 1)
    rows, cols = out_height - ny + 1, out_width - nx + 1
    top, left = min(pads[2], rows - 1), min(pads[0], cols - 1)
    return _Geometry(
        batch, latents, maps, channels, height, width, kh, kw, pads[2], pads[0],
        out_height, out_width, top, left, ny, nx, rows, cols,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _class(y, BEFORE: tl.constexpr, COUNT: tl.constexpr):
        """Class of row y: COUNT rows from BEFORE on share one, each other row has its own."""
        return y - tl.minimum(tl.maximum(y - BEFORE, 0), COUNT - 1)

    @triton.jit
    def _slope(g, pre, ACTIVATION: tl.constexpr):
        """g times the activation's derivative at `pre`."""
        if ACTIVATION == "relu":
            g = tl.where(pre > 0, g, 0.0)
        elif ACTIVATION == "elu":
            g = g * tl.exp(tl.where(pre > 0, 0.0, pre))
        return g

    @triton.jit
    def _prepare_kernel(
        coords, weight, bias, P, taps,
        Z_FIRST: tl.constexpr, MAP_FIRST: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
        C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
        PAD_Y: tl.constexpr, PAD_X: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
        TOP: tl.constexpr, LEFT: tl.constexpr, NY: tl.constexpr, NX: tl.constexpr,
        R: tl.constexpr, Q: tl.constexpr, LAST: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """P (C,Ho,Wo or Ho,Wo,C) from coordinates and bias; sums of taps (K, C,R,Q or R,Q,C)."""
        tiles: tl.constexpr = (C * HO * WO + BLOCK - 1) // BLOCK
        pid = tl.program_id(0)
        if pid < tiles:
            n = pid * BLOCK + tl.arange(0, BLOCK)
            inside = n < C * HO * WO
            if LAST:
                c, pixel = n % C, n // C
            else:
                c, pixel = n // (HO * WO), n % (HO * WO)
            y, x = pixel // WO - PAD_Y, pixel % WO - PAD_X
            total = tl.zeros((BLOCK,), tl.float32)
            for m in range(M):
                for i in range(KH):
                    for j in range(KW):
                        there = (y + i >= 0) & (y + i < H) & (x + j >= 0) & (x + j < W) & inside
                        at = coords + (m * H + y + i) * W + x + j
                        coordinate = tl.load(at, mask=there, other=0.0).to(tl.float32)
                        at = weight + ((c * (K + M) + MAP_FIRST + m) * KH + i) * KW + j
                        total += coordinate * tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                total += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
            tl.store(P + n, total, mask=inside)
        else:
            n = (pid - tiles) * BLOCK + tl.arange(0, BLOCK)
            inside = n < K * C * R * Q
            k, rest = n // (C * R * Q), n % (C * R * Q)
            if LAST:
                c, r, q = rest % C, rest // (C * Q), rest // C % Q
            else:
                c, r, q = rest // (R * Q), rest // Q % R, rest % Q
            y = tl.where(r > TOP, r + NY - 1, r) - PAD_Y  # any row of the class
            x = tl.where(q > LEFT, q + NX - 1, q) - PAD_X
            total = tl.zeros((BLOCK,), tl.float32)
            for i in range(KH):
                for j in range(KW):
                    there = (y + i >= 0) & (y + i < H) & (x + j >= 0) & (x + j < W) & inside
                    at = weight + ((c * (K + M) + Z_FIRST + k) * KH + i) * KW + j
                    total += tl.load(at, mask=there, other=0.0).to(tl.float32)
            tl.store(taps + n, total, mask=inside)

    @triton.jit
    def _forward_kernel(
        P, S, out, batch, images,
        C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
        TOP: tl.constexpr, LEFT: tl.constexpr, NY: tl.constexpr, NX: tl.constexpr,
        R: tl.constexpr, Q: tl.constexpr, ACTIVATION: tl.constexpr, LAST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """out[b] = act(P + S[b]) for BLOCK values of `images` images: P stays in registers."""
        SIZE: tl.constexpr = C * HO * WO
        n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = n < SIZE
        if LAST:
            c, pixel = n % C, n // C
        else:
            c, pixel = n // (HO * WO), n % (HO * WO)
        sums = _class(pixel // WO, TOP, NY) * Q + _class(pixel % WO, LEFT, NX)
        sums = sums * C + c if LAST else c * (R * Q) + sums
        p = tl.load(P + n, mask=inside, other=0.0)
        first = tl.program_id(1) * images
        last = tl.minimum(first + images, batch)
        S += first.to(tl.int64) * (C * R * Q)  # 64-bit: a batch may hold more than 2^31 values
        out += first.to(tl.int64) * SIZE
        for _ in range(first, last):
            v = p + tl.load(S + sums, mask=inside, other=0.0)
            if ACTIVATION == "relu":
                v = tl.where(v < 0, 0.0, v)  # not maximum: NaN must stay NaN
            elif ACTIVATION == "elu":
                # expm1, which Triton lacks; the series is exact to float32 below 1/8
                e = tl.where(v > 0, 0.0, v)
                series = e * (1 + e / 2 * (1 + e / 3 * (1 + e / 4 * (1 + e / 5 * (1 + e / 6)))))
                v = tl.where(v > 0, v, tl.where(e > -0.125, series, tl.exp(e) - 1))
            tl.store(out + n, v, mask=inside)
            S += C * R * Q
            out += SIZE

    @triton.jit
    def _backward_kernel(
        grad, P, S, grad_P, grad_S, batch, images,
        C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, SIZE: tl.constexpr,
        TOP: tl.constexpr, LEFT: tl.constexpr, NY: tl.constexpr, NX: tl.constexpr,
        R: tl.constexpr, Q: tl.constexpr, ACTIVATION: tl.constexpr,
        BANDS: tl.constexpr, ROWS: tl.constexpr, EDGES: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        """NCHW: one read of the gradient of `images` images, in one band of rows of a channel.

        The sum over the images stays in registers until the end. The sum over the rows of the
        band is taken image by image; the rows at the edges (few, each a class of its own) go with
        band 0. Columns are then summed per class. grad_P (chunks, C, Ho*Wo), grad_S (bands, B,
        C,R,Q): both are partial sums, added up afterwards, in a fixed order.
        """
        pid = tl.program_id(0)
        band, c, chunk = pid % BANDS, pid // BANDS % C, pid // (BANDS * C)
        x = tl.arange(0, COLS)
        y = TOP + band * ROWS + tl.arange(0, ROWS)
        at = y[:, None] * WO + x[None, :]
        # SIZE < HO*WO where a "valid" channel, all of one class, is read as rows of any length
        inside = (y < TOP + NY)[:, None] & (x < WO)[None, :] & (at < SIZE)
        sums = c * (R * Q) + TOP * Q + _class(x, LEFT, NX)
        p = tl.load(P + c * SIZE + at, mask=inside, other=0.0)
        total = tl.zeros((ROWS, COLS), tl.float32)

        r = tl.arange(0, EDGES)  # the classes of rows
        edge = ((r + band * R < R) & (r != TOP))[:, None] & (x < WO)[None, :]
        edge_at = tl.where(r > TOP, r + NY - 1, r)[:, None] * WO + x[None, :]
        edge_sums = c * (R * Q) + r[:, None] * Q + _class(x, LEFT, NX)[None, :]
        middle = ((x >= LEFT) & (x < LEFT + NX))[None, :]
        side = ((x < LEFT) | (x >= LEFT + NX) & (x < WO))[None, :]
        if R > 1:
            edge_p = tl.load(P + c * SIZE + edge_at, mask=edge, other=0.0)
            edge_total = tl.zeros((EDGES, COLS), tl.float32)

        first = chunk * images
        last = tl.minimum(first + images, batch)
        grad += first.to(tl.int64) * (C * SIZE) + c * SIZE
        S += first.to(tl.int64) * (C * R * Q)
        grad_S += (band * batch + first).to(tl.int64) * (C * R * Q)
        for _ in range(first, last):
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(S + sums, mask=x < WO, other=0.0)
            g = _slope(g, p + s[None, :], ACTIVATION)
            total += g
            if R == 1 and Q == 1:
                tl.store(grad_S + c, tl.sum(tl.sum(g, 0), 0))
            else:
                column = tl.sum(g, 0)[None, :]
                if R > 1:
                    g = tl.load(grad + edge_at, mask=edge, other=0.0).to(tl.float32)
                    s = tl.load(S + edge_sums, mask=edge, other=0.0)
                    g = _slope(g, edge_p + s, ACTIVATION)
                    edge_total += g
                    column = tl.where(r[:, None] == TOP, column, g)
                else:
                    column = tl.where(r[:, None] == TOP, column, 0.0)
                row = tl.sum(tl.where(middle, column, 0.0), 1)
                tl.store(grad_S + c * (R * Q) + r * Q + LEFT, row, mask=r < R)
                tl.store(grad_S + edge_sums, column, mask=(r < R)[:, None] & side)
            grad += C * SIZE
            S += C * R * Q
            grad_S += C * R * Q
        grad_P += chunk.to(tl.int64) * (C * SIZE) + c * SIZE
        tl.store(grad_P + at, total, mask=inside)
        if R > 1:
            tl.store(grad_P + edge_at, edge_total, mask=edge)

    @triton.jit
    def _backward_last_kernel(
        grad, P, S, grad_P, grad_S, batch, images,
        C: tl.constexpr, WO: tl.constexpr, SIZE: tl.constexpr,
        TOP: tl.constexpr, LEFT: tl.constexpr, NY: tl.constexpr, NX: tl.constexpr,
        R: tl.constexpr, Q: tl.constexpr, ACTIVATION: tl.constexpr,
        SLOTS: tl.constexpr, BLOCKS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """channels_last: as `_backward_kernel`, but a program's pixels are all of one class.

        Slots 0 .. BLOCKS-1 are pieces of the interior, the others one class at the edges each.
        grad_P (chunks, Ho,Wo,C), grad_S (slots, B, C).
        """
        pid = tl.program_id(0)
        parts: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
        slot, part, chunk = pid % SLOTS, pid // SLOTS % parts, pid // (SLOTS * parts)
        edge = slot - BLOCKS  # number of the class at the edges, which are all but one
        edge += (edge >= TOP * Q + LEFT).to(tl.int32)
        edge = tl.where(slot < BLOCKS, TOP * Q + LEFT, edge)
        r, q = edge // Q, edge % Q
        rows, cols = tl.where(r == TOP, NY, 1), tl.where(q == LEFT, NX, 1)
        y0, x0 = tl.where(r > TOP, r + NY - 1, r), tl.where(q > LEFT, q + NX - 1, q)
        start = tl.where(slot < BLOCKS, slot * PIXELS, 0)
        end = tl.where(slot < BLOCKS, tl.minimum(start + PIXELS, rows * cols), rows * cols)
        c = part * CHANNELS + tl.arange(0, CHANNELS)
        first = chunk * images
        last = tl.minimum(first + images, batch)
        for begin in range(start, end, PIXELS):
            tl.debug_barrier()  # what one warp has stored of a long edge, the others read in its next piece
            j = begin + tl.arange(0, PIXELS)
            at = ((y0 + j // cols) * WO + x0 + j % cols)[:, None] * C + c[None, :]
            inside = (j < end)[:, None] & (c < C)[None, :]
            p = tl.load(P + at, mask=inside, other=0.0)
            total = tl.zeros((PIXELS, CHANNELS), tl.float32)
            continued = tl.where(begin > start, C, 0)
            g_at = grad + first.to(tl.int64) * SIZE
            s_at = S + first.to(tl.int64) * (C * R * Q) + edge * C
            o_at = grad_S + (slot * batch + first).to(tl.int64) * C
            for _ in range(first, last):
                g = tl.load(g_at + at, mask=inside, other=0.0).to(tl.float32)
                s = tl.load(s_at + c, mask=c < C, other=0.0)
                g = _slope(g, p + s[None, :], ACTIVATION)
                total += g
                # an edge longer than PIXELS comes in several pieces, added here one by one
                before = tl.load(o_at + c, mask=c < continued, other=0.0)
                tl.store(o_at + c, before + tl.sum(g, 0), mask=c < C)
                g_at += SIZE
                s_at += C * R * Q
                o_at += C
            tl.store(grad_P + chunk.to(tl.int64) * SIZE + at, total, mask=inside)

    @triton.jit
    def _finish_kernel(
        grad_taps, grad_P, coords, grad_weight, partial,
        Z_FIRST: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
        C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
        PAD_Y: tl.constexpr, PAD_X: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
        TOP: tl.constexpr, LEFT: tl.constexpr, NY: tl.constexpr, NX: tl.constexpr,
        R: tl.constexpr, Q: tl.constexpr, LAST: tl.constexpr,
        TAPS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Gradient of the weight. Latents: from the gradient of the sums of taps. Coordinates:
        partial sums (splits, C, M, KH*KW+1) over PIXELS pixels; the last one is the bias's."""
        tiles: tl.constexpr = (K * C * KH * KW + BLOCK - 1) // BLOCK
        pid = tl.program_id(0)
        if pid < tiles:
            n = pid * BLOCK + tl.arange(0, BLOCK)
            inside = n < K * C * KH * KW
            c, k = n // (K * KH * KW), n // (KH * KW) % K
            i, j = n // KW % KH - PAD_Y, n % KW - PAD_X
            total = tl.zeros((BLOCK,), tl.float32)
            for r in range(R):
                y = i + tl.where(r > TOP, r + NY - 1, r)
                for q in range(Q):
                    x = j + tl.where(q > LEFT, q + NX - 1, q)
                    there = (y >= 0) & (y < H) & (x >= 0) & (x < W) & inside
                    one = r * Q + q
                    at = one * C + c if LAST else c * (R * Q) + one
                    at += k * (C * R * Q)
                    total += tl.load(grad_taps + at, mask=there, other=0.0)
            at = (c * (K + M) + Z_FIRST + k) * (KH * KW) + n % (KH * KW)
            tl.store(grad_weight + at, total, mask=inside)
        else:
            pid -= tiles
            m, channel, split = pid % M, pid // M % C, pid // (M * C)
            tap = tl.arange(0, TAPS)
            tap_y, tap_x = (tap // KW - PAD_Y)[:, None], (tap % KW - PAD_X)[:, None]
            sums = tl.zeros((TAPS, BLOCK), tl.float32)
            for begin in range(0, PIXELS, BLOCK):
                pixel = split * PIXELS + begin + tl.arange(0, BLOCK)
                present = (pixel < HO * WO)[None, :]
                g = tl.load(grad_P + channel * (HO * WO) + pixel, mask=pixel < HO * WO, other=0.0)
                row, col = (pixel // WO)[None, :] + tap_y, (pixel % WO)[None, :] + tap_x
                present = present & (tap < KH * KW)[:, None]
                present = present & (row >= 0) & (row < H) & (col >= 0) & (col < W)
                coordinate = tl.load(coords + (m * H + row) * W + col, mask=present, other=0.0)
                coordinate = tl.where((tap == KH * KW)[:, None], 1.0, coordinate.to(tl.float32))
                sums += coordinate * g[None, :]
            partial += ((split * C + channel) * M + m) * (KH * KW + 1)
            tl.store(partial + tap, tl.sum(sums, 1), mask=tap < KH * KW + 1)


# TRITON_INTERPRET=1 before the import: the kernels run in Triton's interpreter, on a CPU.
_INTERPRETED = triton is not None and not isinstance(_forward_kernel, triton.JITFunction)

_BLOCK = 1024  # values a program writes per image forward; 16-byte stores for 4 warps
_BACKWARD_TILE = 2048  # values per image a program reads, NCHW
_PIXELS, _CHANNELS = 64, 64  # the same in channels_last
_PROGRAMS = 2048  # enough to fill any GPU; fixed, so that results don't depend on the device
_MAX_IMAGES = 32  # images per program: reuses P, keeps the partial sums small


def _images(batch, programs):
    """How many images one program goes through, given the programs per image."""
    return max(1, min(_MAX_IMAGES, triton.cdiv(batch * programs, _PROGRAMS)))


def _power(n):
    return 1 << (max(n, 1) - 1).bit_length()


def _constants(g):
    """The sizes that every kernel is compiled for."""
    return dict(
        C=g.channels, HO=g.out_height, WO=g.out_width, TOP=g.top, LEFT=g.left, NY=g.ny, NX=g.nx,
        R=g.rows, Q=g.cols,
    )  # fmt: skip


def _weight_constants(g, coords_first):
    """What the kernels that read or write weights need in addition."""
    return dict(
        Z_FIRST=g.maps if coords_first else 0, K=g.latents, M=g.maps, H=g.height, W=g.width,
        KH=g.kh, KW=g.kw, PAD_Y=g.pad_y, PAD_X=g.pad_x,
    )  # fmt: skip


def _launching(z):
    """Context of the launches: z's GPU is the current one, and no autocast, which would round."""
    if not z.is_cuda and not _INTERPRETED:
        raise ValueError(f"the Triton kernels need tensors on a GPU, got {z.device}")
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(z.device.type, enabled=False))
    if z.is_cuda:
        stack.enter_context(torch.cuda.device(z.device))
    return stack


def _prepare(z, coords, weight, bias, g, coords_first, last):
    """P, the sums of taps (K, values of S for one image) and S = z @ taps, float32."""
    P = torch.empty(g.size, device=z.device)
    taps = torch.empty(g.latents, g.sums, device=z.device)
    grid = (triton.cdiv(P.numel(), 256) + triton.cdiv(taps.numel(), 256),)
    _prepare_kernel[grid](
        coords.contiguous(), weight.contiguous(), weight if bias is None else bias.contiguous(),
        P, taps, MAP_FIRST=0 if coords_first else g.latents, LAST=last, HAS_BIAS=bias is not None,
        BLOCK=256, **_constants(g), **_weight_constants(g, coords_first),
    )  # fmt: skip
    return P, taps, z.float() @ taps


def _triton_forward(z, coords, weight, bias, pads, activation, coords_first, last, dtype):
    g = _geometry(z, coords, weight, pads)
    shape = g.batch, g.channels, g.out_height, g.out_width
    format = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(shape, dtype=dtype, device=z.device, memory_format=format)
    if g.batch == 0:
        return out
    with _launching(z):
        P, _, S = _prepare(z, coords, weight, bias, g, coords_first, last)
        tiles = triton.cdiv(g.size, _BLOCK)
        images = _images(g.batch, tiles)
        _forward_kernel[(tiles, triton.cdiv(g.batch, images))](
            P, S, out, g.batch, images, ACTIVATION=activation, LAST=last, BLOCK=_BLOCK,
            num_warps=4, **_constants(g),
        )  # fmt: skip
    return out


def _stream(grad, P, S, g, activation, last):
    """One read of the gradient -> grad_P (C,Ho,Wo) and grad_S (B, values of S for one image)."""
    constants = _constants(g)
    if last:
        pixels, channels = _PIXELS, min(_power(g.channels), _CHANNELS)
        blocks = triton.cdiv(g.ny * g.nx, pixels)
        slots = blocks + g.rows * g.cols - 1
        programs = slots * triton.cdiv(g.channels, channels)
        images = _images(g.batch, programs)
        chunks = triton.cdiv(g.batch, images)
        grad_P = torch.empty(chunks, g.size, device=S.device)
        grad_S = torch.empty(slots, g.batch, g.channels, device=S.device)
        del constants["HO"]
        _backward_last_kernel[(programs * chunks,)](
            grad, P, S, grad_P, grad_S, g.batch, images, SIZE=g.size, ACTIVATION=activation,
            SLOTS=slots, BLOCKS=blocks, PIXELS=pixels, CHANNELS=channels, num_warps=4, **constants,
        )  # fmt: skip
        interior, middle = grad_S[:blocks].sum(0, keepdim=True), blocks + g.top * g.cols + g.left
        grad_S = torch.cat([grad_S[blocks:middle], interior, grad_S[middle:]])
        grad_S = grad_S.transpose(0, 1).reshape(g.batch, g.sums)
        grad_P = grad_P.sum(0).view(-1, g.channels).t().contiguous()
        return grad_P, grad_S
    size = g.out_height * g.out_width
    if g.rows * g.cols == 1:  # one class: cut the channel into rows that suit the hardware
        cols = min(_power(size), 128)
        constants.update(HO=triton.cdiv(size, cols), WO=cols, NY=triton.cdiv(size, cols), NX=cols)
    cols = _power(constants["WO"])
    rows = min(_power(constants["NY"]), max(1, _BACKWARD_TILE // cols))
    bands = triton.cdiv(constants["NY"], rows)
    images = _images(g.batch, bands * g.channels)
    chunks = triton.cdiv(g.batch, images)
    grad_P = torch.empty(chunks, g.size, device=S.device)
    grad_S = torch.empty(bands, g.batch, g.sums, device=S.device)
    _backward_kernel[(bands * g.channels * chunks,)](
        grad, P, S, grad_P, grad_S, g.batch, images, SIZE=size, ACTIVATION=activation,
        BANDS=bands, ROWS=rows, EDGES=_power(g.rows), COLS=cols,
        num_warps=max(1, min(8, rows * cols // 512)), **constants,
    )  # fmt: skip
    grad_P = grad_P.sum(0) if chunks > 1 else grad_P[0]
    return grad_P.view(g.channels, -1), grad_S.sum(0) if bands > 1 else grad_S[0]


def _triton_backward(grad, z, coords, weight, bias, pads, activation, coords_first, last, want):
    """Gradients of z, coords (empty unless wanted), weight and bias."""
    g = _geometry(z, coords, weight, pads)
    grad_coords = coords.new_empty(0)
    if g.batch == 0:
        grad_coords = torch.zeros_like(coords) if want else grad_coords
        grad_bias = weight.new_zeros(g.channels)
        return torch.zeros_like(z), grad_coords, torch.zeros_like(weight), grad_bias
    format = torch.channels_last if last else torch.contiguous_format
    with _launching(z):
        P, taps, S = _prepare(z, coords, weight, bias, g, coords_first, last)
        grad = grad.contiguous(memory_format=format)
        grad_P, grad_S = _stream(grad, P, S, g, activation, last)
        grad_z = grad_S @ taps.t()
        grad_taps = z.float().t() @ grad_S
        grad_weight = torch.empty(weight.shape, device=z.device)
        size, block, taps_padded = g.out_height * g.out_width, 128, _power(g.kh * g.kw + 1)
        pixels = block * min(triton.cdiv(size, block), 8)
        splits = triton.cdiv(size, pixels)
        partial = torch.empty(splits, g.channels, g.maps, g.kh * g.kw + 1, device=z.device)
        grid = triton.cdiv(weight[:, : g.latents].numel(), block) + splits * g.channels * g.maps
        _finish_kernel[(grid,)](
            grad_taps, grad_P, coords.contiguous(), grad_weight, partial, LAST=last,
            TAPS=taps_padded, PIXELS=pixels, BLOCK=block, num_warps=4,
            **_constants(g), **_weight_constants(g, coords_first),
        )  # fmt: skip
        partial = partial.sum(0)
        map_first = 0 if coords_first else g.latents
        maps = slice(map_first, map_first + g.maps)
        grad_weight[:, maps] = partial[..., :-1].unflatten(2, (g.kh, g.kw))
        if want:
            full = F.conv_transpose2d(
                grad_P.view(1, g.channels, g.out_height, g.out_width), weight[:, maps].float()
            )[0]
            y, x = slice(g.pad_y, g.pad_y + g.height), slice(g.pad_x, g.pad_x + g.width)
            grad_coords = full[:, y, x].to(coords.dtype).contiguous()
    bias_dtype = weight.dtype if bias is None else bias.dtype
    grad_bias = partial[:, 0, -1].to(bias_dtype, copy=True)
    return grad_z.to(z.dtype), grad_coords, grad_weight.to(weight.dtype), grad_bias


# --- the operator ---------------------------------------------------------------------------------

# Each copy of the file in a process has its own, or the last one would take the operator from the
# others. A program of `torch.export` with it loads where a module of the same name is imported.
_NAMESPACE = "sbvae_" + re.sub(r"\W", "_", __name__, flags=re.ASCII)
while hasattr(getattr(torch.ops, _NAMESPACE), "broadcast_conv2d"):
    _NAMESPACE += "_"


@torch.library.custom_op(f"{_NAMESPACE}::broadcast_conv2d", mutates_args=())
def _operator(
    z: Tensor,
    coords: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    pads: List[int],  # noqa: UP006
    activation: Optional[str],  # noqa: UP045
    coords_first: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The layer as one operator for the compiler, `torch.export` and CUDA graphs."""
    arguments = z, coords, weight, bias, pads, activation, coords_first, channels_last, dtype
    return _triton_forward(*arguments)


@_operator.register_fake
def _(z, coords, weight, bias, pads, activation, coords_first, channels_last, dtype):
    kh, kw = weight.shape[2:]
    height = coords.shape[1] + pads[2] + pads[3] - kh + 1
    width = coords.shape[2] + pads[0] + pads[1] - kw + 1
    format = torch.channels_last if channels_last else torch.contiguous_format
    shape = z.shape[0], weight.shape[0], height, width
    return torch.empty(shape, dtype=dtype, device=z.device, memory_format=format)


@torch.library.custom_op(f"{_NAMESPACE}::broadcast_conv2d_backward", mutates_args=())
def _operator_backward(
    grad: Tensor,
    z: Tensor,
    coords: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    pads: List[int],  # noqa: UP006
    activation: Optional[str],  # noqa: UP045
    coords_first: bool,
    channels_last: bool,
    want_coords: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    """Gradients of z, coords (of size 0 unless wanted), weight and bias."""
    arguments = pads, activation, coords_first, channels_last
    return _triton_backward(grad, z, coords, weight, bias, *arguments, want_coords)


@_operator_backward.register_fake
def _(grad, z, coords, weight, bias, pads, activation, coords_first, channels_last, want_coords):
    grad_coords = torch.empty_like(coords) if want_coords else coords.new_empty(0)
    grad_bias = (weight if bias is None else bias).new_empty(weight.shape[0])
    return z.new_empty(z.shape), grad_coords, weight.new_empty(weight.shape), grad_bias


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.arguments = inputs[4:]


def _differentiate(ctx, grad):
    z, coords, weight, bias = ctx.saved_tensors
    pads, activation, coords_first, channels_last, _ = ctx.arguments
    need = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # a second derivative is wanted: the kernels have none, the PyTorch form has every one
        tensors = [t for t, n in zip(ctx.saved_tensors, need, strict=True) if n]
        out = _torch(*ctx.saved_tensors, *ctx.arguments)
        grads = iter(torch.autograd.grad(out, tensors, grad, create_graph=True))
        return *(next(grads) if n else None for n in need), *[None] * 5
    grads = _operator_backward(
        grad, z, coords, weight, bias, pads, activation, coords_first, channels_last,
        ctx.needs_input_grad[1],
    )  # fmt: skip
    return *(g if n else None for g, n in zip(grads, need, strict=True)), *[None] * 5


_operator.register_autograd(_differentiate, setup_context=_save)


# --- public ---------------------------------------------------------------------------------------


def _pads(padding, kh, kw):
    """(left, right, top, bottom), as F.pad takes them."""
    if padding == "same":  # TensorFlow's rule: for an even kernel one more row at the end
        return (kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2
    if padding == "valid":
        return 0, 0, 0, 0
    pair = (padding, padding) if isinstance(padding, numbers.Integral) else padding
    valid = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not valid or not all(
        isinstance(p, numbers.Integral) and not isinstance(p, bool) and 0 <= p < 2**15 for p in pair
    ):
        raise ValueError(
            "padding must be 'same', 'valid', an int from 0 to 32,767 or a pair of them, got "
            f"{padding!r}"
        )
    rows, columns = map(int, pair)
    return columns, columns, rows, rows


def broadcast_conv2d(
    z,
    coords,
    weight,
    bias=None,
    padding="same",
    activation=None,
    backend="auto",
    coords_first=False,
    out_format="contiguous",
):
    """act(conv2d(pad(concat([tile(z), coords])), weight, bias)), without the tiles.

    z            (B,K) latents
    coords       (M,H,W) coordinate channels of any content, M >= 1; see `coordinates`
    weight       (C,K+M,kh,kw), as `nn.Conv2d` has it: first the latents' channels, then the
                 coordinates', the other way round with `coords_first`
    bias         (C,) or None
    padding      "same": the output is H x W; for an even kernel one more row and column of zeros at
                 the end than at the start (TensorFlow's rule and the paper's). "valid": none.
                 An int or a pair (rows, columns): that many on each side, as in `nn.Conv2d`
    activation   None, "relu" or "elu" (alpha 1)
    backend      "auto", "reference", "torch" or "triton"
    out_format   "contiguous" (NCHW) or "channels_last": how the output lies in memory

    Tensors are floating point, of one dtype (any mix under autocast), on one device. Returns
    (B,C,Ho,Wo). Gradients flow to all four tensors. Raises ValueError for what does not fit, and with
    backend="triton" for what the kernels can't take; "auto" then takes "torch".
    """
    _check_options(activation, backend, out_format)
    _check(z, coords, weight, bias)
    pads = _pads(padding, *weight.shape[2:])
    _check_size(*coords.shape[1:], *weight.shape[2:], pads)
    device, dtype = z.device.type, z.dtype
    autocast = _autocasts(device) and dtype != torch.float64
    # torch.vmap leaves autocast out: an output in its type would meet weights that are not
    if autocast and (torch.compiler.is_compiling() or not (_batched(z) or _batched(weight))):
        dtype = torch.get_autocast_dtype(device)
    small = backend == "auto" and _small(z, coords, weight)
    # Autocast would round latents and weights. What is small can stay in float32: P, S, small layers
    exact = autocast and backend != "reference"
    if small or backend == "reference":
        if coords_first:
            maps = coords.shape[0]
            weight = torch.cat([weight[:, maps:], weight[:, :maps]], 1)
        tensors = z, coords, weight, bias
        if exact:
            tensors = (None if t is None else t.float() for t in tensors)
        with torch.autocast(device, enabled=False) if exact else contextlib.nullcontext():
            out = _reference(*tensors, pads, activation)
        return _laid_out(out.to(dtype) if exact else out, out_format == "channels_last")
    reason = None if backend == "torch" else _refusal(z, coords, weight, pads, dtype, out_format)
    if backend == "triton" and reason:
        raise ValueError(f"backend='triton' {reason}; use backend='auto' or 'torch'")
    with torch.autocast(device, enabled=False) if exact else contextlib.nullcontext():
        last = out_format == "channels_last"
        arguments = z, coords, weight, bias, list(pads), activation, coords_first, last, dtype
        if not reason and backend != "torch" and (z.is_cuda or backend == "triton"):
            return _operator(*arguments)
        return _torch(*arguments)


def _small(z, coords, weight):
    """Whether the plain convolution is quicker, on a CPU: so few multiply-adds that the factorised
    form's dozen of small steps cost more. Measured on one core of a Zen 4, 8x8 to 64x64."""
    if z.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    half = z.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    return len(z) * weight.numel() * coords[0].numel() < (52e6 if half else 16e6)


def _refusal(z, coords, weight, pads, dtype, out_format):
    """Why Triton can't take these arguments, or None."""
    if triton is None:
        return "needs Triton, which is not installed"
    if _stepwise():
        return "has no rules for torch.func, forward-mode derivatives and torch.jit.trace"
    if not z.is_cuda and not _INTERPRETED:
        return f"needs tensors on a GPU, got {z.device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {dtype}"
    g = _geometry(z, coords, weight, pads)
    if g.size >= 2**31 - 2**16 or weight.numel() >= 2**31 - 2**16:
        return "takes less than 2^31 values per image"
    if g.kh * g.kw > 255 or g.rows * g.cols > 1024:
        return f"takes at most 255 taps and 1024 classes, got {g.kh * g.kw} and {g.rows * g.cols}"
    wide = _power(g.rows) * _power(g.out_width) > 8192  # what one program holds of the edges
    if out_format == "contiguous" and g.rows * g.cols > 1 and wide:
        return f"takes contiguous output this padded only below a width of {g.out_width}"
    return None


def _autocasts(device):
    return device != "meta" and torch.is_autocast_enabled(device)  # which "meta" cannot be asked


def _check_size(height, width, kh, kw, pads):
    if height + pads[2] + pads[3] < kh or width + pads[0] + pads[1] < kw:
        raise ValueError(
            f"the {kh}x{kw} kernel is larger than the padded {height}x{width} image, "
            "so there is no output"
        )


def _check_options(activation, backend, out_format):
    """Raise ValueError, in one line, for what there is not."""
    if activation not in tuple(_ACTIVATIONS):
        raise ValueError(f"activation must be None, 'relu' or 'elu', got {activation!r}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if out_format not in _FORMATS:
        raise ValueError(f"out_format must be 'contiguous' or 'channels_last', got {out_format!r}")


def _check(z, coords, weight, bias):
    """Raise ValueError, in one line, for tensors that do not fit together."""
    given = [t for t in (z, coords, weight, bias) if t is not None]
    if not all(isinstance(t, torch.Tensor) for t in given):
        raise ValueError(f"expected tensors, got {[type(t).__name__ for t in given]}")
    if z.dim() != 2 or coords.dim() != 3 or weight.dim() != 4:
        hint = "; z.flatten(1) makes (B,K) of (B,K,1,1), z.flatten(0, 1) of (B,slots,K)"
        raise ValueError(
            "expected z (B,K), coords (M,H,W) and weight (C,K+M,kh,kw), got "
            f"{tuple(z.shape)}, {tuple(coords.shape)} and {tuple(weight.shape)}"
            + hint * (z.dim() > 2)
        )
    if weight.shape[1] != z.shape[1] + coords.shape[0] or 0 in (
        *coords.shape, z.shape[1], *weight.shape,
    ):  # fmt: skip
        raise ValueError(
            f"weight must have K+M = {z.shape[1]}+{coords.shape[0]} input channels (K, M >= 1) and "
            f"no side of 0, got shape {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if len({t.device for t in given}) > 1:
        devices = ", ".join(str(t.device) for t in given)
        raise ValueError(f"z, coords, weight and bias must be on one device, got {devices}")
    if not all(t.is_floating_point() for t in given):
        raise ValueError(f"the tensors must be floating point, got {[t.dtype for t in given]}")
    if len({t.dtype for t in given}) > 1 and not _autocasts(z.device.type):
        dtypes = ", ".join(str(t.dtype) for t in given)
        raise ValueError(f"z, coords, weight and bias must have one dtype, got {dtypes}")


def coordinates(height, width):
    """The coordinate channels of Algorithm 1, (2,H,W) float32: x along the width, y along the
    height, from -1 to 1. (The paper's listing makes y with w; h is meant.)"""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    return torch.stack([x, y])


class SpatialBroadcastConv2d(nn.Conv2d):
    """Broadcast to height x width, append coordinates, convolve: z (B,K) -> (B,C,Ho,Wo).

    Takes the place of those steps and of an `nn.Conv2d(latents + 2, out_channels, kernel_size)`,
    whose weight, bias, initialisation and state dict it has. Other `coords` (M,height,width) make
    it latents + M; they move with the module but are not in the state dict, so that they must be
    set anew after `to_empty`. The other arguments are those of `broadcast_conv2d`, which is the one
    to call for a size that only the forward pass knows, and for coordinates that are learned.
    Raises ValueError for arguments that do not fit together.
    """

    def __init__(
        self,
        latents,
        out_channels,
        kernel_size,
        height,
        width,
        padding="same",
        activation=None,
        bias=True,
        coords=None,
        coords_first=False,
        backend="auto",
        out_format="contiguous",
        device=None,
        dtype=None,
    ):
        sides = (kernel_size,) * 2 if isinstance(kernel_size, numbers.Integral) else kernel_size
        if not isinstance(sides, (tuple, list)) or len(sides) != 2:
            raise ValueError(f"kernel_size must be an int or a pair of them, got {kernel_size!r}")
        sizes = dict(latents=latents, out_channels=out_channels, height=height, width=width)
        for name, size in [*sizes.items(), *(("kernel_size", side) for side in sides)]:
            if not isinstance(size, numbers.Integral) or size < 1:
                raise ValueError(f"{name} must be an int and at least 1, got {size!r}")
        _check_size(height, width, *sides, _pads(padding, *sides))
        _check_options(activation, backend, out_format)
        coords = coordinates(height, width) if coords is None else coords
        fits = isinstance(coords, Tensor) and tuple(coords.shape[1:]) == (height, width)
        if not fits or len(coords) == 0:
            got = tuple(coords.shape) if isinstance(coords, Tensor) else type(coords).__name__
            raise ValueError(f"coords must be a tensor (M, {height}, {width}), M >= 1, got {got}")
        if coords.requires_grad:
            raise ValueError(
                "coords must not require a gradient: the layer does not own them; call "
                "broadcast_conv2d with yours"
            )
        super().__init__(
            latents + coords.shape[0],
            out_channels,
            tuple(sides),
            padding=padding,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        # not persistent: the state dict must stay that of nn.Conv2d
        self.register_buffer(
            "coords", coords.to(self.weight.device, self.weight.dtype), persistent=False
        )
        self.activation = activation
        self.coords_first = coords_first
        self.backend = backend
        self.out_format = out_format

    def forward(self, z):
        return broadcast_conv2d(
            z,
            self.coords,
            self.weight,
            self.bias,
            self.padding,
            self.activation,
            self.backend,
            self.coords_first,
            self.out_format,
        )

    def extra_repr(self):
        height, width = self.coords.shape[1:]
        own = f"height={height}, width={width}, activation={self.activation!r}"
        return f"{super().extra_repr()}, {own}" + ", coords_first=True" * self.coords_first
