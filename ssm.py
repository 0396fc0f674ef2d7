"""ssm.py: a memory that decides what to let in, the selective state space model (Mamba).

A leaky integrator, dh/dtime = A h + B u with A < 0, keeps a trace of all inputs u, which fades at
the same rate whatever u is. Here every token chooses the step size dt of its own update (dt is no
gradient): a large dt forgets the past and writes the token, and dt = 0 holds the state.

Forward, for every channel and its states s, A = -exp(A_log) < 0; Bt, Ct are B, C of the papers:
    dt = softplus(z)     z, Bt, Ct = linear(u)   so all three depend on the token
    a = exp(dt A)        b = dt u Bt             a is exact; for b: Euler's dt for (a - 1) / A
    h_t = a_t h_{t-1} + b_t                      the scan, linear in h
    y_t = sum_s Ct_t h_t + skip u_t
Block: x + out(y silu(gate)), u = silu(conv(x1)); x1, gate are the halves of linear(rmsnorm(x))
Backward, g_t is the gradient of h_t, slope_t that of the exponent dt A:
    g_t = dy_t Ct_t + a_{t+1} g_{t+1}            the same scan, run from the end
    slope_t = g_t a_t h_{t-1}                    dA_log = A sum_t slope dt      dskip = sum dy u
    dCt = sum dy h,  dBt = sum g dt u   over the channels      dz = ddt sigmoid(z)
    ddt = sum_s slope A + u sum_s g Bt      du = dt sum_s g Bt + skip dy + (dz, dBt, dCt) Wx^T

Run    python ssm.py      (induction heads; python ssm.py --help lists the other tasks)
Papers: Gu, Dao 2023 (Mamba), Gu, Goel, Re 2021 (S4), Gu et al. 2022 (S4D), Fu et al. 2022 (H3).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///

import math
import os
import signal
import threading
import time
from dataclasses import dataclass, fields, replace

for library in ("OPENBLAS", "MKL", "OMP"):  # the matrices are small: one BLAS thread is fastest
    os.environ.setdefault(library + "_NUM_THREADS", "1")
import numpy as np


@dataclass
class Config:
    """Induction heads: which token followed the mark, somewhere far back?"""
    length: int = 24        # tokens per sequence
    layers: int = 1         # blocks
    dim: int = 32           # embedding dimension, channels of the scan
    states: int = 8         # states per channel
    kernel: int = 3         # tokens in the window of the convolution
    batch_size: int = 32    # sequences per step
    steps: int = 300        # optimizer steps
    lr: float = 0.02        # peak learning rate
    warmup: int = 10        # steps of linear warmup
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    seed: int = 0           # random seed


# ---- layers: T tokens, B sequences, N = T B rows, D channels, S states per channel ---------------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


def rmsnorm_forward(x, gamma, eps=1e-5):
    """y = gamma xhat, xhat = x / sqrt(mean(x^2) + eps), per row.   x (N, D)."""
    inv_rms = ((x * x).mean(axis=1, keepdims=True) + eps) ** -0.5
    xhat = x * inv_rms
    return gamma * xhat, (xhat, gamma, inv_rms)


def rmsnorm_backward(dout, cache):
    """g = gamma dout, dx = (g - xhat mean(g xhat)) / rms, dgamma = sum_n dout xhat."""
    xhat, gamma, inv_rms = cache
    g = gamma * dout
    dx = (g - xhat * (g * xhat).mean(axis=1, keepdims=True)) * inv_rms
    return dx, (dout * xhat).sum(axis=0)


def sigmoid(z):
    """1 / (1 + e^-z), computed as (1 + tanh(z / 2)) / 2, which cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def silu_forward(x):
    """y = x s(x), s the sigmoid (Elfwing et al. 2017)."""
    s = sigmoid(x)
    return x * s, (x, s)


def silu_backward(dout, cache):
    """dx = dout (s + x s (1 - s)): the product rule."""
    x, s = cache
    return dout * (s + x * s * (1 - s))


def causal_conv_forward(x, W, b):
    """y_t = b + sum_k W_k x_{t-k}: a filter per channel; no output depends on a later token.
    x (T, B, D), W (kernel, D), b (D,)."""
    y = b + W[0] * x
    for k in range(1, len(W)):
        y[k:] += W[k] * x[:-k]
    return y, (x, W)


def causal_conv_backward(dout, cache):
    """dx_t = sum_k W_k dout_{t+k}, dW_k = sum_t dout_t x_{t-k}, db = sum dout."""
    x, W = cache
    dx = W[0] * dout
    dW = np.empty_like(W)
    dW[0] = (dout * x).sum(axis=(0, 1))
    for k in range(1, len(W)):
        dx[:-k] += W[k] * dout[k:]
        dW[k] = (dout[k:] * x[:-k]).sum(axis=(0, 1))
    return dx, dW, dout.sum(axis=(0, 1))


def scan_forward(a, b):
    """h_t = a_t h_{t-1} + b_t, from h = 0 before the first.   a, b (T, ...) -> h (T, ...)."""
    h = b.copy()
    for t in range(1, len(a)):
        h[t] += a[t] * h[t - 1]
    return h, (a, h)


def scan_backward(dout, cache):
    """g_t = dout_t + a_{t+1} g_{t+1}: h_t acts directly and through h_{t+1}; this is a scan, too,
    run from the end. da_t = g_t h_{t-1}, db = g."""
    a, h = cache
    g = dout.copy()
    for t in reversed(range(len(a) - 1)):
        g[t] += a[t + 1] * g[t + 1]
    da = np.zeros_like(a)
    da[1:] = g[1:] * h[:-1]
    return da, g


