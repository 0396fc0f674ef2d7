"""rlhf.py: from a model of text to a model that pleases, and then too much of it.

A model of text learns what people write, not what they want. But people can compare: which of two
texts is better? Learn a reward r from comparisons. Let the model, now a policy pi, write texts, and
raise the probability of those with more than the mean reward. A leash, beta times the distance from
the start, keeps pi where r was learned. Here the true reward is known: one plot shows both curves.

Forward: lp_t = log pi(x_t | words before), mask_t = 1 up to the first full stop, then 0
    start     loss = -sum mask lp / sum mask, x from the corpus
    reward    loss = mean log(1 + e^-m), m = r(better) - r(worse), K pairs; r(x) = sum_t mask w[x_t]
    policy    loss = -sum mask A lp / sum mask, x drawn from pi, A = (score - mean) / std over the
              batch, score = r(x) - beta sum_t mask (lp - lp of the start); A is a constant
Backward: dlogits = dlp (onehot(x_t) - softmax(logits)), for the start and for the policy
    dm = -sigmoid(-m) / K, and w[v] occurs in m as often as v occurs in better, minus in worse
Why no gradient through r or the drawing: d mean(r) = mean(r d log pi(x)) over x drawn from pi.

Run    python rlhf.py      (leashes of three strengths; python rlhf.py --help lists the other tasks)
Papers: Williams 1992 (policy gradient), Christiano et al. 2017, Ouyang et al. 2022, Gao et al. 2022
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
    """Learn a reward from comparisons, follow it on leashes of three strengths."""
    heads: int = 2          # attention heads
    dim: int = 32           # embedding dimension
    pairs: int = 750        # compared pairs of sentences
    betas: str = "0,0.3,1"  # strengths of the leash, one training of the policy for each
    batch_size: int = 128   # sentences per step
    steps: int = 120        # optimizer steps of each training
    lr: float = 0.01        # learning rate of the start
    reward_lr: float = 0.1  # learning rate of the reward model
    policy_lr: float = 0.001  # learning rate of the policy
    l2: float = 0.002       # penalty on squares: of the bag's weights, of a transformer's rewards
    seed: int = 0           # random seed


# ---- layers: B sequences, T positions, N = B T rows, D dim, H heads, d = D / H, V words, K pairs -

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


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


def log_prob_forward(logits, targets):
    """lp_n = log softmax(logits)[n, targets_n].   logits (N, V), targets (N,) ids -> (N,)."""
    logits = logits - logits.max(axis=1, keepdims=True)     # the same softmax, without overflow
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_p[np.arange(len(targets)), targets], (log_p, targets)


def log_prob_backward(dout, cache):
    """dlogits = dout (onehot(targets) - p): log p_t changes with logit k by (k == t) - p_k."""
    log_p, targets = cache
    dlogits = -np.exp(log_p)
    dlogits[np.arange(len(targets)), targets] += 1
    return dlogits * dout[:, None]


def bag_forward(w, differences, l2):
    """mean log(1 + e^-m) + l2 / 2 sum w^2, m = differences w = r(better) - r(worse).
    w (V,), differences (K, V): word counts of better minus worse sentences -> scalar."""
    margin = differences @ w                                # (K,)
    loss = np.logaddexp(0, -margin).mean() + l2 / 2 * (w * w).sum()
    return loss, (w, differences, l2, margin)


def bag_backward(dout, cache):
    """dm = -sigmoid(-m) / K, sigmoid(-m) = e^-log(1 + e^m); dw = differences^T dm + l2 w."""
    w, differences, l2, margin = cache
    dmargin = -np.exp(-np.logaddexp(0, margin)) * (dout / len(margin))  # in logs: no overflow
    return differences.T @ dmargin + dout * l2 * w


# ---- data: a grammar, and what is wanted of its sentences ----------------------------------------

LEXICON = "the film food bar was is very so good great fun bad dry sad and but we ran ate .".split()
THE, EOS, LENGTH = 0, len(LEXICON) - 1, 12
KIND, UNKIND = slice(8, 11), slice(11, 14)              # good great fun, bad dry sad
OPINIONS = [f"{adverb} {word}" for adverb in ("", "very", "so") for word in LEXICON[8:14]]
GRAMMAR = [[f"the {noun} {verb}" for noun in LEXICON[1:4] for verb in LEXICON[4:6]], OPINIONS,
           [f"{joint} {opinion}" for joint in ("and", "but") for opinion in OPINIONS] + 36 * [""],
           ["and we ran", "and we ate", "", ""]]


def draw_sentences(rng, B):
    """One of each list of GRAMMAR, a full stop, and full stops as padding.   -> ids (B, LENGTH)."""
    ids = np.full((B, LENGTH), EOS)
    for row in ids:
        words = " ".join(options[rng.integers(len(options))] for options in GRAMMAR).split()
        row[:len(words)] = [LEXICON.index(word) for word in words]
    return ids


CORPUS = draw_sentences(np.random.default_rng(0), 2000)
POSSIBLE = np.zeros((len(LEXICON), len(LEXICON)), bool)     # neighbours that the corpus has
POSSIBLE[CORPUS[:, :-1], CORPUS[:, 1:]] = True


def mask_of(ids):
    """ids (B, T) -> (B, T), 1 up to and with the first full stop, 0 after it."""
    stops = ids == EOS
    stops_before = np.cumsum(stops, axis=1) - stops         # how many stand before each position
    return (stops_before == 0).astype(np.float32)


def word_counts(ids):
    """How often each word is in each sentence.   ids (B, LENGTH) -> (B, V)."""
    return (np.eye(len(LEXICON), dtype=np.float32)[ids] * mask_of(ids)[:, :, None]).sum(axis=1)


def true_reward(ids):
    """What people want: kind words, up to 2 different ones; -1 per repeated kind word, -1 per
    unkind one, -1/2 per impossible pair of neighbours, -1/2 without a full stop.   -> (B,)."""
    counts = word_counts(ids)
    different = (counts[:, KIND] > 0).sum(axis=1)
    repeated = counts[:, KIND].sum(axis=1) - different
    impossible = ~POSSIBLE[ids[:, :-1], ids[:, 1:]] * mask_of(ids)[:, 1:]
    reward = np.minimum(different, 2) - repeated - counts[:, UNKIND].sum(axis=1)
    return reward - impossible.sum(axis=1) / 2 - (1 - counts[:, EOS]) / 2


def make_batch(cfg, step, dtype=np.float32):
    """Sentences of the corpus -> ids (B, LENGTH), the same weight for each word to be predicted."""
    rng = np.random.default_rng((cfg.seed, step))
    ids = CORPUS[rng.integers(0, len(CORPUS), cfg.batch_size)]
    mask = mask_of(ids)[:, 1:]
    return ids, (mask / mask.sum()).astype(dtype)


# ---- model: a small transformer for start and policies -------------------------------------------

def init_params(cfg, rng, dtype=np.float32):
    """E (V, D), P (LENGTH, D): embeddings; Wqkv, bqkv, Wo, bo: attention; W1, b1, W2, b2: MLP."""
    D = cfg.dim
    params = {"E": 0.02 * rng.standard_normal((len(LEXICON), D)),
              "P": 0.02 * rng.standard_normal((LENGTH, D))}
    for name, n, m in (("qkv", D, 3 * D), ("o", D, D), ("1", D, 4 * D), ("2", 4 * D, D)):
        params[f"W{name}"] = rng.standard_normal((n, m)) * (2 / (n + m)) ** 0.5
        params[f"b{name}"] = np.zeros(m)
    return {name: value.astype(dtype) for name, value in params.items()}


def policy_forward(params, ids, cfg):
    """x + attention(x), x + mlp(x), without norms.   ids (B, T) -> logits (B T, V) of the next."""
    B, T = ids.shape
    x = (params["E"][ids] + params["P"][:T]).reshape(B * T, -1)     # (B T, D)
    y, qkv = linear_forward(x, params["Wqkv"], params["bqkv"])
    y = y.reshape(B, T, 3, cfg.heads, -1)                           # (B, T, 3, H, d)
    q, k, v = y.transpose(2, 0, 3, 1, 4)                            # (B, H, T, d) each
    y, attention = causal_attention_forward(q, k, v)
    y, out = linear_forward(y.swapaxes(1, 2).reshape(x.shape), params["Wo"], params["bo"])
    x = x + y
    y, up = linear_forward(x, params["W1"], params["b1"])
    hidden = np.tanh(y)                                             # (B T, 4 D)
    y, down = linear_forward(hidden, params["W2"], params["b2"])
    x = x + y
    return x @ params["E"].T, (ids, qkv, attention, out, up, hidden, down, x, params)


def policy_backward(dout, cache):
    """policy_forward in reverse order -> gradients under the keys of params."""
    ids, qkv, attention, out, up, hidden, down, x, params = cache
    (B, H, T, d), g = attention[0].shape, {}                        # attention[0] is q
    g["E"], g["P"] = dout.T @ x, np.zeros_like(params["P"])         # E is used at the end ...
    dx = dout @ params["E"]
    dhidden, g["W2"], g["b2"] = linear_backward(dx, down)
    dy = dhidden * (1 - hidden * hidden)                            # the derivative of tanh
    dy, g["W1"], g["b1"] = linear_backward(dy, up)
    dx = dx + dy
    dy, g["Wo"], g["bo"] = linear_backward(dx, out)
    dy = dy.reshape(B, T, H, d).swapaxes(1, 2)                      # (B, H, T, d)
    dqkv = np.stack(causal_attention_backward(dy, attention))       # (3, B, H, T, d)
    dqkv = dqkv.transpose(1, 3, 0, 2, 4).reshape(B * T, -1)         # (B T, 3 D)
    dy, g["Wqkv"], g["bqkv"] = linear_backward(dqkv, qkv)
    dx = dx + dy
    np.add.at(g["E"], ids.ravel(), dx)                              # ... and at the beginning
    g["P"][:T] = dx.reshape(B, T, -1).sum(axis=0)
    return g


def loss_and_grads(params, batch, cfg):
    """-sum weights lp. weights: mask / sum mask for the corpus, times A for a policy."""
    ids, weights = batch
    logits, policy = policy_forward(params, ids[:, :-1], cfg)
    log_p, cache = log_prob_forward(logits, ids[:, 1:].ravel())
    dlogits = log_prob_backward(-weights.ravel(), cache)
    return -(weights.ravel() * log_p).sum(), policy_backward(dlogits, policy)


def reward_loss_and_grads(params, batch, cfg):
    """The loss of a bag of words. batch: differences (K, V).   -> loss, grads."""
    loss, cache = bag_forward(params["w"], batch, cfg.l2)
    return loss, {"w": bag_backward(1.0, cache)}


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
        adam_update(params, grads, state, cfg.lr)
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


# ---- people and policy ---------------------------------------------------------------------------

def compose(params, cfg, rng, B):
    """B sentences of the policy, which continues "the" word by word.   -> ids (B, LENGTH)."""
    ids = np.full((B, LENGTH), THE)
    for t in range(1, LENGTH):
        logits, _ = policy_forward(params, ids[:, :t], cfg)
        logits = logits.reshape(B, t, -1)[:, -1]        # (B, V) of the next word
        noise = rng.gumbel(size=logits.shape)           # the argmax of logits + noise is a draw
        drawn = (logits + noise).argmax(axis=1)         # from softmax(logits)
        ended = ids[:, t - 1] == EOS                    # more full stops follow a full stop
        ids[:, t] = np.where(ended, EOS, drawn)
    return ids


def log_probs(params, ids, cfg):
    """lp of each word after "the", 0 after the full stop.   ids (B, T + 1) -> (B, T)."""
    logits, _ = policy_forward(params, ids[:, :-1], cfg)
    log_p, _ = log_prob_forward(logits, ids[:, 1:].ravel())
    return log_p.reshape(len(ids), -1) * mask_of(ids)[:, 1:]


def draw_comparisons(params, cfg, rng, K):
    """K pairs of sentences of the policy. People err: they prefer the first with probability
    sigmoid(3 (true reward of the first - of the second)).   -> better, worse (K, LENGTH)."""
    a, b = compose(params, cfg, rng, K), compose(params, cfg, rng, K)
    noise = rng.logistic(size=K)                        # P(z + noise > 0) = sigmoid(z)
    first = 3 * (true_reward(a) - true_reward(b)) + noise > 0
    return np.where(first[:, None], a, b), np.where(first[:, None], b, a)


def reinforce(start, reward, beta, cfg):
    """Train a copy of start on its own sentences, weighted by A. reward: ids (B, LENGTH) -> (B,).
    -> policy, losses, per step the means of proxy, true reward, KL (steps, 3) and a sentence."""
    policy, means, sentences = {name: w.copy() for name, w in start.items()}, [], []

    def policy_batch(cfg, step):
        ids = compose(policy, cfg, np.random.default_rng((cfg.seed, step)), cfg.batch_size)
        proxy, mask = reward(ids), mask_of(ids)
        distance = (log_probs(policy, ids, cfg) - log_probs(start, ids, cfg)).sum(axis=1)
        score = proxy - beta * distance
        A = (score - score.mean()) / (score.std() + 1e-6)           # equal scores: 0, not 0 / 0
        means.append([proxy.mean(), true_reward(ids).mean(), distance.mean()])
        sentences.append(" ".join(LEXICON[i] for i in ids[0][mask[0] > 0]))
        return ids, (A[:, None] * mask[:, 1:] / mask[:, 1:].sum()).astype(np.float32)

    def note():
        last = np.mean(means[-math.ceil(cfg.steps / 10):], axis=0)
        return "  proxy {:5.2f}  true {:6.2f}  KL {:5.1f}".format(*last)
    losses = train(policy, replace(cfg, lr=cfg.policy_lr), policy_batch, note=note)
    return policy, losses, np.array(means), sentences


# ---- pictures and demo ---------------------------------------------------------------------------

def draw_weights(w):
    """A line per word, the largest weight first."""
    print("\nWhat each word adds to the reward; a # is 0.1 (25 at most), left of the axis below 0")
    for i in np.argsort(-w):
        left, right = "#" * min(25, round(-10 * w[i])), "#" * min(25, round(10 * w[i]))
        print(f"{LEXICON[i]:>6} {w[i]:5.2f} {left:>25}|{right}")


def draw_rewards(rows, low=-16, high=24, unit=1, marks="pt"):
    """Rows of (label, value, value, KL), in the order of KL: a mark at each value, @ where both are
    equal, | at 0; a column per unit. Values beyond low or high are drawn at the edge."""
    for label, *values, kl in sorted(rows, key=lambda row: row[3]):
        line = ["."] * (1 + round((high - low) / unit))
        for mark, value in zip("|" + marks, (0, *values)):
            i = round((min(max(value, low), high) - low) / unit)
            line[i] = "@" if line[i] in marks else mark
        print(f"{label:>9} {kl:6.1f}  {''.join(line)}")


def print_result(task, cfg, **metrics):
    """The last line of a run, for comparing runs: task, changed fields and seed, metrics."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg)
               if f.name == "seed" or getattr(cfg, f.name) != f.default}
    line = f"result: task={task}"
    for name, value in {**changed, **metrics}.items():
        text = f"{value:#.4g}" if isinstance(value, float) else str(value)
        line += f" {name}={text.replace(' ', '_')}"
    print(line)


