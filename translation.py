"""translation.py: words in, words out, with an encoder-decoder transformer that can copy.

The encoder turns the source into one vector per token, the memory; the decoder writes the target
token by token, attending to the memory. A word outside its vocabulary it can only copy: a pointer
scores the positions of the source, and one softmax runs over the vocabulary and these positions.

Forward; every sublayer f (attention, mlp) as x + f(norm(x)), see transformer.py:
    rotary positions    q_t, k_s turned by angles t theta, s theta: q_t . k_s depends on t - s
    pointer             c_ts = (x_t Wq) . ([m_s, m_s-1] Wk) / sqrt(D), m the memory
    probability of y    P = p_y + sum of p_s over all s with source_s = y,  p = softmax([logits, c])
Backward: loss = -log P, z = [logits, c], dz = p - r; r = p / P for every way to output y, else 0

Run    python translation.py           headlines with names never seen in training; --help says more
Papers: Vaswani et al. 2017 (the transformer), Gu et al. 2016 (copying)
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
from dataclasses import dataclass, fields

for library in ("OPENBLAS", "MKL", "OMP"):  # the matrices are small: one BLAS thread is fastest
    os.environ.setdefault(library + "_NUM_THREADS", "1")
import numpy as np


@dataclass
class Config:
    """Shorten sentences to headlines, with the pointer and without."""
    layers: int = 1         # layers of the encoder, and of the decoder
    heads: int = 4          # attention heads
    dim: int = 64           # embedding dimension
    dropout: float = 0.0    # share of every sublayer's output set to 0 in training
    label_smoothing: float = 0.0  # share of the target's probability given to the vocabulary
    batch_size: int = 32    # pairs per step
    steps: int = 400        # optimizer steps of each training
    lr: float = 0.003       # peak learning rate
    warmup: int = 50        # steps of linear warmup
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    seed: int = 0           # random seed


# ---- layers: B sequences, S source, T target tokens, N = B T, D dim, H heads, d = D / H ----------

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


def rotate(x, t):
    """Turn pairs of numbers by angles t theta_j; backward: by -t.   x (B, H, T, d), t (T, 1)."""
    theta = 10000.0 ** (-np.arange(0, x.shape[3], 2) / x.shape[3])          # (d / 2,)
    turn = np.exp(1j * t * theta).astype(np.result_type(x, np.complex64))   # (T, d / 2)
    return (x.view(turn.dtype) * turn).view(x.dtype)    # view: the same memory, read as pairs


def rotary_multihead_forward(x, p, memory, heads, B, mask, t):
    """Per head softmax(q k^T / sqrt(d)) v over the positions where mask is True, q and k rotated
    by t; q from x (B T, D), k and v from memory (B S, D).   -> (B T, D)."""
    D = x.shape[1]
    q = (x @ p["Wqkv"][:, :D]).reshape(B, -1, heads, D // heads).swapaxes(1, 2)     # (B, H, T, d)
    kv = (memory @ p["Wqkv"][:, D:]).reshape(B, -1, 2, heads, D // heads)
    k, v = kv.transpose(2, 0, 3, 1, 4)                              # (B, H, S, d) each
    q, k = rotate(q, t) * q.shape[3] ** -0.5, rotate(k, t)
    scores = np.where(mask, q @ k.swapaxes(2, 3), -1e9)             # (B, H, T, S)
    w = np.exp(scores - scores.max(axis=3, keepdims=True))
    w /= w.sum(axis=3, keepdims=True)                               # attention weights
    y = (w @ v).swapaxes(1, 2).reshape(x.shape)                     # the heads side by side
    return y @ p["Wo"], (x, p, memory, t, q, k, v, w, y)


def rotary_multihead_backward(dout, cache):
    """rotary_multihead_forward in reverse order.   -> dx, gradients, dmemory."""
    x, p, memory, t, q, k, v, w, y = cache
    (B, H, T, d), D = q.shape, x.shape[1]
    dy = (dout @ p["Wo"].T).reshape(B, T, H, d).swapaxes(1, 2)
    dw = dy @ v.swapaxes(2, 3)
    ds = w * (dw - (w * dw).sum(axis=3, keepdims=True))             # 0 where the mask made w 0
    dq = rotate(ds @ k, -t).swapaxes(1, 2).reshape(x.shape) * d ** -0.5
    dkv = np.stack([rotate(ds.swapaxes(2, 3) @ q, -t), w.swapaxes(2, 3) @ dy])  # (2, B, H, S, d)
    dkv = dkv.transpose(1, 3, 0, 2, 4).reshape(len(memory), 2 * D)
    g = {"Wqkv": np.concatenate([x.T @ dq, memory.T @ dkv], axis=1), "Wo": y.T @ dout}
    return dq @ p["Wqkv"][:, :D].T, g, dkv @ p["Wqkv"][:, D:].T


def swiglu_mlp_forward(x, p):
    """y = (silu(gate) up) W2, [gate, up] = x W1, silu(z) = z / (1 + e^-z).   x, y (N, D)."""
    gate, up = np.split(x @ p["W1"], 2, axis=1)
    s = 0.5 + 0.5 * np.tanh(0.5 * gate)                 # the sigmoid, without overflow
    h = gate * s * up
    return h @ p["W2"], (x, p, gate, up, s, h)


def swiglu_mlp_backward(dout, cache):
    """swiglu_mlp_forward in reverse order.   -> dx, gradients."""
    x, p, gate, up, s, h = cache
    dh = dout @ p["W2"].T                               # then the product rule
    dz = np.concatenate([dh * up * (s + gate * s * (1 - s)), dh * gate * s], axis=1)
    return dz @ p["W1"].T, {"W1": x.T @ dz, "W2": h.T @ dout}


def pointer_forward(x, p, memory, B):
    """c_ts = (x_t Wq) . ([m_s, m_s-1] Wk) / sqrt(D).   x (B T, D), memory (B S, D) -> (B, T, S)."""
    m = memory.reshape(B, -1, x.shape[1])
    before = np.pad(m, ((0, 0), (1, 0), (0, 0)))[:, :-1]    # m_s-1: having copied s - 1, find s
    m = np.concatenate([m, before], axis=2)                         # (B, S, 2 D)
    q = (x @ p["Wq"]).reshape(B, -1, x.shape[1])
    k = m @ p["Wk"] * x.shape[1] ** -0.5                            # (B, S, D)
    return q @ k.swapaxes(1, 2), (x, p, m, q, k)


def pointer_backward(dout, cache):
    """pointer_forward in reverse order.   -> dx, gradients, dmemory."""
    x, p, m, q, k = cache
    B, S, D = k.shape
    dq = (dout @ k).reshape(x.shape)
    dk = (dout.swapaxes(1, 2) @ q * D ** -0.5).reshape(B * S, D)
    dm = (dk @ p["Wk"].T).reshape(B, S, 2 * D)
    dm[:, :-1, :D] += dm[:, 1:, D:]                     # m_s stands at s, and at s + 1 as "before"
    g = {"Wq": x.T @ dq, "Wk": m.reshape(B * S, 2 * D).T @ dk}
    return dq @ p["Wq"].T, g, dm[:, :, :D].reshape(B * S, D)


def log_softmax(logits):
    """log of the softmax of every row.   logits (N, V) -> (N, V)."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def copy_cross_entropy_forward(z, right, V, label_smoothing):
    """mean_n of -(1 - s) log P - s mean_v log p_v, p = softmax(z), P the sum of p where right, s
    the label smoothing.   z = [logits, c] (N, V + S), right (N, V + S) True or False -> scalar."""
    log_p = log_softmax(z)
    ways = np.where(right, log_p, -1e9)
    best = ways.max(axis=1, keepdims=True)
    share = np.exp(ways - best)
    total = share.sum(axis=1, keepdims=True)            # log P = best + log(total)
    loss = -(1 - label_smoothing) * (best + np.log(total)).mean()
    loss -= label_smoothing * log_p[:, :V].mean()
    return loss, (log_p, share / total, V, label_smoothing)