def selective_scan_forward(u, dt, Bt, Ct, A_log, skip):
    """a = exp(dt A), A = -exp(A_log), b = dt u Bt, h the scan of a and b, y = sum_s Ct h + skip u.
    u, dt (T, B, D), Bt, Ct (T, B, S), A_log (S, D), skip (D,) -> y (T, B, D)."""
    A = -np.exp(A_log)
    a = np.exp(dt[:, :, None] * A)                      # (T, B, S, D)
    b = Bt[..., None] * (dt * u)[:, :, None]            # (T, B, S, D)
    h, scan = scan_forward(a, b)
    y = (Ct[:, :, None] @ h)[:, :, 0] + skip * u        # (T, B, D); @ sums over the states
    return y, (u, dt, Bt, Ct, A, skip, a, h, scan)


def selective_scan_backward(dout, cache):
    """The formulas at the top of the file; db is g.   -> du, ddt, dBt, dCt, dA_log, dskip."""
    u, dt, Bt, Ct, A, skip, a, h, scan = cache
    da, db = scan_backward(Ct[..., None] * dout[:, :, None], scan)
    slope = da * a                                      # gradient of dt A, since a = exp(dt A)
    dwrite = (Bt[:, :, None] @ db)[:, :, 0]             # gradient of dt u, (T, B, D)
    du = dwrite * dt + skip * dout
    ddt = (slope * A).sum(axis=2) + dwrite * u
    dBt = (db @ (dt * u)[..., None])[..., 0]            # (T, B, S)
    dCt = (h @ dout[..., None])[..., 0]
    dA_log = (slope * dt[:, :, None]).sum(axis=(0, 1)) * A
    return du, ddt, dBt, dCt, dA_log, (dout * u).sum(axis=(0, 1))


def softmax_cross_entropy_forward(logits, targets):
    """-mean_n log softmax(logits)[n, targets_n].   logits (N, V), targets (N,) ids -> scalar."""
    logits = logits - logits.max(axis=1, keepdims=True)     # the same softmax, without overflow
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -log_p[np.arange(len(targets)), targets].mean()
    return loss, (log_p, targets)


def softmax_cross_entropy_backward(dout, cache):
    """dlogits = (p - onehot(targets)) / N: -log p_y changes with logit k by p_k - (k == y)."""
    log_p, targets = cache
    dlogits = np.exp(log_p)
    dlogits[np.arange(len(targets)), targets] -= 1
    return dlogits * (dout / len(targets))


# ---- data ----------------------------------------------------------------------------------------

ALPHABET = "abcdefgh*"        # the last one is the mark


def make_batch(cfg, step, dtype=np.float32):
    """Random tokens; the mark stands once somewhere and again at the end.   -> ids (B, T),
    targets (B, 1): the token after the first mark, to be output after the second."""
    rng = np.random.default_rng((cfg.seed, step))
    rows, mark = np.arange(cfg.batch_size), len(ALPHABET) - 1
    ids = rng.integers(0, mark, (cfg.batch_size, cfg.length))
    position = rng.integers(0, cfg.length - 2, cfg.batch_size)
    ids[rows, position] = mark
    ids[:, -1] = mark
    return ids, ids[rows, position + 1][:, None]


# ---- model: an embedding, blocks, a last norm, logits --------------------------------------------

def init_params(cfg, rng, dtype=np.float32, vocab_size=len(ALPHABET)):
    """E (V, D); gamma, Win, bin, Wconv, bconv, Wx, bx, A_log, skip, Wout, bout of block i with the
    prefix "i."; gamma, Wo, bo. A = -1, ..., -S in every channel; dt is 0.001 to 1, if u is 0."""
    D, S, V = cfg.dim, cfg.states, vocab_size
    params = {"E": rng.standard_normal((V, D)), "gamma": np.ones(D),
              "Wo": rng.standard_normal((D, V)) * D ** -0.5, "bo": np.zeros(V)}
    for i in range(cfg.layers):
        for name, n, m in (("in", D, 2 * D), ("x", D, D + 2 * S), ("out", D, D)):
            params[f"{i}.W{name}"] = rng.standard_normal((n, m)) * n ** -0.5
            params[f"{i}.b{name}"] = np.zeros(m)
        params[f"{i}.Wconv"] = rng.standard_normal((cfg.kernel, D)) * cfg.kernel ** -0.5
        params[f"{i}.bconv"] = np.zeros(D)
        dt = 0.001 ** rng.random(D)                     # log-uniform from 0.001 to 1
        params[f"{i}.bx"][:D] = np.log(np.exp(dt) - 1)  # the inverse of softplus
        params[f"{i}.A_log"] = np.repeat(np.log(np.arange(1, S + 1))[:, None], D, axis=1)
        params[f"{i}.gamma"], params[f"{i}.skip"] = np.ones(D), np.ones(D)
    return {name: value.astype(dtype) for name, value in params.items()}


def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


def selective_forward(u, params):
    """z, Bt, Ct = linear(u), dt = softplus(z), then the scan.   u (T, B, D) -> y (T, B, D)."""
    S, D = params["A_log"].shape
    zBC, linear = linear_forward(u.reshape(-1, D), params["Wx"], params["bx"])
    zBC = zBC.reshape(*u.shape[:2], -1)                 # (T, B, D + 2 S)
    z, Bt, Ct = np.split(zBC, [D, D + S], axis=2)
    dt = np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))        # log(1 + e^z) without overflow
    y, scan = selective_scan_forward(u, dt, Bt, Ct, params["A_log"], params["skip"])
    return y, (scan, z, linear)


