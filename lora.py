"""lora.py: change a trained network with few numbers, then store it in few bits.

Low-rank adaptation (LoRA) freezes a trained matrix W and trains the product A B of two thin
matrices, the adapter, that is added to W. It has few numbers, and can be taken off again.

Forward, x (N, D), W (D, M), A (D, r), B (r, M), s = alpha / r; A starts random, B at zero:
    y = x W + b + s (x A) B
Backward; W and b are frozen and get no gradient:
    dB = s (x A)^T dy      dA = s x^T (dy B^T)      dx = dy W^T + s (dy B^T) A^T
At the first step B = 0, so dA = 0, but dB is not. If A and B were both 0, both would remain 0.
Merged into W + s A B, the adapter costs nothing, and y is the same up to rounding.

A small GPT learns to sort and to reverse digits; then, from 128 examples, to sort downwards.

Run    python lora.py      (python lora.py --help lists the other tasks)
Papers: Hu et al. 2021 (LoRA), Aghajanyan et al. 2020 (few dimensions suffice for fine-tuning).
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
    """Learn to sort and reverse digits, then a third job, by an adapter and by full fine-tuning."""
    layers: int = 2         # transformer blocks
    heads: int = 4          # attention heads
    dim: int = 48           # embedding dimension
    digits: int = 5         # digits per sequence
    batch_size: int = 64    # sequences per step
    steps: int = 500        # optimizer steps of pre-training
    lr: float = 0.003       # learning rate, falls in the second half; adapters: 3 times as large
    examples: int = 128     # training sequences of the third job
    tune_steps: int = 120   # optimizer steps on the third job, at most --steps
    rank: int = 8           # rank of the adapter
    alpha: float = 8.0      # numerator of the adapter's factor alpha / rank
    seed: int = 0           # random seed


# ---- layers: B sequences, T positions, N = B T rows, D dim, H heads, d = D / H, V tokens, r rank -
# Linear layers: D inputs, M outputs. In lora_forward and lora_backward B is the adapter's matrix.

def affine_forward(x, p, name):
    """y = x W + b, with the parameters W and b of this name.   x (N, D), W (D, M), b (M,)."""
    return x @ p["W" + name] + p["b" + name], (name, x, p["W" + name])


def affine_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout.   -> dx, gradients."""
    name, x, W = cache
    return dout @ W.T, {"W" + name: x.T @ dout, "b" + name: dout.sum(axis=0)}


def lora_forward(x, p, name, scale):
    """y = x W + b + scale (x A) B.   x (N, D), W (D, M) and b frozen, A (D, r), B (r, M)."""
    W, b = p["W" + name], p["b" + name]
    A, B = p["A" + name], p["B" + name]
    xA = x @ A                                          # (N, r)
    return x @ W + b + scale * (xA @ B), (name, x, xA, W, A, B, scale)


def lora_backward(dout, cache):
    """dxA = scale dout B^T, dx = dout W^T + dxA A^T, dA = x^T dxA, dB = scale (x A)^T dout."""
    name, x, xA, W, A, B, scale = cache
    dxA = scale * (dout @ B.T)                          # (N, r)
    return dout @ W.T + dxA @ A.T, {"A" + name: x.T @ dxA, "B" + name: scale * (xA.T @ dout)}