def copy_cross_entropy_backward(dout, cache):
    """dz = (p - (1 - s) share - s / V) / N; share = p / P where right, 0 elsewhere."""
    log_p, share, V, label_smoothing = cache
    dz = np.exp(log_p) - (1 - label_smoothing) * share
    dz[:, :V] -= label_smoothing / V
    return dz * (dout / len(dz))


# ---- data ----------------------------------------------------------------------------------------

SOURCES = ["the {firm} of {city} will {verb} its {kind} {thing} , {title} {name} said on {day}",
           "on {day} {title} {name} asked the {firm} of {city} to {verb} its {kind} {thing}"]
HEADLINE = "{name} : {city} {firm} to {verb} {thing}"
PARTS = {"title": "minister mayor doctor", "firm": "bank museum school", "verb": "sell close move",
         "kind": "old new famous", "thing": "library bridge archive", "day": "monday friday"}
INVENTED = [a + b for a in "bal cor dav fen gar hol jan kel lor mar nor per ros sol vel".split()
            for b in "a as ek en er ia in is o on or us".split()]
KNOWN, RARE, UNSEEN = INVENTED[::16], INVENTED[1::2], INVENTED[2::4]    # UNSEEN: for tests only
PAD, BOS, EOS, UNK = range(4)   # padding, beginning and end of a sequence, unknown word
TOKENS = " ".join([HEADLINE, "the of will its , said on asked", *PARTS.values(), *KNOWN])
TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", *(w for w in TOKENS.split() if "{" not in w)]
IDS = {word: i for i, word in enumerate(TOKENS)}


def draw_headlines(rng, n, names):
    """-> n pairs (source, headline) of lists of words; persons and cities have one of the names."""
    choices, pairs = {part: words.split() for part, words in PARTS.items()}, []
    choices["name"] = choices["city"] = names
    for form, *numbers in rng.integers(2 ** 31, size=(n, 1 + len(choices))).tolist():
        words = {part: some[i % len(some)] for i, (part, some) in zip(numbers, choices.items())}
        pairs.append([text.format(**words).split() for text in (SOURCES[form % 2], HEADLINE)])
    return pairs


def encode_pair(source, target, ids):
    """ids: a dict of V words -> ids of both sides; other words of the source get V, V + 1, ..."""
    new = [word for word in dict.fromkeys(source) if word not in ids]   # each once, in order
    ids = ids | {word: len(ids) + i for i, word in enumerate(new)}
    return [ids[word] for word in source], [ids.get(word, UNK) for word in target]


def pad(sequences):
    """Lists of ids -> ids (N, longest), each followed by PAD."""
    ids = np.full((len(sequences), max(map(len, sequences))), PAD)
    for row, sequence in zip(ids, sequences):
        row[:len(sequence)] = sequence
    return ids


def padded_batch(pairs, cfg, rng, dtype):
    """Pairs of ids -> source (B, S), target (B, T) from BOS on, targets (B, T) up to EOS; dropout
    masks of encoder and decoder (B, masks, S or T, D), 0 or 1 / (1 - dropout)."""
    source, target = pad([a for a, _ in pairs]), pad([[BOS, *b] for _, b in pairs])
    batch = [source, target, pad([[*b, EOS] for _, b in pairs])]
    for (B, T), n in ((source.shape, 2), (target.shape, 3)):
        keep = rng.random((B, 1 + n * cfg.layers, T, cfg.dim), dtype) >= cfg.dropout
        batch.append(keep * dtype(1 / (1 - cfg.dropout)))
    return batch


def make_batch(cfg, step, dtype=np.float32):
    """New sentences; half of the names are in the vocabulary.   -> see padded_batch."""
    rng = np.random.default_rng((cfg.seed, step))
    names = len(RARE) // len(KNOWN) * KNOWN + RARE
    pairs = [encode_pair(*pair, IDS) for pair in draw_headlines(rng, cfg.batch_size, names)]
    return padded_batch(pairs, cfg, rng, dtype)


# ---- model: the encoder reads the source, the decoder and the pointer write the target -----------

def init_params(cfg, rng, dtype=np.float32, vocab_size=len(TOKENS)):
    """E (V, D), used three times; "enc0.self.Wqkv", ..., "dec0.cross.Wqkv", ...; last norms."""
    D, params = cfg.dim, {}
    shapes = {"E": (vocab_size, D), "copy.Wq": (D, D), "copy.Wk": (2 * D, D)}
    for i in range(cfg.layers):
        for at in (f"enc{i}.self", f"dec{i}.self", f"dec{i}.cross"):
            shapes[at + ".Wqkv"], shapes[at + ".Wo"] = (D, 3 * D), (D, D)
        for at in (f"enc{i}.mlp", f"dec{i}.mlp"):
            shapes[at + ".W1"], shapes[at + ".W2"] = (D, 4 * D), (2 * D, D)
    ends = [name for name in shapes if name.endswith((".Wo", ".W2"))]   # of sublayers: their
    for name, (n, m) in shapes.items():                                 # many small steps add up
        std = (2 / (n + m)) ** 0.5 * (2 * cfg.layers) ** (-0.5 * (name in ends))
        params[name] = rng.standard_normal((n, m)) * (0.02 if name == "E" else std)
    for at in ["enc", "dec", *(name[:-3] for name in ends)]:
        params[at + ".gamma"], params[at + ".beta"] = np.ones(D), np.zeros(D)
    return {name: value.astype(dtype) for name, value in params.items()}


def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


def layers_forward(x, params, stack, sublayers, memory, keep):
    """x + f(norm(x)) for all sublayers f of every layer, a last norm; keep: dropout masks."""
    x, caches = x * keep[0], []
    for number, kept in enumerate(keep[1:]):            # of all sublayers, layer by layer
        name, forward, backward, *inputs = sublayers[number % len(sublayers)]
        at = f"{stack}{number // len(sublayers)}.{name}."
        p = part(params, at)
        y, norm = layernorm_forward(x, p["gamma"], p["beta"])
        reads = {"self": [y], "cross": [memory], "mlp": []}[name]   # where keys and values are from
        y, cache = forward(y, p, *reads, *inputs)
        x = x + kept * y
        caches.append((name, at, norm, cache, backward, kept))
    x, norm = layernorm_forward(x, params[stack + ".gamma"], params[stack + ".beta"])
    return x, (stack, keep[0], caches, norm)


def layers_backward(dout, cache):
    """layers_forward in reverse order.   -> dx, gradients, dmemory."""
    stack, keep, caches, norm = cache
    grads, dmemory = {}, 0
    dx, grads[stack + ".gamma"], grads[stack + ".beta"] = layernorm_backward(dout, norm)
    for name, at, norm, cache, backward, kept in reversed(caches):
        dy, g, *dread = backward(kept * dx, cache)      # dread: [gradient of reads], [] for mlp
        sums = {"self": dy, "cross": dmemory, "mlp": 0}
        sums[name] = sum(dread, sums[name])             # self-attention has read y, cross memory
        dy, g["gamma"], g["beta"] = layernorm_backward(sums["self"], norm)
        dx, dmemory = dx + dy, sums["cross"]
        grads.update({at + key: value for key, value in g.items()})
    return keep * dx, grads, dmemory


def encdec_copy_forward(params, source, target, cfg, keeps, pointer=True):
    """source (B, S), target (B, T) from BOS on -> z (B T, V + S): V logits, S pointer scores."""
    E, (B, S), T = params["E"], source.shape, target.shape[1]
    ids = np.concatenate([source.ravel(), target.ravel()])
    ids = np.where(ids < len(E), ids, UNK)                          # (B S + B T,)
    mask, causal_mask = (source != PAD)[:, None], np.tri(T, dtype=bool)     # (B, 1, S), (T, T)
    attention = rotary_multihead_forward, rotary_multihead_backward, cfg.heads, B
    mlp = "mlp", swiglu_mlp_forward, swiglu_mlp_backward            # see layers_forward
    encoder = [("self", *attention, mask[:, None], np.arange(S)[:, None]), mlp]
    memory, enc = layers_forward(E[ids[:B * S]], params, "enc", encoder, None, keeps[0])
    decoder = [("self", *attention, causal_mask, np.arange(T)[:, None]),
               ("cross", *attention, mask[:, None], np.zeros((1, 1))), mlp]     # 0: no rotation
    x, dec = layers_forward(E[ids[B * S:]], params, "dec", decoder, memory, keeps[1])
    c, copy = pointer_forward(x, part(params, "copy."), memory, B)
    c = np.where(mask & pointer, c, -1e9).reshape(B * T, S)         # where p is 0, so is dz
    return np.concatenate([x @ E.T, c], axis=1), (enc, dec, copy, ids, x, E, B)


def encdec_copy_backward(dout, cache):
    """encdec_copy_forward in reverse order -> gradients under the keys of params."""
    enc, dec, copy, ids, x, E, B = cache
    dlogits, dc = np.split(dout, [len(E)], axis=1)
    dx, g, dmemory = pointer_backward(dc.reshape(B, -1, dc.shape[1]), copy)
    dtarget, decoder, dm = layers_backward(dx + dlogits @ E, dec)
    dsource, encoder, _ = layers_backward(dmemory + dm, enc)        # pointer and cross-attention
    grads = {"E": dlogits.T @ x, "copy.Wq": g["Wq"], "copy.Wk": g["Wk"], **encoder, **decoder}
    np.add.at(grads["E"], ids, np.concatenate([dsource, dtarget]))  # E embeds both sides, too
    return grads


def loss_and_grads(params, batch, cfg, pointer=True):
    """Loss over the targets that are not padding, gradients under the keys of params."""
    source, target, targets, *keeps = batch
    keeps = [keep.swapaxes(0, 1).reshape(keep.shape[1], -1, cfg.dim) for keep in keeps]
    z, cache = encdec_copy_forward(params, source, target, cfg, keeps, pointer)
    V = len(params["E"])
    b, t = np.nonzero(targets != PAD)                   # sequence and position of every target
    real = b * target.shape[1] + t                      # and its row of z
    y = np.where((targets < V) | pointer, targets, UNK)[b, t][:, None]
    right = np.concatenate([y == np.arange(V), y == source[b]], axis=1)         # ways to output y
    loss, loss_cache = copy_cross_entropy_forward(z[real], right, V, cfg.label_smoothing)
    dz = np.zeros_like(z)
    dz[real] = copy_cross_entropy_backward(1.0, loss_cache)
    return loss, encdec_copy_backward(dz, cache)


# ---- optimizer, training and demo ----------------------------------------------------------------

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


def train(params, cfg, make_batch, loss_and_grads, state, losses, note=lambda: ""):
    """Train params in place; state: of the optimizer; losses: of the steps so far, grows."""
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        clip_norm(grads, cfg.grad_clip)
        adam_update(params, grads, state, learning_rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def draw_map(w, rows, columns):
    """Attention weights w (T, S), with the names of the T rows and the S columns."""
    height, width = max(map(len, columns)), max(8, *map(len, rows))
    for line in zip(*(name.rjust(height) for name in columns)):         # from top to bottom
        print(" " * (width + 2) + " ".join(line))
    for name, weights in zip(rows, shade(w)):
        print(f"{name:>{width}s} |{' '.join(weights)}|")


def print_result(task, cfg, **metrics):
    """The last line of a run, for comparing runs: task, changed fields and seed, metrics."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg)
               if f.name == "seed" or getattr(cfg, f.name) != f.default}
    line = f"result: task={task}"
    for name, value in {**changed, **metrics}.items():
        text = f"{value:#.4g}" if isinstance(value, float) else str(value)
        line += f" {name}={text.replace(' ', '_')}"
    print(line)


def write(params, source, target, cfg, pointer=True):
    """-> the likeliest ids after each true prefix (B, T); p (B, T, V + S); cross-attention w."""
    keeps = [[1.0] * (1 + n * cfg.layers) for n in (2, 3)]          # no dropout
    z, cache = encdec_copy_forward(params, source, target, cfg, keeps, pointer)
    _, (_, _, caches, _), *_ = cache                    # of the decoder's sublayers
    _, _, _, (*_, w, _), _, _ = caches[-2]              # the last but one is cross-attention
    p = np.exp(log_softmax(z)).reshape(*target.shape, -1)
    vocab = np.tile(np.arange(len(params["E"])), (len(source), 1))
    ways = np.concatenate([vocab, source], axis=1)                  # (B, V + S)
    return np.take_along_axis(ways, p.argmax(axis=2), axis=1), p, w


def main(cfg):
    """Train without the pointer and with it; let both shorten sentences that are new to them."""
    start, metrics = time.perf_counter(), {}
    for name, pointer in (("no_pointer", False), ("pointer", True)):
        params, losses = init_params(cfg, np.random.default_rng(cfg.seed)), []
        print(f"\nShort headlines, {name}: {cfg.layers} + {cfg.layers} layers, dim {cfg.dim}, "
              f"lr {cfg.lr}, {sum(w.size for w in params.values())} parameters\n"
              f"chance level: loss {math.log(len(TOKENS)):.3f}")
        train(params, cfg, make_batch, lambda *args: loss_and_grads(*args, pointer), {}, losses)
        for kind, names in (("known", KNOWN), ("unseen", UNSEEN)):
            rng = np.random.default_rng((cfg.seed, 10 ** 6))
            pairs = sorted(draw_headlines(rng, 500, names), key=lambda pair: -len(pair[0]))
            ids = [encode_pair(*pair, IDS) for pair in pairs]
            source, target, targets, *_ = padded_batch(ids, cfg, rng, np.float32)
            ids, p, w = write(params, source, target, cfg, pointer)
            check_finite(p.sum(), params)
            exact = float(((ids == targets) | (targets == PAD)).all(axis=1).mean())
            metrics[f"{name}_{kind}"] = exact
            words, vocab = pairs[0][0], list(dict.fromkeys([*TOKENS, *pairs[0][0]]))
            written = [vocab[i] for i in ids[0]]
            print(f"{exact:.1%} of 500 headlines with {kind} names are right; for example\n"
                  f"    {' '.join(words)}\n    -> {' '.join(written)}")
        if len(losses) < cfg.steps:
            break
    print("\nRows: the headline; columns: the source, twice. Left: cross-attention, the largest of "
          "all\nheads. Right: the pointer's part of the softmax. Blank is 0, @ is 1")
    draw_map(np.concatenate([w[0].max(axis=0), p[0, :, len(TOKENS):]], axis=1), written, 2 * words)
    print("\nNext: python translation.py pairs      python mae.py")
    print_result("headlines", cfg, **metrics, params=sum(w.size for w in params.values()),
                 steps=len(losses), seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest: byte-pair encoding, BLEU and ROUGE, beam search, pairs of a file, plumbing. =======

MORE = """
Data: any UTF-8 lines SOURCE TAB TARGET. Multi30k, German to English, has a file per language:
    for s in train val test_2016_flickr; do for l in de en; do curl -O \\
    https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/$s.$l.gz
    gunzip -f $s.$l.gz; done; paste $s.de $s.en > $s.tsv; done
    python translation.py pairs --data train.tsv --validation val.tsv --test test_2016_flickr.tsv \\
        --layers 3 --dim 192 --batch-size 64 --steps 6000 --lr 0.002 --warmup 300 --save m30.npz
Headlines of Reuters-21578 (unpack reuters21578.tar.gz, then run the lines that stand below):
    https://archive.ics.uci.edu/ml/machine-learning-databases/reuters21578-mld/reuters21578.tar.gz
    python translation.py pairs --data reuters-headlines.tsv --pointer --lower --layers 2 \\
        --dim 128 --context 40 --batch-size 64 --steps 3000 --lr 0.003 --warmup 150 \\
        --dropout 0.2 --label-smoothing 0 --save reuters.npz
    import glob, html, re
    def words(tag, article):
        found = re.search(f"<{tag}>(.*?)</{tag}>", article, re.DOTALL)
        return html.unescape(found[1]).split() if found else []
    with open("reuters-headlines.tsv", "w", encoding="utf-8") as file:
        for name in sorted(glob.glob("reut2-*.sgm")):
            for article in open(name, encoding="latin-1").read().split("</REUTERS>"):
                body, title = words("BODY", article)[:-1], words("TITLE", article)  # -1: "Reuter"
                numbers = sum(any(c.isdigit() for c in word) for word in body)
                if len(body) >= 40 and len(title) >= 3 and numbers < len(body) / 4:
                    print(" ".join(body), " ".join(title), sep="\\t", file=file)

Break it (names that are right by default: 100 % with the pointer; without it 100 % of the known)
    rotate: return x                    without the pointer 44 %; with it 100 %: m_s-1 has the order
    pointer_forward: before = 0 * m     100 %: positions do as well. Both: 51 %, of the unseen 1 %
    layers_backward: layernorm_backward(dy, norm)
                                        86 %, 100 %: the gradient of the keys and values is missing,
                                        and the model learns nevertheless

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python translation.py --layers 2, or --dim 32: what becomes of the two models?
    2. Let the pointer score by additive attention (attention.py). Derive its backward pass.
    3. Derive and add Luong's general score to the pointer: c_ts = x_t W m_s, without Wq and Wk.
Papers: Su 2021 (rotary positions), Shazeer 2020 (SwiGLU), Sennrich 2016 (byte-pair encoding),
Szegedy 2016 (label smoothing), Wu 2016 (length penalty), Papineni 2002 (BLEU), Lin 2004 (ROUGE)
"""

import argparse
import contextlib
import ctypes
import functools
import heapq
import inspect
import json
import re
import sys
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- byte-pair encoding --------------------------------------------------------------------------

PIECES = re.compile(r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+")      # pairs are merged within a piece


def merge_pair(tokens, pair):
    """The tokens with every occurrence of the pair merged, from left to right."""
    merged = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            token = merged.pop() + token
        merged.append(token)
    return merged


def find_merges(counts, most):
    """Merge the most frequent pair of neighbours into one token, again and again; tokens are bytes.
    counts: how often each piece of text occurs -> the pairs in this order, at most `most`."""
    tokens = {piece: [bytes([b]) for b in piece.encode()] for piece in counts}
    total, where = Counter(), defaultdict(dict)         # of every pair: how often, in which pieces
    changed, heap, merges = set(), [], {}

    def count(piece, sign):
        for pair in zip(tokens[piece], tokens[piece][1:]):
            total[pair] += sign * counts[piece]
            where[pair][piece] = True
            changed.add(pair)

    for piece in counts:
        count(piece, 1)
    while len(merges) < most:
        for pair in changed:
            heapq.heappush(heap, (-total[pair], pair))
        changed.clear()
        n, pair = heapq.heappop(heap) if heap else (0, None)
        if n > -2:                                      # no pair occurs twice
            break
        if -n == total[pair]:                           # else out of date: a newer entry follows
            for piece in list(where.pop(pair)):
                count(piece, -1)
                tokens[piece] = merge_pair(tokens[piece], pair)
                count(piece, 1)
            merges[pair] = True
    return list(merges)


def merge_steps(tokens, ranks):
    """Yield the tokens after every merge, in the order in which the merges were learned."""
    while True:
        yield tokens
        pairs = ranks.keys() & zip(tokens, tokens[1:])
        if not pairs:
            return
        tokens = merge_pair(tokens, min(pairs, key=ranks.get))


def make_tokenizer(unit, merges):
    """-> a function: text -> tokens (bytes); joined, they are the text again."""
    ranks = {pair: k for k, pair in enumerate(merges)}

    @functools.cache
    def split(piece):
        *_, tokens = merge_steps([bytes([b]) for b in piece.encode()], ranks)
        return tokens
    cut = {"bpe": split, "words": lambda piece: [piece.encode()],
           "characters": lambda piece: [c.encode() for c in piece]}[unit]
    return lambda text: [token for piece in PIECES.findall(text) for token in cut(piece)]


# ---- scores: BLEU as sacrebleu, ROUGE as rouge-score ---------------------------------------------

def bleu_tokens(text):
    """Words and punctuation, split as by mteval-v13a, the script of the WMT translation tasks."""
    text = f" {text} "
    for pattern, new in ((r"<skipped>|-\n", ""), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"),
                         ("&gt;", ">"), (r"([{-~[-` -&(-+:-@/])", r" \1 "),
                         (r"([^0-9])([.,])", r"\1 \2 "), (r"([.,])([^0-9])", r" \1 \2"),
                         (r"([0-9])(-)", r"\1 \2 ")):
        text = re.sub(pattern, new, text)
    return text.split()


def ngrams(tokens, n):
    """How often each sequence of n tokens occurs."""
    return Counter(zip(*(tokens[k:] for k in range(n))))


def bleu(outputs, references):
    """Papineni 2002: geometric mean of the precisions of 1- to 4-grams, times a brevity penalty,
    in percent. No match of n tokens counts as 1/2, 1/4, ... of a match, as in sacrebleu."""
    outputs, references = ([bleu_tokens(text) for text in texts] for texts in (outputs, references))
    log_precision, none = 0.0, 1
    for n in range(1, 5):
        pairs = [(ngrams(a, n), ngrams(b, n)) for a, b in zip(outputs, references)]
        right = sum((a & b).total() for a, b in pairs)
        total = sum(a.total() for a, _ in pairs)
        if not total or n == 1 and not right:
            return 0.0
        if not right:
            none *= 2
        log_precision += math.log((right or 1 / none) / total) / 4
    lengths = [sum(map(len, texts)) for texts in (outputs, references)]
    return 100 * math.exp(log_precision + min(0, 1 - lengths[1] / lengths[0]))


def rouge(outputs, references):
    """Lin 2004: mean F-scores of common words, pairs, longest common subsequences, in percent."""
    scores = []
    for texts in zip(outputs, references):
        a, b = (re.findall("[a-z0-9]+", text.lower()) for text in texts)
        common = [(ngrams(a, n) & ngrams(b, n)).total() for n in (1, 2)]
        row = [0] * (len(b) + 1)                        # longest common subsequence of a[:i], b[:k]
        for token in a:
            before, row = row, [0]
            for k, other in enumerate(b):
                row.append(before[k] + 1 if token == other else max(before[k + 1], row[k]))
        totals = [ngrams(a, n).total() + ngrams(b, n).total() for n in (1, 2, 1)]
        scores.append([200 * n / max(1, total) for n, total in zip((*common, row[-1]), totals)])
    return dict(zip(("rouge1", "rouge2", "rougeL"), map(float, np.mean(scores, axis=0))))


# ---- beam search ---------------------------------------------------------------------------------

def beam_search(step, state, N, limit, beam, length_penalty):
    """Keep the best partial outputs of each of N sequences, K = beam of them, by log_p / length **
    length_penalty; a beam of 1 is greedy decoding. step(ids (N K,), state) -> log_p (N K, V) of the
    next token, state; state: a list of arrays with N K rows.
    -> ids (N, T) of the best outputs, PAD after EOS; their log_p (N,)."""
    row = np.arange(N)[:, None]
    ids = np.full((N, beam, 1), BOS)
    log_p = np.where(np.arange(beam) == 0, 0.0, -1e9) + np.zeros((N, 1))    # at first only one
    length, ended = np.zeros((N, beam), int), np.zeros((N, beam), bool)
    for _ in range(limit):
        next_log_p, state = step(ids[:, :, -1].ravel(), state)
        next_log_p = next_log_p.astype(float).reshape(N, beam, -1)
        V = next_log_p.shape[2]
        only_pad = np.where(np.arange(V) == PAD, 0.0, -1e9)
        next_log_p = np.where(ended[:, :, None], only_pad, next_log_p)
        length = length + ~ended
        total = log_p[:, :, None] + next_log_p              # (N, K, V)
        score = (total / length[:, :, None] ** length_penalty).reshape(N, beam * V)
        best = np.argsort(-score, axis=1, kind="stable")[:, :beam]
        origin, token = best // V, best % V                 # (N, K) each
        log_p = total[row, origin, token]
        ids = np.concatenate([ids[row, origin], token[:, :, None]], axis=2)
        length, ended = length[row, origin], ended[row, origin] | (token == EOS)
        state = [array[(beam * row + origin).ravel()] for array in state]
        if ended.all():
            break
    return ids[:, 0, 1:], log_p[:, 0]


def find_targets(params, source, cfg, beam):
    """source (N, S) -> ids (N, T) that beam_search finds, their log-probabilities (N,)."""
    E, V = params["E"], len(params["E"])
    N, S = source.shape
    known = np.append(np.arange(V), np.full(S, UNK))                # the row of E for every id
    mlp = "mlp", swiglu_mlp_forward, None               # None: no backward pass
    encoder = [("self", rotary_multihead_forward, None, cfg.heads, N,
                (source != PAD)[:, None, None], np.arange(S)[:, None]), mlp]
    x, keep = E[known[source].ravel()], [1.0] * (1 + 3 * cfg.layers)            # no dropout
    memory, _ = layers_forward(x, params, "enc", encoder, None, keep[cfg.layers:])
    memory = np.repeat(memory.reshape(N, S, -1), beam, axis=0).reshape(N * beam * S, -1)
    source = np.repeat(source, beam, axis=0)            # a row for each partial output
    mask = (source != PAD)[:, None]
    attention, row = (rotary_multihead_forward, None, cfg.heads, N * beam), np.arange(N * beam)
    pointer = part(with_pointer(params), "copy.")

    def step(ids, state):
        target = np.column_stack([*state, ids])                     # (N K, T)
        T = target.shape[1]
        decoder = [("self", *attention, np.tri(T, dtype=bool), np.arange(T)[:, None]),
                   ("cross", *attention, mask[:, None], np.zeros((1, 1))), mlp]
        x, _ = layers_forward(E[known[target].ravel()], params, "dec", decoder, memory, keep)
        x = x[T - 1::T]                                             # of the last token
        c, _ = pointer_forward(x, pointer, memory, N * beam)
        c = np.where(mask & cfg.pointer, c, -1e9)[:, 0]
        p = np.exp(log_softmax(np.concatenate([x @ E.T, c], axis=1)))
        total = np.pad(p[:, :V], ((0, 0), (0, S)))      # of each id: all ways to output it
        np.add.at(total, (row[:, None], source), p[:, V:])
        total[:, [PAD, BOS]] = 0
        return np.log(np.maximum(total, 1e-30)), [target]

    start = [np.zeros((N * beam, 0), int)]              # no tokens yet
    return beam_search(step, start, N, cfg.context, beam, cfg.length_penalty)


# ---- pairs of a file: python translation.py pairs --data train.tsv -------------------------------

@dataclass
class Pairs(Config):
    """Pairs of texts of a file (without one: the sentences and headlines from above)."""
    dropout: float = 0.1    # share of every sublayer's output set to 0 in training
    label_smoothing: float = 0.1  # share of the target's probability given to the vocabulary
    steps: int = 300        # optimizer steps
    pointer: bool = False   # copying of source tokens by a pointer
    unit: Literal["bpe", "words", "characters"] = "bpe"  # kind of token
    vocab_size: int = 4000  # maximum number of merges (bpe), else of tokens; the rest is <unk>
    lower: bool = False     # lower case for all characters
    context: int = 48       # maximum tokens with EOS: longer sources are cut, targets left out
    beam: int = 4           # beam width: partial outputs kept at each step
    length_penalty: float = 0.45  # exponent of the length that log-probabilities are divided by
    threads: int = 2        # micro-batches, each on a thread of its own
    data: str = ""          # UTF-8 file with lines source TAB target
    validation: str = ""    # such a file, for the loss in training (none: a tenth of the data)
    test: str = ""          # such a file, for the scores (none: the last tenth of the data)
    save: str = ""          # checkpoint file (.npz) to write at every line of progress
    load: str = ""          # checkpoint file to resume from, with its tokens


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


def read_pairs(path):
    """A file of lines source TAB target -> (source, target) of each line, a note on lines that are
    not like this.   Raises InputError."""
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    columns = [[text.strip() for text in line.split("\t")] for line in lines]
    pairs = [(line[0], line[1]) for line in columns if len(line) > 1 and line[0] and line[1]]
    require(len(pairs) >= 20, path, "20 lines or more of source TAB target", len(pairs))
    more = sum(len(line) > 2 for line in columns)
    note = f"; dropped: {len(lines) - len(pairs)} without TAB or a side" * (len(pairs) < len(lines))
    note += f"; only the first two columns are used, {more} lines have more" * (more > 0)
    return pairs, f"{path}: {len(lines)} lines{note}"


@functools.lru_cache
def load_texts(path, validation, test, unit, vocab_size, lower, context, checkpoint):
    """-> dict: train and validation, pairs of ids; test, pairs of texts; tokenize; ids, a dict of
    tokens; merges; note on all that is cut, left out or unknown.   Raises InputError."""
    texts, notes = {}, []
    for name, file in (("train", path), ("validation", validation), ("test", test)):
        if file:
            texts[name], note = read_pairs(file)
            notes.append(note)
    if not path:
        pairs = draw_headlines(np.random.default_rng(0), 1000, INVENTED)
        texts["train"] = [[" ".join(words) for words in pair] for pair in pairs]
    for name in ("test", "validation"):
        if name not in texts:
            cut = len(texts["train"]) - max(1, len(texts["train"]) // 10)
            texts["train"], texts[name] = texts["train"][:cut], texts["train"][cut:]
    if lower:
        texts = {name: [[text.lower() for text in pair] for pair in texts[name]] for name in texts}
    lines = [" " + text for pair in texts["train"] for text in pair]    # a first word like others
    saved = read_checkpoint(checkpoint)[0] if checkpoint else {}
    merges = [tuple(token.encode("latin-1") for token in pair) for pair in saved.get("merges", [])]
    if unit == "bpe" and not merges:
        pieces = Counter(piece for line in lines for piece in PIECES.findall(line))
        merges = find_merges(pieces, vocab_size)
    tokenize = make_tokenizer(unit, merges)
    counts = Counter(token for line in lines for token in tokenize(line))
    vocab = [token for token, _ in counts.most_common(vocab_size)]
    if unit == "bpe":
        vocab = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    vocab = [token.encode("latin-1") for token in saved.get("vocab", [])] or vocab
    ids = {token: i for i, token in enumerate(dict.fromkeys([*TOKENS[:4], *vocab]))}
    encoded = {}
    for name in ("train", "validation", "test"):
        pairs = [[tokenize(" " + text) for text in pair] for pair in texts[name]]
        fit = [pair for pair in pairs if len(pair[1]) < context]
        encoded[name] = [encode_pair(a[:context], b, ids) for a, b in fit]
        unknown = np.mean([token not in ids for a, _ in pairs for token in a])
        long = sum(len(a) > context for a, _ in pairs)
        notes.append(f"{name}: {len(pairs)} pairs; unknown: {unknown:.2%} of the source tokens\n"
                     f"  over {context} tokens: {long} sources, cut; {len(pairs) - len(fit)} "
                     f"targets{', left out' * (name != 'test')}")
        require(fit, "--context", f"one that some targets of {name} do not exceed", context)
    encoded["train"].sort(key=lambda pair: (len(pair[1]), len(pair[0])))
    return {**encoded, "test": texts["test"], "tokenize": tokenize, "ids": ids, "merges": merges,
            "note": "\n".join(notes)}


def texts_of(cfg):
    """load_texts of a configuration."""
    return load_texts(cfg.data, cfg.validation, cfg.test, cfg.unit, cfg.vocab_size, cfg.lower,
                      cfg.context, cfg.load)


def init_pairs(cfg, rng, dtype=np.float32):
    """-> the parameters of init_params, for the tokens of the file; without the pointer's."""
    params = init_params(cfg, rng, dtype, len(texts_of(cfg)["ids"]))
    return {name: w for name, w in params.items() if cfg.pointer or not name.startswith("copy.")}


def with_pointer(params):
    """The parameters, with zeros for the matrices of a pointer that is not used."""
    D, dtype = params["E"].shape[1], params["E"].dtype
    return {"copy.Wq": np.zeros((D, D), dtype), "copy.Wk": np.zeros((2 * D, D), dtype), **params}


def pairs_batch(cfg, step, dtype=np.float32):
    """Neighbours in the order of length, so that there is little padding.   -> padded_batch."""
    rng, pairs = np.random.default_rng((cfg.seed, step)), texts_of(cfg)["train"]
    start = rng.integers(max(1, len(pairs) - cfg.batch_size + 1))
    return padded_batch(pairs[start:start + cfg.batch_size], cfg, rng, dtype)


def pairs_loss_and_grads(params, batch, cfg):
    """loss_and_grads, with the pointer or without."""
    loss, grads = loss_and_grads(with_pointer(params), batch, cfg, cfg.pointer)
    return loss, {name: grads[name] for name in params}


def encode_texts(texts, cfg):
    """-> for every (source, target): ids of both, a list of the tokens that these ids stand for."""
    data, encoded = texts_of(cfg), []
    for pair in texts:
        source, target = (data["tokenize"](" " + text)[:cfg.context] for text in pair)
        tokens = list(dict.fromkeys([*data["ids"], *source]))       # numbered as by encode_pair
        tokens[:4] = b"", b"", b"", b" <unk>"
        encoded.append((*encode_pair(source, target, data["ids"]), tokens))
    return encoded


def loss_on(params, cfg, pairs):
    """Loss per token of pairs of ids, without dropout and label smoothing."""
    cfg, results = replace(cfg, dropout=0.0, label_smoothing=0.0), []
    pairs = sorted(pairs, key=lambda pair: len(pair[1]))
    for k in range(0, len(pairs), 50):
        batch = padded_batch(pairs[k:k + 50], cfg, np.random.default_rng(0), np.float32)
        results.append((pairs_loss_and_grads(params, batch, cfg)[0], (batch[2] != PAD).sum()))
    losses, counts = zip(*results)
    return float(np.average(losses, weights=counts))


def translate_texts(params, texts, cfg, beam, pool):
    """-> a text for each source of texts, mean log-probability; those of like length together."""
    encoded = encode_texts(texts, cfg)
    order = np.argsort([len(source) for source, *_ in encoded], kind="stable")
    parts = [order[k:k + 50] for k in range(0, len(order), 50)]
    sources = [pad([encoded[n][0] for n in part]) for part in parts]
    found = list(pool.map(lambda source: find_targets(params, source, cfg, beam), sources))
    outputs = [""] * len(texts)
    for part, (ids, _) in zip(parts, found):
        for n, row in zip(part, ids):
            output = b"".join(encoded[n][2][i] for i in row)
            outputs[n] = output.decode("utf-8", "replace").strip()
    return outputs, float(np.concatenate([log_p for _, log_p in found]).mean())


def run_pairs(cfg):
    """Train; translate the test greedily and by beam search, measure BLEU and ROUGE; draw a map."""
    start, data, state, losses = time.perf_counter(), texts_of(cfg), {}, []
    n = len(data["train"])
    require(cfg.threads <= n, "--threads", f"at most {n}, the pairs to learn from", cfg.threads)
    params = init_pairs(cfg, np.random.default_rng(cfg.seed))
    meta = dict(task="pairs", unit=cfg.unit, lower=cfg.lower, heads=cfg.heads, pointer=cfg.pointer,
                merges=[[token.decode("latin-1") for token in pair] for pair in data["merges"]],
                vocab=[token.decode("latin-1") for token in list(data["ids"])[4:]])
    if cfg.load:
        load_checkpoint(cfg.load, meta, params, state, losses)
    if cfg.save:
        save_checkpoint(cfg.save, meta, params, state, losses, dry_run=True)
    sources, references = zip(*data["test"])
    print(f"{data['note']}\n{cfg.layers} + {cfg.layers} layers, dim {cfg.dim}, lr {cfg.lr}, batch "
          f"size {cfg.batch_size}, {sum(w.size for w in params.values())} parameters")
    if cfg.unit == "bpe":
        print("A source, merge by merge (| stands between tokens):")
        ranks = {pair: k for k, pair in enumerate(data["merges"])}
        for tokens in merge_steps([bytes([b]) for b in sources[0][:16].encode()], ranks):
            print("    " + b"|".join(tokens).decode("utf-8", "replace"))
    print(f"chance level: loss {math.log(len(data['ids'])):.3f}")

    def note():
        if cfg.save:
            save_checkpoint(cfg.save, meta, params, state, losses)
        return f"  validation {loss_on(params, cfg, data['validation'][:200]):.3f}"

    quiet = functools.partial(np.seterr, over="ignore", invalid="ignore")       # as run does
    with ThreadPoolExecutor(cfg.threads, initializer=quiet) as pool:
        threaded = functools.partial(threaded_loss_and_grads, pairs_loss_and_grads, pool)
        train(params, cfg, pairs_batch, threaded, state, losses, note)
        metrics = {"validation_loss": loss_on(params, cfg, data["validation"])}
        check_finite(metrics["validation_loss"], params)
        found = {"first 12 words": ([" ".join(text.split()[:12]) for text in sources], "")}
        for beam in sorted({1, cfg.beam}):
            outputs, log_p = translate_texts(params, data["test"], cfg, beam, pool)
            found[f"beam {beam}"] = outputs, f"  mean log p {log_p:.2f}"
    print("\nThe test set: first words of the source as the target, greedy decoding, beam search")
    for name, (outputs, log_p) in found.items():
        metrics.update(bleu=bleu(outputs, references), **rouge(outputs, references))
        scores = "  ".join(f"{key} {metrics[key]:5.2f}" for key in list(metrics)[1:])
        print(f"    {name:14s}  {scores}{log_p}")
    for n in range(0, len(outputs), math.ceil(len(outputs) / 4)):
        for name, texts in (("source", sources), ("target", references), ("output", outputs)):
            print(f"    {name}  {texts[n][:300]}")
    (source, target, tokens), = encode_texts([(sources[0], outputs[0])], cfg)
    source, target = source[:24], [*target, EOS][:24]
    _, _, w = write(with_pointer(params), np.array([source]), np.array([[BOS, *target[:-1]]]), cfg,
                    cfg.pointer)
    rows, columns = ([tokens[i].decode("utf-8", "replace").strip() or "_" for i in row]
                     for row in (target, source))
    print("\nThe first of them: cross-attention, the largest of all heads. Rows: output; columns: "
          "source\n(_: a blank, or the end); shades: blank is 0, @ is 1")
    draw_map(w[0].max(axis=0), rows, columns)
    print("\nNext: python translation.py pairs --pointer      python mae.py")
    print_result("pairs", cfg, **metrics, params=sum(w.size for w in params.values()),
                 steps=len(losses), seconds=time.perf_counter() - start)


# ---- threads: micro-batches on several cores -----------------------------------------------------

def split_batch(batch, n):
    """n micro-batches, each with its share of the loss terms: the tokens of the targets."""
    total = (batch[1] != PAD).sum()
    parts = zip(*(np.array_split(array, n) for array in batch))
    return [(float((part[1] != PAD).sum() / total), part) for part in parts]


def threaded_loss_and_grads(loss_and_grads, pool, params, batch, cfg):
    """Every thread takes a micro-batch: NumPy releases the interpreter lock while it computes. The
    gradient of a mean is the mean of the gradients, weighted by the shares of the loss terms."""
    shares, parts = zip(*split_batch(batch, cfg.threads))
    results = list(pool.map(lambda part: loss_and_grads(params, part, cfg), parts))
    loss = sum(share * loss for share, (loss, _) in zip(shares, results))
    grads = {name: sum(share * g[name] for share, (_, g) in zip(shares, results))
             for name in params}
    return loss, grads


# ---- checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path, meta, params, state, losses, dry_run=False):
    """All that a training needs to go on, as a .npz file; dry_run: try it.   Raises InputError."""
    own = os.path.isfile(path) and zipfile.is_zipfile(path)
    own = own and "meta.npy" in zipfile.ZipFile(path).namelist() or not os.path.exists(path)
    require(own, f"--save {path}", "a new file or one of --save", "something else, which stays")
    check_finite(0.0, params)                           # never over a good one
    arrays = {f"params {k}": v for k, v in params.items()}
    arrays.update({f"state {k}": v for k, v in state.items()})
    beside = f"{path}.{os.getpid()}"                    # renamed when it is complete
    try:
        with open(beside, "wb") as file:
            np.savez(file, meta=json.dumps(meta), losses=losses, **arrays)
        os.replace(beside, beside if dry_run else path)
    except (OSError, ValueError) as error:
        raise InputError(f"--save {path}: expected a file to write, found: {error}") from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.remove(beside)                           # of a dry run, an error or Ctrl-C


def read_checkpoint(path):
    """A file of save_checkpoint -> meta, losses, arrays by name.   Raises InputError."""
    try:
        with zipfile.ZipFile(path), open(path, "rb") as file, np.load(file) as saved:
            arrays = dict(saved)
        meta, losses = json.loads(str(arrays.pop("meta"))), arrays.pop("losses").tolist()
        return dict(meta), list(losses), arrays
    except Exception as error:                          # there are many ways to be damaged
        raise InputError(f"--load {path}: expected a file of --save, found: {error}") from None


def load_checkpoint(path, meta, params, state, losses):
    """Fill params, state, losses from a file of save_checkpoint; meta and shapes must agree."""
    found, past, arrays = read_checkpoint(path)
    for name, value in meta.items():
        require(found.get(name) == value, f"--load {path}", f"{name} {value!r}", found.get(name))
    saved = {name[7:]: value for name, value in arrays.items() if name.startswith("params ")}
    for name in sorted(saved.keys() | params.keys()):
        old, new = (d[name].shape if name in d else "no such array" for d in (saved, params))
        require(old == new, f"--load {path}", f"{name} {new}", old)
    params.update(saved)
    state.update({name[6:]: value if value.ndim else value.item()
                  for name, value in arrays.items() if name.startswith("state ")})
    losses.extend(past)
    print(f"resuming {path} after {len(past)} steps")


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


def pairs_constraints(cfg):
    """What must hold between the values of a task: (ok, what, expected, found) for each."""
    yield cfg.dim / cfg.heads % 2 == 0, "--dim", f"an even multiple of --heads {cfg.heads}", cfg.dim
    yield cfg.dropout < 1, "--dropout", "below 1", cfg.dropout
    yield cfg.label_smoothing < 1, "--label-smoothing", "below 1", cfg.label_smoothing
    if isinstance(cfg, Pairs):
        yield cfg.context > 15, "--context", "16 or more", cfg.context
        most = f"at most --batch-size {cfg.batch_size}"
        yield cfg.threads <= cfg.batch_size, "--threads", most, cfg.threads
        read = [os.path.realpath(path) for path in (cfg.data, cfg.validation, cfg.test) if path]
        yield os.path.realpath(cfg.save) not in read, "--save", "a file other than --data", cfg.save


def operation_cases(rng):
    """Inputs of operations of this file, for gradcheck.py: B 6, T 5, D 12, H 3, d 4."""
    x, memory = rng.standard_normal((2, 30, 12))
    params = init_params(Config(dim=12), rng, float)
    p, mlp = ({name: w for name, w in part(params, at).items() if name[0] == "W"}
              for at in ("dec0.cross.", "dec0.mlp."))
    mask = np.tri(5, dtype=bool) | (rng.random((6, 1, 5, 5)) < 0.3)
    right = np.eye(30, 12, -9, dtype=bool) | (rng.random((30, 12)) < 0.6)
    return {"rotary_multihead": dict(x=x, p=p, memory=memory, heads=3, B=6, mask=mask,
                                     t=np.arange(5)[:, None]),
            "swiglu_mlp": dict(x=x[:7], p=mlp),
            "pointer": dict(x=x, p=part(params, "copy."), memory=memory, B=6),
            "copy_cross_entropy": dict(z=x, right=right, V=5, label_smoothing=0.3)}


GRADCHECK = {name: lambda rng, name=name: operation_cases(rng)[name] for name in (
    "rotary_multihead", "swiglu_mlp", "pointer", "copy_cross_entropy")}

TASKS = {"headlines": Task(Config, init_params, make_batch, loss_and_grads, main),
         "pairs": Task(Pairs, init_pairs, pairs_batch, pairs_loss_and_grads, run_pairs)}
CONSTRAINTS = {Config: pairs_constraints, Pairs: pairs_constraints}

if __name__ == "__main__":
    run(TASKS)
