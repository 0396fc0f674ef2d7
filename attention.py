"""attention.py: a decoder that chooses what to read.

An encoder that hands over its last state must fit a sentence of any length into this one state
(seq2seq.py shows where this fails). With attention the decoder has the encoder's states of all
positions, the values. For every output each position gets a score from its key v_s Wk and the
decoder's query h_t Wq; a softmax turns the scores into weights, and the decoder reads the weighted
mean of the values, the context. All of it is learned.

Forward, for decoder states h_t and values v_s = [LSTM from the left, LSTM from the right]:
    m_ts = tanh(h_t Wq + v_s Wk)    e_ts = u . m_ts    w_t = softmax_s(e_ts), 0 at padding
    context_t = sum_s w_ts v_s      a_t = tanh([h_t, context_t] Wa + ba)      logits_t = a_t Wo + bo
Backward (the LSTM: lstm.py), from [dh_t, dcontext_t] = da_t (1 - a_t^2) Wa^T:
    dw_ts = dcontext_t . v_s        de_ts = w_ts (dw_ts - sum_r w_tr dw_tr)   (softmax Jacobian)
    du = sum_ts de_ts m_ts          dn_ts = de_ts u (1 - m_ts^2)              (before the tanh)
    dWq = sum_ts h_t^T dn_ts        dh_t += sum_s dn_ts Wq^T
    dWk = sum_ts v_s^T dn_ts        dv_s = sum_t dn_ts Wk^T, and sum_t w_ts dcontext_t

The weights show what an output depends on only if the context is the decoder's one way to the
source, and if they are sharp. So the decoder's state starts at zero, not at the encoder's last one.
And the first scores are large: a blurred mean can be decoded, too, so the loss alone does not ask
for sharp weights.

Run    python attention.py      (reverse up to 10 letters; --help lists the other tasks)
Papers: Bahdanau et al. 2015, Luong et al. 2015 (a_t), Schuster and Paliwal 1997 (two directions).
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
    """Read 2 to 10 letters, write them in reverse order."""
    length: int = 10        # most letters
    embed_dim: int = 32     # embedding dimension
    hidden: int = 128       # hidden units, even: each direction of the encoder has half
    score_init_scale: float = 8.0  # factor of the first Wq, Wk and u
    batch_size: int = 32    # sequences per step
    steps: int = 600        # optimizer steps
    lr: float = 0.01        # peak learning rate
    warmup: int = 50        # steps of linear warmup
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    seed: int = 0           # random seed


# ---- layers: N sequences, S source and T target positions, D inputs, H hidden units, V tokens ----
# (a projection has M outputs; in an attention keys have A numbers and values C)

def project_forward(x, W):
    """y = x W at every position, in one product.   x (N, T, D), W (D, M) -> y (N, T, M)."""
    N, T, D = x.shape
    return (x.reshape(N * T, D) @ W).reshape(N, T, -1), (x, W)


def project_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, a sum over all n and t."""
    x, W = cache
    flat = dout.reshape(-1, W.shape[1])                     # (N T, M)
    return (flat @ W.T).reshape(x.shape), x.reshape(-1, len(W)).T @ flat


def embedding_forward(ids, E):
    """Row ids of E.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """Row v of dE is the sum of dout over all positions whose id is v."""
    ids, shape = cache
    onehot = (ids.reshape(-1, 1) == np.arange(shape[0])).astype(dout.dtype)     # (positions, V)
    dE = onehot.T @ dout.reshape(len(onehot), -1)       # E[ids] is onehot @ E, a linear layer
    return dE.reshape(shape)


def sigmoid(z):
    """1 / (1 + e^-z), computed as (1 + tanh(z / 2)) / 2, which cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def lstm_forward(z, h0, c0, Wh):
    """c' = f c + i g, h' = o tanh(c'), as derived in lstm.py; i, f, g, o: four blocks of H columns.
    z = x Wx + b (T, N, 4 H), h0, c0 (N, H), Wh (H, 4 H) -> every h (T, N, H), the last c (N, H)."""
    N, H = h0.shape
    h, c, gates = [h0], [c0], []
    for t in range(len(z)):
        a = (z[t] + h[t] @ Wh).reshape(N, 4, H)
        i, f, g, o = sigmoid(a[:, 0]), sigmoid(a[:, 1]), np.tanh(a[:, 2]), sigmoid(a[:, 3])
        c.append(f * c[t] + i * g)
        h.append(o * np.tanh(c[t + 1]))
        gates.append((i, f, g, o))
    h, c, gates = np.array(h), np.array(c), np.array(gates)
    return (h[1:], c[-1]), (h, c, gates, Wh)


def lstm_backward(dh_out, dc, cache):
    """From the last step to the first, as derived in lstm.py.   dh_out (T, N, H), dc (N, H) of the
    last c -> dz (T, N, 4 H), dh0, dc0, dWh."""
    h, c, gates, Wh = cache
    i, f, g, o = gates.swapaxes(0, 1)                       # (T, N, H) each
    tanh_c = np.tanh(c[1:])                                 # factors, for all steps at once:
    di, df = g * i * (1 - i), c[:-1] * f * (1 - f)          # dz_i = dc di, dz_f = dc df,
    dg, do = i * (1 - g ** 2), tanh_c * o * (1 - o)         # dz_g = dc dg, dz_o = dh do,
    to_c = o * (1 - tanh_c ** 2)                            # dc += dh to_c
    T, N, H = dh_out.shape
    dz = np.zeros((T, N, 4 * H), dh_out.dtype)
    dh, WhT = 0, Wh.T.copy()                                # contiguous: faster in the loop
    for t in reversed(range(T)):
        dh = dh + dh_out[t]                                 # from the step after, and from above
        dc = dc + dh * to_c[t]
        dz[t] = np.concatenate([dc * di[t], dc * df[t], dc * dg[t], dh * do[t]], axis=1)
        dh = dz[t] @ WhT
        dc = dc * f[t]
    dWh = h[:-1].reshape(T * N, H).T @ dz.reshape(T * N, 4 * H)
    return dz, dh, dc, dWh


def masked_softmax_forward(scores, mask):
    """w = e^score / sum e^score over the positions s where mask is True; 0 elsewhere.
    scores (N, T, S), mask (N, S) -> w (N, T, S)."""
    scores = np.where(mask[:, None], scores, -1e9)          # mask[:, None] (N, 1, S)
    w = np.exp(scores - scores.max(axis=2, keepdims=True))
    w /= w.sum(axis=2, keepdims=True)
    return w, w                                             # all that backward needs


def masked_softmax_backward(dout, cache):
    """dscores = w (dout - sum_s w dout): one weight can only grow at the cost of the others."""
    w = cache
    return w * (dout - (w * dout).sum(axis=2, keepdims=True))