def selective_backward(dout, cache):
    """selective_forward in reverse order -> du, gradients; u is used twice, so gradients add."""
    (scan, z, linear), g = cache, {}
    du, ddt, dBt, dCt, g["A_log"], g["skip"] = selective_scan_backward(dout, scan)
    dzBC = np.concatenate([ddt * sigmoid(z), dBt, dCt], axis=2)
    more, g["Wx"], g["bx"] = linear_backward(dzBC.reshape(-1, dzBC.shape[2]), linear)
    return du + more.reshape(du.shape), g


SELECTIVE = selective_forward, selective_backward


def mamba_block_forward(x, params, mixer):
    """The block at the top of the file; mixer: (forward, backward) of u -> y.   x (T, B, D)."""
    y, norm = rmsnorm_forward(x.reshape(-1, x.shape[2]), params["gamma"])
    y, up = linear_forward(y, params["Win"], params["bin"])
    x1, gate = np.split(y.reshape(*x.shape[:2], -1), 2, axis=2)     # (T, B, D) each
    x1, conv = causal_conv_forward(x1, params["Wconv"], params["bconv"])
    u, silu = silu_forward(x1)
    y, mix = mixer[0](u, params)
    gate, gate_silu = silu_forward(gate)
    out, down = linear_forward((y * gate).reshape(-1, x.shape[2]), params["Wout"], params["bout"])
    return x + out.reshape(x.shape), (mix, norm, up, conv, silu, y, gate, gate_silu, down, mixer)


def mamba_block_backward(dout, cache):
    """mamba_block_forward in reverse order.   -> dx, gradients."""
    mix, norm, up, conv, silu, y, gate, gate_silu, down, mixer = cache
    dy, Wout, bout = linear_backward(dout.reshape(-1, dout.shape[2]), down)
    dy = dy.reshape(dout.shape)
    du, g = mixer[1](dy * gate, mix)
    dx1 = silu_backward(du, silu)
    dx1, g["Wconv"], g["bconv"] = causal_conv_backward(dx1, conv)
    dgate = silu_backward(dy * y, gate_silu)
    dy = np.concatenate([dx1, dgate], axis=2)
    dy, g["Win"], g["bin"] = linear_backward(dy.reshape(-1, dy.shape[2]), up)
    dy, g["gamma"] = rmsnorm_backward(dy, norm)
    return dout + dy.reshape(dout.shape), {**g, "Wout": Wout, "bout": bout}


def mamba_forward(params, ids, last, cfg, mixer):
    """ids (B, T) -> logits (last * B, V): B rows of token T - last, B of the next, to T - 1."""
    x, caches = params["E"][ids.T], []                  # (T, B, D): time comes first
    for i in range(cfg.layers):
        x, cache = mamba_block_forward(x, part(params, f"{i}."), mixer)
        caches.append(cache)
    y, norm = rmsnorm_forward(x[-last:].reshape(-1, cfg.dim), params["gamma"])
    logits, out = linear_forward(y, params["Wo"], params["bo"])
    return logits, (caches, ids, x, norm, out, params, last)


def mamba_backward(dout, cache):
    """mamba_forward in reverse order -> gradients under the keys of params."""
    caches, ids, x, norm, out, params, last = cache
    grads, dx = {"E": np.zeros_like(params["E"])}, np.zeros_like(x)
    dy, grads["Wo"], grads["bo"] = linear_backward(dout, out)
    dy, grads["gamma"] = rmsnorm_backward(dy, norm)
    dx[-last:] = dy.reshape(last, *x.shape[1:])         # 0 before the last tokens
    for i in reversed(range(len(caches))):
        dx, g = mamba_block_backward(dx, caches[i])
        grads.update({f"{i}.{name}": value for name, value in g.items()})
    np.add.at(grads["E"], ids.T, dx)
    return grads


def loss_and_grads(params, batch, cfg, mixer=SELECTIVE):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    ids, targets = batch
    logits, cache = mamba_forward(params, ids, targets.shape[1], cfg, mixer)
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets.T.ravel())
    return loss, mamba_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)


# ---- optimizer and training ----------------------------------------------------------------------

def clip_norm(grads, limit):
    """Scale all gradients so that their joint norm is at most limit, if limit is not 0 (Pascanu et
    al. 2013).   -> the norm before."""
    norm = math.sqrt(sum(float((g.astype(float) ** 2).sum()) for g in grads.values()))
    if norm > limit > 0:
        for g in grads.values():
            g *= limit / norm
    return norm


def adam_update(params, grads, state, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """m, v: moving averages of g and g^2, divided by 1 - beta^t to correct for their start at 0;
    w <- w - lr m / (sqrt(v) + eps)."""
    t = state["t"] = state.get("t", 0) + 1
    for name, g in grads.items():
        m = state["m " + name] = beta1 * state.get("m " + name, 0) + (1 - beta1) * g
        v = state["v " + name] = beta2 * state.get("v " + name, 0) + (1 - beta2) * g * g
        m = m / (1 - beta1 ** t)
        v = v / (1 - beta2 ** t)
        params[name] -= lr * m / (np.sqrt(v) + eps)


def learning_rate(step, cfg):
    """Linear warmup times half a cosine, from step 1 on; the last step is small, not 0."""
    warmup = min(1, step / max(1, cfg.warmup))
    return cfg.lr * warmup * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / cfg.steps))


def check_finite(loss, params=None):
    """Raise FloatingPointError unless the loss and all parameters are finite, and below 1e10."""
    if not all(np.abs(value).max() < 1e10 for value in (loss, *(params or {}).values())):
        raise FloatingPointError(f"training diverged (loss {loss:.4g}); lower the learning rate")