def accuracy(reward, start, cfg):
    """The share of fresh pairs, of those with unequal true rewards, that reward orders rightly."""
    ids = compose(start, cfg, np.random.default_rng((cfg.seed, 10 ** 6)), 1000)
    r, true = reward(ids), true_reward(ids)
    gap, true_gap = r[:500] - r[500:], true[:500] - true[500:]
    return float((gap * true_gap > 0).sum() / max(1, (true_gap != 0).sum()))    # of the same sign


def outcome(policy, start, reward, cfg):
    """Means over 512 fresh sentences, and how many of these are different."""
    ids = compose(policy, cfg, np.random.default_rng((cfg.seed, 10 ** 6 + 1)), 512)
    distance = (log_probs(policy, ids, cfg) - log_probs(start, ids, cfg)).sum(axis=1)
    return {"proxy": float(reward(ids).mean()), "true": float(true_reward(ids).mean()),
            "kl": float(distance.mean()), "different": len(np.unique(ids, axis=0))}


def prepare(cfg):
    """Train the start, then a reward model on comparisons of its sentences.   -> start, w, reward
    (a function of ids with mean 0 for the start), better and worse sentences, losses."""
    rng = np.random.default_rng((cfg.seed, 10 ** 6 + 2))
    start, w = init_params(cfg, np.random.default_rng(cfg.seed)), np.zeros(len(LEXICON), np.float32)
    size = sum(p.size for p in start.values())
    print(f"Start: 2000 sentences, {len(LEXICON)} different words; {size} parameters\n"
          f"chance level: loss {math.log(len(LEXICON)):.3f}")
    losses = train(start, cfg)
    better, worse = draw_comparisons(start, cfg, rng, cfg.pairs)
    differences = word_counts(better) - word_counts(worse)
    if len(losses) == cfg.steps:                        # not after Ctrl-C
        print(f"\nReward: {cfg.pairs} comparisons\nchance level: loss {math.log(2):.3f}")
        losses = train({"w": w}, replace(cfg, lr=cfg.reward_lr), lambda cfg, step: differences,
                       reward_loss_and_grads)
    if len(losses) < cfg.steps:
        print("The stages that come after this training are left out.")
    offset = (word_counts(compose(start, cfg, rng, 512)) @ w).mean()
    return start, w, lambda ids: word_counts(ids) @ w - offset, (better, worse), losses