def additive_attention_forward(h, k, values, mask, p):
    """The formulas above; keys k = values Wk.   h (N, T, H), k (N, S, A), values (N, S, C), mask
    (N, S), p: Wq (H, A), u (A,) -> context (N, T, C); the cache begins with w (N, T, S)."""
    q, project = project_forward(h, p["Wq"])                # (N, T, A)
    m = np.tanh(q[:, :, None] + k[:, None])                 # (N, T, S, A)
    w, softmax = masked_softmax_forward(m @ p["u"], mask)   # (N, T, S)
    return w @ values, (w, softmax, m, project, values, p["u"])


def additive_attention_backward(dout, cache):
    """-> dh, dk, dvalues (of the means; keys add theirs), gradients under the keys of p."""
    w, softmax, m, project, values, u = cache
    dscores = masked_softmax_backward(dout @ values.swapaxes(1, 2), softmax)    # (N, T, S)
    dn = dscores[..., None] * u * (1 - m ** 2)              # (N, T, S, A)
    dk = dn.sum(axis=1)                                     # k_s meets all q_t,
    dh, dWq = project_backward(dn.sum(axis=2), project)     # and q_t all k_s
    du = dscores.ravel() @ m.reshape(-1, len(u))            # (N T S) @ (N T S, A)
    return dh, dk, w.swapaxes(1, 2) @ dout, {"Wq": dWq, "u": du}


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

VOCAB = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]
PAD, BOS, EOS = 0, 1, 2     # padding, beginning and end of a sequence


def pad(sequences):
    """Lists of ids -> ids (N, longest), each followed by PAD."""
    ids = np.full((len(sequences), max(map(len, sequences))), PAD)
    for row, sequence in zip(ids, sequences):
        row[:len(sequence)] = sequence
    return ids


def make_batch(cfg, step, dtype=np.float32):
    """-> source (N, S): ids of letters between BOS and EOS; target (N, T): the letters in reverse
    order and EOS; positions (N, T): where each stands in the source, 0 for EOS and padding."""
    rng = np.random.default_rng((cfg.seed, step))
    lengths = rng.integers(2, cfg.length + 1, cfg.batch_size)
    letters = [rng.integers(3, len(VOCAB), n) for n in lengths]
    source = pad([[BOS, *ids, EOS] for ids in letters])
    target = pad([[*ids[::-1], EOS] for ids in letters])
    return source, target, pad([range(n, -1, -1) for n in lengths])


# ---- model: two LSTMs read the source, a third writes the target ---------------------------------