def layernorm_forward(x, gamma, beta, eps=1e-5):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + eps), per row.   x (N, D)."""
    mean = x.mean(axis=1, keepdims=True)
    inv_std = (x.var(axis=1, keepdims=True) + eps) ** -0.5
    xhat = (x - mean) * inv_std
    return gamma * xhat + beta, (xhat, gamma, inv_std)


def layernorm_backward(dout, cache):
    """g = gamma dout, dx = (g - mean(g) - xhat mean(g xhat)) / std, since every x moves mean and
    std, too; dgamma = sum_n dout xhat, dbeta = sum_n dout."""
    xhat, gamma, inv_std = cache
    g = gamma * dout
    mean_g = g.mean(axis=1, keepdims=True)
    mean_g_xhat = (g * xhat).mean(axis=1, keepdims=True)
    dx = (g - mean_g - xhat * mean_g_xhat) * inv_std
    return dx, (dout * xhat).sum(axis=0), dout.sum(axis=0)


def causal_attention_forward(q, k, v):
    """out = p v, p = softmax(q k^T / sqrt(d) + causal mask).   q, k, v, out (B, H, T, d)."""
    T, d = q.shape[2:]
    scores = q @ k.swapaxes(2, 3) * d ** -0.5           # (B, H, T, T)
    scores = np.where(np.tri(T, dtype=bool), scores, -1e9)      # the causal mask hides the future
    p = np.exp(scores - scores.max(axis=3, keepdims=True))
    p /= p.sum(axis=3, keepdims=True)
    return p @ v, (q, k, v, p)


def causal_attention_backward(dout, cache):
    """dv = p^T dout, dp = dout v^T, ds = p (dp - sum_s p dp), dq = ds k / sqrt(d),
    dk = ds^T q / sqrt(d).   The mask needs nothing: where p is 0, so is ds."""
    q, k, v, p = cache
    dv = p.swapaxes(2, 3) @ dout
    dp = dout @ v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(axis=3, keepdims=True))
    ds *= q.shape[3] ** -0.5
    return ds @ k, ds.swapaxes(2, 3) @ q, dv


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


# ---- data: initial of a job, digits, >, the digits after the job, such as s31415>11345 ------

MARKS = "0123456789>srd"
JOBS = {"sort": lambda digits: np.sort(digits, axis=1),
        "reverse": lambda digits: digits[:, ::-1],
        "descend": lambda digits: np.sort(digits, axis=1)[:, ::-1]}


def draw_sequences(rng, job, B, cfg):
    """B sequences of a job.   -> ids (B, T), without the last digit; targets (B, digits)."""
    digits = rng.integers(0, 10, (B, cfg.digits))       # the id of a digit is its value
    targets = JOBS[job](digits)
    initial = np.full((B, 1), MARKS.index(job[0]))
    arrow = np.full((B, 1), MARKS.index(">"))
    return np.hstack([initial, digits, arrow, targets[:, :-1]]), targets


def make_batch(cfg, step, dtype=np.float32):
    """Sequences to sort and to reverse.   -> ids (B, T), targets (B, digits)."""
    rng, half = np.random.default_rng((cfg.seed, step)), cfg.batch_size // 2
    ids, targets = draw_sequences(rng, "sort", cfg.batch_size - half, cfg)
    more_ids, more_targets = draw_sequences(rng, "reverse", half, cfg)
    return np.concatenate([ids, more_ids]), np.concatenate([targets, more_targets])


# ---- model: a GPT whose linear layers are an argument: plain ones, or with an adapter ------------

def init_params(cfg, rng, dtype=np.float32):
    """E (V, D), P (T, D): embeddings of tokens, positions; "0.Wqkv", ... in block 0: gamma1, beta1,
    Wqkv, bqkv, Wo, bo, gamma2, beta2, W1, b1, W2, b2; gamma, beta, Wout, bout."""
    D, V = cfg.dim, len(MARKS)
    params = {"E": rng.standard_normal((V, D)), "P": rng.standard_normal((2 * cfg.digits + 1, D)),
              "Wout": rng.standard_normal((D, V)) * D ** -0.5, "bout": np.zeros(V)}
    for i in range(cfg.layers):
        for name, n, m in (("qkv", D, 3 * D), ("o", D, D), ("1", D, 4 * D), ("2", 4 * D, D)):
            params[f"{i}.W{name}"] = rng.standard_normal((n, m)) * (2 / (n + m)) ** 0.5
            params[f"{i}.b{name}"] = np.zeros(m)
        for norm in "12":
            params[f"{i}.gamma{norm}"], params[f"{i}.beta{norm}"] = np.ones(D), np.zeros(D)
    params["gamma"], params["beta"] = np.ones(D), np.zeros(D)
    return {name: value.astype(dtype) for name, value in params.items()}


def init_adapter(cfg, rng, dtype=np.float32):
    """For every matrix of a block, "0.Wo" (D, M): "0.Ao" (D, r), random, "0.Bo" (r, M), zero."""
    adapter = {}
    for name, W in init_params(cfg, np.random.default_rng(cfg.seed)).items():
        if ".W" in name:
            A = rng.standard_normal((len(W), cfg.rank)) * len(W) ** -0.5
            adapter[name.replace("W", "A")] = A.astype(dtype)
            adapter[name.replace("W", "B")] = np.zeros((cfg.rank, W.shape[1]), dtype)
    return adapter


def adapter_batch(cfg, step, dtype=np.float32, base=None):
    """Sequences of the third job, drawn from the same cfg.examples sequences in every step.
    -> ids, targets, base: the frozen parameters, untrained ones if none are given."""
    first, rng = np.random.default_rng((cfg.seed, 0)), np.random.default_rng((cfg.seed, step))
    ids, targets = draw_sequences(first, "descend", cfg.examples, cfg)
    drawn = rng.integers(0, cfg.examples, cfg.batch_size)
    base = base or init_params(cfg, np.random.default_rng(cfg.seed), dtype)
    return ids[drawn], targets[drawn], base


def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


AFFINE = affine_forward, affine_backward


def adapted(cfg):
    """The linear layer with an adapter, a pair of functions like AFFINE."""
    def layer(x, p, name):
        return lora_forward(x, p, name, scale=cfg.alpha / cfg.rank)
    return layer, lora_backward


def layer_block_forward(x, p, heads, B, layer, layer_backward):
    """x + attention(norm(x)), then x + mlp(norm(x)), mlp(y) = layer(max(layer(y), 0)). layer is the
    forward of all linear layers; layer_backward waits in the cache.   x (B T, D) -> (B T, D)."""
    y, norm1 = layernorm_forward(x, p["gamma1"], p["beta1"])
    y, qkv = layer(y, p, "qkv")
    y = y.reshape(B, -1, 3, heads, x.shape[1] // heads)             # (B, T, 3, H, d)
    q, k, v = y.transpose(2, 0, 3, 1, 4)                            # (B, H, T, d) each
    y, attention = causal_attention_forward(q, k, v)
    y, out = layer(y.swapaxes(1, 2).reshape(x.shape), p, "o")
    x = x + y
    y, norm2 = layernorm_forward(x, p["gamma2"], p["beta2"])
    y, up = layer(y, p, "1")
    hidden = np.maximum(y, 0)                                       # (B T, 4 D)
    y, down = layer(hidden, p, "2")
    return x + y, (norm1, qkv, attention, out, norm2, up, hidden, down, layer_backward)


def layer_block_backward(dout, cache):
    """layer_block_forward in reverse order; x is used twice: gradients add.   -> dx, grads."""
    norm1, qkv, attention, out, norm2, up, hidden, down, layer_backward = cache
    (B, H, T, d), g = attention[0].shape, {}                        # attention[0] is q
    dhidden, g_down = layer_backward(dout, down)
    dy = dhidden * (hidden > 0)                                     # the derivative of max(y, 0)
    dy, g_up = layer_backward(dy, up)
    dy, g["gamma2"], g["beta2"] = layernorm_backward(dy, norm2)
    dout = dout + dy
    dy, g_out = layer_backward(dout, out)
    dy = dy.reshape(B, T, H, d).swapaxes(1, 2)                      # (B, H, T, d)
    dqkv = np.stack(causal_attention_backward(dy, attention))       # (3, B, H, T, d)
    dqkv = dqkv.transpose(1, 3, 0, 2, 4).reshape(B * T, -1)         # (B T, 3 D)
    dy, g_qkv = layer_backward(dqkv, qkv)
    dy, g["gamma1"], g["beta1"] = layernorm_backward(dy, norm1)
    return dout + dy, {**g, **g_down, **g_up, **g_out, **g_qkv}


def layer_gpt_forward(params, ids, cfg, layer=AFFINE):
    """ids (B, T) tokens -> logits (B digits, V), those of the last cfg.digits positions. layer:
    forward and backward of the linear layers, as AFFINE."""
    (B, T), caches = ids.shape, []
    x = (params["E"][ids] + params["P"]).reshape(B * T, -1)
    for i in range(cfg.layers):
        x, cache = layer_block_forward(x, part(params, f"{i}."), cfg.heads, B, *layer)
        caches.append(cache)
    last = x.reshape(B, T, -1)[:, -cfg.digits:].reshape(B * cfg.digits, -1)
    x, norm = layernorm_forward(last, params["gamma"], params["beta"])
    logits, out = affine_forward(x, params, "out")
    return logits, (ids, caches, norm, out, params)


def layer_gpt_backward(dout, cache):
    """layer_gpt_forward in reverse order -> gradients by name."""
    (ids, caches, norm, out, params), (B, T) = cache, cache[0].shape
    dx, grads = affine_backward(dout, out)
    dx, grads["gamma"], grads["beta"] = layernorm_backward(dx, norm)
    dlast = dx.reshape(B, -1, dx.shape[1])                          # (B, digits, D)
    dx = np.zeros((B, T, dx.shape[1]), dx.dtype)                    # 0 where nothing is predicted
    dx[:, -dlast.shape[1]:] = dlast
    dx = dx.reshape(B * T, -1)
    for i in reversed(range(len(caches))):
        dx, g = layer_block_backward(dx, caches[i])
        grads.update({f"{i}.{name}": value for name, value in g.items()})
    grads["E"] = np.zeros_like(params["E"])
    np.add.at(grads["E"], ids.ravel(), dx)
    grads["P"] = dx.reshape(B, T, -1).sum(axis=0)
    return grads


def loss_and_grads(params, batch, cfg, layer=AFFINE):
    """One forward and one backward pass -> loss, gradients by name."""
    ids, targets = batch
    logits, cache = layer_gpt_forward(params, ids, cfg, layer)
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets.ravel())
    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    return loss, layer_gpt_backward(dlogits, cache)


def adapter_loss_and_grads(params, batch, cfg):
    """loss_and_grads of an adapter alone: those of all other parameters, the frozen base, drop out.
    """
    ids, targets, base = batch
    loss, grads = loss_and_grads({**base, **params}, (ids, targets), cfg, adapted(cfg))
    return loss, {name: grads[name] for name in params}


# ---- optimizer and training ----------------------------------------------------------------------

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


def decayed_rate(step, cfg):
    """cfg.lr over the first half of the steps, then linearly to nearly 0."""
    return cfg.lr * min(1, 2 * (1 - (step - 1) / cfg.steps))


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


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state, losses = {}, []
    for step in progress(cfg.steps, losses):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        adam_update(params, grads, state, decayed_rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def train_base(cfg):
    """Learn to sort and to reverse.   -> params, losses."""
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    print(f"Sort or reverse {cfg.digits} digits: a GPT of {cfg.layers} layers, {cfg.heads} heads, "
          f"dim {cfg.dim}, {sum(p.size for p in params.values())} parameters")
    print(f"chance level: loss {math.log(10):.3f}")
    return params, train(params, cfg)


def tune_adapter(params, cfg, batch=adapter_batch):
    """Learn the third job by an adapter.   -> adapter, losses."""
    adapter = init_adapter(cfg, np.random.default_rng(cfg.seed))
    print(f"\nAdapter of rank {cfg.rank}: {sum(a.size for a in adapter.values())} numbers")
    return adapter, train(adapter, replace(cfg, lr=3 * cfg.lr),
                          lambda cfg, step: batch(cfg, step, base=params), adapter_loss_and_grads)


def tune_all(params, cfg, batch=adapter_batch):
    """Learn the third job by a copy of all parameters.   -> copy, losses."""
    tuned = {name: value.copy() for name, value in params.items()}
    print(f"\nAll parameters: {sum(p.size for p in tuned.values())} numbers")
    return tuned, train(tuned, cfg, lambda cfg, step: batch(cfg, step, base=params)[:2])


def try_job(params, cfg, job, layer=AFFINE, n=500):
    """n fresh sequences; every digit is predicted from the true ones before it.   -> loss, share of
    sequences with every digit right, logits."""
    rng = np.random.default_rng((cfg.seed, 10 ** 6 + list(JOBS).index(job)))
    ids, targets = draw_sequences(rng, job, n, cfg)
    logits, _ = layer_gpt_forward(params, ids, cfg, layer)
    loss, _ = softmax_cross_entropy_forward(logits, targets.ravel())
    right = logits.argmax(axis=1).reshape(targets.shape) == targets
    return float(loss), float(right.all(axis=1).mean()), logits


def print_jobs(models, cfg):
    """A table. models: name -> parameters and linear layer.   -> metrics."""
    print("\nFresh sequences with every digit right; the jobs are columns, 15 # are 100 %:\n"
          + " " * 16 + "".join(f"{job:26s}" for job in JOBS))
    metrics = {}
    for name, (params, layer) in models.items():
        shares = [try_job(params, cfg, job, layer)[1] for job in JOBS]
        metrics.update({f"{name}_{job}": share for job, share in zip(JOBS, shares)})
        bars = [f"{share:6.1%} |{'#' * round(15 * share):15s}|" for share in shares]
        print(f"{name:15s} {'  '.join(bars)}")
    return metrics


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


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
    """Pre-train; learn the third job by an adapter, and by all parameters; compare."""
    start, short = time.perf_counter(), replace(cfg, steps=min(cfg.tune_steps, cfg.steps))
    params, losses = train_base(cfg)
    loss, _, before = try_job(params, cfg, "sort")
    models = {"before": (params, AFFINE)}
    if len(losses) == cfg.steps:                        # else Ctrl-C
        adapter, more = tune_adapter(params, short)
        models["adapter"] = {**params, **adapter}, adapted(cfg)
        if len(more) == short.steps:
            models["full"] = tune_all(params, short)[0], AFFINE
        models["adapter_off"] = params, AFFINE
    metrics = print_jobs(models, cfg)
    if "adapter" in models:
        metrics["same"] = float(np.array_equal(before, try_job(params, cfg, "sort")[2]))
        print(f"Adapter off: the logits are those of before, to the bit: {metrics['same'] == 1}")
    if "full" in models:
        print("\nThe change of Wo in block 0, first 24 rows and 46 columns; blank is 0, @ is the "
              "largest\nof the whole matrix. Left: A B of the adapter; right: full fine-tuning")
        changes = adapter["0.Ao"] @ adapter["0.Bo"], models["full"][0]["0.Wo"] - params["0.Wo"]
        left, right = (shade(np.abs(W) / (np.abs(W).max() + 1e-9)) for W in changes)
        for i in range(min(24, cfg.dim)):
            print("".join(left[i, :46]) + "   " + "".join(right[i, :46]))
    print("\nNext: python lora.py --rank 1 --alpha 1      python lora.py ranks")
    print_result("adapt", cfg, **metrics, sort_loss=loss, steps=len(losses),
                 params=sum(p.size for p in params.values()), seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest: ranks, forgetting; weights in few bits; outliers, FP8; QLoRA; speed; flags. ====

MORE = """
Tasks (seeds 0 to 4: shares of fresh sequences with every digit right)
    python lora.py ranks        rank 1: 26 to 56 %, 2: 36 to 68 %, 4: 59 to 80 %, 8: 59 to 84 %, all
                                parameters: 69 to 86 %, from scratch: 46 to 60 %. With any
                                of them, sort falls from 100 % to 6 % or less: adapters forget as
                                much as full fine-tuning, but can be taken off. With a quarter of
                                old sequences in each batch: sort 90 to 97 %, descend 58 to 82 %
    python lora.py quantize     sort with 8 bits: nothing is lost; 4 bits: 99 to 100 %; 3 bits: 70
                                to 88 % with one scale, 84 to 97 % with one for each column, over
                                99 % if trained; 2 bits: 1 to 11 %, if trained 94 to 98 %. With
                                outliers of 400: 0 %; kept in float, smoothed, or in e4m3: 99.8 %
    python lora.py qlora        4 bits 61 to 86 %, float 59 to 84 %: an adapter repairs the rounding
                                below it. Merged and rounded again: 58 to 78 %; 3 bits 43 to 63 %
                                in place of 61 to 81 %, so merge into the float weights
    python lora.py speed        int8 is not faster in NumPy, halves and integer products are slower