def progress(steps, losses, note=lambda: ""):
    """for step in progress(steps, losses): ... losses.append(loss).   Print ten lines, or one per
    minute. Ctrl-C ends the loop after the step at hand; a loss that is not finite is an error."""
    def stop(*signal_and_frame):
        stopped.append(True)
        signal.signal(signal.SIGINT, previous)          # the next Ctrl-C ends the program
    stopped = []
    main_thread = threading.current_thread() is threading.main_thread()
    previous = main_thread and signal.signal(signal.SIGINT, stop)
    start = printed = time.perf_counter()
    first = before = len(losses)
    try:
        for step in range(first + 1, steps + 1):
            yield step
            check_finite(losses[-1])
            now = time.perf_counter()
            due = step % math.ceil(steps / 10) == 0 or step == steps or now > printed + 60
            if due or stopped:
                mean = sum(losses[before:]) / (step - before)
                left = (now - start) / (step - first) * (steps - step)
                print(f"step {step:6d}/{steps}  mean loss {mean:#.4g}{note()}  |  "
                      f"{now - start:.1f} s  ({left:.0f} s left)", flush=True)
                printed, before = now, step
            if stopped:
                print(f"stopped after step {step}; this is what has been learned so far")
                break
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, previous)


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads, note=lambda: ""):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state, losses = {}, []
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        clip_norm(grads, cfg.grad_clip)
        adam_update(params, grads, state, learning_rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def accuracy_at(length, params, cfg, make_batch=make_batch, mixer=SELECTIVE):
    """The share of right tokens in fresh sequences of any length."""
    cfg, right = replace(cfg, length=length), []
    for step in range(1, 17):
        ids, targets = make_batch(cfg, cfg.steps + step)
        logits, _ = mamba_forward(params, ids, targets.shape[1], cfg, mixer)
        right.append((logits.argmax(axis=1) == targets.T.ravel()).mean())
    return float(np.mean(right))


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def draw_steps(params, cfg, rows=12, columns=80):
    """The step sizes of the last block below the tokens of fresh sequences."""
    ids, _ = make_batch(cfg, cfg.steps + 1)
    ids = ids[:max(1, columns // (cfg.length + 2))]     # as many as fit into a line
    _, (caches, *_) = mamba_forward(params, ids, 1, cfg, SELECTIVE)
    (scan, *_), *_ = caches[-1]                         # of the last block: the cache of its scan,
    _, dt, _, _, A, *_ = scan                           # with dt (T, B, D), A (S, D)
    later = dt[::-1].cumsum(axis=0)[::-1] - dt          # the sum of all later steps
    left = (dt[:, :, None] * np.exp(later[:, :, None] * A)).mean(axis=(2, 3))       # (T, B)
    most = np.argsort(-dt.std(axis=(0, 1)))[:rows]
    lines = {"text": np.array(list(ALPHABET))[ids]}     # every value: (B, T) characters
    for d in most:
        lines[f"dt {d}"] = shade(dt[:, :, d].T / dt[:, :, most].max())
    lines["left"] = shade(left.T / left.max(axis=0)[:, None])
    for title, sequences in lines.items():
        print(f"{title:6s}" + "  ".join("".join(row[-columns:]) for row in sequences))


def print_result(task, cfg, **metrics):
    """The last line of a run, for comparing runs: task, changed fields and seed, metrics."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg)
               if f.name == "seed" or getattr(cfg, f.name) != f.default}
    line = f"result: task={task}"
    for name, value in {**changed, **metrics}.items():
        text = f"{value:#.4g}" if isinstance(value, float) else str(value)
        line += f" {name}={text.replace(' ', '_')}"
    print(line)


def main(cfg):
    """Learn to find the token after the mark; draw the step sizes; try longer sequences."""
    start, params = time.perf_counter(), init_params(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"Which token followed the first *? Length {cfg.length}, layers {cfg.layers}, dim "
          f"{cfg.dim}, {size} parameters\nchance level: loss {math.log(8):.3f}, accuracy 12.5%")
    losses = train(params, cfg)
    metrics = {f"accuracy_{n}": accuracy_at(n, params, cfg) for n in cfg.length * 4 ** np.arange(3)}
    print("Step sizes dt of the last block; a row per channel, the 12 that vary most; blank is 0, "
          "@ is\nthe largest. Last row: how much each token weighs in the states at the end")
    draw_steps(params, cfg)
    print("Accuracy at 1, 4, 16 times the length: {:.1%}, {:.1%}, {:.1%}".format(*metrics.values()))
    print("Next: python ssm.py lengths      python ssm.py copy")
    print_result("induction", cfg, **metrics, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: the time-invariant twin, lengths, copying, other scans, text; flags. =

MORE = """
Break it (accuracy at lengths 24 / 96 / 384, seed 0; as it is 100 / 100 / 86 %)
    python ssm.py --kernel 1 --layers 2     13 / 11 / 14 %, chance: without the convolution a
        token sees the one before only mixed with all others, in the state
    only dt depends on the token (columns of Bt and Ct in Wx and its gradient 0, random in bx)
                                        100 / 100 / 100 %
    only Bt and Ct do (columns of z in Wx and its gradient 0)
                                        100 / 77 / 30 %: no step holds the state for long
    scan_backward: a[t] for a[t + 1]    100 / 100 / 100 %: a wrong gradient need not show; check it
    scan_backward: return 0 * da, g     100 / 97 / 60 %: no gradient asks for a longer memory
    scan_forward: P = np.cumprod(a, axis=0), h = P * np.cumsum(b / P, axis=0)   nan: P becomes 0

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python ssm.py --layers 2 for five seeds: which one reaches further, one block or two?
    2. In Mamba z = (u Wlow) Wup + bz, Wlow (D, R), R below D. Write it, with all gradients.
    3. Exact for constant u is b = u Bt (a - 1) / A, not dt u Bt. Derive and add its backward: A has
       a gradient through b as well.

Data
    curl -o tinyshakespeare.txt \\
        https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt

Papers of these parts: Dao, Gu 2024 (Mamba-2, SSD), Katharopoulos et al. 2020 (linear attention).
"""

import argparse
import contextlib
import ctypes
import functools
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- the time-invariant twin: a convolution ------------------------------------------------------
# If Wx is left out, dt, Bt and Ct come from bx alone and are the same for all tokens. Then y is a
# convolution of u with a fixed filter K, plus skip u (S4D).

def lti_conv_forward(u, dt, Bt, Ct, A_log, skip):
    """y_t = sum_j K_j u_{t-j} + skip u_t, K_j = sum_s Ct exp(j dt A) dt Bt, by FFT of length 2 T:
    one of T would wrap around.   u (T, B, D), dt, skip (D,), Bt, Ct (S,), A_log (S, D)."""
    T, A = len(u), -np.exp(A_log)
    j = np.arange(T, dtype=u.dtype)[:, None, None]
    powers = np.exp(j * (dt * A))                       # (T, S, D)
    K = ((Bt * Ct)[:, None] * powers).sum(axis=1) * dt  # (T, D)
    fu, fK = np.fft.rfft(u, 2 * T, axis=0), np.fft.rfft(K, 2 * T, axis=0)[:, None]
    y = np.fft.irfft(fu * fK, 2 * T, axis=0)[:T].astype(u.dtype)
    return y + skip * u, (u, dt, Bt, Ct, A, skip, j, powers, K, fu, fK)


def lti_conv_backward(dout, cache):
    """du_t = sum_j K_j dout_{t+j} + skip dout_t, dK_j = sum_t dout_t u_{t-j}: correlations, that is
    products with a conjugate. The gradient of dt A is j times that of the exponent j dt A."""
    u, dt, Bt, Ct, A, skip, j, powers, K, fu, fK = cache
    T, f = len(u), np.fft.rfft(dout, 2 * len(u), axis=0)
    du = np.fft.irfft(f * fK.conj(), 2 * T, axis=0)[:T].astype(u.dtype) + skip * dout
    dK = np.fft.irfft(f * fu.conj(), 2 * T, axis=0)[:T].astype(u.dtype).sum(axis=1)
    terms = (dK * dt)[:, None] * powers                 # (T, S, D)
    slope = (Bt * Ct)[:, None] * (j * terms).sum(axis=0)
    ddt = (slope * A).sum(axis=0) + (dK * K).sum(axis=0) / dt
    dBC = terms.sum(axis=(0, 2))
    return du, ddt, dBC * Ct, dBC * Bt, slope * dt * A, (dout * u).sum(axis=(0, 1))


def twin_forward(u, params):
    """selective_forward with the same z, Bt, Ct for every token, those of the bias."""
    S, D = params["A_log"].shape
    z, Bt, Ct = np.split(params["bx"], [D, D + S])
    dt = np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))
    y, conv = lti_conv_forward(u, dt, Bt, Ct, params["A_log"], params["skip"])
    return y, (z, conv)


def twin_backward(dout, cache):
    """twin_forward in reverse order -> du, gradients."""
    z, conv = cache
    du, ddt, dBt, dCt, dA_log, dskip = lti_conv_backward(dout, conv)
    dbx = np.concatenate([ddt * sigmoid(z), dBt, dCt])
    return du, {"bx": dbx, "A_log": dA_log, "skip": dskip}


def init_twin(cfg, rng, dtype=np.float32):
    """init_params without Wx, with random Bt and Ct in bx."""
    params = init_params(cfg, rng, dtype)
    for i in range(cfg.layers):
        del params[f"{i}.Wx"]
        params[f"{i}.bx"][cfg.dim:] = rng.standard_normal(2 * cfg.states)
    return params


def twin_loss_and_grads(params, batch, cfg):
    """loss_and_grads of the twin."""
    return loss_and_grads(params, batch, cfg, (twin_forward, twin_backward))


# ---- both at lengths beyond training: python ssm.py lengths --------------------------------------

@dataclass
class Lengths(Config):
    """Induction heads by the selective model and by its twin, up to 16 times the trained length."""


COMPARED = {"selective": (init_params, loss_and_grads, SELECTIVE),
            "twin": (init_twin, twin_loss_and_grads, (twin_forward, twin_backward))}


def compare_models(task, cfg, make_batch, lengths, classes):
    """Train both models to choose among classes; draw their accuracies by length."""
    start, metrics = time.perf_counter(), {}
    for model, (init, function, mixer) in COMPARED.items():
        params = init(cfg, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"\n{model}: length {cfg.length}, layers {cfg.layers}, dim {cfg.dim}, "
              f"{size} parameters\nchance level: loss {math.log(classes):.3f}")
        losses = train(params, cfg, make_batch, function)
        for length in lengths:
            accuracy = accuracy_at(length, params, cfg, make_batch, mixer)
            metrics[f"{model}_{length}"] = accuracy
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print(f"\nAccuracy on fresh sequences, trained at {cfg.length}; rows: length; 40 @ is 100 %:")
    for name, accuracy in metrics.items():
        print(f"{name:14s} {accuracy:6.1%}  {'@' * round(40 * accuracy)}")
    print("\nNext: python ssm.py scan      python ssm.py copy --layers 1")
    print_result(task, cfg, **metrics, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


def run_lengths(cfg):
    """Which token followed the mark, at up to 16 times the length of training?"""
    compare_models("lengths", cfg, make_batch, (cfg.length, 4 * cfg.length, 16 * cfg.length), 8)


# ---- selective copying: python ssm.py copy -------------------------------------------------------

@dataclass
class Copy(Config):
    """Selective copying: output the three tokens that count, in order."""
    length: int = 16        # tokens before the three marks
    layers: int = 2         # blocks
    steps: int = 400        # optimizer steps


def copy_batch(cfg, step, dtype=np.float32):
    """Three data tokens of a to d among h, the blank; then three marks, at which the data tokens
    are to be output in order.   -> ids (B, length + 3), targets (B, 3)."""
    rng, B = np.random.default_rng((cfg.seed, step)), cfg.batch_size
    ids = np.full((B, cfg.length + 3), ALPHABET.index("h"))
    ids[:, cfg.length:] = ALPHABET.index("*")
    targets = rng.integers(0, 4, (B, 3))
    shuffled = rng.random((B, cfg.length)).argsort(axis=1)          # all positions, per sequence
    positions = np.sort(shuffled[:, :3], axis=1)
    np.put_along_axis(ids, positions, targets, axis=1)
    return ids, targets


def run_copy(cfg):
    """Which three tokens counted, at up to four times the length of training?"""
    compare_models("copy", cfg, copy_batch, (cfg.length, 2 * cfg.length, 4 * cfg.length), 4)


# ---- the scan in other ways: python ssm.py scan --------------------------------------------------
# (a1, b1) and then (a2, b2) is (a2 a1, a2 b1 + b2). This rule is associative, so h needs no T steps
# in a row. Mamba-2 has one a for all states of a head: then y is masked attention without softmax.

def halves_scan(a, b):
    """h of scan_forward in 2 floor(log2 T) passes: join pairs, scan the half that is left, fill in.
    """
    T, h = len(a), b.copy()
    if T > 1:
        a2, b2 = a[1::2], b[1::2]                       # t = 1, 3, 5, ...
        a1, b1 = a[::2][:len(a2)], b[::2][:len(a2)]     # the token before each of these
        h[1::2] = halves_scan(a2 * a1, a2 * b1 + b2)
        h[2::2] += a[2::2] * h[1:T - 1:2]               # t = 2, 4, ...: one step from t - 1
    return h


def ssd_forward(x, log_a, Bt, Ct):
    """Y = (L * Ct Bt^T) X, L_ti = exp(total_t - total_i) for i <= t, else 0, total = cumsum(log a).
    x, Y (H, T, P): H heads of P channels; log_a (H, T), Bt, Ct (T, S)."""
    total = log_a.cumsum(axis=1)
    gap = total[:, :, None] - total[:, None]            # (H, T, T)
    L = np.exp(np.where(np.tri(x.shape[1], dtype=bool), gap, -1e9))
    y = (L * (Ct @ Bt.T)) @ x
    return y, (x, Bt, Ct, L, y)


def ssd_backward(dout, cache):
    """G = dY X^T, dX = (L * Ct Bt^T)^T dY, dCt = (L * G) Bt, dBt = (L * G)^T Ct. exp(total_t) is a
    factor of row t, exp(-total_t) of column t, so dtotal = rowsum(dY * Y - dX * X); dlog_a is its
    cumsum from the end."""
    x, Bt, Ct, L, y = cache
    dx = (L * (Ct @ Bt.T)).swapaxes(1, 2) @ dout
    LG = (L * (dout @ x.swapaxes(1, 2))).sum(axis=0)    # (T, T): all heads share Bt and Ct
    dtotal = (dout * y).sum(axis=2) - (dx * x).sum(axis=2)
    dlog_a = dtotal[:, ::-1].cumsum(axis=1)[:, ::-1]
    return dx, dlog_a, LG.T @ Ct, LG @ Bt


@dataclass
class Scan:
    """The same outputs in several ways, without training."""
    length: int = 256       # tokens
    dim: int = 64           # channels
    seed: int = 0           # random seed


def run_scan(cfg):
    """Differences between all ways, and steps in a row; the mask L of three heads."""
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    T, D, S = cfg.length, cfg.dim, 16
    u = rng.standard_normal((T, 1, D)).astype(np.float32)
    Bt = rng.standard_normal((T, 1, S)).astype(np.float32)
    Ct = rng.standard_normal((T, 1, S)).astype(np.float32)
    dt = np.repeat(0.01 ** rng.random((T, 1, 1)), D, axis=2).astype(np.float32)     # one head
    A_log, skip = np.zeros((S, D), np.float32), np.zeros(D, np.float32)             # A is -1
    y, (_, _, _, _, _, _, a, h, _) = selective_scan_forward(u, dt, Bt, Ct, A_log, skip)
    halves = halves_scan(a, Bt[..., None] * (dt * u)[:, :, None])
    heads, _ = ssd_forward((dt * u).swapaxes(0, 1), -dt[:, :, 0].T, Bt[:, 0], Ct[:, 0])
    same = [np.broadcast_to(x[:1], x.shape) for x in (dt, Bt, Ct)]      # all tokens as the first
    y_same, _ = selective_scan_forward(u, *same, A_log, skip)
    fixed, _ = lti_conv_forward(u, dt[0, 0], Bt[0, 0], Ct[0, 0], A_log, skip)
    passes, metrics = 2 * int(math.log2(T)), {}         # of a scan by halves
    print(f"{T} tokens, {D} channels, {S} states, float32, beside a loop of {T} steps in a row:")
    for name, steps, error in (("halves", passes, halves - h),
                               ("fft", 2 * math.ceil(math.log2(2 * T)), fixed - y_same),
                               ("attention", passes + 1, heads.swapaxes(0, 1) - y)):    # cumsum, L
        metrics[name] = float(np.abs(error).max())
        print(f"    {name:10s} {steps:3d} steps in a row, largest difference {metrics[name]:.0e}")
    log_a = np.zeros((3, 24))
    log_a[1], log_a[2, [8, 17]] = -0.15, -3
    zeros = np.zeros((24, 1))                           # L depends on log_a alone
    _, (_, _, _, L, _) = ssd_forward(np.zeros((3, 24, 1)), log_a, zeros, zeros)
    print("\nThe mask L of three heads: row t is dark in the columns of tokens that count at t.\n"
          "Left: a is 1; middle: the same a for all tokens; right: two tokens make a large step")
    for t in range(24):                                 # row t of all heads side by side
        print("   ".join("".join(head[t]) for head in shade(L)))
    print("\nNext: python ssm.py lengths      python ssm.py copy")
    print_result("scan", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- characters: python ssm.py text --data tinyshakespeare.txt -----------------------------------

@dataclass
class Text(Config):
    """Predict the next character of a text file."""
    data: str = ""          # UTF-8 text file, its last tenth for validation
    length: int = 64        # characters per window in training
    layers: int = 2         # blocks
    dim: int = 128          # embedding dimension, channels of the scan
    states: int = 4         # states per channel
    batch_size: int = 16    # windows per step
    lr: float = 0.003       # peak learning rate


def read_text(path):
    """The text of a UTF-8 file, without a byte order mark.   Raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x} at {error.start}"
        raise InputError(f"{path}: expected UTF-8 text, found {found}") from None
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: expected a text file, found: {found}") from None
    require(text.strip(), path, "some text", "an empty file")
    return text


@functools.lru_cache
def split_text(path, length):
    """-> the characters of a text, sorted; its first nine tenths and its last as indices into them.
    Without a path the text of MORE.   Raises InputError."""
    text = read_text(path) if path else MORE * 9
    chars = sorted(set(text))
    ids = np.searchsorted(chars, list(text))
    require(len(ids) > 10 * length, f"--data {path}", f"over {10 * length} characters", len(ids))
    return chars, *np.split(ids, [len(ids) * 9 // 10])


def init_text(cfg, rng, dtype=np.float32):
    """init_params with an embedding for every character of the file."""
    return init_params(cfg, rng, dtype, len(split_text(cfg.data, cfg.length)[0]))


def text_batch(cfg, step, dtype=np.float32):
    """Random windows of the training part -> ids (B, T), targets (B, T): the next characters."""
    rng = np.random.default_rng((cfg.seed, step))
    _, train, _ = split_text(cfg.data, cfg.length)
    starts = rng.integers(0, len(train) - cfg.length, cfg.batch_size)
    windows = train[starts[:, None] + np.arange(cfg.length + 1)]
    return windows[:, :-1], windows[:, 1:]


def validation_nats(params, cfg, length, most=10 ** 9):
    """Mean loss over windows of any length, of the validation part or of its beginning."""
    ids = split_text(cfg.data, cfg.length)[2][:most]
    starts, losses = np.arange(0, len(ids) - length, length), []
    for some in np.array_split(starts, math.ceil(len(ids) / 4096)):
        windows = ids[some[:, None] + np.arange(length + 1)]
        logits, _ = mamba_forward(params, windows[:, :-1], length, cfg, SELECTIVE)
        loss, _ = softmax_cross_entropy_forward(logits, windows[:, 1:].T.ravel())
        losses += [float(loss)] * len(some)             # every window counts once
    return sum(losses) / len(losses)


def run_text(cfg):
    """Train on a text file; validation loss by length of the window; a sample."""
    require(cfg.data, "--data", "a UTF-8 text file (python ssm.py --help says where)", cfg.data)
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    chars, ids, validation = split_text(cfg.data, cfg.length)
    params = init_text(cfg, rng)
    size = sum(p.size for p in params.values())
    print(f"{cfg.data}: {len(ids)} characters to learn from, {len(chars)} different\nlayers "
          f"{cfg.layers}, dim {cfg.dim}, states {cfg.states}, {size} parameters\n"
          f"chance level: loss {math.log(len(chars)):.3f}")

    def note():
        return f"  validation {validation_nats(params, cfg, cfg.length, 20000):.4f}"
    losses = train(params, cfg, text_batch, note=note)
    lengths = cfg.length, min(4 * cfg.length, len(validation) - 1)
    nats = [validation_nats(params, cfg, length) for length in lengths]
    check_finite(max(nats), params)
    ids = ids[:cfg.length].tolist()
    for _ in range(200):
        logits, _ = mamba_forward(params, np.array([ids[-cfg.length:]]), 1, cfg, SELECTIVE)
        p = np.exp((logits[0].astype(float) - logits.max()) / 0.7)      # temperature 0.7
        ids.append(rng.choice(len(p), p=p / p.sum()))
    print("\n" + "".join(chars[i] for i in ids[cfg.length:]))
    print("\nNats per character of the last tenth: {:.4f}, {:.4f} in longer windows".format(*nats))
    print("Next: python ssm.py text --data FILE --states 8      python moe.py")
    print_result("text", cfg, validation=nats[0], validation_long=nats[1], params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ---- flags and errors: the same in every lesson --------------------------------------------------

class InputError(ValueError):
    """A flag, value or file that cannot be used: the program ends with one line, exit status 2."""


def require(ok, what, expected, found):
    """Raise InputError unless ok."""
    if not ok:
        raise InputError(f"{what}: expected {expected}, found {found!r}")


class Task(NamedTuple):
    """What a command runs; gradcheck.py drives the same functions."""
    config: type
    init_params: object
    make_batch: object
    loss_and_grads: object
    main: object


MAY_BE_ZERO = ("seed", "warmup", "top_k", "crop", "window", "fuse", "patch")    # other int: >= 1
ABOVE_ZERO = ("lr", "temperature")                                              # other float: >= 0


def check(cfg):
    """Raise InputError unless every value has the type of its field, is one of its choices, is
    finite and in range, and CONSTRAINTS of this kind of Config hold."""
    for f in fields(cfg):
        flag, value = "--" + f.name.replace("_", "-"), getattr(cfg, f.name)
        if get_args(f.type):
            choices = get_args(f.type)
            require(value in choices, flag, " or ".join(map(str, choices)), value)
        elif f.type in (str, bool):
            require(isinstance(value, f.type), flag, f.type.__name__, value)
        elif f.type is int:
            least = 0 if f.name in MAY_BE_ZERO else 1
            require(type(value) is int, flag, "a whole number", value)
            require(least <= value < 2 ** 31, flag, f"{least} or more, below 2^31", value)
        else:
            require(type(value) in (int, float), flag, "a number", value)
            above = value > 0 if f.name in ABOVE_ZERO else value >= 0
            least = "above 0" if f.name in ABOVE_ZERO else "0 or more"
            require(above and value < math.inf, flag, f"a number {least}, and finite", value)
    for ok, what, expected, found in CONSTRAINTS.get(type(cfg), lambda cfg: [])(cfg):
        require(ok, what, expected, found)


def read_flags(tasks, argv):
    """-> the name of the task that argv begins with (else of the first), its Config: every field is
    a flag, its comment the help text."""
    def fail(message):
        task = argv[0] if argv and argv[0] in tasks else next(iter(tasks))
        words = re.split("[ =]", " ".join(argv))        # --task names, --task=names
        late = [word for word in words[1:] if word in tasks] + ["TASK"] * ("--task" in words)
        program = f"python {Path(sys.argv[0]).name}"
        hint = f"; tasks are commands: {program} {late[0]}" if late else ""
        raise InputError(f"{message} ({program} {task} --help lists the flags{hint})")

    usage = f"%(prog)s [TASK] [--flags]     without TASK: {next(iter(tasks))}"
    about = (__doc__ or "") + MORE                      # python -OO drops docstrings
    parser = argparse.ArgumentParser(usage=usage, description=about, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="task", metavar="task", prog=parser.prog)
    parser.error = fail
    for name, task in tasks.items():
        command = commands.add_parser(name, help=task.config.__doc__, allow_abbrev=False,
                                      description=task.config.__doc__)
        command.error, comments = fail, {}
        with contextlib.suppress(OSError, TypeError):   # no source text in a notebook cell
            for c in reversed(task.config.__mro__[:-1]) if {"-h", "--help"} & set(argv) else ():
                comments.update(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(c), re.M))
        for f in fields(task.config):
            kind = dict(type=f.type, metavar=f.name.upper())
            if f.type is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            elif get_args(f.type):
                kind = dict(choices=get_args(f.type))
            text = f"{comments.get(f.name, '')} (default: {f.default!r})".replace("%", "%%")
            flag = "--" + f.name.replace("_", "-")
            command.add_argument(flag, default=f.default, help=text, **kind)
    named = argv and (argv[0] in ("-h", "--help") or not argv[0].startswith("-"))
    flags = vars(parser.parse_args(argv if named else [next(iter(tasks)), *argv]))
    name = flags.pop("task")
    cfg = tasks[name].config(**flags)
    check(cfg)
    return name, cfg


def run(tasks):
    """Run what the command line asks for; user errors end in one line, without a traceback."""
    if sys.stdout and sys.stdout is sys.__stdout__:     # a console, not a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        with contextlib.suppress(AttributeError, ValueError):   # Windows; not the main thread
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it quietly
    np.seterr(over="ignore", invalid="ignore")          # divergence: see progress and check_finite
    pasted = "__file__" not in globals() and sys.argv[:1] != ["-"]      # argv is the notebook's
    try:
        name, cfg = read_flags(tasks, [] if pasted else sys.argv[1:])
        tasks[name].main(cfg)
    except (InputError, FloatingPointError, MemoryError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {str(error) or 'out of memory'}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


CONSTRAINTS = dict.fromkeys((Config, Lengths, Copy, Scan, Text), lambda cfg: [
    (cfg.length >= 3, "--length", "3 or more", cfg.length)])
GRADCHECK = {"causal_conv": "x 5 3 4, W 3 4, b 4", "scan": "a 5 3 6, b 5 3 6",
             "selective_scan": "u 5 3 4, dt 5 3 4, Bt 5 3 6, Ct 5 3 6, A_log 6 4, skip 4",
             "lti_conv": "u 5 3 4, dt 4, Bt 6, Ct 6, A_log 6 4, skip 4",
             "ssd": "x 3 5 4, log_a 3 5, Bt 5 6, Ct 5 6"}

TASKS = {"induction": Task(Config, init_params, make_batch, loss_and_grads, main),
         "lengths": Task(Lengths, init_twin, make_batch, twin_loss_and_grads, run_lengths),
         "copy": Task(Copy, init_params, copy_batch, loss_and_grads, run_copy),
         "scan": Task(Scan, None, None, None, run_scan),
         "text": Task(Text, init_text, text_batch, loss_and_grads, run_text)}

if __name__ == "__main__":
    run(TASKS)