def init_params(cfg, rng, dtype=np.float32, source_size=len(VOCAB), target_size=len(VOCAB)):
    """E_source, E_target; Wx, Wh, b of "fore.", "back.", "decoder.", and its Wq, Wk, u, Wa, ba; Wo,
    bo. The variance of W (n, m) is 1 / n; Wq, Wk, u are score_init_scale times larger."""
    H, D = cfg.hidden, cfg.embed_dim
    shapes = {"decoder.Wq": (H, H), "decoder.Wk": (H, H), "decoder.u": (H,),
              "decoder.Wa": (2 * H, H), "Wo": (H, target_size)}
    params = {"E_source": 0.5 * rng.standard_normal((source_size, D)),
              "E_target": 0.5 * rng.standard_normal((target_size, D)),
              "decoder.ba": np.zeros(H), "bo": np.zeros(target_size)}
    for name, h in (("fore", H // 2), ("back", H // 2), ("decoder", H)):
        shapes.update({f"{name}.Wx": (D, 4 * h), f"{name}.Wh": (h, 4 * h)})
        params[f"{name}.b"] = np.repeat([0.0, 1.0, 0.0, 0.0], h)        # forget gates begin open
    for name, shape in shapes.items():
        params[name] = rng.standard_normal(shape) * shape[0] ** -0.5
    for name in ("Wq", "Wk", "u"):
        params[f"decoder.{name}"] *= cfg.score_init_scale
    return {name: value.astype(dtype) for name, value in params.items()}


def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


def lstm_layer_forward(x, state, p):
    """x (N, T, D), state (2, N, H): h and c before, p: Wx, Wh, b -> h (N, T, H), state after."""
    z, project = project_forward(x, p["Wx"])                # (N, T, 4 H)
    (h, c), lstm = lstm_forward((z + p["b"]).swapaxes(0, 1), *state, p["Wh"])
    return (h.swapaxes(0, 1), np.stack([h[-1], c])), (project, lstm)


def lstm_layer_backward(dh, dstate, cache):
    """-> dx, dstate before, gradients under the keys of p."""
    project, lstm = cache
    dh = dh.swapaxes(0, 1).copy()
    dh[-1] += dstate[0]                                     # the last h is in h and in state
    dz, dh0, dc0, dWh = lstm_backward(dh, dstate[1], lstm)
    dx, dWx = project_backward(dz.swapaxes(0, 1), project)
    return dx, np.stack([dh0, dc0]), {"Wx": dWx, "Wh": dWh, "b": dz.sum(axis=(0, 1))}


def bilstm_encoder_forward(params, source):
    """source (N, S) -> values (N, S, H): at each position the state of the LSTM from the left and
    that of the LSTM from the right. Either LSTM reads padding after all tokens."""
    s = np.arange(source.shape[1])
    n = (source != PAD).sum(axis=1, keepdims=True)          # (N, 1)
    order = np.where(s < n, n - 1 - s, s)[:, :, None]       # reverses tokens; undoes itself
    x, embed = embedding_forward(source, params["E_source"])            # (N, S, D)
    zeros = np.zeros((2, len(x), len(params["fore.Wh"])), x.dtype)
    (fore, _), fore_cache = lstm_layer_forward(x, zeros, part(params, "fore."))
    x = np.take_along_axis(x, order, axis=1)
    (back, _), back_cache = lstm_layer_forward(x, zeros, part(params, "back."))
    back = np.take_along_axis(back, order, axis=1)
    return np.concatenate([fore, back], axis=2), (embed, order, zeros, fore_cache, back_cache)


def bilstm_encoder_backward(dvalues, cache):
    """bilstm_encoder_forward in reverse order -> gradients under the keys of params."""
    embed, order, zeros, fore_cache, back_cache = cache
    dfore, dback = np.split(dvalues, 2, axis=2)
    dback = np.take_along_axis(dback, order, axis=1)
    dx_back, _, back = lstm_layer_backward(dback, zeros, back_cache)
    dx_fore, _, fore = lstm_layer_backward(dfore, zeros, fore_cache)
    dx = dx_fore + np.take_along_axis(dx_back, order, axis=1)
    grads = {f"fore.{name}": g for name, g in fore.items()}
    grads.update({f"back.{name}": g for name, g in back.items()})
    return {**grads, "E_source": embedding_backward(dx, embed)}


def attention_decoder_forward(x, state, values, mask, p, attend=additive_attention_forward,
                              keys=project_forward):
    """x (N, T, D), state (2, N, H), values (N, S, H), mask (N, S) -> a (N, T, H), state after; the
    cache begins with w (N, T, S)."""
    k, project = keys(values, p["Wk"])                      # (N, S, A)
    (h, state), lstm = lstm_layer_forward(x, state, p)
    context, attention = attend(h, k, values, mask, p)
    joined = np.concatenate([h, context], axis=2)           # (N, T, 2 H)
    a, join = project_forward(joined, p["Wa"])
    a = np.tanh(a + p["ba"])
    w, *_ = attention
    return (a, state), (w, project, lstm, attention, join, a)


def attention_decoder_backward(da, dstate, cache, attend_backward=additive_attention_backward,
                               keys_backward=project_backward):
    """In reverse order.   -> dx, dstate before, dvalues, gradients by name."""
    _, project, lstm, attention, join, a = cache
    da = da * (1 - a ** 2)
    djoined, dWa = project_backward(da, join)
    dh, dcontext = np.split(djoined, 2, axis=2)
    dq, dk, dvalues, grads = attend_backward(dcontext, attention)
    dv, grads["Wk"] = keys_backward(dk, project)
    dx, dstate, lstm_grads = lstm_layer_backward(dh + dq, dstate, lstm)
    grads.update(lstm_grads, Wa=dWa, ba=da.sum(axis=(0, 1)))
    return dx, dstate, dvalues + dv, grads


def translator_forward(params, source, target, decode=attention_decoder_forward):
    """-> logits (count, V) of the tokens of target, without padding, each given those before it."""
    values, encoder = bilstm_encoder_forward(params, source)
    inputs = np.insert(target[:, :-1], 0, BOS, axis=1)
    x, embed = embedding_forward(inputs, params["E_target"])            # (N, T, D)
    zeros = np.zeros((2, *values[:, 0].shape), x.dtype)
    (a, _), decoder = decode(x, zeros, values, source != PAD, part(params, "decoder."))
    real = target != PAD
    logits = a[real] @ params["Wo"] + params["bo"]          # (count, V)
    w, *_ = decoder
    return logits, (w, encoder, embed, decoder, a, real, params)


def translator_backward(dlogits, cache, decode_backward=attention_decoder_backward):
    """translator_forward in reverse order -> gradients under the keys of params."""
    _, encoder, embed, decoder, a, real, params = cache
    da = np.zeros_like(a)
    da[real] = dlogits @ params["Wo"].T
    zeros = np.zeros((2, *a[:, 0].shape), a.dtype)          # nothing reads the last state
    dx, _, dvalues, g = decode_backward(da, zeros, decoder)
    grads = {f"decoder.{name}": value for name, value in g.items()}
    grads.update(E_target=embedding_backward(dx, embed), Wo=a[real].T @ dlogits,
                 bo=dlogits.sum(axis=0))
    return {**grads, **bilstm_encoder_backward(dvalues, encoder)}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    source, target, _ = batch
    logits, cache = translator_forward(params, source, target)
    loss, loss_cache = softmax_cross_entropy_forward(logits, target[target != PAD])
    return loss, translator_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)


# ---- training and demo ---------------------------------------------------------------------------

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


def greedy_decode(params, source, T, decode=attention_decoder_forward):
    """source (N, S) -> ids (N, T): every token is the likeliest one after those before it."""
    values, _ = bilstm_encoder_forward(params, source)
    state = np.zeros((2, *values[:, 0].shape), values.dtype)
    ids = [np.full(len(source), BOS)]
    for _ in range(T):
        x = params["E_target"][ids[-1][:, None]]            # (N, 1, D)
        (a, state), _ = decode(x, state, values, source != PAD, part(params, "decoder."))
        ids.append((a[:, 0] @ params["Wo"] + params["bo"]).argmax(axis=1))
    return np.stack(ids[1:], axis=1)


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


def main(cfg, task="reverse", init_params=init_params, make_batch=make_batch,
         loss_and_grads=loss_and_grads, decode=attention_decoder_forward):
    """Train, measure on fresh sequences, draw a map. Later parts pass their own functions."""
    start, params = time.perf_counter(), init_params(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"{task} 2 to {cfg.length} letters: hidden {cfg.hidden}, lr {cfg.lr}, batch size "
          f"{cfg.batch_size}, {size} parameters\nchance level: loss {math.log(27):.3f}")
    losses = train(params, cfg, make_batch, loss_and_grads)
    source, target, positions = make_batch(replace(cfg, batch_size=1000), cfg.steps + 1)
    written = greedy_decode(params, source, target.shape[1], decode)
    exact = float(((written == target) | (target == PAD)).all(axis=1).mean())
    _, (w, *_) = translator_forward(params, source, target, decode)
    check_finite(w.sum(), params)
    on_letter = np.take_along_axis(w, positions[:, :, None], axis=2)[:, :, 0]
    alignment = float(on_letter[positions > 0].mean())
    print(f"exact match: {exact:.2%} of 1000 fresh sequences are written without a mistake\n"
          f"alignment: {alignment:.2%} of the attention is on the letter that is written\n\n"
          "Attention weights. Columns: what is read; rows: what is written; blank is 0, @ is 1")
    row = (target != PAD).sum(axis=1).argmax()              # a longest sequence: no padding
    draw_map(w[row], [VOCAB[i] for i in target[row]], [VOCAB[i] for i in source[row]])
    print("\nNext: python attention.py lengths      python attention.py dates")
    print_result(task, cfg, exact=exact, alignment=alignment, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: scores, input feeding, no attention, dates, pairs of a file. =========

MORE = """
Break it (what to change, and what comes of it; exact match and alignment of the default run are
100 % and 99 %)
    python attention.py --score-init-scale 1    100 %, 93 %: blurred means are read as well
    bilstm_encoder_forward: back = 0 * back     88 %, 1 %: positions must be counted from the end,
                                                which an LSTM from the left cannot do
    attention_decoder_forward: [h, 0 * context] 0 %: only the context depends on the source
    attention_decoder_backward: dh for dh + dq  99.5 %, 95 %: wrong, and it learns all the same
    masked_softmax_backward: return w * dout    2 %, 14 %; with --seed 1 and 2 100 %, 80 and 86 %:
                                                so check gradients, and not only the loss
    python attention.py reverse --score dot --score-init-scale 1        100 %, 96 %

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. Derive and add the score of Luong et al. 2015 that they call location: w = softmax(h_t W),
       one column per position of the source, 64 of them. It is DOT with keys that do not depend on
       the values: W (H, 64) is `Wk`, and a pair keys_forward, _backward replaces PROJECT. Add it to
       SCORES, to init_model (drawn by a rng of its own) and to the Literal of --score.
    2. Start the decoder from the encoder's last state. What becomes of the alignment?
    3. python attention.py lengths: why do 11 letters go wrong, though attention could reach them?
       Does input feeding help? lengths has no flag for it: use decoder_of(Reverse(...)).

Data
    pairs: a file with lines source TAB target, any languages. Multi30k, German to English:
        for l in de en; do
        curl -O https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/train.$l.gz
        gunzip -f train.$l.gz; done; paste train.de train.en > train.tsv
    python attention.py pairs --data train.tsv         2.97 nats per word

Papers of these parts: Cho et al. 2014 (no attention), Luong et al. 2015 (scores, input feeding).
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import inspect
import re
import struct
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- dot and general scores: python attention.py reverse --score dot -----------------------------
# Products in place of a small net per pair of positions (Luong et al. 2015). General: the keys are
# the values times a matrix. Dot: the keys are the values, here times a learned number s: states of
# an LSTM are small at first, so without s all scores would be nearly equal.

def dot_attention_forward(h, k, values, mask, p):
    """The score is h_t . k_s.   h (N, T, H), keys k (N, S, H), values (N, S, C), mask (N, S)
    -> context (N, T, C); the cache begins with w (N, T, S)."""
    w, softmax = masked_softmax_forward(h @ k.swapaxes(1, 2), mask)
    return w @ values, (w, softmax, h, k, values)


def dot_attention_backward(dout, cache):
    """-> dh, dk, dvalues, no gradients of parameters."""
    w, softmax, h, k, values = cache
    dscores = masked_softmax_backward(dout @ values.swapaxes(1, 2), softmax)
    return dscores @ k, dscores.swapaxes(1, 2) @ h, w.swapaxes(1, 2) @ dout, {}


def scale_forward(x, s):
    """y = s x, s a number that is learned.   x (N, T, D), s (1,) -> (N, T, D)."""
    return x * s, (x, s)


def scale_backward(dout, cache):
    """dx = s dout, ds = sum dout x."""
    x, s = cache
    return dout * s, (dout * x).sum().reshape(1)


ADDITIVE = additive_attention_forward, additive_attention_backward
DOT = dot_attention_forward, dot_attention_backward
PROJECT = project_forward, project_backward     # of values to keys
SCORES = {"additive": (ADDITIVE, PROJECT), "dot": (DOT, (scale_forward, scale_backward)),
          "general": (DOT, PROJECT)}


# ---- input feeding: python attention.py reverse --input-feeding ----------------------------------
# The spine's decoder reads nothing of what it attended to before. Here the LSTM reads the a of the
# step before together with x, so the steps follow one another, and attention is part of the loop.

def feeding_decoder_forward(x, state, values, mask, p, attend=additive_attention_forward,
                            keys=project_forward):
    """The spine's decoder, a step at a time, on [x_t, a_{t-1}] (Luong et al. 2015).   x (N, T, D),
    state (2, N, H): h and c, a being 0, or (3, N, H): h, c and a -> a (N, T, H), state after."""
    k, project = keys(values, p["Wk"])                      # once for all steps

    def same_keys(values, Wk):
        return k, None
    state, a = state[:2], state[2] if len(state) == 3 else np.zeros_like(state[0])
    outputs, caches = [], []
    for t in range(x.shape[1]):
        fed = np.concatenate([x[:, t], a], axis=1)          # (N, D + H)
        (a, state), cache = attention_decoder_forward(fed[:, None], state, values, mask, p, attend,
                                                      same_keys)
        a = a[:, 0]
        outputs.append(a)
        caches.append(cache)
    w = np.concatenate([w for w, *_ in caches], axis=1)
    return (np.stack(outputs, axis=1), np.stack([*state, a])), (w, project, caches)


def feeding_decoder_backward(dout, dstate, cache, attend_backward=additive_attention_backward,
                             keys_backward=project_backward):
    """From the last step to the first.   -> dx, dstate before, dvalues, gradients by name."""
    (_, project, caches), H = cache, dout.shape[2]
    da, dx, dks, dvalues, grads = np.zeros_like(dout[:, 0]), [], [], 0, {}

    def collect(dk, _):
        dks.append(dk)
        return 0, 0                                         # dvalues and dWk come after the loop
    for t in reversed(range(len(caches))):
        da = da + dout[:, t]                                # from the step after, and from above
        da = da[:, None]
        dfed, dstate, dv, g = attention_decoder_backward(da, dstate, caches[t], attend_backward,
                                                         collect)
        dx_t, da = np.split(dfed[:, 0], [-H], axis=1)
        dx.insert(0, dx_t)
        dvalues = dvalues + dv
        grads = {name: grads.get(name, 0) + g[name] for name in g}
    dv, grads["Wk"] = keys_backward(sum(dks), project)
    return np.stack(dx, axis=1), dstate, dvalues + dv, grads


DECODERS = {False: (attention_decoder_forward, attention_decoder_backward),
            True: (feeding_decoder_forward, feeding_decoder_backward)}


@dataclass
class Reverse(Config):
    """Write up to 10 letters in reverse order."""
    score: Literal["additive", "dot", "general"] = "additive"  # score of a position
    input_feeding: bool = False  # the decoder reads its last a as well


@dataclass
class Copy(Reverse):
    """Write up to 10 letters in the same order."""


def decoder_of(cfg):
    """-> forward and backward of the decoder that cfg describes."""
    (attend, attend_backward), (keys, keys_backward) = SCORES[cfg.score]
    decode, decode_backward = DECODERS[cfg.input_feeding]
    return (functools.partial(decode, attend=attend, keys=keys),
            functools.partial(decode_backward, attend_backward=attend_backward,
                              keys_backward=keys_backward))


def init_model(cfg, rng, dtype=np.float32, source_size=len(VOCAB), target_size=len(VOCAB)):
    """init_params; with the weights of another score; with rows of decoder.Wx for a."""
    params, H = init_params(cfg, rng, np.float64, source_size, target_size), cfg.hidden
    weights = {"additive": {name: params.pop(f"decoder.{name}") for name in ("Wq", "Wk", "u")},
               "dot": {"Wk": np.array([cfg.score_init_scale])},
               "general": {"Wk": rng.standard_normal((H, H)) * cfg.score_init_scale * H ** -0.5}}
    params.update({f"decoder.{name}": w for name, w in weights[cfg.score].items()})
    if cfg.input_feeding:
        rows = rng.standard_normal((H, 4 * H)) * H ** -0.5
        params["decoder.Wx"] = np.concatenate([params["decoder.Wx"], rows])
    return {name: value.astype(dtype) for name, value in params.items()}


def model_loss_and_grads(params, batch, cfg):
    """loss_and_grads, with the score and the decoder of cfg."""
    source, target, *_ = batch
    decode, decode_backward = decoder_of(cfg)
    logits, cache = translator_forward(params, source, target, decode)
    loss, loss_cache = softmax_cross_entropy_forward(logits, target[target != PAD])
    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    return loss, translator_backward(dlogits, cache, decode_backward)


def run_reverse(cfg):
    """The spine's program, with the score and the decoder of cfg."""
    decode, _ = decoder_of(cfg)
    main(cfg, "reverse", init_model, make_batch, model_loss_and_grads, decode)


def copy_batch(cfg, step, dtype=np.float32):
    """-> source, target: the letters of the source and EOS; positions."""
    source, _, _ = make_batch(cfg, step)
    target = source[:, 1:]                                  # without BOS
    positions = np.arange(1, source.shape[1])
    return source, target, np.where(target > EOS, positions, 0)


def run_copy(cfg):
    """The same for copies."""
    decode, _ = decoder_of(cfg)
    main(cfg, "copy", init_model, copy_batch, model_loss_and_grads, decode)


# ---- no attention, and longer sequences: python attention.py lengths -----------------------------

def bottleneck_decoder_forward(x, state, values, mask, p):
    """An LSTM that reads the same summary of the source at every step: the last state of the LSTM
    from the left and that of the LSTM from the right (Cho et al. 2014).   -> h, state after."""
    rows, last = np.arange(len(x)), mask.sum(axis=1) - 1
    fore, back = np.split(values, 2, axis=2)
    summary = np.concatenate([fore[rows, last], back[:, 0]], axis=1)    # (N, H)
    summary = np.repeat(summary[:, None], x.shape[1], axis=1)           # (N, T, H)
    out, lstm = lstm_layer_forward(np.concatenate([x, summary], axis=2), state, p)
    return out, (None, lstm, rows, last, values.shape)


def bottleneck_decoder_backward(dh, dstate, cache):
    """bottleneck_decoder_forward in reverse order.   -> dx, dstate before, dvalues, gradients."""
    _, lstm, rows, last, shape = cache
    dx, dstate, grads = lstm_layer_backward(dh, dstate, lstm)
    dx, dsummary = np.split(dx, [-shape[2]], axis=2)
    dfore, dback = np.split(dsummary.sum(axis=1), 2, axis=1)
    dvalues = np.zeros(shape, dh.dtype)
    dvalues[rows, last, :shape[2] // 2] = dfore
    dvalues[:, 0, shape[2] // 2:] = dback
    return dx, dstate, dvalues, grads


@dataclass
class Lengths(Config):
    """Reverse with and without attention: exact match by length."""


def init_bottleneck(cfg, rng, dtype=np.float32):
    """init_params without attention; decoder.Wx has rows for the summary."""
    params, H = init_params(cfg, rng, np.float64), cfg.hidden
    for name in ("Wq", "Wk", "u", "Wa", "ba"):
        del params[f"decoder.{name}"]
    rows = rng.standard_normal((H, 4 * H)) * H ** -0.5
    params["decoder.Wx"] = np.concatenate([params["decoder.Wx"], rows])
    return {name: value.astype(dtype) for name, value in params.items()}


def bottleneck_loss_and_grads(params, batch, cfg):
    """loss_and_grads without attention."""
    source, target, _ = batch
    logits, cache = translator_forward(params, source, target, bottleneck_decoder_forward)
    loss, loss_cache = softmax_cross_entropy_forward(logits, target[target != PAD])
    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    return loss, translator_backward(dlogits, cache, bottleneck_decoder_backward)


def padding_change(params, batch):
    """The largest change of a logit when five columns of padding are added, and the embedding of
    padding is another one; the largest weight on padding."""
    source, target, _ = batch
    logits, _ = translator_forward(params, source, target)
    longer = np.pad(source, ((0, 0), (0, 5)), constant_values=PAD)
    other = {**params, "E_source": params["E_source"].copy()}
    other["E_source"][PAD] += 1
    changed, (w, *_) = translator_forward(other, longer, target)
    on_padding = np.where(longer[:, None] == PAD, w, 0).max()
    return float(np.abs(changed - logits).max()), float(on_padding)


def run_lengths(cfg):
    """Train both; exact match at lengths inside and beyond those of the training."""
    start, rows, metrics = time.perf_counter(), [], {}
    models = (("attention", init_params, loss_and_grads, attention_decoder_forward),
              ("none", init_bottleneck, bottleneck_loss_and_grads, bottleneck_decoder_forward))
    last = cfg.length + 8
    fresh = make_batch(replace(cfg, length=last, batch_size=60 * last), cfg.steps + 1)
    source, target, _ = fresh
    n = (target > EOS).sum(axis=1)
    lengths = np.unique([2, cfg.length // 2, cfg.length - 2, cfg.length, cfg.length + 1,
                         cfg.length + 2, cfg.length + 4, last])
    lengths = lengths[lengths >= 2]
    for name, init, gradients, decode in models:
        params = init(cfg, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"\nReverse 2 to {cfg.length} letters, attention {name}: hidden {cfg.hidden}, {size} "
              f"parameters\nchance level: loss {math.log(27):.3f}")
        losses = train(params, cfg, make_batch, gradients)
        written = greedy_decode(params, source, target.shape[1], decode)
        right = ((written == target) | (target == PAD)).all(axis=1)
        metrics[f"{name}_exact"] = float(right[n <= cfg.length].mean())
        check_finite(metrics[f"{name}_exact"], params)
        rows.append((name, [100 * right[n == length].mean() for length in lengths]))
        if name == "attention":
            change, on_padding = padding_change(params, [array[:100] for array in fresh])
        if len(losses) < cfg.steps:                         # Ctrl-C
            break
    print("\nExact match (%) by number of letters; right of the bar: more than in training")
    bar = int((lengths <= cfg.length).sum())
    for name, cells in (("letters", lengths), *rows):
        cells = [f"{x:7.3g}" for x in cells]
        print(f"{name:>10s} {''.join(cells[:bar])}  |{''.join(cells[bar:])}")
    print(f"\nFive more columns of padding, with another embedding, change logits by {change:.0e} "
          f"at most;\nthe largest weight on padding is {on_padding}")
    print("\nNext: python attention.py dates      python attention.py reverse --input-feeding")
    print_result("lengths", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- dates in 17 spellings: python attention.py dates --------------------------------------------

MONTHS = ("January February March April May June July August September October November "
          "December").split()
WEEKDAYS = "Mon Tue Wed Thu Fri Sat Sun".split()
SPELLINGS = (                           # slashes: the month before the day; dots: the day first
    "{d} {month} {year}", "{month} {d}, {year}", "{dd} {mon} {year}", "{nth} of {month} {year}",
    "{mon} {nth}, {year}", "{weekday}, {d} {month} {year}", "{weekday} {mon} {d} {year}",
    "{year}, {month} {d}", "{dd}{MON}{year}", "{MON} {dd} '{yy}", "{d}-{mon}-{yy}",
    "{year}/{mm}/{dd}", "{mm}/{dd}/{year}", "{m}/{d}/{yy}", "{dd}.{mm}.{year}", "{d}.{m}.{yy}",
    "{year}{mm}{dd}")
SPELLED = [*VOCAB[:3], *sorted({*"".join([*MONTHS, *WEEKDAYS, *map(str.upper, MONTHS)]),
                                *"stndrdthof0123456789 ,./-'"})]
ISO = [*VOCAB[:3], *"-0123456789"]
ISO_PARTS = ["year"] * 4 + [""] + ["month"] * 2 + [""] + ["day"] * 2   # of each character
FIRST_DAY = datetime.date(1950, 1, 1).toordinal()           # '50 stands for 1950,
DAYS = 36525                                                # '49 for 2049


@dataclass
class Dates:
    """Dates in 17 spellings, to be written as 2004-02-29."""
    embed_dim: int = 32     # embedding dimension
    hidden: int = 128       # hidden units, even: each direction of the encoder has half
    score: Literal["additive", "dot", "general"] = "additive"  # score of a position
    input_feeding: bool = False  # the decoder reads its last a as well
    score_init_scale: float = 8.0  # scale of the first attention scores
    batch_size: int = 32    # dates per step
    steps: int = 600        # optimizer steps
    lr: float = 0.01        # peak learning rate
    warmup: int = 50        # steps of linear warmup
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    png: str = ""           # file to write a map for every spelling to
    seed: int = 0           # random seed


def spell_date(date, spelling):
    """-> text, {"year": (first, last + 1), "month": ..., "day": ...}: where these parts stand."""
    y, m, d = date.year, date.month, date.day
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(d % 10, "th") if d not in (11, 12, 13) else "th"
    forms = {"year": ("year", f"{y}"), "yy": ("year", f"{y % 100:02d}"),
             "month": ("month", MONTHS[m - 1]), "mon": ("month", MONTHS[m - 1][:3]),
             "MON": ("month", MONTHS[m - 1][:3].upper()), "m": ("month", f"{m}"),
             "mm": ("month", f"{m:02d}"), "d": ("day", f"{d}"), "dd": ("day", f"{d:02d}"),
             "nth": ("day", f"{d}{suffix}"), "weekday": ("", WEEKDAYS[date.weekday()])}
    text, spans = "", {}
    for form, between in re.findall(r"{(\w+)}|([^{]+)", spelling):
        name, written = forms[form] if form else ("", between)
        spans[name] = len(text), len(text) + len(written)
        text += written
    return text, spans


def draw_dates(rng, n, held_out=False, spellings=SPELLINGS):
    """n random dates; every eleventh day is held out, in all spellings.   -> (text, as 2004-02-29,
    spans of spell_date) of each."""
    days = 11 * rng.integers(DAYS // 11, size=n) + (0 if held_out else rng.integers(1, 11, n))
    dates = []
    for day, spelling in zip(days, rng.integers(len(spellings), size=n)):
        date = datetime.date.fromordinal(FIRST_DAY + int(day))
        text, spans = spell_date(date, spellings[spelling])
        dates.append((text, date.isoformat(), spans))
    return dates


UNK = 3                                 # in the vocabularies of files: all other tokens


def token_ids(vocab):
    """A list of tokens -> dict: the id of each."""
    return {token: i for i, token in enumerate(vocab)}


def encode(tokens, ids):
    """-> the ids of tokens, UNK for those that ids, a dict, does not have."""
    return [ids.get(token, UNK) for token in tokens]


def pad_pairs(pairs, source_ids, target_ids):
    """(source, target, ...) of tokens -> padded ids of the sources and of the targets."""
    source = pad([[BOS, *encode(a, source_ids), EOS] for a, *_ in pairs])
    return source, pad([[*encode(b, target_ids), EOS] for _, b, *_ in pairs])


SPELLED_IDS, ISO_IDS = token_ids(SPELLED), token_ids(ISO)


def dates_batch(cfg, step, dtype=np.float32):
    """-> source (N, S), target (N, T)."""
    rng = np.random.default_rng((cfg.seed, step))
    return pad_pairs(draw_dates(rng, cfg.batch_size), SPELLED_IDS, ISO_IDS)


def init_dates(cfg, rng, dtype=np.float32):
    """-> the parameters of init_model."""
    return init_model(cfg, rng, dtype, len(SPELLED), len(ISO))


def part_alignment(w, dates, name, beside=0):
    """Mean share of the attention on the year, month or day of the source, and on `beside`
    characters left and right of it, while that part is written."""
    shares = []
    for weights, (_, _, spans) in zip(w, dates):
        first, last = spans[name]
        rows = [t for t, written in enumerate(ISO_PARTS) if written == name]
        columns = slice(max(0, 1 + first - beside), 1 + last + beside)  # 1: after BOS
        shares.extend(weights[rows, columns].sum(axis=1))
    return float(np.mean(shares))


PNG = b"\x89PNG\r\n\x1a\n"    # the first bytes of every PNG file


def write_png(path, image):
    """Colors (H, W, 3) from 0 to 1 as a PNG file: a signature, then chunks of length, name, content
    and checksum.   Raises InputError."""
    H, W, _ = image.shape
    rows = (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8).reshape(H, 3 * W)
    rows = np.concatenate([np.zeros((H, 1), np.uint8), rows], axis=1)   # 0: an unfiltered row
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    raw = b"".join(struct.pack(">I", len(body)) + name + body
                   + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)
    try:
        Path(path).write_bytes(PNG + raw)
    except OSError as error:
        raise InputError(f"--png {path}: expected a file to write, found: {error}") from None


def try_png(path):
    """Raise InputError if no picture can be written to path, or if something else stands there."""
    if os.path.exists(path):
        own = os.path.isfile(path) and os.access(path, os.R_OK | os.W_OK)
        own = own and Path(path).read_bytes().startswith(PNG)
        require(own, f"--png {path}", "a new file or a PNG", "something else, which stays")
    else:
        write_png(path, np.zeros((1, 1, 3)))            # before the training, not after it
        os.remove(path)


def tile_images(images, columns, scale):
    """Images (N, H, W, C) of 1 or 3 channels in rows of `columns`, in white frames; every pixel
    becomes a square of scale x scale.   -> one image (., ., 3)"""
    images = np.repeat(images.repeat(scale, axis=1).repeat(scale, axis=2), 3 // images.shape[3], 3)
    images = np.pad(images, ((0, -len(images) % columns), (4, 4), (4, 4), (0, 0)),
                    constant_values=1)
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    return rows.reshape(len(rows) * rows.shape[1], -1, 3)


def map_images(maps):
    """Attention weights, (T, S) each, as images: gray is 0, black is 1, around it white.
    -> (N, longest T, longest S, 1)"""
    T, S = (max(w.shape[axis] for w in maps) for axis in (0, 1))
    images = [np.pad(0.9 * (1 - w), ((0, T - len(w)), (0, S - w.shape[1])), constant_values=1)
              for w in maps]
    return np.stack(images)[..., None]


def run_dates(cfg):
    """Train; exact match and alignment on held-out days by spelling; two maps."""
    start, params = time.perf_counter(), init_dates(cfg, np.random.default_rng(cfg.seed))
    if cfg.png:
        try_png(cfg.png)
    size, (decode, _) = sum(p.size for p in params.values()), decoder_of(cfg)
    print(f"Dates in {len(SPELLINGS)} spellings: score {cfg.score}, hidden {cfg.hidden}, lr "
          f"{cfg.lr}, batch size {cfg.batch_size}, {size} parameters")
    print(f"chance level: loss {math.log(12):.3f}")
    losses = train(params, cfg, dates_batch, model_loss_and_grads)
    print("\nHeld-out days, 60 per spelling: exact match (%); share of the attention that is on "
          "the year,\nthe month, the day of the source while these are written")
    print(f"{'':26s} exact    year   month     day")
    rng, maps = np.random.default_rng((cfg.seed, 10 ** 6)), []
    rights, table, near = [], [], []
    for spelling in SPELLINGS:
        dates = draw_dates(rng, 60, True, [spelling])
        source, target = pad_pairs(dates, SPELLED_IDS, ISO_IDS)
        right = (greedy_decode(params, source, target.shape[1], decode) == target).all(axis=1)
        _, (w, *_) = translator_forward(params, source, target, decode)
        check_finite(w.sum(), params)
        maps.append(w[0])
        shares = [part_alignment(w, dates, name) for name in ("year", "month", "day")]
        near += [part_alignment(w, dates, name, 1) for name in ("year", "month", "day")]
        rights.extend(right)
        table.append(shares)
        print(f"  {dates[0][0]:24s}{100 * right.mean():6.1f}"
              + "".join(f"{share:8.2f}" for share in shares))
    exact, (year, month, day) = float(np.mean(rights)), np.mean(table, axis=0).tolist()
    row, column = np.unravel_index(np.argmin(table), np.shape(table))
    print(f"exact match: {exact:.2%}. A date can be right where a share is low, like the "
          f"{table[row][column]:.2f} in row {row + 1}:\nover all spellings, {np.mean(near):.1%} of "
          "the attention is on the part or a character beside it, and\nthe encoder's states there "
          "have read the part as well")
    for spelling in ("{weekday}, {d} {month} {year}", "{dd}.{mm}.{year}"):
        dates = draw_dates(rng, 1, True, [spelling])
        source, target = pad_pairs(dates, SPELLED_IDS, ISO_IDS)
        _, (w, *_) = translator_forward(params, source, target, decode)
        print("\nAttention weights. Columns: what is read; rows: what is written; "
              "blank is 0, @ is 1")
        draw_map(w[0], [ISO[i] for i in target[0]], [SPELLED[i] for i in source[0]])
    if cfg.png:
        write_png(cfg.png, tile_images(map_images(maps), 3, 6))
        print(f"{cfg.png}: a map for each spelling, in the order of the table (gray is 0, black 1)")
    print("\nNext: python attention.py dates --score general      python attention.py pairs")
    alignment = float(np.average([year, month, day], weights=[4, 2, 2]))
    print_result("dates", cfg, exact=exact, alignment=alignment, year=year, month=month, day=day,
                 params=size, steps=len(losses), seconds=time.perf_counter() - start)


# ---- pairs of a file: python attention.py pairs --data train.tsv ---------------------------------

@dataclass
class Pairs:
    """Pairs of sentences of a file (without one: numbers, to be written in Roman numerals)."""
    vocab_size: int = 3000  # words per side; all other ones become <unk>
    length: int = 20        # most words per side; longer pairs are dropped
    embed_dim: int = 64     # embedding dimension
    hidden: int = 128       # hidden units, even: each direction of the encoder has half
    score: Literal["additive", "dot", "general"] = "additive"  # score of a position
    input_feeding: bool = False  # the decoder reads its last a as well
    score_init_scale: float = 1.0  # scale of the first attention scores
    batch_size: int = 32    # pairs per step
    steps: int = 900        # optimizer steps
    lr: float = 0.004       # peak learning rate
    warmup: int = 50        # steps of linear warmup
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    threads: int = 2        # micro-batches, each on a thread of its own
    data: str = ""          # UTF-8 file with lines source TAB target, the last tenth held out
    seed: int = 0           # random seed


def roman(n):
    """1984 -> MCMLXXXIV."""
    text = ""
    for value, numeral in zip((1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
                              "M CM D CD C XC L XL X IX V IV I".split()):
        text += numeral * (n // value)
        n %= value
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
def load_pairs(path, vocab_size, length):
    """-> dict: train, held_out (from the last tenth of the file): (source, target) lists of words;
    vocabs of both sides; ids: token_ids of them; note.   Raises InputError."""
    if path:
        pairs, note = read_pairs(path)
    else:
        numbers = 1 + np.random.default_rng(0).permutation(3999)
        pairs, note = [(" ".join(str(n)), " ".join(roman(n))) for n in numbers], "Roman numerals"
    words = re.compile(r"\w+|[^\w\s]").findall           # words and punctuation marks
    pairs = [(words(a), words(b)) for a, b in pairs]
    cut = len(pairs) - max(1, len(pairs) // 10)
    vocabs = []
    for side in zip(*pairs[:cut]):
        counts = Counter(word for sentence in side for word in sentence)
        common = [word for word, _ in counts.most_common(vocab_size)]
        vocabs.append([*VOCAB[:3], "<unk>", *sorted(common)])
    train, held_out = ([pair for pair in some if max(map(len, pair)) <= length]
                       for some in (pairs[:cut], pairs[cut:]))
    require(train and held_out, "--length", "one that most pairs do not exceed", length)
    ids = [token_ids(vocab) for vocab in vocabs]
    unknown = [np.mean([word not in ids[k] for pair in train for word in pair[k]])
               for k in (0, 1)]
    note += (f"\n{len(train)} pairs for training, {len(held_out)} held out; dropped: "
             f"{len(pairs) - len(train) - len(held_out)} longer than {length} words\n<unk>: "
             f"{unknown[0]:.1%} and {unknown[1]:.1%} of the words of the two sides")
    return {"train": train, "held_out": held_out, "vocabs": vocabs, "ids": ids, "note": note}


def pairs_of(cfg):
    """load_pairs of a configuration."""
    return load_pairs(cfg.data, cfg.vocab_size, cfg.length)


def init_pairs(cfg, rng, dtype=np.float32):
    """-> the parameters of init_model."""
    return init_model(cfg, rng, dtype, *map(len, pairs_of(cfg)["vocabs"]))


def pairs_batch(cfg, step, dtype=np.float32):
    """Random pairs of the training.   -> source (N, S), target (N, T)."""
    rng = np.random.default_rng((cfg.seed, step))
    data = pairs_of(cfg)
    rows = rng.integers(0, len(data["train"]), cfg.batch_size)
    return pad_pairs([data["train"][i] for i in rows], *data["ids"])


def held_out_loss(params, cfg, pairs):
    """-> loss per word, share of words that are the likeliest, given those before them."""
    decode, _ = decoder_of(cfg)
    losses, right = [], []
    for k in range(0, len(pairs), 50):
        source, target = pad_pairs(pairs[k:k + 50], *pairs_of(cfg)["ids"])
        logits, _ = translator_forward(params, source, target, decode)
        tokens = target[target != PAD]
        losses.append((softmax_cross_entropy_forward(logits, tokens)[0], len(tokens)))
        right.extend(logits.argmax(axis=1) == tokens)
    means, counts = zip(*losses)
    return float(np.average(means, weights=counts)), float(np.mean(right))


def run_pairs(cfg):
    """Train; loss on held-out pairs; some translations; two maps."""
    start, data = time.perf_counter(), pairs_of(cfg)
    require(cfg.batch_size <= len(data["train"]), "--batch-size",
            f"at most {len(data['train'])} for this file", cfg.batch_size)
    params = init_pairs(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    source_vocab, target_vocab = data["vocabs"]
    print(f"{data['note']}\nscore {cfg.score}, hidden {cfg.hidden}, lr {cfg.lr}, batch size "
          f"{cfg.batch_size}, {size} parameters\n"
          f"chance level: loss {math.log(len(target_vocab) - 2):.3f}")

    def note():
        return f"  held out {held_out_loss(params, cfg, data['held_out'][:200])[0]:.3f}"

    quiet = functools.partial(np.seterr, over="ignore", invalid="ignore")       # as run does
    with ThreadPoolExecutor(cfg.threads, initializer=quiet) as pool:
        threaded = functools.partial(threaded_loss_and_grads, model_loss_and_grads, pool)
        losses = train(params, cfg, pairs_batch, threaded, note)
    validation, right = held_out_loss(params, cfg, data["held_out"][:1000])
    check_finite(validation, params)
    decode, _ = decoder_of(cfg)
    some = data["held_out"][:200]
    source, target = pad_pairs(some, *data["ids"])
    written = greedy_decode(params, source, target.shape[1], decode)
    exact = float(((written == target) | (target == PAD)).all(axis=1).mean())
    print("\nHeld-out sources, their targets, and what is written:")
    for (source_words, target_words), ids in zip(some[:4], written):
        ids = [*ids, EOS]
        text = " ".join(target_vocab[i] for i in ids[:ids.index(EOS)])
        print(f"    {' '.join(source_words)}\n        target   {' '.join(target_words)}"
              f"\n        written  {text}")
    _, (w, *_) = translator_forward(params, source[:2], target[:2], decode)
    for weights, target_ids, source_ids in zip(w, target, source):
        print("\nAttention weights. Columns: what is read; rows: the target; blank is 0, @ is 1")
        rows = [target_vocab[i] for i in target_ids if i != PAD]
        columns = [source_vocab[i] for i in source_ids if i != PAD]
        draw_map(weights[:len(rows), :len(columns)], rows, columns)
    print(f"\nheld-out loss {validation:.3f} nats per word; {right:.1%} of the words are the "
          f"likeliest\ngiven those before them; exact match: {exact:.1%} of {len(some)}")
    print("\nNext: python attention.py pairs --input-feeding      python nested_attention.py")
    print_result("pairs", cfg, validation=validation, right=right, exact=exact, params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


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


def letters_fit(cfg):
    """The constraints on tasks with letters."""
    return [(cfg.hidden % 2 == 0, "--hidden", "an even number", cfg.hidden),
            (cfg.length >= 2, "--length", "2 or more", cfg.length)]


def pairs_fit(cfg):
    """The constraints on pairs."""
    most = f"at most --batch-size {cfg.batch_size}"
    return [(cfg.hidden % 2 == 0, "--hidden", "an even number", cfg.hidden),
            (cfg.threads <= cfg.batch_size, "--threads", most, cfg.threads)]


CONSTRAINTS = {Reverse: letters_fit, Copy: letters_fit, Lengths: letters_fit,
               Dates: lambda cfg: [(cfg.hidden % 2 == 0, "--hidden", "an even number", cfg.hidden)],
               Pairs: pairs_fit}


def attention_cases(rng, **shapes):
    """Inputs of an attention for gradcheck.py: 3 queries, 5 values, some of them padding."""
    h, values = rng.standard_normal((2, 3, 6)), rng.standard_normal((2, 5, 8))
    mask = np.arange(5) < np.array([[5], [2]])
    return dict(h=h, k=rng.standard_normal((2, 5, 6)), values=values, mask=mask,
                p={name: rng.standard_normal(shape) for name, shape in shapes.items()})


GRADCHECK = {
    "masked_softmax": lambda rng: dict(scores=rng.standard_normal((2, 3, 5)),
                                       mask=np.arange(5) < np.array([[5], [2]])),
    "additive_attention": lambda rng: attention_cases(rng, Wq=(6, 6), u=(6,)),
    "dot_attention": lambda rng: attention_cases(rng),
    "project": "x 2 3 5, W 5 7",
    "scale": "x 2 3 5, s 1",
    "lstm_layer": lambda rng: dict(x=rng.standard_normal((3, 5, 7)),
                                   state=rng.standard_normal((2, 3, 6)),
                                   p={"Wx": rng.standard_normal((7, 24)),
                                      "Wh": rng.standard_normal((6, 24)),
                                      "b": rng.standard_normal(24)})}

TASKS = {"reverse": Task(Reverse, init_model, make_batch, model_loss_and_grads, run_reverse),
         "copy": Task(Copy, init_model, copy_batch, model_loss_and_grads, run_copy),
         "lengths": Task(Lengths, init_bottleneck, make_batch, bottleneck_loss_and_grads,
                         run_lengths),
         "dates": Task(Dates, init_dates, dates_batch, model_loss_and_grads, run_dates),
         "pairs": Task(Pairs, init_pairs, pairs_batch, model_loss_and_grads, run_pairs)}

if __name__ == "__main__":
    run(TASKS)