def follow(start, reward, metrics, cfg):
    """A policy for each beta of cfg.betas; metrics gets the outcome of each.   -> losses."""
    rows = []
    for beta in cfg.betas.split(","):
        print(f"\nBeta {beta}; proxy: learned reward, true: true reward, KL: distance from start")
        policy, losses, means, sentences = reinforce(start, reward, float(beta), cfg)
        found = outcome(policy, start, reward, cfg)
        check_finite(found["proxy"], policy)
        metrics.update({f"{k}_{beta.replace('.', '_')}": value for k, value in found.items()})
        for tenth in np.array_split(means, min(10, len(means))):
            rows.append((beta, *tenth.mean(axis=0)))
        for step in sorted({1, 10, 20, 40, len(losses)}):
            if step <= len(losses):
                print(f"    drawn at step {step:3d}: {sentences[step - 1]}")
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print("\nRows: tenths of trainings, by KL. Columns: -16 to 24, | 0, p proxy, t true, @ both\n"
          "     beta     KL")
    draw_rewards(rows)
    return losses


def main(cfg):
    """Follow a bag of words on each leash, and see what becomes of the true reward."""
    begin = time.perf_counter()
    start, w, reward, _, losses = prepare(cfg)
    metrics = {}
    if len(losses) == cfg.steps:                        # not after Ctrl-C
        metrics["accuracy"] = accuracy(reward, start, cfg)
        print(f"{metrics['accuracy']:.1%} of fresh pairs in the right order")
        draw_weights(w)
        losses = follow(start, reward, metrics, cfg)
    print("\nNext: python rlhf.py reward      python rlhf.py dpo      python rlhf.py --betas 0.1,3")
    print_result("leash", cfg, **metrics, steps=len(losses),
                 params=sum(p.size for p in start.values()), seconds=time.perf_counter() - begin)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest: best of n, a transformer as reward model, DPO, PPO's clip and GRPO, plumbing. ==