Break it (what to change, and what comes of it; seed 0)
    init_adapter: 0 * rng.standard_normal       descend 0.2 %: no gradient reaches A or B
    init_adapter: 0.5 * rng.standard_normal((cfg.rank, W.shape[1])) for B       sort is at 0 %
                                                before the first step; descend ends at 24, not 75 %
    adapted: scale=cfg.alpha                    descend 47 %: the output of A B is 8 times as large
    merged: without cfg.alpha / cfg.rank        python lora.py qlora --alpha 16: merged 23, not 73 %
    ROUNDED: dict(bits=3, axis=0, percentile=95)    sort 97.8 in place of 94.8 %, 80: 72.8 %:
                                                    a few clipped weights make finer steps
    EIGHT_BITS: 1000 in place of 20             outliers of 400: sort 7 %; those below 1000
                                                are rounded with all others

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python lora.py --examples 32 (then 256, 1000): where does pre-training cease to matter?
    2. Derive and add learned scales: y = t round(W / t) with dt = sum dy (round(W / t) - W / t).
    3. Keep the adapters of two jobs. Does the network do both with the sum of them?

Papers of these parts: Bengio et al. 2013 (straight-through), Jacob et al. 2018 (integers), Dettmers
et al. 2022 (LLM.int8), 2023 (QLoRA), Xiao et al. 2022 (SmoothQuant), Micikevicius et al. 2022
(FP8), Biderman et al. 2024 (LoRA learns less and forgets less).
"""

import argparse
import contextlib
import ctypes
import functools
import inspect
import re
import sys
import timeit
from pathlib import Path
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- ranks and forgetting: python lora.py ranks --------------------------------------------------

@dataclass
class Ranks(Config):
    """Ranks 1, 2, 4, ... up to --rank, full fine-tuning, from scratch, and with old sequences."""
    old: float = 0.25       # share of old sequences in a batch of the last two trainings


def mixed_batch(cfg, step, dtype=np.float32, base=None):
    """adapter_batch with a share cfg.old of sequences to sort or reverse."""
    ids, targets, base = adapter_batch(cfg, step, dtype, base)
    old = round(cfg.old * cfg.batch_size)
    old_ids, old_targets = make_batch(replace(cfg, batch_size=old), step)
    return np.concatenate([old_ids, ids[old:]]), np.concatenate([old_targets, targets[old:]]), base


def run_ranks(cfg):
    """The third job by adapters of several ranks and by all parameters: what is learned, what is
    forgotten, and what a few old sequences in every batch preserve."""
    start, short = time.perf_counter(), replace(cfg, steps=min(cfg.tune_steps, cfg.steps))
    params, losses = train_base(cfg)
    fresh, scale = init_params(cfg, np.random.default_rng(cfg.seed)), cfg.alpha / cfg.rank
    runs, ranks = {}, [2 ** k for k in range(cfg.rank.bit_length()) if 2 ** k < cfg.rank]
    for r in [*ranks, cfg.rank]:
        runs[f"rank_{r}"] = tune_adapter, params, replace(short, rank=r, alpha=scale * r)
    runs.update(full=(tune_all, params, short), scratch=(tune_all, fresh, short),
                adapter_old=(tune_adapter, params, short), full_old=(tune_all, params, short))
    steps, planned, models = len(losses), cfg.steps, {"before": (params, AFFINE)}
    for name, (tune, base, config) in runs.items():
        if len(losses) < planned:                       # Ctrl-C
            break
        print(f"\n{name}:", end="")
        tuned, losses = tune(base, config, mixed_batch if "old" in name else adapter_batch)
        layer, planned = adapted(config) if tune is tune_adapter else AFFINE, short.steps
        models[name] = {**base, **tuned}, layer
    metrics = print_jobs(models, cfg)
    if "full" in models:
        changes = [models["full"][0][name] - params[name] for name in params if ".W" in name]
        squares = np.array([np.linalg.svd(W, compute_uv=False)[:cfg.dim] ** 2 for W in changes])
        shares = (squares.cumsum(axis=1) / squares.sum(axis=1, keepdims=True)).mean(axis=0)
        shown = [float(shares[:k][-1]) for k in (1, 2, 4, 8)]
        metrics["energy_8"] = shown[-1]
        print("Share of the squares of full fine-tuning's change in its first 1, 2, 4, 8 singular "
              "directions:\n" + ", ".join(f"{share:.0%}" for share in shown))
    print("\nNext: python lora.py ranks --old 0.5      python lora.py qlora")
    print_result("ranks", cfg, **metrics, steps=steps, seconds=time.perf_counter() - start)


# ---- weights in few bits: python lora.py quantize ------------------------------------------------
# Integers from -Q to Q and one scale t for the matrix or for each column: Wq = t round(W / t).

@dataclass
class Quantize:
    """Weights in 8, 4, 3, 2 bits, training through the rounding, outliers and their cures, FP8."""
    layers: int = 2         # transformer blocks
    heads: int = 4          # attention heads
    dim: int = 48           # embedding dimension
    digits: int = 5         # digits per sequence
    batch_size: int = 64    # sequences per step
    steps: int = 500        # optimizer steps of pre-training
    lr: float = 0.003       # learning rate, which falls to 0 over the second half of the steps
    tune_steps: int = 120   # optimizer steps through the rounding, at most --steps
    seed: int = 0           # random seed


def quantize(x, bits, axis=None, percentile=100):
    """x rounded to multiples -Q ... Q of t; Q = 2^(bits - 1) - 1, t = max|x| / Q: one t, or one for
    each column (axis=0) or row (axis=1). A percentile below 100 for the maximum clips the largest.
    """
    Q = 2 ** (bits - 1) - 1
    t = np.percentile(np.abs(x), percentile, axis=axis, keepdims=True) / Q + 1e-12
    return (t * np.clip(np.round(x / t), -Q, Q)).astype(x.dtype)


def round_weights(params, **options):
    """quantize for every matrix of the blocks; embeddings, norms and biases remain."""
    return {name: quantize(w, **options) if ".W" in name else w for name, w in params.items()}


def straight_through_loss_and_grads(params, batch, cfg, bits):
    """The gradient at the rounded weights, taken for that of the weights: rounding has slope 0
    nearly everywhere. Clipped weights, |W / t| > Q, would get 0, but t = max|W| / Q clips none.
    That t moves with W is left out."""
    return loss_and_grads(round_weights(params, bits=bits, axis=0), batch, cfg)


def print_rounded(name, params, cfg, layer=AFFINE):
    """A line of a table.   -> loss and share of right sequences, of sort."""
    loss, share, _ = try_job(params, cfg, "sort", layer)
    other_loss, other_share, _ = try_job(params, cfg, "reverse", layer)
    bars = [f"{s:6.1%} |{'#' * round(15 * s):15s}|" for s in (share, other_share)]
    print(f"{name:15s}  {loss:8.4f} {other_loss:8.4f}   {'  '.join(bars)}")
    return loss, share


def draw_levels(column):
    """A histogram: how many weights of a column are rounded to each of the 15 levels of 4 bits."""
    largest = np.abs(column).max()
    levels = np.round(7 * quantize(column, 4) / largest).astype(int)
    for level, count in zip(range(-7, 8), np.bincount(levels + 7, minlength=15)):
        print(f"{level / 7 * largest:8.3f} |{'#' * min(count, 80)}")


ROUNDED = {"bits_8_tensor": dict(bits=8), "bits_8_column": dict(bits=8, axis=0),
           "bits_4_tensor": dict(bits=4), "bits_4_clipped": dict(bits=4, percentile=99.9),
           "bits_4_column": dict(bits=4, axis=0), "bits_3_tensor": dict(bits=3),
           "bits_3_column": dict(bits=3, axis=0), "bits_2_column": dict(bits=2, axis=0)}


def run_quantize(cfg):
    """Round the weights, train through the rounding; then 8 bits for weights and activations."""
    start, short = time.perf_counter(), replace(cfg, steps=min(cfg.tune_steps, cfg.steps))
    params, losses = train_base(cfg)
    models = {name: round_weights(params, **row) for name, row in ROUNDED.items()}
    steps, planned, metrics = len(losses), cfg.steps, {}
    for bits in (3, 2):
        if len(losses) < planned:                       # Ctrl-C
            break
        print(f"\nStraight through the rounding to {bits} bits by column:")
        tuned, planned = {name: w.copy() for name, w in params.items()}, short.steps
        losses = train(tuned, short, make_batch, functools.partial(
            straight_through_loss_and_grads, bits=bits))
        models[f"bits_{bits}_trained"] = round_weights(tuned, bits=bits, axis=0)
    print("\nColumns: losses of sort and reverse; sequences with every digit right, 15 # are 100 %")
    for name, p in {"float": params, **models}.items():
        metrics[name + "_loss"], metrics[name] = print_rounded(name, p, cfg)
    print("First column of W2 in block 0. Rows: the 15 levels of 4 bits; a # is one weight, and a "
          "row\nends at 80")
    draw_levels(params["0.W2"][:, 0])
    metrics.update(show_outliers(params, cfg))
    print("\nNext: python lora.py qlora      python lora.py speed")
    print_result("quantize", cfg, **metrics, steps=steps, seconds=time.perf_counter() - start)


# ---- outliers and FP8, shown by python lora.py quantize ------------------------------------------
# A product of integers needs them on both sides. In large language models a few channels of x are
# 20 to 100 times as large as the others. So small a network has none, and plant makes some.

def plant(params, cfg, factor, channels=4):
    """The same function with outliers: gamma and beta of some channels are multiplied by factor,
    the rows of the next W divided by it."""
    planted = {name: w.copy() for name, w in params.items()}
    for i in range(cfg.layers):
        for norm, name in (("1", "qkv"), ("2", "1")):
            planted[f"{i}.gamma{norm}"][:channels] *= factor
            planted[f"{i}.beta{norm}"][:channels] *= factor
            planted[f"{i}.W{name}"][:channels] /= factor
    return planted


def largest_inputs(params, cfg):
    """max|x| of every channel, of the inputs of all linear layers in turn, on a training batch.
    -> list of arrays."""
    seen = []

    def watch(x, p, name):
        seen.append(np.abs(x).max(axis=0))
        return affine_forward(x, p, name)
    layer_gpt_forward(params, make_batch(cfg, 1)[0], cfg, (watch, None))
    return seen


def smooth(params, cfg):
    """The same function: channel j is divided by c_j = sqrt(max|x_j| / max|W_j|) in gamma and beta,
    row j of W multiplied by it (SmoothQuant)."""
    smoothed, seen = dict(params), largest_inputs(params, cfg)
    for i in range(cfg.layers):
        first, third = seen[4 * i], seen[4 * i + 2]     # of the inputs of Wqkv, Wo, W1, W2
        for norm, name, largest in (("1", "qkv", first), ("2", "1", third)):
            c = np.sqrt(largest / np.abs(params[f"{i}.W{name}"]).max(axis=1))
            for vector in ("gamma", "beta"):
                smoothed[f"{i}.{vector}{norm}"] = params[f"{i}.{vector}{norm}"] / c
            smoothed[f"{i}.W{name}"] = params[f"{i}.W{name}"] * c[:, None]
    return smoothed


def e4m3(x):
    """x rounded to floats of 8 bits: sign, 4 bits of exponent, 3 of mantissa. The step is
    2^(floor(log2|x|) - 3), at least 2^-9; the largest number is 448."""
    _, exponent = np.frexp(x)                           # |x| is from 2^(exponent - 1) to 2^exponent
    step = np.ldexp(np.ones_like(x), np.maximum(exponent - 1, -6) - 3)
    return np.clip(np.round(x / step) * step, -448, 448)


def float8(x):
    """e4m3 of x, scaled so that the largest number becomes 448."""
    t = np.abs(x).max() / 448 + 1e-12
    return e4m3(x / t) * t


def low_layer(x, p, name, round_x, round_W, threshold):
    """A linear layer of rounded x and W; channels of x beyond the threshold are kept in float, with
    their rows of W (LLM.int8)."""
    W, kept = p["W" + name], np.abs(x).max(axis=0) > threshold
    y = round_x(x[:, ~kept]) @ round_W(W[~kept]) + x[:, kept] @ W[kept]
    return y + p["b" + name], None


by_tensor = functools.partial(quantize, bits=8)
by_token = functools.partial(quantize, bits=8, axis=1)
by_column = functools.partial(quantize, bits=8, axis=0)
EIGHT_BITS = {                                          # how to round x and W, threshold
    "tensor": (by_tensor, by_column, math.inf), "token": (by_token, by_column, math.inf),
    "kept": (by_token, by_column, 20), "smoothed": (by_token, by_column, math.inf),
    "e4m3": (float8, float8, math.inf)}


def show_outliers(params, cfg):
    """8 bits for weights and activations, without and with outliers; three cures.   -> metrics."""
    metrics = {}
    for factor in (1, 50, 400):
        planted = plant(params, cfg, factor)
        print(f"4 of {cfg.dim} channels times {factor}: x and W in 8 bits; columns as above")
        for name, (round_x, round_W, threshold) in EIGHT_BITS.items():
            layer = functools.partial(low_layer, round_x=round_x, round_W=round_W,
                                      threshold=threshold)
            p = smooth(planted, cfg) if name == "smoothed" else planted
            _, metrics[f"{name}_{factor}"] = print_rounded(name, p, cfg, (layer, None))
    print("Largest |x| of each of the first 46 channels before the first Wqkv, as columns of up to "
          "5 #\nLeft: with outliers; right: smoothed")
    left, right = (largest_inputs(p, cfg)[0][:46] for p in (planted, smooth(planted, cfg)))
    for row in range(5, 0, -1):
        bars = [np.where(5 * v / v.max() > row - 1, "#", " ") for v in (left, right)]
        print("".join(bars[0]) + "   " + "".join(bars[1]))
    print("How many positive numbers of a format lie from 2^-k to below 2^(1 - k), if the largest "
          "is 1;\ncolumns: k = 0 to 15")
    floats = np.unique(e4m3(np.arange(1, 448 * 512) / 512)) / 448
    for name, values in (("int8", np.arange(1, 128) / 127), ("e4m3", floats)):
        _, exponents = np.frexp(values)                 # values from 2^(exponent - 1) to 2^exponent
        counts = [int((exponents == 1 - k).sum()) for k in range(16)]
        print(f"{name}  " + "".join(f"{count:4d}" for count in counts))
    return metrics


# ---- QLoRA: python lora.py qlora -----------------------------------------------------------------

@dataclass
class QLoRA(Config):
    """The third job by an adapter on frozen weights of few bits; merging."""


def merged(params, adapter, cfg):
    """W + s A B in place of every W."""
    whole = dict(params)
    for name in adapter:
        if ".A" in name:
            change = adapter[name] @ adapter[name.replace("A", "B")]
            W = name.replace("A", "W")
            whole[W] = params[W] + cfg.alpha / cfg.rank * change
    return whole


def run_qlora(cfg):
    """Adapters on weights in float, 4 and 3 bits; merging them, and rounding what is merged."""
    start, short = time.perf_counter(), replace(cfg, steps=min(cfg.tune_steps, cfg.steps))
    params, losses = train_base(cfg)
    steps, planned, models = len(losses), cfg.steps, {"before": (params, AFFINE)}
    for bits in (32, 4, 3):
        base = params if bits == 32 else round_weights(params, bits=bits, axis=0)
        models[f"bits_{bits}"] = base, AFFINE
        if len(losses) < planned:                       # Ctrl-C
            break
        adapter, losses = tune_adapter(base, short)
        whole, planned = merged(base, adapter, cfg), short.steps
        models[f"bits_{bits}_lora"] = {**base, **adapter}, adapted(cfg)
        models[f"bits_{bits}_merged"] = whole, AFFINE
        models[f"bits_{bits}_again"] = round_weights(whole, bits=bits, axis=0), AFFINE
    metrics = print_jobs(models, cfg)
    print("lora: the adapter beside the weights; merged: W + s A B, in float; again: that, rounded")
    print("\nNext: python lora.py qlora --rank 4 --alpha 4      python lora.py speed")
    print_result("qlora", cfg, **metrics, steps=steps, seconds=time.perf_counter() - start)


# ---- speed: python lora.py speed -----------------------------------------------------------------

@dataclass
class Speed:
    """What weights of few bytes cost in NumPy: one row times a matrix."""
    repeats: int = 20       # repetitions, of which the fastest counts
    seed: int = 0           # random seed


def run_speed(cfg):
    """Time a product with weights in several formats; nothing is trained."""
    start, metrics = time.perf_counter(), {}
    print("One row times a D x D matrix: milliseconds, MiB of weights")
    for D in (256, 2048):
        rng = np.random.default_rng(cfg.seed)
        x = rng.standard_normal((1, D), np.float32)
        W = rng.standard_normal((D, D), np.float32)
        t = np.abs(W).max(axis=0) / 127
        Wq, half = np.round(W / t).astype(np.int8), W.astype(np.float16)
        products = {"float32": (W, lambda: x @ W),
                    "float16": (half, lambda: x @ half.astype(np.float32)),
                    "int8": (Wq, lambda: x @ Wq.astype(np.float32) * t),
                    "int32": (Wq, lambda: x.astype(np.int32) @ Wq.astype(np.int32) * t)}
        for name, (weights, product) in products.items():
            ms = 1000 * min(timeit.repeat(product, number=1, repeat=cfg.repeats))
            print(f"D {D:4d}  {name:8s} {ms:8.3f} ms {weights.nbytes / 2 ** 20:6.2f} MiB")
            metrics[f"{name}_{D}_ms"] = ms
    print("NumPy saves bytes, not time: int8 and float16 are first converted to float32.\n"
          "Quoted, not measured: where reading weights takes the time, a quarter of the bytes is\n"
          "up to 4 times as fast; tensor cores multiply int8 and FP8 at twice the rate of bfloat16")
    print("\nNext: python lora.py speed --repeats 50      python rlhf.py")
    print_result("speed", cfg, **metrics, seconds=time.perf_counter() - start)


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


def sizes_fit(cfg):
    """What must hold between the values of a task: (ok, what, expected, found) for each."""
    yield cfg.dim % cfg.heads == 0, "--dim", f"a multiple of --heads {cfg.heads}", cfg.dim
    yield getattr(cfg, "alpha", 1) > 0, "--alpha", "above 0", getattr(cfg, "alpha", 1)
    yield getattr(cfg, "old", 0) < 1, "--old", "below 1", getattr(cfg, "old", 0)


CONSTRAINTS = dict.fromkeys((Config, Ranks, Quantize, QLoRA), sizes_fit)


def lora_case(rng):
    """Inputs of lora for gradcheck.py; of W and b, True (1) or False (0), it asks no gradient."""
    frozen = {"Wo": rng.random((5, 7)) < 0.5, "bo": rng.random(7) < 0.5}
    adapter = {"Ao": rng.standard_normal((5, 3)), "Bo": rng.standard_normal((3, 7))}
    return dict(x=rng.standard_normal((4, 5)), p=frozen | adapter, name="o", scale=0.7)


GRADCHECK = {"affine": lambda rng: dict(x=rng.standard_normal((3, 5)), p={
    "Wo": rng.standard_normal((5, 7)), "bo": rng.standard_normal(7)}, name="o"), "lora": lora_case}
TASKS = {
    "adapt": Task(Config, init_params, make_batch, loss_and_grads, main),
    "ranks": Task(Ranks, init_adapter, mixed_batch, adapter_loss_and_grads, run_ranks),
    "quantize": Task(Quantize, init_params, make_batch, loss_and_grads, run_quantize),
    "qlora": Task(QLoRA, init_adapter, adapter_batch, adapter_loss_and_grads, run_qlora),
    "speed": Task(Speed, None, None, None, run_speed)}

if __name__ == "__main__":
    run(TASKS)