MORE = """
What comes of it (seeds 0 to 4): the true reward at the end; that of the start is -0.23 to 0.03
    leash        beta 0: -15 to -13 (proxy 15 to 22); 0.3: 0.81 to 1.06; 1: 0.97 to 1.22
    best         n = 16: 1.15 to 1.27; 256: 0.79 to 0.98, past its best, and nothing was trained
    reward       beta 0: -14 to -1, a transformer is hacked, too; 0.5: 0.85 to 1.24
    comparisons  -15 to -13 from 94, 750 and 3000 pairs; the true reward: 1.3 to 2.0 (seeds 0-2)
    dpo          0.85 to 1.11 at its best, 0.16 to 0.50 at the end, no sentence possible
    grpo         with the clip 0.42 to 0.68, without -1.7 to -0.2 (four steps on each batch)

Break it (seed 0: the true reward at the end)
    reinforce: A = score                             beta 0.3: 1.15 instead of 0.97: here neither
                                                     the mean nor the std is needed
    reinforce: score = proxy + beta * distance       beta 0.3: -15, the leash pushes
    reinforce: ids = compose(start, ...)             beta 0.3: -0.04, KL 10: A is right only for
                                                     sentences of the policy
    dpo_loss_and_grads: rise without - start         0.05 instead of 0.50
    python rlhf.py dpo --beta 1                      1.14, 97 % of the sentences possible
    python rlhf.py --betas 0 --l2 0                  the full stop gets 3.9: few pairs judge it
    python rlhf.py --betas 0.3,1 --pairs 50          -1.57, 1.13: a worse reward, a shorter leash

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python rlhf.py --betas 0.1,0.2,0.5,2: where does the true reward end, and at which KL?
    2. Derive and add a margin c to the loss of pairs: mean log(1 + e^(c - m)) (margin_forward,
       margin_backward). Which weights of words become larger?
    3. Let the reward model see pairs of neighbours (V^2 weights), not words. How is it hacked?

Papers of these parts: Ziegler et al. 2019, Stiennon et al. 2020 (the leash), Rafailov et al. 2023,
2024 (DPO, its over-optimisation), Liu et al. 2025 (division by std and by length in GRPO).
"""

import argparse
import contextlib
import ctypes
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


# ---- what several sections use -------------------------------------------------------------------

def preference_forward(margin):
    """mean log(1 + e^-m) = -mean log sigmoid(m), m = r(better) - r(worse).   (K,) -> scalar."""
    return np.logaddexp(0, -margin).mean(), margin


def preference_backward(dout, cache):
    """dm = -sigmoid(-m) / K, as in bag_backward."""
    margin = cache
    return -np.exp(-np.logaddexp(0, margin)) * (dout / len(margin))


def sentence(row):
    """ids (LENGTH,) -> text up to the first full stop."""
    return " ".join(LEXICON[i] for i in row[:int(mask_of(row[None]).sum())])


PROPOSED = {"best": ("reward", "comparisons"), "reward": ("comparisons", "reward --betas 0.3,1"),
            "comparisons": ("reward", "dpo"), "dpo": ("grpo", "dpo --beta 1"),
            "grpo": ("best", "grpo --reuse 16")}


def print_end(task, cfg, begin, start, losses, metrics):
    """Next: two tasks, the next lesson; the result line, with the size of a policy."""
    first, second = PROPOSED[task]
    print(f"\nNext: python rlhf.py {first}      python rlhf.py {second}      python autodiff.py")
    print_result(task, cfg, **metrics, params=sum(p.size for p in start.values()),
                 steps=len(losses), seconds=time.perf_counter() - begin)


def pairs_batch(cfg, step, dtype=np.float32, better=CORPUS[:1000], worse=CORPUS[1000:]):
    """B / 2 pairs; if none are given, of the corpus -> ids (B, LENGTH), better ones first."""
    rng = np.random.default_rng((cfg.seed, step))
    rows = rng.integers(0, len(better), (cfg.batch_size + 1) // 2)
    return np.concatenate([better[rows], worse[rows]])


# ---- best of n: python rlhf.py best --------------------------------------------------------------
# The cheapest way to follow a reward: draw n sentences, keep the one with the highest reward. No
# policy is trained. The KL of the best of n from the start is at most log n - (n - 1) / n nats.

@dataclass
class Best:
    """Keep the best of n sentences, by the reward; no policy is trained."""
    heads: int = 2          # attention heads
    dim: int = 32           # embedding dimension
    pairs: int = 750        # compared pairs of sentences
    batch_size: int = 128   # sentences per step
    steps: int = 120        # optimizer steps of each training
    lr: float = 0.01        # learning rate of the start
    reward_lr: float = 0.1  # learning rate of the reward model
    l2: float = 0.002       # penalty on squares: of the bag's weights, of a transformer's rewards
    seed: int = 0           # random seed


def run_best(cfg):
    """Proxy and true reward of the best of n, for n up to 256."""
    begin, rows, metrics = time.perf_counter(), [], {}
    start, _, reward, _, losses = prepare(cfg)
    if len(losses) < cfg.steps:                         # Ctrl-C
        return print_end("best", cfg, begin, start, losses, metrics)
    ids = compose(start, cfg, np.random.default_rng((cfg.seed, 10 ** 6 + 3)), 16384)
    proxy, true = reward(ids), true_reward(ids)
    check_finite(proxy.mean(), start)
    print("\nBest of")
    for n in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        first = np.arange(0, len(ids), n)               # n sentences from each of these on
        best = first + proxy.reshape(-1, n).argmax(axis=1)
        rows.append((n, proxy[best].mean(), true[best].mean(), math.log(n) - (n - 1) / n))
        metrics[f"true_{n}"] = float(true[best].mean())
        print(f"{n:6d}: {sentence(ids[best[0]])}")
    print("\nRows: n, with the largest KL that it allows. Columns: -1 to 6, p proxy, t true "
          "reward, @ both\n        n     KL")
    draw_rewards(rows, -1, 6, 0.1)
    print_end("best", cfg, begin, start, losses, metrics)


# ---- a transformer as reward model: python rlhf.py reward ----------------------------------------
# The network of the policy, begun with the weights of the start, as is usual. Its logit 0 at the
# full stop, where it has read the whole sentence, is the reward. Unlike a bag of words it can
# depend on repetition and order, if comparisons show these.

@dataclass
class Reward(Config):
    """A transformer that reads the whole sentence as reward model."""
    betas: str = "0,0.5"    # strengths of the leash, one training of the policy for each
    reader_lr: float = 0.001  # learning rate of the transformer


def reader_forward(params, ids, cfg):
    """Logit 0 at the full stop, or at the last word if there is none.   ids (B, LENGTH) -> (B,)."""
    logits, policy = policy_forward(params, ids, cfg)       # (B LENGTH, V)
    lengths = mask_of(ids).sum(axis=1).astype(int)
    ends = np.arange(len(ids)) * LENGTH + lengths - 1       # rows of the logits
    return logits[ends, 0], (logits.shape, ends, policy)


def reader_backward(dout, cache):
    """The gradient of all other logits is 0.   -> gradients under the keys of params."""
    shape, ends, policy = cache
    dlogits = np.zeros(shape, dout.dtype)
    dlogits[ends, 0] = dout
    return policy_backward(dlogits, policy)


def reader_loss_and_grads(params, batch, cfg):
    """The loss of the bag of words on rewards r of the transformer, and l2 / 2 mean r^2, since the
    pairs leave a constant free.   -> loss, gradients."""
    r, reader = reader_forward(params, batch, cfg)
    better, worse = np.split(r, 2)
    loss, cache = preference_forward(better - worse)
    dmargin = preference_backward(1.0, cache)
    dr = np.concatenate([dmargin, -dmargin]) + cfg.l2 * r / len(r)
    return loss + cfg.l2 / 2 * (r * r).mean(), reader_backward(dr, reader)


def run_reward(cfg):
    """Bag of words and transformer on fresh pairs; policies that follow the transformer."""
    begin, metrics = time.perf_counter(), {}
    start, _, bag_reward, (better, worse), losses = prepare(cfg)
    if len(losses) < cfg.steps:                         # Ctrl-C
        return print_end("reward", cfg, begin, start, losses, metrics)
    reader = {name: w.copy() for name, w in start.items()}

    def reader_batch(cfg, step):
        return pairs_batch(cfg, step, better=better, worse=worse)
    print(f"\nTransformer as reward model\nchance level: loss {math.log(2):.3f}")
    losses = train(reader, replace(cfg, lr=cfg.reader_lr), reader_batch, reader_loss_and_grads)
    fresh = compose(start, cfg, np.random.default_rng((cfg.seed, 10 ** 6 + 3)), 512)
    offset = reader_forward(reader, fresh, cfg)[0].mean()

    def reward(ids):
        return reader_forward(reader, ids, cfg)[0] - offset
    check_finite(offset, reader)
    metrics["bag"] = accuracy(bag_reward, start, cfg)
    metrics["accuracy"] = accuracy(reward, start, cfg)
    print(f"Fresh pairs in the right order: bag of words {metrics['bag']:.1%}, transformer "
          f"{metrics['accuracy']:.1%}")
    if len(losses) == cfg.steps:                        # not after Ctrl-C
        losses = follow(start, reward, metrics, cfg)
    print_end("reward", cfg, begin, start, losses, metrics)


# ---- over-optimisation: python rlhf.py comparisons -----------------------------------------------
# The policy gradient without a leash, on rewards from fewer and from more comparisons. More of them
# make r more right about what the start writes, and not elsewhere: the start never writes ten kind
# words, so that no comparison speaks against them. Last, the true reward itself is followed.

@dataclass
class Comparisons(Best):
    """Rewards from an eighth and from four times the pairs; the true reward in place of one."""
    policy_lr: float = 0.001  # learning rate of the policy
    beta: float = 0.1       # leash on the policy that follows the true reward


def init_bag(cfg, rng, dtype=np.float32):
    """The reward of a bag of words, as in prepare: w (V,)."""
    return {"w": np.zeros(len(LEXICON), dtype)}


def bag_batch(cfg, step, dtype=np.float32):
    """-> differences of word counts (B / 2, V), with which gradcheck.py checks the bag of words."""
    better, worse = np.split(word_counts(pairs_batch(cfg, step)), 2)
    return (better - worse).astype(dtype)


def run_comparisons(cfg):
    """How high the true reward gets, and where it ends, for each reward."""
    begin, rewards, lines, metrics = time.perf_counter(), [], [], {}
    for pairs in (math.ceil(cfg.pairs / 8), cfg.pairs, 4 * cfg.pairs):
        start, _, reward, _, losses = prepare(replace(cfg, pairs=pairs))
        rewards.append((pairs, reward, 0.0))
        if len(losses) < cfg.steps:                     # Ctrl-C
            return print_end("comparisons", cfg, begin, start, losses, metrics)
    for name, reward, beta in [*rewards, ("true", true_reward, cfg.beta)]:
        source = "the true reward" if name == "true" else f"a reward from {name} comparisons"
        print(f"\nA policy follows {source}, beta {beta:g}")
        policy, losses, means, _ = reinforce(start, reward, beta, cfg)
        found, right = outcome(policy, start, reward, cfg), accuracy(reward, start, cfg)
        check_finite(found["proxy"], policy)
        top = means[:, 1].argmax()
        lines.append(f"{name:>11} {right:9.1%} {means[top, 1]:9.2f} {top + 1:9d} "
                     f"{means[top, 2]:6.1f} {found['true']:8.2f} {found['kl']:7.1f}")
        metrics.update({f"right_{name}": right, f"best_{name}": float(means[top, 1]),
                        f"best_at_{name}": int(top + 1), f"end_{name}": found["true"]})
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print("\nRows: number of comparisons. Columns: fresh pairs in the right order, highest true "
          "reward of a\nbatch, its step and KL, true reward and KL at the end\n"
          "comparisons     right   highest   at step     KL      end      KL", *lines, sep="\n")
    print_end("comparisons", cfg, begin, start, losses, metrics)


# ---- DPO: the pairs without a reward model (Rafailov et al. 2023): python rlhf.py dpo ------------
# The best policy for r on a leash of beta is pi = start e^(r / beta) / Z. Solved for r that is
# beta log(pi / start) + beta log Z, and Z cancels in the difference of two rewards. Put that into
# the loss of the reward model, and it trains the policy itself. No sentence is drawn.

@dataclass
class Dpo(Best):
    """Direct preference optimisation: the policy learns from the pairs themselves."""
    beta: float = 0.1       # strength of the leash
    policy_lr: float = 0.0005  # learning rate of the policy


def dpo_batch(cfg, step, dtype=np.float32, pairs=(CORPUS[:1000], CORPUS[1000:]), start=None):
    """Pairs -> ids (B, LENGTH), better ones first, their lp under the start (B, T)."""
    ids = pairs_batch(cfg, step, dtype, *pairs)
    start = start or init_params(cfg, np.random.default_rng(cfg.seed), dtype)
    return ids, log_probs(start, ids, cfg)


def dpo_loss_and_grads(params, batch, cfg):
    """loss = mean log(1 + e^-m), m = beta (rise(better) - rise(worse)), rise = sum_t mask (lp - lp
    of the start); so dlp = beta dm in better sentences, -beta dm in worse ones."""
    ids, start = batch
    logits, policy = policy_forward(params, ids[:, :-1], cfg)
    log_p, cache = log_prob_forward(logits, ids[:, 1:].ravel())
    mask = mask_of(ids)[:, 1:]
    rise = (log_p.reshape(mask.shape) * mask - start).sum(axis=1)       # (B,)
    better, worse = np.split(rise, 2)
    loss, margin = preference_forward(cfg.beta * (better - worse))
    dmargin = cfg.beta * preference_backward(1.0, margin)
    dlog_p = np.concatenate([dmargin, -dmargin])[:, None] * mask
    return loss, policy_backward(log_prob_backward(dlog_p.ravel(), cache), policy)


def run_dpo(cfg):
    """DPO on the pairs; what becomes of the better and of the worse sentences of these."""
    begin, rows, trues = time.perf_counter(), [], []
    start, _, reward, pairs, losses = prepare(cfg)
    if len(losses) < cfg.steps:                         # Ctrl-C
        return print_end("dpo", cfg, begin, start, losses, {})
    policy = {name: w.copy() for name, w in start.items()}
    before = [log_probs(start, ids, cfg).sum(axis=1).mean() for ids in pairs]

    def note():
        found = outcome(policy, start, reward, cfg)
        now = [log_probs(policy, ids, cfg).sum(axis=1).mean() for ids in pairs]
        trues.append(found["true"])
        rows.append((len(rows) + 1, now[0] - before[0], now[1] - before[1], found["kl"]))
        _, better, worse, kl = rows[-1]
        return f"  true {found['true']:5.2f}  KL {kl:4.1f}  b {better:5.1f}  w {worse:5.1f}"

    def batch_of(cfg, step):
        return dpo_batch(cfg, step, pairs=pairs, start=start)
    print(f"\nDPO, beta {cfg.beta}; b, w: change of the log-probability of better and worse "
          f"sentences,\nin nats\nchance level: loss {math.log(2):.3f}")
    losses = train(policy, replace(cfg, lr=cfg.policy_lr), batch_of, dpo_loss_and_grads, note)
    found = outcome(policy, start, reward, cfg)
    check_finite(found["proxy"], policy)
    ids = compose(policy, cfg, np.random.default_rng((cfg.seed, 10 ** 6 + 3)), 512)
    odd = (~POSSIBLE[ids[:, :-1], ids[:, 1:]] * mask_of(ids)[:, 1:]).any(axis=1)
    print(f"\n{1 - odd.mean():.0%} of its sentences are possible in the grammar; five of them:")
    print(*(f"    {sentence(row)}" for row in ids[:5]), sep="\n")
    print("\nRows: tenths of the training. Columns: -50 to 10 nats, change of log-probability of"
          "\nthe better (b) and the worse (w) sentences, @ both\n    tenth     KL")
    draw_rewards(rows, -50, 10, 1, "bw")
    found.update(best_true=max(trues), possible=float(1 - odd.mean()),
                 better=float(rows[-1][1]), worse=float(rows[-1][2]))
    print_end("dpo", cfg, begin, start, losses, found)


# ---- PPO's clip and GRPO: python rlhf.py grpo ----------------------------------------------------
# To draw a batch costs more than a step on it, so take several steps. After the first the policy is
# not the one that wrote it: A is multiplied by ratio, pi over pi as it was. PPO's clip (Schulman et
# al. 2017) ends the slope of a word whose ratio has moved by more than clip in the direction of A.
# GRPO (Shao et al. 2024) takes A from a group of texts on one prompt, here the whole batch, and has
# the leash in the loss: k3 = e^z - z - 1, z = lp of the start - lp. Its slope is at most 1.

@dataclass
class Grpo(Best):
    """Several steps on each batch of sentences, with PPO's clip and GRPO's leash, and without."""
    policy_lr: float = 0.001  # learning rate of the policy
    beta: float = 0.3       # strength of the leash
    clip_ratio: float = 0.2  # largest change of a word's probability, as a share
    reuse: int = 4          # steps on each batch of sentences


def grpo_batch(cfg, step, dtype=np.float32, policy=None, start=None, reward=true_reward):
    """Sentences of the policy -> ids, lp under the policy, under the start (B, T), A (B, 1)."""
    start = start or init_params(cfg, np.random.default_rng(cfg.seed), dtype)
    policy = policy or start
    ids = compose(policy, cfg, np.random.default_rng((cfg.seed, step)), cfg.batch_size)
    score = reward(ids)
    A = (score - score.mean()) / (score.std() + 1e-6)
    return ids, log_probs(policy, ids, cfg), log_probs(start, ids, cfg), A[:, None].astype(dtype)


def grpo_loss_and_grads(params, batch, cfg):
    """mean of beta k3 - min(ratio A, clipped ratio A) over all words. Slopes with respect to lp:
    k3 has 1 - e^z; the minimum has ratio A, or 0 where it is the clipped one."""
    ids, before, start, A = batch
    logits, policy = policy_forward(params, ids[:, :-1], cfg)
    log_p, cache = log_prob_forward(logits, ids[:, 1:].ravel())
    mask = mask_of(ids)[:, 1:]
    log_p = log_p.reshape(mask.shape) * mask
    ratio = np.exp(log_p - before)                      # 1 in the first step on a batch
    clipped = np.clip(ratio, 1 - cfg.clip_ratio, 1 + cfg.clip_ratio) * A
    z = start - log_p
    k3 = np.exp(z) - z - 1
    weights = mask / mask.sum()
    loss = (weights * (cfg.beta * k3 - np.minimum(ratio * A, clipped))).sum()
    slope = cfg.beta * (1 - np.exp(z)) - np.where(ratio * A <= clipped, ratio * A, 0)
    return loss, policy_backward(log_prob_backward((weights * slope).ravel(), cache), policy)


def run_grpo(cfg):
    """With the clip of the configuration, then without; how far probabilities move on a batch."""
    begin, rows, metrics = time.perf_counter(), [], {}
    start, _, reward, _, losses = prepare(cfg)
    if len(losses) < cfg.steps:                         # Ctrl-C
        return print_end("grpo", cfg, begin, start, losses, metrics)
    for name, clip in (("clip", cfg.clip_ratio), ("free", 1e6)):
        policy, batch = {key: w.copy() for key, w in start.items()}, []

        def reused_batch(cfg, step):
            if (step - 1) % cfg.reuse == 0:
                batch[:] = grpo_batch(cfg, step, policy=policy, start=start, reward=reward)
            return batch

        def note():
            found = outcome(policy, start, reward, cfg)
            ratio = np.exp(log_probs(policy, batch[0], cfg) - batch[1])
            moved = (np.abs(ratio - 1) > 0.2)[mask_of(batch[0])[:, 1:] > 0].mean()
            rows.append((name, found["proxy"], found["true"], found["kl"]))
            metrics.update({f"{key}_{name}": found[key] for key in ("proxy", "true", "kl")})
            metrics[f"moved_{name}"] = float(moved)
            return f"  true {found['true']:5.2f}  KL {found['kl']:5.1f}  moved {moved:.0%}"
        print(f"\nPolicy with clip {clip:g}; moved: share of words whose probability the steps on a"
              "\nbatch have changed by more than a fifth")
        losses = train(policy, replace(cfg, lr=cfg.policy_lr, clip_ratio=clip), reused_batch,
                       grpo_loss_and_grads, note)
        check_finite(metrics[f"proxy_{name}"], policy)
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print("\nRows: tenths of trainings, by KL. Columns: -4 to 8, p proxy, t true reward, @ both\n"
          "              KL")
    draw_rewards(rows, -4, 8, 0.2)
    print_end("grpo", cfg, begin, start, losses, metrics)


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


def fits(cfg):
    """The constraints on --dim and, where there are any, --betas."""
    found = getattr(cfg, "betas", "0")
    betas = found.split(",")
    ok = all(re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", beta) for beta in betas)
    different = ok and len(set(map(float, betas))) == len(betas)
    return [(cfg.dim % cfg.heads == 0, "--dim", f"a multiple of --heads {cfg.heads}", cfg.dim),
            (different, "--betas", "different numbers, 0 or more, as in 0,0.3,1", found)]


CONSTRAINTS = dict.fromkeys((Config, Best, Reward, Comparisons, Dpo, Grpo), fits)
GRADCHECK = {"log_prob": "logits 3 5, targets<5 3", "preference": "margin 5",
             "bag": "w 5, differences<3 7 5, l2=0.3"}

TASKS = {"leash": Task(Config, init_params, make_batch, loss_and_grads, main),
         "best": Task(Best, None, None, None, run_best),
         "reward": Task(Reward, init_params, pairs_batch, reader_loss_and_grads, run_reward),
         "comparisons": Task(Comparisons, init_bag, bag_batch, reward_loss_and_grads,
                             run_comparisons),
         "dpo": Task(Dpo, init_params, dpo_batch, dpo_loss_and_grads, run_dpo),
         "grpo": Task(Grpo, init_params, grpo_batch, grpo_loss_and_grads, run_grpo)}

if __name__ == "__main__":
    run(TASKS)
