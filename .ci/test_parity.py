"""The same in PyTorch: every operation, every model of every lesson built from torch.nn, optimizers, schedules.

Values and gradients in float64. OPERATIONS has a row for every operation, MODELS rows for every model: a lesson
without rows there fails. A row's function does what the lesson does with PyTorch's own layers and autograd.
"""
import functools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lessons import NEW, load, source, top_level

torch = pytest.importorskip("torch")
F, nn = torch.nn.functional, torch.nn
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

LESSONS = [name.removesuffix(".py") for name in NEW]        # rebuilt ones; others come when they are
TOLERANCE = 1e-10
differences = []


def lesson(name):
    """A lesson as a module."""
    return load(f"{name}.py")


@functools.cache
def definitions(stem):
    """The top level of a lesson -> {name: its text}."""
    return top_level(source(f"{stem}.py"))


def having(*names):
    """The lessons that define the first of these; one of those in which all of them have the same text."""
    found = [stem for stem in reversed(LESSONS) if names[0] in definitions(stem)]
    return sorted({tuple(map(definitions(stem).get, names)): stem for stem in found}.values())


def array(values):
    """Numbers or a tensor as an array."""
    return values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def differ(what, ours, theirs):
    """Hold two arrays equal, relative to the largest entry; keep the difference for the report."""
    ours, theirs = array(ours), array(theirs)
    assert ours.shape == theirs.shape, f"{what}: {ours.shape}, PyTorch {theirs.shape}"
    largest = np.abs(theirs).max()
    assert largest > 0, f"{what} is 0: nothing is compared"
    differences.append((float(np.abs(ours - theirs).max() / largest), what))
    assert differences[-1][0] < TOLERANCE, f"{what} differs by {differences[-1][0]:.1e}"


@pytest.fixture(scope="module", autouse=True)
def report(request):
    """At the end print the largest difference (with pytest -n 2 each worker prints that of its own share)."""
    yield
    worker = getattr(request.config, "workerinput", {}).get("workerid", "")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    if differences:
        largest, what = max(differences)
        with capture.global_and_fixture_disabled():
            print(f"\n{worker}{': ' * bool(worker)}{len(differences)} comparisons with PyTorch {torch.__version__}, "
                  f"largest difference {largest:.1e} ({what})", file=sys.stderr if worker else sys.stdout, flush=True)


rng = np.random.default_rng(0)


def normal(*shape):
    """Standard normal numbers."""
    return rng.standard_normal(shape)


def call(module, named, *inputs, **options):
    """What a module of torch.nn with these parameters, all that it has, makes of the inputs."""
    assert named.keys() == dict(module.named_parameters()).keys()
    return torch.func.functional_call(module, named, inputs, options)


def part(p, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


# ---- operations ------------------------------------------------------------------------------------------------------

def channels_first(function):
    """A function of PyTorch for images (N, C, H, W), for ours of (N, H, W, C)."""
    return lambda x, *args: function(x.permute(0, 3, 1, 2), *args).permute(0, 2, 3, 1)


def torch_batchnorm(x, gamma, beta, running=None):
    """F.batch_norm in training, or with given statistics."""
    if running is None:
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5)
    return F.batch_norm(x, *map(torch.tensor, running), gamma, beta, training=False, eps=1e-5)


def torch_conv(x, W, stride=1, padding=None, dilation=1, groups=1):
    """F.conv2d of images; padding None keeps the size."""
    padding = len(W) // 2 if padding is None else padding
    return channels_first(F.conv2d)(x, W.permute(3, 2, 0, 1), None, stride, padding, dilation, groups)


def torch_dropout(x, keep, rate):
    """F.dropout, which draws the same mask as kept."""
    torch.manual_seed(0)
    return F.dropout(x, rate)


def kept(rate, *shape):
    """What F.dropout keeps."""
    return torch_dropout(torch.ones(shape), None, rate).numpy() > 0


def torch_rope(x, cos, sin):
    """Rotation of each pair as a product of complex numbers."""
    a, b = x.chunk(2, dim=3)
    y = torch.complex(a, b) * torch.complex(cos, sin)
    return torch.cat([y.real, y.imag], dim=3)


def alibi_bias(H, T):
    """-slope_h (t - s) for s <= t, else -inf.   -> (H, T, T)."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    bias = [-distance * 2.0 ** (-8 * (h + 1) / H) for h in range(H)]
    return torch.stack(bias).masked_fill(distance < 0, -math.inf)


def recurrent(kind, x, weights, state=None, lengths=None):
    """nn.RNN, nn.LSTM or nn.GRU; x (T, N, D) or, with lengths (N,), the first steps of it. weights: Wx, Wh, b (a GRU
    has bn, too) of "l0", "l1", ... and perhaps "l0_reverse".   -> h (T, N, H), last states, of all layers."""
    named = {}
    for layer, (Wx, Wh, b, *bn) in weights.items():
        zeros = torch.zeros(len(b) - sum(map(len, bn)))
        named.update({f"weight_ih_{layer}": Wx.T, f"weight_hh_{layer}": Wh.T, f"bias_ih_{layer}": b,
                      f"bias_hh_{layer}": torch.cat([zeros, *bn])})
    both = "l0_reverse" in weights
    net = getattr(nn, kind)(x.shape[2], len(Wh), len(weights) // (1 + both), bidirectional=both)
    if lengths is None:
        return call(net, named, x, state)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    h, state = call(net, named, packed, state)
    return nn.utils.rnn.pad_packed_sequence(h, total_length=len(x))[0], state


def torch_cell(kind):
    """A layer of kind on z, as our functions get it: z = x Wx + b is x, if Wx is 1 and b 0."""
    def layer(z, h0, *rest):
        c0, (Wh, *bn) = (rest[:1], rest[1:]) if kind == "LSTM" else ((), rest)
        state = (h0[None], c0[0][None]) if c0 else h0[None]
        weights = {"l0": (torch.eye(z.shape[2]), Wh, torch.zeros(z.shape[2]), *bn)}
        h, last = recurrent(kind, z, weights, state)
        return (h, last[1][0]) if c0 else h
    return layer


def torch_lstm_layer(x, state, p):
    """As torch_cell, with x (N, T, D), state (2, N, H) of h and c, p: Wx, Wh, b."""
    h, last = recurrent("LSTM", x.transpose(0, 1), {"l0": (p["Wx"], p["Wh"], p["b"])}, (state[:1], state[1:]))
    return h.transpose(0, 1), torch.cat(last)


def torch_masked_lstm(z, h0, c0, Wh, mask):
    """A packed sequence; h of padding is the last h before it."""
    weights = {"l0": (torch.eye(z.shape[2]), Wh, torch.zeros(z.shape[2]))}
    h, (last, c) = recurrent("LSTM", z, weights, (h0[None], c0[None]), mask.sum(dim=(0, 2)))
    return torch.where(mask, h, last), c[0]


def attention_named(prefix, p):
    """The parameters of an nn.MultiheadAttention; Wq and Wkv may be apart."""
    W = p["Wqkv"] if "Wqkv" in p else torch.cat([p["Wq"], p["Wkv"]], dim=1)
    b = p["bqkv"] if "bqkv" in p else torch.cat([p["bq"], p["bkv"]])
    return {f"{prefix}in_proj_weight": W.T, f"{prefix}in_proj_bias": b, f"{prefix}out_proj.weight": p["Wo"].T,
            f"{prefix}out_proj.bias": p["bo"]}


def torch_multihead(x, p, heads, B, mask, memory=None):
    """nn.MultiheadAttention; mask (B, 1, 1, S) is one of padding."""
    x = x.reshape(B, -1, x.shape[1])
    memory = x if memory is None else memory.reshape(B, -1, x.shape[2])
    masks = dict(key_padding_mask=~mask[:, 0, 0]) if mask.ndim == 4 else dict(attn_mask=~mask)
    layer = nn.MultiheadAttention(x.shape[2], heads, batch_first=True)
    return call(layer, attention_named("", p), x, memory, memory, **masks)[0].flatten(0, 1)


def torch_attend(h, k, values, mask, p):
    """The context of additive scores, if p has weights for them, else of products."""
    if "u" in p:
        scores = (torch.tanh((h @ p["Wq"])[:, :, None] + k[:, None]) * p["u"]).sum(dim=3)
        return scores.masked_fill(~mask[:, None], -math.inf).softmax(dim=2) @ values
    return F.scaled_dot_product_attention(h, k, values, mask[:, None], scale=1.0)


def torch_scores(h, values, mask, p):
    """The same with keys from the values: by a matrix, or by a number."""
    k = values @ p["Wk"] if p["Wk"].ndim == 2 else values * p["Wk"]
    return torch_attend(h, k, values, mask, p)


def inner_gradient(M, k, v, c):
    """The slope of c |M k|^2 / 2 - <M k, v> by M, from autograd.   M (B, p, d), k (B, d), v (B, p)."""
    y = torch.einsum("bpd,bd->bp", M, k)
    return torch.autograd.grad((c / 2 * y * y - y * v).sum(), M, create_graph=True)[0]


def torch_memory(k, q, v, eta, alpha, c, step):
    """Read M q, then M <- alpha M - eta step(slope, t): a loop that autograd differentiates.   (T, B, ...)."""
    M, y = torch.zeros(len(k[0]), v.shape[2], k.shape[2], requires_grad=True), []
    for t in range(len(k)):
        y.append(torch.einsum("bpd,bd->bp", M, q[t]))
        M = alpha[t, :, None, None] * M + step(inner_gradient(M, k[t], v[t], c), t, eta[t, :, None, None])
    return torch.stack(y)


def torch_momentum_memory(k, q, v, eta, alpha, mu, c):
    """Momentum as the inner rule; without it if mu is 0."""
    S = [0.0]

    def step(g, t, eta):
        S.append(mu[t, :, None, None] * S[-1] - eta * g)
        return S[-1]
    return torch_memory(k, q, v, eta, alpha, c, step)


def torch_plain_memory(k, q, v, eta, c):
    """Hebb's rule or the delta rule: gradient descent."""
    return torch_memory(k, q, v, eta, torch.ones_like(eta), c, lambda g, t, eta: -eta * g)


def torch_adam_memory(k, q, v, eta, alpha, c, beta1, beta2):
    """Adam as the inner rule, 1e-6 under the root."""
    slopes = []

    def average(values, beta):
        weights = [(1 - beta) * beta ** (len(values) - 1 - i) for i in range(len(values))]
        return sum(w * value for w, value in zip(weights, values)) / sum(weights)

    def step(g, t, eta):
        slopes.append(g)
        return -eta * average(slopes, beta1) / (average([g * g for g in slopes], beta2) + 1e-6).sqrt()
    return torch_memory(k, q, v, eta, alpha, c, step)


def torch_cms(k, v, eta, alpha, w, periods):
    """A memory per level; each gathers slopes and steps when its period is over."""
    M = [torch.zeros(len(k[0]), v.shape[2], k.shape[2], requires_grad=True) for _ in periods]
    gathered, outputs = [0.0 for _ in periods], []
    for t in range(len(k)):
        M = [level.clone() for level in M]                  # so that no level is a function of another
        y = sum(w[i] * torch.einsum("bpd,bd->bp", level, k[t]) for i, level in enumerate(M))
        outputs.append(y)
        slopes = torch.autograd.grad(((y - v[t]) ** 2 / 2).sum(), M, create_graph=True)
        for i, period in enumerate(periods):
            gathered[i] = gathered[i] + slopes[i]
            if (t + 1) % period == 0:
                M[i], gathered[i] = alpha[i] * M[i] - eta[i] * gathered[i], 0.0
    return torch.stack(outputs)


def memory_case(*gates, **numbers):
    """Inputs of a memory."""
    k, q, v = (normal(4, 3, size) for size in (6, 6, 5))
    return dict(k=k, q=q, v=v, **{gate: rng.uniform(0.1, 0.9, (4, 3)) for gate in gates}, **numbers)


def qkv(S=5):
    """Queries, keys, values (B, H, T or S, d)."""
    return dict(q=normal(2, 3, 5, 6), k=normal(2, 3, S, 6), v=normal(2, 3, S, 6))


SCALED = F.scaled_dot_product_attention
NORM = dict(gamma=normal(5), beta=normal(5))
RUNNING = dict(running=(normal(5), rng.uniform(0.5, 2, 5)))
ANGLES = np.outer(np.arange(5), [1, 0.1, 0.01])
MULTIHEAD = dict(Wq=normal(6, 6), bq=normal(6), Wkv=normal(6, 12), bkv=normal(12), Wo=normal(6, 6), bo=normal(6))
PADDING = np.arange(7) < np.array([4, 7])[:, None]
STATES = dict(h=normal(2, 3, 6), k=normal(2, 7, 6), values=normal(2, 7, 5), mask=PADDING)
CELL = dict(z=normal(6, 4, 20), h0=normal(4, 5), c0=normal(4, 5), Wh=normal(5, 20))
POOL = channels_first(F.max_pool2d)

# name of the operation, and perhaps a variant: (inputs in forward's order; floats get gradients), the same in PyTorch
OPERATIONS = {
    "linear": (dict(x=normal(3, 5), W=normal(5, 7), b=normal(7)), lambda x, W, b: F.linear(x, W.T, b)),
    "bias": (dict(x=normal(2, 3, 4, 5), b=normal(5)), torch.add),
    "relu": (dict(x=normal(3, 5)), F.relu),
    "sigmoid": (dict(x=normal(3, 5)), torch.sigmoid),
    "tanh": (dict(x=normal(3, 5)), torch.tanh),
    "gelu": (dict(x=normal(3, 5)), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (dict(x=normal(3, 5)), F.silu),
    "swiglu": (dict(gate=normal(3, 5), up=normal(3, 5)), lambda gate, up: F.silu(gate) * up),
    "dropout": (dict(x=normal(3, 5), keep=kept(0.4, 3, 5), rate=0.4), torch_dropout),
    "layernorm": (dict(x=normal(3, 5), **NORM), lambda x, gamma, beta: F.layer_norm(x, (5,), gamma, beta, 1e-5)),
    "rmsnorm": (dict(x=normal(3, 5), gamma=normal(5)), lambda x, gamma: F.rms_norm(x, (5,), gamma, 1e-5)),
    "unit": (dict(x=normal(3, 5)), lambda x: F.normalize(x, dim=1)),
    "batchnorm": (dict(x=normal(6, 5), **NORM), torch_batchnorm),
    "batchnorm evaluation": (dict(x=normal(6, 5), **NORM, **RUNNING), torch_batchnorm),
    "embedding": (dict(ids=rng.integers(0, 5, (3, 4)), E=normal(5, 2)), F.embedding),
    "gather": (dict(x=normal(3, 5, 2), ids=rng.random((3, 5)).argsort(axis=1)[:, :3]),
               lambda x, ids: x.gather(1, ids[:, :, None].expand(-1, -1, 2))),
    "mse": (dict(y=normal(3, 5), targets=normal(3, 5)), F.mse_loss),
    "binary_cross_entropy": (dict(logits=normal(3, 5), targets=rng.integers(0, 2, (3, 5)).astype(float)),
                             F.binary_cross_entropy_with_logits),
    "softmax_cross_entropy": (dict(logits=normal(3, 5), targets=rng.integers(0, 5, 3)), F.cross_entropy),
    "smoothed_cross_entropy": (dict(logits=normal(3, 5), targets=rng.integers(0, 5, 3), label_smoothing=0.3),
                               lambda z, t, s: F.cross_entropy(z, t, label_smoothing=s)),
    "penalty": (dict(W=normal(3, 5), l1=0.3, l2=0.2),
                lambda W, l1, l2: l1 * W.abs().sum() + l2 / 2 * W.pow(2).sum()),
    "causal_attention": (qkv(), lambda q, k, v: SCALED(q, k, v, is_causal=True)),
    "bidirectional_attention": (qkv(), SCALED),
    "tiled_attention": (qkv() | dict(tiles=[(2, 1), (0, 0), (2, 2), (1, 1), (1, 0), (2, 0)], tile=2),
                        lambda q, k, v, *_: SCALED(q, k, v, is_causal=True)),
    "tiled_attention window": (qkv() | dict(tiles=[(0, 0), (1, 1), (1, 0), (2, 2), (2, 1)], tile=2),
                               lambda q, k, v, *_: SCALED(q, k, v, torch.tensor(
                                   np.tri(5, dtype=bool)
                                   & (np.arange(5) // 2 > np.arange(5)[:, None] // 2 - 2)))),
    "row_block_attention": (qkv() | dict(block=2), lambda q, k, v, _: SCALED(q, k, v, is_causal=True)),
    "attention": (qkv(7), SCALED),
    "attention padding": (qkv(7) | dict(mask=PADDING[:, None, None]), SCALED),
    "attention causal": (qkv() | dict(mask=np.tri(5, dtype=bool)), SCALED),
    "attention random": (qkv(7) | dict(mask=(rng.random((2, 3, 5, 7)) < 0.6) | np.eye(5, 7, dtype=bool)), SCALED),
    "alibi_attention": (qkv(), lambda q, k, v: SCALED(q, k, v, alibi_bias(*q.shape[1:3]))),
    "multihead": (dict(x=normal(10, 6), p=MULTIHEAD, heads=3, B=2, mask=PADDING[:, None, None], memory=normal(14, 6)),
                  torch_multihead),
    "self_attention": (dict(x=normal(10, 6), p=MULTIHEAD, heads=3, B=2, mask=np.tri(5, dtype=bool)), torch_multihead),
    "additive_attention": (STATES | dict(p=dict(Wq=normal(6, 6), u=normal(6))), torch_attend),
    "dot_attention": (STATES | dict(p={}), torch_attend),
    "project": (dict(x=normal(2, 3, 5), W=normal(5, 4)), lambda x, W: F.linear(x, W.T)),
    "scale": (dict(x=normal(2, 3, 5), s=normal(1)), lambda x, s: x * s),
    "masked_softmax": (dict(scores=normal(2, 3, 7), mask=PADDING),
                       lambda scores, mask: scores.masked_fill(~mask[:, None], -math.inf).softmax(dim=2)),
    "rope": (dict(x=normal(2, 3, 5, 6), cos=np.cos(ANGLES), sin=np.sin(ANGLES)), torch_rope),
    "conv": (dict(x=normal(2, 6, 5, 3), W=normal(3, 3, 3, 4)), torch_conv),
    "conv 5": (dict(x=normal(2, 7, 6, 3), W=normal(5, 5, 3, 4)), torch_conv),
    "conv_loop": (dict(x=normal(2, 6, 5, 3), W=normal(3, 3, 3, 4)), torch_conv),
    "maxpool": (dict(x=normal(2, 6, 4, 3)), lambda x: POOL(x, 2)),
    "fast_maxpool": (dict(x=normal(2, 6, 4, 3)), lambda x: POOL(x, 2)),
    "fast_maxpool overlapping": (dict(x=normal(2, 7, 6, 3), k=3, stride=2, padding=1), POOL),
    "avgpool": (dict(x=normal(2, 6, 4, 3)), channels_first(lambda x: F.avg_pool2d(x, 2))),
    "globalpool": (dict(x=normal(2, 6, 4, 3)), lambda x: F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1).flatten(1)),
    "groupnorm": (dict(x=normal(2, 5, 3, 6), gamma=normal(6), beta=normal(6), groups=3),
                  channels_first(lambda x, gamma, beta, n: F.group_norm(x, n, gamma, beta, 1e-5))),
    "lstm": (CELL, torch_cell("LSTM")),
    "lstm_layer": (dict(x=normal(4, 6, 3), state=normal(2, 4, 5), p=dict(Wx=normal(3, 20), Wh=normal(5, 20),
                                                                         b=normal(20))), torch_lstm_layer),
    "masked_lstm": (CELL | dict(mask=np.arange(6)[:, None, None] < np.array([6, 2, 5, 1])[:, None]),
                    torch_masked_lstm),
    "gru": (dict(z=normal(6, 4, 15), h0=normal(4, 5), Wh=normal(5, 15), bn=normal(5)), torch_cell("GRU")),
    "rnn": (dict(z=normal(6, 4, 5), h0=normal(4, 5), Wh=normal(5, 5)), torch_cell("RNN")),
    "gate one": (dict(junk=rng.integers(0, 2, (4, 3)), z=normal(1)), lambda junk, z: z.sigmoid()[0 * junk]),
    "gate two": (dict(junk=rng.integers(0, 2, (4, 3)), z=normal(2)), lambda junk, z: z.sigmoid()[junk]),
    "cms": (dict(k=normal(7, 3, 6), v=normal(7, 3, 5), eta=normal(3), alpha=normal(3), w=normal(3),
                 periods=(1, 2, 3)), torch_cms),
}
for name in ("batchnorm2d", "fast_batchnorm2d"):
    OPERATIONS[name] = dict(x=normal(3, 4, 2, 5), **NORM), channels_first(torch_batchnorm)
    OPERATIONS[f"{name} evaluation"] = dict(x=normal(3, 4, 2, 5), **NORM, **RUNNING), channels_first(torch_batchnorm)
for k, *numbers in ((3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (2, 1, 0, 2, 1), (3, 1, 1, 1, 2), (3, 2, 2, 2, 3),
                    (1, 2, 0, 1, 1), (2, 3, 3, 1, 2), (3, 1, 1, 1, 6)):
    more = dict(zip(("stride", "padding", "dilation", "groups"), numbers))
    label = " ".join(["conv2d", f"k={k}", *(f"{name}={n}" for name, n in more.items())])
    OPERATIONS[label] = dict(x=normal(2, 9, 8, 6), W=normal(k, k, 6 // more["groups"], 12), **more), torch_conv
for c in (0, 1, 2):
    OPERATIONS[f"memory c={c}"] = memory_case("eta", c=c), torch_plain_memory
    OPERATIONS[f"momentum_memory c={c}"] = memory_case("eta", "alpha", "mu", c=c), torch_momentum_memory
    OPERATIONS[f"adam_memory c={c}"] = memory_case("eta", "alpha", c=c, beta1=0.3 * c, beta2=0.7), torch_adam_memory


def gan_net(p, player, x, slope):
    """A network of gan.py: two hidden layers of leaky ReLU."""
    for i in (1, 2):
        x = F.leaky_relu(F.linear(x, p[f"{player}_W{i}"].T, p.get(f"{player}_b{i}")), slope)
    return F.linear(x, p[f"{player}_W3"].T, p.get(f"{player}_b3"))


def input_gradient_case():
    """Weights, and the slopes of leaky ReLU that they give for GAN_POINTS."""
    W1, W2, W3 = normal(3, 6), normal(6, 6), normal(6, 1)
    m1 = np.where(GAN_POINTS @ W1 > 0, 1, 0.2)
    m2 = np.where(m1 * (GAN_POINTS @ W1) @ W2 > 0, 1, 0.2)
    return dict(masks=(m1, m2), W1=W1, W2=W2, W3=W3)


def torch_input_gradient(masks, *weights):
    """dD/dx of the net with these weights, which autograd differentiates once more."""
    x = torch.tensor(GAN_POINTS, requires_grad=True)
    logits = gan_net({f"d_W{i}": W for i, W in enumerate(weights, 1)}, "d", x, 0.2)
    return torch.autograd.grad(logits.sum(), x, create_graph=True)[0]


GAN_POINTS = normal(5, 3)
SQUARE = normal(3, 5)
LOGITS = dict(logits=normal(3, 5), targets=rng.integers(0, 2, (3, 5)).astype(float))
OPERATIONS |= {
    "leaky_relu": (dict(x=normal(3, 5)), lambda x: F.leaky_relu(x, 0.2)),
    "hinge": (LOGITS, lambda a, t: F.margin_ranking_loss(a, torch.zeros_like(a), 2 * t - 1, margin=1)),
    "wasserstein": (LOGITS, lambda a, t: torch.where(t > 0, -a, a).mean()),
    "minimax": (LOGITS, lambda a, t: -F.binary_cross_entropy_with_logits(a, 1 - t)),
    "input_gradient": (input_gradient_case(), torch_input_gradient),
    "gradient_penalty": (dict(g=normal(5, 3), target=0.7), lambda g, target: ((g.norm(dim=1) - target) ** 2).mean()),
    "spectral_norm": (dict(W=SQUARE, vectors=(np.linalg.svd(SQUARE)[2][0], np.linalg.svd(SQUARE)[0][:, 0])),
                      lambda W, vectors: W / torch.linalg.matrix_norm(W, 2)),
}

NO_GRADIENT = {"targets", "cos", "sin"}
BACKWARD = {"alibi_attention": "causal_attention"}          # where it has not the name of forward

# Operations of which torch.nn has neither a layer nor a function. Those with a row above are compared with a formula
# that autograd differentiates; those without one would not be compared, but all have one.
NO_COUNTERPART = {
    "penalty": "weight decay is a part of PyTorch's optimizers; |W| it does not penalize",
    "swiglu": "torch.nn has SiLU, and GLU with a sigmoid",
    "rope": "torch.nn has no positions; the row multiplies complex numbers",
    "additive_attention": "torch.nn has scaled products only",
    "gate": "a sigmoid, then an embedding",
    "memory": "fast weights: the row is a loop, whose inner slopes are from autograd, too",
    "momentum_memory": "as memory",
    "adam_memory": "as memory: torch.optim cannot be differentiated",
    "lora": "W and b are frozen and get no gradient: the models of lora.py compare those of A and B",
    "cms": "as memory",
}


def torch_rotary_multihead(x, p, memory, heads, B, mask, t):
    """F.scaled_dot_product_attention of rotated queries and keys; pairs are neighbours, as complex numbers."""
    D = x.shape[1]
    q = (x @ p["Wqkv"][:, :D]).unflatten(0, (B, -1)).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = ((memory @ w).unflatten(0, (B, -1)).unflatten(2, (heads, -1)).transpose(1, 2)
            for w in p["Wqkv"][:, D:].chunk(2, dim=1))
    d = D // heads
    turn = torch.polar(torch.ones(d // 2), t * 10000.0 ** (-torch.arange(0, d, 2) / d))
    q, k = (torch.view_as_real(torch.view_as_complex(a.unflatten(3, (-1, 2)).contiguous()) * turn).flatten(3)
            for a in (q, k))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2).flatten(0, 1) @ p["Wo"]


def torch_swiglu_mlp(x, p):
    """F.silu of one half of x W1 times the other half."""
    gate, up = (x @ p["W1"]).chunk(2, dim=1)
    return (F.silu(gate) * up) @ p["W2"]


def torch_pointer(x, p, memory, B):
    """Products of queries with keys of every position and the one before it."""
    m = memory.unflatten(0, (B, -1))
    m = torch.cat([m, F.pad(m, (0, 0, 1, 0))[:, :-1]], dim=2)
    return (x @ p["Wq"]).unflatten(0, (B, -1)) @ (m @ p["Wk"]).transpose(1, 2) / x.shape[1] ** 0.5


def torch_copy_cross_entropy(z, right, V, label_smoothing):
    """-log of the sum of the right entries of a softmax; of the first V for the smoothing."""
    log_p = z.log_softmax(dim=1)
    target = log_p.masked_fill(~right, -math.inf).logsumexp(dim=1).mean()
    return -(1 - label_smoothing) * target - label_smoothing * log_p[:, :V].mean()


ATTENTION_PARTS = dict(Wqkv=normal(12, 36), Wo=normal(12, 12))
OPERATIONS |= {
    "rotary_multihead cross": (dict(
        x=normal(10, 12), p=ATTENTION_PARTS, memory=normal(14, 12), heads=3, B=2, mask=PADDING[:, None, None],
        t=np.zeros((1, 1), int)), torch_rotary_multihead),
    "rotary_multihead self": (dict(
        x=normal(10, 12), p=ATTENTION_PARTS, memory=normal(10, 12), heads=3, B=2, mask=np.tri(5, dtype=bool),
        t=np.arange(5)[:, None]), torch_rotary_multihead),
    "swiglu_mlp": (dict(x=normal(5, 6), p=dict(W1=normal(6, 8), W2=normal(4, 6))), torch_swiglu_mlp),
    "pointer": (dict(x=normal(10, 6), p=dict(Wq=normal(6, 6), Wk=normal(12, 6)), memory=normal(14, 6), B=2),
                torch_pointer),
    "copy_cross_entropy": (dict(z=normal(4, 9), right=np.eye(4, 9, dtype=bool) | (rng.random((4, 9)) < 0.3), V=5,
                                label_smoothing=0.3), torch_copy_cross_entropy)}


TORCH_NAMES = {"power": "pow", "broadcast": "broadcast_to"}
LAST_AXIS = {"softmax": F.softmax, "log_softmax": F.log_softmax}


def torch_operation(op, x, *args):
    """An operation of autodiff.py."""
    if op == "normalize":
        return F.layer_norm(x, x.shape[-1:])
    if op in LAST_AXIS:
        return LAST_AXIS[op](x, dim=-1)
    options = {"keepdim": True} if op in ("sum", "mean") else {}
    return getattr(torch, TORCH_NAMES.get(op, op))(x, *args, **options)


for op, *args in (
        ("add", normal(3, 5), normal(3, 5)), ("mul", normal(3, 5), normal(3, 5)), ("div", normal(3, 5), normal(3, 5)),
        ("power", normal(3, 5) ** 2, 1.5), ("sqrt", normal(3, 5) ** 2), ("exp", normal(3, 5)),
        ("log", normal(3, 5) ** 2), ("relu", normal(3, 5)), ("matmul", normal(2, 3, 5), normal(2, 5, 4)),
        ("transpose", normal(2, 3, 5), 0, 2), ("reshape", normal(3, 4), (2, 6)),
        ("broadcast", normal(3, 1), (4, 3, 5)), ("sum", normal(3, 4, 5), (0, 2)), ("mean", normal(3, 4, 5), (0, 2)),
        ("softmax", normal(2, 3, 5)), ("log_softmax", normal(2, 3, 5)), ("normalize", normal(2, 3, 5))):
    OPERATIONS[f"operation {op}"] = dict(op=op) | {f"input {k}": x for k, x in enumerate(args)}, torch_operation


def torch_layer(x, W, B, residual=True):
    """One head over the rows of B images, then an MLP, prenorm."""
    x = x.unflatten(0, (B, -1))
    q, k, v = (F.layer_norm(x, x.shape[-1:]) @ W[s] for s in "qkv")
    y = F.scaled_dot_product_attention(q, k, v) @ W["o"]
    x = x + y if residual else y
    y = F.relu(F.layer_norm(x, x.shape[-1:]) @ W["u"]) @ W["d"]
    return (x + y if residual else y).flatten(0, 1)


OPERATIONS["layer"] = dict(
    x=normal(10, 6), W={s: normal(6, 6) for s in "qkvo"} | {"u": normal(6, 8), "d": normal(8, 6)}, B=2), torch_layer


D = torch.distributions


def torch_log_weight(logits, z, log_var, e, targets):
    log_x = D.Bernoulli(logits=logits).log_prob(targets[:, None]).sum(dim=2)
    log_q = D.Normal(0.0, 1.0).log_prob(e) - log_var[:, None] / 2       # the density of z = mu + sigma e
    return log_x + (D.Normal(0.0, 1.0).log_prob(z) - log_q).sum(dim=2)


def torch_gaussian_kl(mu, log_var):
    return D.kl_divergence(D.Normal(mu, (log_var / 2).exp()), D.Normal(0.0, 1.0)).sum(dim=1).mean()


OPERATIONS |= {
    "reparameterize": (dict(mu=normal(3, 5), log_var=normal(3, 5), e=normal(3, 5)),
                       lambda mu, log_var, e: mu + (log_var / 2).exp() * e),
    "gaussian_kl": (dict(mu=normal(3, 5), log_var=normal(3, 5)), torch_gaussian_kl),
    "bernoulli": (dict(logits=normal(3, 5), targets=rng.integers(0, 2, (3, 5)).astype(float)),
                  lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="sum") / 3),
    "log_weight": (dict(logits=normal(3, 2, 7), z=normal(3, 2, 5), log_var=normal(3, 5), e=normal(3, 2, 5),
                        targets=rng.integers(0, 2, (3, 7)).astype(float)), torch_log_weight)}


def torch_experts(x, w, W1, W2, chosen):
    """All experts on all tokens; the weights are 0 where an expert is not chosen."""
    every = torch.einsum("neh,ehd->ned", F.relu(torch.einsum("nd,edh->neh", x, W1)), W2)
    weights = torch.zeros(len(x), len(W1)).scatter(1, torch.as_tensor(chosen), w)
    return (weights[:, :, None] * every).sum(dim=1)


def torch_balance(p, chosen):
    """E times the product of the shares of tokens and the mean probabilities, summed over the experts."""
    shares = F.one_hot(torch.as_tensor(chosen), p.shape[1]).double().mean(dim=(0, 1))
    return p.shape[1] * shares @ p.mean(dim=0)


CHOSEN = rng.permuted(np.tile(np.arange(4), (5, 1)), axis=1)[:, :2]
ROUTED = dict(p=rng.random((5, 4)) + 0.1, chosen=CHOSEN)
OPERATIONS |= {
    "softmax": (dict(z=normal(3, 5)), lambda z: z.softmax(dim=1)),
    "switch_gate": (ROUTED, lambda p, chosen: p.gather(1, chosen)),
    "shared_gate": (ROUTED, lambda p, chosen: F.normalize(p.gather(1, chosen), p=1, dim=1)),
    "balance": (ROUTED, torch_balance),
    "experts": (dict(x=normal(5, 3), w=normal(5, 2), W1=normal(4, 3, 6), W2=normal(4, 6, 3), chosen=CHOSEN),
                torch_experts)}


def torch_causal_conv(x, W, b):
    """F.conv1d, a filter per channel, with zeros before the first token.   x (T, B, D), W (K, D)."""
    x = F.pad(x.permute(1, 2, 0), (len(W) - 1, 0))
    return F.conv1d(x, W.flip(0).T[:, None], b, groups=len(b)).permute(2, 0, 1)


def torch_scan(a, b):
    """A loop that autograd differentiates."""
    h = [b[0]]
    for t in range(1, len(a)):
        h.append(a[t] * h[-1] + b[t])
    return torch.stack(h)


def torch_selective_scan(u, dt, Bt, Ct, A_log, skip):
    """The same for the states of a selective scan."""
    a = torch.exp(torch.einsum("tbd,nd->tbnd", dt, -A_log.exp()))
    h = torch_scan(a, torch.einsum("tbd,tbn->tbnd", dt * u, Bt))
    return torch.einsum("tbn,tbnd->tbd", Ct, h) + skip * u


def torch_lti(u, dt, Bt, Ct, *rest):
    """A selective scan in which all tokens are alike."""
    shared = (x.expand(*u.shape[:2], -1) for x in (dt, Bt, Ct))
    return torch_selective_scan(u, *shared, *rest)


def torch_ssd(x, log_a, Bt, Ct):
    """The recurrence over states (N, P) of every head, in place of attention."""
    h = torch_scan(log_a.exp().T[:, :, None, None], torch.einsum("htp,tn->thnp", x, Bt))
    return torch.einsum("tn,thnp->htp", Ct, h)


SSM_REST = dict(A_log=normal(6, 4), skip=normal(4))
OPERATIONS |= {
    "causal_conv": (dict(x=normal(5, 3, 4), W=normal(2, 4), b=normal(4)), torch_causal_conv),
    "scan": (dict(a=normal(5, 3, 4), b=normal(5, 3, 4)), torch_scan),
    "selective_scan": (dict(u=normal(5, 3, 4), dt=rng.random((5, 3, 4)), Bt=normal(5, 3, 6), Ct=normal(5, 3, 6),
                            **SSM_REST), torch_selective_scan),
    "lti_conv": (dict(u=normal(5, 3, 4), dt=rng.uniform(0.1, 1, 4), Bt=normal(6), Ct=normal(6), **SSM_REST), torch_lti),
    "ssd": (dict(x=normal(3, 5, 4), log_a=-rng.random((3, 5)), Bt=normal(5, 6), Ct=normal(5, 6)), torch_ssd)}


OPERATIONS["affine"] = (dict(x=normal(3, 5), p=dict(Wo=normal(5, 7), bo=normal(7)), name="o"),
                        lambda x, p, name: F.linear(x, p["Wo"].T, p["bo"]))
LOG_SOFTMAX = dict(logits=normal(3, 5), targets=rng.integers(0, 5, 3))
OPERATIONS |= {"log_prob": (LOG_SOFTMAX, lambda z, t: torch.distributions.Categorical(logits=z).log_prob(t)),
               "preference": (dict(margin=normal(5)), lambda m: -F.logsigmoid(m).mean()),
               "bag": (dict(w=normal(5), differences=rng.integers(-2, 3, (7, 5)), l2=0.3),
                       lambda w, x, l2: -F.logsigmoid(x.double() @ w).mean() + l2 / 2 * w.square().sum())}


def tensor(value, gradient=True):
    """Arrays, or a dict of arrays, as tensors; those of floats get gradients, if they are to."""
    if isinstance(value, dict):
        return {name: tensor(w, gradient) for name, w in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    return torch.tensor(value, requires_grad=gradient and value.dtype.kind == "f")


def all_of(out):
    """An output, or several, as a tuple."""
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("label, stem", [(label, stem) for label in OPERATIONS for stem in having(
    *(f"{label.split()[0]}_{way}" for way in ("forward", "backward")))])
def test_operation(label, stem):
    module, (case, function), name = lesson(stem), OPERATIONS[label], label.split()[0]
    out, cache = getattr(module, name + "_forward")(*case.values())
    tensors = {k: tensor(v, k not in NO_GRADIENT) for k, v in case.items()}
    theirs, loss = all_of(function(*tensors.values())), 0.0
    gen, douts = np.random.default_rng(1), []
    for ours, their in zip(all_of(out), theirs, strict=True):
        differ(f"{stem} {label}", ours, their)
        douts.append(gen.standard_normal(np.shape(ours)))
        loss = loss + (their * torch.tensor(douts[-1])).sum()
    loss.backward()
    grads = getattr(module, BACKWARD.get(name, name) + "_backward")(*douts, cache)
    wanted = {k: v for k, v in tensors.items() if isinstance(v, dict) or getattr(v, "requires_grad", False)}
    for (k, v), g in zip(wanted.items(), all_of(grads), strict=True):
        pairs = [(f"{k}[{key}]", g[key], v[key]) for key in v] if isinstance(v, dict) else [(k, g, v)]
        for what, ours, their in pairs:
            differ(f"{stem} {label}, gradient of {what}", ours, their.grad)


# ---- models: one function per model of a lesson; p: its parameters, batch: its batch, both as tensors -> loss --------

MODELS = {}         # label: (lesson, task or "spine", fields of its Config, function)


def model(stem, task, *variants, **fields):
    """Rows of MODELS for the function below: the fields, changed as each variant says."""
    def add(function):
        for variant in variants or ({},):
            label = " ".join([stem, task, *(f"{name}={value}" for name, value in variant.items())])
            assert label not in MODELS
            MODELS[label] = stem, task, fields | variant, function
        return function
    return add


def options(**choices):
    """All combinations: options(a=(1, 2), b=(3, 4)) -> four dicts."""
    rows = [{}]
    for name, values in choices.items():
        rows = [row | {name: value} for row in rows for value in values]
    return rows


def prepared(label):
    """-> the lesson's loss_and_grads, parameters with noise, so that none is 0, a batch, the Config."""
    stem, task, fields, _ = MODELS[label]
    module = lesson(stem)
    spine = SimpleNamespace(config=module.Config, **{name: getattr(module, name, None) for name in (
        "init_params", "make_batch", "loss_and_grads")})
    row = spine if task == "spine" else module.TASKS[task]
    cfg, gen = row.config(**fields), np.random.default_rng(1)
    params = row.init_params(cfg, np.random.default_rng(0), np.float64)
    params = {name: value + 0.3 * gen.standard_normal(value.shape) for name, value in params.items()}
    return row.loss_and_grads, params, row.make_batch(cfg, 1, np.float64), cfg


def compare(what, loss, grads, their_loss, tensors):
    """Loss and all gradients."""
    their_loss.backward()
    differ(what, loss, their_loss)
    assert grads.keys() == tensors.keys()
    for name, g in grads.items():
        differ(f"{what}, gradient of {name}", g, tensors[name].grad)


# perceptron.py

@model("perceptron", "spine", dict(inputs=2), dict(inputs=3))
def sigmoid_neurons(p, batch, cfg):
    x, targets = batch
    logits = call(nn.Linear(*p["W"].shape), {"weight": p["W"].T, "bias": p["b"]}, x)
    return nn.BCEWithLogitsLoss()(logits, targets)


@model("perceptron", "names", batch_size=20)
@model("perceptron", "mnist", batch_size=5)
def softmax_regression(p, batch, cfg):
    x, targets = batch
    x = x if x.ndim == 2 else F.one_hot(x, len(p["W"])).double()
    logits = call(nn.Linear(*p["W"].shape), {"weight": p["W"].T, "bias": p["b"]}, x)
    return nn.CrossEntropyLoss()(logits, targets)


# mlp.py

ACTIVATIONS = {"relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "gelu": nn.GELU(approximate="tanh"),
               "silu": nn.SiLU()}
LOSSES = {"mse": nn.MSELoss(), "binary": nn.BCEWithLogitsLoss(), "softmax": nn.CrossEntropyLoss()}


def sequential(p, x, activation):
    """nn.Sequential of nn.Linear, nn.BatchNorm1d if p has gammas, the activation."""
    layers, named, last = [], {}, sum(name[0] == "W" for name in p) - 1
    for i in range(last + 1):
        D, M = p[f"W{i}"].shape
        for layer, names in ((nn.Linear(D, M, bias=f"b{i}" in p), ("W", "b")), (nn.BatchNorm1d(M), ("gamma", "beta"))):
            if f"{names[0]}{i}" in p:
                for ours, theirs in zip(names, dict(layer.named_parameters())):
                    named[f"{len(layers)}.{theirs}"] = p[f"{ours}{i}"].mT if ours == "W" else p[f"{ours}{i}"]
                layers.append(layer)
        layers += [ACTIVATIONS[activation]] if i < last else []
    return call(nn.Sequential(*layers), named, x)


@model("mlp", "spine", dict(points="spirals"), dict(points="xor"), hidden="5,4", batch_size=7)
def mlp(p, batch, cfg):
    x, targets = batch
    return LOSSES["binary"](sequential(p, x, "tanh"), targets)


@model("mlp", "net", *options(activation=ACTIVATIONS, loss=LOSSES, norm=("none", "batch")), hidden="5,4", batch_size=7)
@model("mlp", "net", dict(l1=0.3), dict(l2=0.2), dict(l1=0.1, l2=0.4), batch_size=7)
@model("mlp", "gates", dict(loss="binary"), dict(loss="mse"), batch_size=8)
def mlp_net(p, batch, cfg):
    x, targets = batch
    loss = LOSSES[cfg.loss](sequential(p, x, cfg.activation), targets)
    weights = [value for name, value in p.items() if name[0] == "W"]
    return loss + sum(cfg.l1 * W.abs().sum() + cfg.l2 / 2 * W.pow(2).sum() for W in weights)


@model("mlp", "names", dict(fuse=0), dict(fuse=2), hidden="6,5,4", context=4, embed_dim=3, batch_size=9)
def mlp_names(p, batch, cfg):
    """A layer that joins n neighbours is a convolution of n of them with stride n."""
    ids, targets = batch
    x = F.embedding(ids, p["E"]).transpose(1, 2)                    # (N, D, T)
    for i in range(3):
        (n, M), D = p[f"W{i}"].shape, x.shape[1]
        net = nn.Sequential(nn.Conv1d(D, M, n // D, stride=n // D, bias=False), nn.BatchNorm1d(M), ACTIVATIONS["gelu"])
        x = call(net, {"0.weight": p[f"W{i}"].reshape(n // D, D, M).permute(2, 1, 0), "1.weight": p[f"gamma{i}"],
                       "1.bias": p[f"beta{i}"]}, x)
    return F.cross_entropy(F.linear(x[:, :, 0], p["W3"].T, p["b3"]), targets)


@model("mlp", "mnist", hidden="5,4", batch_size=7)
def mlp_mnist(p, batch, cfg):
    x, targets = batch
    return LOSSES["softmax"](sequential(p, x, "relu"), targets)


# vanilla_rnn.py

def elman(p, x, state=None):
    """nn.RNN and nn.Linear.   x (T, N, D) -> y, last h."""
    h, state = recurrent("RNN", x, {"l0": (p["Wx"], p["Wh"], p["b"])}, state)
    return F.linear(h, p["Wo"].T, p["bo"]), state


@model("vanilla_rnn", "spine", hidden=5, length=6, batch_size=4)
def wave(p, batch, cfg):
    x, targets = batch
    return nn.MSELoss()(elman(p, x)[0], targets)


@model("vanilla_rnn", "recall", hidden=5, bits=2, delay=4, batch_size=4)
def recall(p, batch, cfg):
    x, asked, targets = batch
    return F.binary_cross_entropy_with_logits(elman(p, x)[0][asked], targets[asked])


def test_truncated_recall():
    """In windows, detached from one another."""
    ours, params, batch, cfg = prepared("vanilla_rnn recall")
    module, p, h, outputs = lesson("vanilla_rnn"), tensor(params), None, []
    loss, grads = ours(params, batch, cfg, lambda dout, cache: module.truncated(dout, cache, 3))
    x, asked, targets = map(torch.tensor, batch)
    for window in x.split(3):
        y, h = elman(p, window, h)
        outputs.append(y)
        h = h.detach()
    y = torch.cat(outputs)
    compare("vanilla_rnn recall, windows", loss, grads,
            F.binary_cross_entropy_with_logits(y[asked], targets[asked]), p)


# lstm.py

KINDS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "masked_lstm": "LSTM"}


def stack(p, x, cell, state=None, lengths=None):
    """Layers of nn.RNN, nn.GRU or nn.LSTM and nn.Linear.   x (T, N) or (T, N, D) -> y, last states."""
    if "E" in p:
        x = F.embedding(x, p["E"])
    names = [name for name in ("Wx", "Wh", "b", "bn") if f"{name}0" in p]
    weights = {f"l{k}": tuple(p[f"{name}{k}"] for name in names) for k in range(sum(n[:2] == "Wx" for n in p))}
    h, state = recurrent(KINDS[cell], x, weights, state, lengths)
    return F.linear(h, p["Wo"].T, p["bo"]), state


@model("lstm", "spine", hidden=5, length=6, batch_size=4)
def remember(p, batch, cfg):
    x, targets = batch
    h, _ = recurrent("LSTM", x, {"l0": (p["Wx"], p["Wh"], p["b"])})
    return nn.MSELoss()(F.linear(h[-1], p["Wo"].T, p["bo"]), targets)


@model("lstm", "add", *options(cell=("lstm", "gru", "rnn"), layers=(1, 3)), hidden=5, length=6, batch_size=4)
def add(p, batch, cfg):
    x, targets = batch
    return nn.MSELoss()(stack(p, x, cfg.cell)[0][-1], targets)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_gradient_of_the_input(cell):
    """The task gradient needs dx of a stack, which no training does."""
    _, params, (x, _), cfg = prepared(f"lstm add cell={cell} layers=3")
    module, tx, p = lesson("lstm"), tensor(x), tensor(params)
    (y, _), cache = module.stack_forward(params, x, cell, module.zero_states(params, cell, cfg.batch_size))
    dy = np.random.default_rng(1).standard_normal(y.shape)
    (stack(p, tx, cell)[0] * tensor(dy, False)).sum().backward()
    differ(f"lstm {cell}, gradient of the input", module.stack_backward(dy, cache)[0], tx.grad)


@model("lstm", "reverse", dict(layers=1), dict(layers=2), hidden=5, embed_dim=4, batch_size=6)
def reverse(p, batch, cfg):
    """Padding is taken out of the middle of the sequences, the rest packed."""
    ids, targets, mask = batch
    order = torch.argsort((~mask[:, :, 0]).long(), dim=0, stable=True)
    logits, _ = stack(p, ids.gather(0, order), cfg.cell, lengths=mask.sum(dim=(0, 2)))
    return F.cross_entropy(logits.flatten(0, 1), targets.gather(0, order).flatten(), ignore_index=-1)


def text(p, ids, cfg, state=None):
    """-> logits, states; of either lesson."""
    if hasattr(cfg, "cell"):
        return stack(p, ids, cfg.cell, state)
    return elman(p, F.embedding(ids, p["E"]), state)


@model("vanilla_rnn", "text", hidden=5, embed_dim=4, length=6, batch_size=3)
@model("lstm", "text", *options(cell=("lstm", "gru", "rnn"), layers=(1, 2)), hidden=5, embed_dim=4, length=6,
       batch_size=3)
def text_loss(p, batch, cfg):
    ids, targets = batch
    return F.cross_entropy(text(p, ids, cfg)[0].flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("label", [label for label in MODELS if MODELS[label][3] is text_loss])
def test_carried_state(label):
    """Three windows of a text: states are carried over, gradients are not."""
    ours, params, _, cfg = prepared(label)
    module, states, theirs = lesson(MODELS[label][0]), None, None
    for step in (1, 2, 3):
        batch, p = module.text_batch(cfg, step), tensor(params)
        loss, grads, states = ours(params, batch, cfg, states)
        ids, targets = map(torch.tensor, batch)
        logits, theirs = text(p, ids, cfg, theirs)
        compare(f"{label}, window {step}", loss, grads, F.cross_entropy(logits.flatten(0, 1), targets.flatten()), p)
        theirs = tuple(s.detach() for s in theirs) if isinstance(theirs, tuple) else theirs.detach()
        joined = torch.stack(all_of(theirs), dim=2) if hasattr(cfg, "cell") else theirs
        differ(f"{label}, state {step}", states, joined)


# seq2seq.py

def lstm_weights(p, prefix):
    """Wx, Wh, b of an LSTM."""
    return {"l0": tuple(p[f"{prefix}.{name}"] for name in ("Wx", "Wh", "b"))}


def summary(p, source):
    """-> the last h and c of the encoder."""
    x = F.embedding(source.T, p["encoder.E"])
    return recurrent("LSTM", x, lstm_weights(p, "encoder"), lengths=(source != 0).sum(dim=1))[1]


@model("seq2seq", "spine", length=5, embed_dim=4, hidden=5, batch_size=4)
def seq2seq(p, batch, cfg):
    source, inputs, targets = batch
    x = F.embedding(inputs.T, p["decoder.E"])
    h, _ = recurrent("LSTM", x, lstm_weights(p, "decoder"), summary(p, source), (inputs != 0).sum(dim=1))
    logits = F.linear(h, p["Wo"].T, p["bo"])
    return F.cross_entropy(logits.flatten(0, 1), targets.T.flatten(), ignore_index=0)


@model("seq2seq", "letters", *options(teacher_forcing=(1.0, 0.4), reverse_source=(True, False)), length=5, embed_dim=4,
       hidden=5, batch_size=4)
@model("seq2seq", "words", teacher_forcing=0.0, length=3, embed_dim=4, hidden=5, batch_size=4)
def scheduled_sampling(p, batch, cfg):
    source, inputs, targets, forced = batch
    with torch.no_grad():
        state, inputs = summary(p, source), inputs.clone()
        for t in range(inputs.shape[1] - 1):
            x = F.embedding(inputs[:, t][None], p["decoder.E"])
            h, state = recurrent("LSTM", x, lstm_weights(p, "decoder"), state)
            written = 1 + F.linear(h[0], p["Wo"].T, p["bo"])[:, 1:].argmax(dim=1)
            inputs[:, t + 1] = torch.where(forced[:, t + 1], inputs[:, t + 1], written)
    return seq2seq(p, (source, inputs, targets), cfg)


# attention.py

def bilstm(p, source):
    """A bidirectional nn.LSTM -> values (N, S, H), the last states of both directions, (N, H)."""
    layers = {f"l0{end}": lstm_weights(p, name)["l0"] for name, end in (("fore", ""), ("back", "_reverse"))}
    x = F.embedding(source.T, p["E_source"])
    h, (last, _) = recurrent("LSTM", x, layers, lengths=(source != 0).sum(dim=1))
    return h.transpose(0, 1), torch.cat([*last], dim=1)


def translator_loss(p, outputs, target):
    """Cross-entropy where the target is not padding."""
    logits = F.linear(outputs, p["Wo"].T, p["bo"])
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0)


def decoder_inputs(p, target):
    """BOS and the target but its last token, as rows of E_target (N, T, D)."""
    return F.embedding(F.pad(target[:, :-1], (1, 0), value=1), p["E_target"])


SIZES = dict(length=6, embed_dim=4, hidden=6, batch_size=5)


@model("attention", "spine", **SIZES)
@model("attention", "reverse", *options(score=("additive", "dot", "general"), input_feeding=(False, True)), **SIZES)
@model("attention", "copy", **SIZES)
def attention(p, batch, cfg):
    source, target, _ = batch
    d, x, (values, _), mask = part(p, "decoder."), decoder_inputs(p, target), bilstm(p, source), source != 0

    def join(h):
        return torch.tanh(F.linear(torch.cat([h, torch_scores(h, values, mask, d)], dim=2), d["Wa"].T, d["ba"]))
    if not getattr(cfg, "input_feeding", False):
        h, _ = recurrent("LSTM", x.transpose(0, 1), lstm_weights(p, "decoder"), lengths=(target != 0).sum(dim=1))
        return translator_loss(p, join(h.transpose(0, 1)), target)
    H = len(d["Wh"])
    a, state, outputs = torch.zeros(len(x), H), (torch.zeros(len(x), H), torch.zeros(len(x), H)), []
    named = {"weight_ih": d["Wx"].T, "weight_hh": d["Wh"].T, "bias_ih": d["b"], "bias_hh": torch.zeros(4 * H)}
    for t in range(x.shape[1]):
        state = call(nn.LSTMCell(len(d["Wx"]), H), named, torch.cat([x[:, t], a], dim=1), state)
        a = join(state[0][:, None])[:, 0]
        outputs.append(a)
    return translator_loss(p, torch.stack(outputs, dim=1), target)


@model("attention", "lengths", **SIZES)
def bottleneck(p, batch, cfg):
    source, target, _ = batch
    x, (_, last) = decoder_inputs(p, target), bilstm(p, source)
    x = torch.cat([x, last[:, None].expand(-1, x.shape[1], -1)], dim=2)
    h, _ = recurrent("LSTM", x.transpose(0, 1), lstm_weights(p, "decoder"))
    return translator_loss(p, h.transpose(0, 1), target)


# nested_attention.py

RECALL = dict(keys=4, values=5, dim=3, length=9, batch_size=4)
RULES = ("hebb", "delta", "momentum", "adam", "dgd")


@model("nested_attention", "spine", dict(rule="hebb"), dict(rule="delta"), **RECALL)
@model("nested_attention", "rule", *options(rule=RULES), alpha="token", **RECALL)
@model("nested_attention", "rule", *options(eta=("fixed", "global", "token"), alpha=("fixed", "global")), **RECALL)
@model("nested_attention", "rule", dict(rule="momentum", mu=0.4), dict(rule="adam", beta1=0.5), **RECALL)
def inner_rule(p, batch, cfg):
    key, value, junk, targets = batch
    k, q, v = F.normalize(p["Wk"], dim=1)[key], F.normalize(p["Wq"], dim=1)[key], p["Wv"][value]
    ones = torch.ones(key.shape)
    eta = p["eta"][junk % len(p["eta"])] if "eta" in p else ones
    alpha = p["alpha"].sigmoid()[junk % len(p["alpha"])] if "alpha" in p else ones
    c = {"hebb": 0, "delta": 1, "momentum": 1, "adam": 1, "dgd": 2}[cfg.rule]
    if cfg.rule == "adam":
        y = torch_adam_memory(k, q, v, eta, alpha, c, cfg.beta1, cfg.beta2)
    else:
        mu = cfg.mu * ones if cfg.rule == "momentum" else 0 * ones
        y = torch_momentum_memory(k, q, v, eta, alpha, p["mu"].sigmoid() * ones if "mu" in p else mu, c)
    logits = F.linear(y, p["Wo"].T, p["bo"])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@model("nested_attention", "memories", *options(periods=("1,2,4", "3", "4,1"), shared=(False, True)),
       dict(staggered=True), home=3, away=2, keys=3, values=4, length=9, batch_size=3)
def stream(p, batch, cfg):
    key, value, _ = batch
    periods = [int(n) for n in cfg.periods.split(",")]
    y = torch_cms(F.one_hot(key, cfg.keys).double(), F.one_hot(value, cfg.values).double(), p["log_eta"].exp(),
                  p["alpha"].sigmoid().expand(len(periods)), p["w"], periods)
    return F.cross_entropy((p["log_scale"].exp() * y).flatten(0, 1), value.flatten())


# cnn.py

def convolution(p, x, norm, stride=1):
    """nn.Conv2d, with a bias or nn.BatchNorm2d or nn.GroupNorm.   x (N, C, H, W)."""
    k, _, C, M = p["W"].shape
    layers = [nn.Conv2d(C, M, k, stride, k // 2, bias=norm == "none")]
    layers += {"none": [], "batch": [nn.BatchNorm2d(M)], "group": [nn.GroupNorm(math.gcd(M, 8), M)]}[norm]
    named = {"0.weight": p["W"].permute(3, 2, 0, 1)}
    named.update({"0.bias": p["bias"]} if norm == "none" else {"1.weight": p["gamma"], "1.bias": p["beta"]})
    return call(nn.Sequential(*layers), named, x)


def residual(p, x, norm, stride=1):
    """Two convolutions, and x past them."""
    y = convolution(part(p, "a."), x, norm, stride).relu()
    y = convolution(part(p, "b."), y, norm)
    return (y + (convolution(part(p, "s."), x, norm, stride) if "s.W" in p else x)).relu()


@model("cnn", "spine", size=8, channels=2, batch_size=5)
def cnn(p, batch, cfg):
    x, labels = batch
    x = x.permute(0, 3, 1, 2)
    for i in "123":
        layer = {name[:-1]: value for name, value in p.items() if name[-1] == i}
        x = nn.MaxPool2d(2)(convolution(layer, x, "batch").relu())
    x = F.linear(x.permute(0, 2, 3, 1).flatten(1), p["W4"].T, p["b4"]).relu()
    return nn.CrossEntropyLoss()(F.linear(x, p["W5"].T, p["b5"]), labels)


LAYERS = {"plain": "stem1 pool1 conv2 pool2 conv3 pool3", "linear": "",
          "resnet": "stem1 conv1 pool1 res1 conv2 pool2 res2 conv3 pool3 res3"}


@model("cnn", "net", *options(model=("plain", "resnet"), norm=("batch", "group", "none"), pool=("max", "average")),
       dropout=0.3, label_smoothing=0.2, channels=2, batch_size=3)
@model("cnn", "net", dict(model="linear"), dict(model="plain", crop=2, flip=True), channels=2, batch_size=3)
@model("cnn", "mnist", channels=2, batch_size=3)
def convnet(p, batch, cfg):
    x, labels, keep = batch
    x = x.permute(0, 3, 1, 2)
    for name in LAYERS[cfg.model].split():
        if name[:4] == "pool":
            x = (nn.MaxPool2d(2) if cfg.pool == "max" else nn.AvgPool2d(2))(x)
        elif name[:3] == "res":
            x = residual(part(p, name + "."), x, cfg.norm)
        else:
            x = convolution(part(p, name + ".a."), x, cfg.norm).relu()
    x = nn.AdaptiveAvgPool2d(1)(x) if cfg.model == "resnet" else x.permute(0, 2, 3, 1)
    x = x.flatten(1)
    if cfg.model == "plain":
        x, fc = F.linear(x, p["fc.a.W"][0, 0].T), part(p, "fc.a.")
        if cfg.norm == "batch":
            x = F.batch_norm(x, None, None, fc["gamma"], fc["beta"], training=True)
        x = F.group_norm(x, 8, fc["gamma"], fc["beta"]) if cfg.norm == "group" else x
        x = (x + fc["bias"] if cfg.norm == "none" else x).relu()
    logits = F.linear(x * keep / (1 - cfg.dropout), p["out.W"].T, p["out.b"])
    return nn.CrossEntropyLoss(label_smoothing=cfg.label_smoothing)(logits, labels)


@model("cnn", "resnet18", size=32, channels=2, batch_size=6)
def resnet18(p, batch, cfg):
    x, labels = batch
    x = convolution(part(p, "stem.a."), x.permute(0, 3, 1, 2), "batch", 2).relu()
    x = nn.MaxPool2d(3, 2, 1)(x)
    for stage in "1234":
        x = residual(part(p, f"{stage}1."), x, "batch", 1 if stage == "1" else 2)
        x = residual(part(p, f"{stage}2."), x, "batch")
    x = nn.AdaptiveAvgPool2d(1)(x).flatten(1)
    return nn.CrossEntropyLoss()(F.linear(x, p["out.W"].T, p["out.b"]), labels)


# transformer.py

LAYER = dict(dropout=0.0, batch_first=True, activation=lambda z: F.gelu(z, approximate="tanh"))


def mlp_named(p):
    """The parameters of the two linear layers of an nn.TransformerEncoderLayer."""
    return {"linear1.weight": p["W1"].T, "linear1.bias": p["b1"], "linear2.weight": p["W2"].T, "linear2.bias": p["b2"]}


def block(p, x, heads, mask=None):
    """An nn.TransformerEncoderLayer, as a block of a GPT.   x (B, T, D)."""
    D = x.shape[2]
    named = {**attention_named("self_attn.", p), **mlp_named(p)}
    for k in "12":
        named.update({f"norm{k}.weight": p[f"gamma{k}"], f"norm{k}.bias": p[f"beta{k}"]})
    return call(nn.TransformerEncoderLayer(D, heads, 4 * D, norm_first=True, **LAYER), named, x, src_mask=mask)


def blocks(p, x, cfg, mask=None, block=block, side=""):
    """All blocks and the last norm."""
    i = 0
    while f"{side}{i}.Wo" in p:
        x = block(part(p, f"{side}{i}."), x, cfg.heads, mask)
        i += 1
    return normalized(p, x, side and side + ".")


def normalized(p, x, prefix="", k=""):
    """nn.LayerNorm, or nn.RMSNorm if there is no beta."""
    gamma, beta = p[f"{prefix}gamma{k}"], p.get(f"{prefix}beta{k}")
    if beta is None:
        return call(nn.RMSNorm(len(gamma), eps=1e-5), {"weight": gamma}, x)
    return call(nn.LayerNorm(len(gamma)), {"weight": gamma, "bias": beta}, x)


def tied_loss(p, x, targets, **options):
    """Cross-entropy of the products with the embeddings."""
    return F.cross_entropy((x @ p["E"].T).flatten(0, -2), targets.flatten(), **options)


def causal_mask(T):
    """0 for s <= t, else -inf."""
    return nn.Transformer.generate_square_subsequent_mask(T)


def sines(T, D):
    """sin, then cos, of t / 10000^(2 j / D)."""
    angles = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


GPT = dict(layers=2, heads=2, dim=8, context=7, batch_size=3)


@model("transformer", "spine", **GPT)
def gpt(p, batch, cfg):
    ids, targets = batch
    x = F.embedding(ids, p["E"]) + p["P"]
    return tied_loss(p, blocks(p, x, cfg, causal_mask(7)), targets)


@model("faster", "spine", dict(layers=1), dict(layers=2), heads=2, dim=8, context=7, tile=3, batch_size=3)
@model("faster", "text", layers=2, heads=2, dim=8, context=7, tile=3, batch_size=3)
def plain_gpt(p, batch, cfg):
    """Blocks without norms and biases; targets of the last positions."""
    (ids, targets), count = batch, batch[1].shape[1]
    x = F.embedding(ids, p["E"]) + p["P"]
    for i in range(cfg.layers):
        q, k, v = (x @ p[f"{i}.Wqkv"]).unflatten(2, (3, cfg.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + SCALED(q, k, v, is_causal=True).transpose(1, 2).flatten(2) @ p[f"{i}.Wo"]
        x = x + F.relu(x @ p[f"{i}.W1"]) @ p[f"{i}.W2"]
    return F.cross_entropy((x[:, -count:] @ p["U"]).flatten(0, 1), targets.flatten())


def rotary_block(p, x, heads, mask=None):
    """A block with rotated queries and keys, of LayerNorm and GELU or of RMSNorm and SwiGLU."""
    qkv = F.linear(normalized(p, x, k="1"), p["Wqkv"].T, p.get("bqkv"))
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)               # (B, H, T, d) each
    cos, sin = sines(q.shape[2], q.shape[3]).roll(q.shape[3] // 2, dims=1).chunk(2, dim=1)
    a = SCALED(torch_rope(q, cos, sin), torch_rope(k, cos, sin), v, is_causal=True)
    x = x + F.linear(a.transpose(1, 2).flatten(2), p["Wo"].T, p.get("bo"))
    z = normalized(p, x, k="2")
    if "Wgate" in p:
        return x + (F.silu(z @ p["Wgate"]) * (z @ p["Wup"])) @ p["Wdown"]
    return x + F.linear(LAYER["activation"](F.linear(z, p["W1"].T, p["b1"])), p["W2"].T, p["b2"])


@model("transformer", "modern", **GPT)
def modern(p, batch, cfg):
    ids, targets = batch
    return tied_loss(p, blocks(p, F.embedding(ids, p["E"]), cfg, block=rotary_block), targets)


@model("transformer", "text", dict(model="modern"), dict(model="gpt"), **GPT)
def text_file(p, batch, cfg):
    return {"modern": modern, "gpt": gpt}[cfg.model](p, batch, cfg)


@model("transformer", "positions", *options(position=("learned", "sinusoidal", "none", "rotary", "alibi")), **GPT)
def positions(p, batch, cfg):
    ids, targets = batch
    x, T = F.embedding(ids, p["E"]), ids.shape[1]
    if cfg.position == "rotary":
        return tied_loss(p, blocks(p, x, cfg, block=rotary_block), targets)
    added = {"learned": p["P"][:T] if "P" in p else 0.0, "sinusoidal": 0.02 * sines(T, cfg.dim)}
    mask = alibi_bias(cfg.heads, T).repeat(len(ids), 1, 1) if cfg.position == "alibi" else causal_mask(T)
    return tied_loss(p, blocks(p, x + added.get(cfg.position, 0.0), cfg, mask), targets)


@model("transformer", "fill", **GPT)
def fill(p, batch, cfg):
    ids, targets = batch
    return tied_loss(p, blocks(p, F.embedding(ids, p["E"]) + p["P"], cfg), targets, ignore_index=-1)


@model("transformer", "mnist", heads=2, dim=8, batch_size=3)
def mnist(p, batch, cfg):
    images, labels = batch
    x = F.linear(images.unflatten(1, (28, 28)), p["Wp"].T, p["bp"]) + p["P"]
    return tied_loss(p, blocks(p, x, cfg).mean(dim=1), labels)


def encdec_layer(p, x, cfg, *memory, **masks):
    """An nn.TransformerEncoderLayer or, with a memory, an nn.TransformerDecoderLayer."""
    kind = nn.TransformerDecoderLayer if memory else nn.TransformerEncoderLayer
    named, names = mlp_named(part(p, "mlp.")), {"self": "self_attn.", "cross": "multihead_attn."}
    for k, sublayer in enumerate([s for s in ("self", "cross", "mlp") if f"{s}.gamma" in p], 1):
        q = part(p, sublayer + ".")
        named.update({f"norm{k}.weight": q["gamma"], f"norm{k}.bias": q["beta"]})
        if sublayer in names:
            named.update(attention_named(names[sublayer], q))
    layer = kind(cfg.dim, cfg.heads, 4 * cfg.dim, norm_first=cfg.norm == "prenorm", **LAYER)
    return call(layer, named, x, *memory, **masks)


ENCDEC = dict(layers=2, heads=2, dim=8, context=5, batch_size=4)


@model("transformer", "reverse", dict(norm="postnorm"), dict(norm="prenorm"), **ENCDEC)
@model("transformer", "sort", **ENCDEC)
def encdec(p, batch, cfg):
    source, target, targets = batch
    (S, T), padding = (source.shape[1], target.shape[1]), source == 0
    memory = cfg.dim ** 0.5 * F.embedding(source, p["E"]) + sines(S, cfg.dim)
    for i in range(cfg.layers):
        memory = encdec_layer(part(p, f"enc{i}."), memory, cfg, src_key_padding_mask=padding)
    memory = normalized(p, memory, "enc.")
    x = cfg.dim ** 0.5 * F.embedding(target, p["E"]) + sines(T, cfg.dim)
    for i in range(cfg.layers):
        x = encdec_layer(part(p, f"dec{i}."), x, cfg, memory, memory_key_padding_mask=padding,
                         tgt_mask=causal_mask(T).isinf())
    return tied_loss(p, normalized(p, x, "dec."), targets, ignore_index=0)


# translation.py

TRANSLATION = dict(layers=2, heads=2, dim=8, batch_size=3)


@model("translation", "spine", **TRANSLATION)
@model("translation", "headlines", label_smoothing=0.2, dropout=0.3, **TRANSLATION)
@model("translation", "pairs", dict(pointer=True), dict(pointer=False), dict(pointer=True, unit="words", vocab_size=30),
       **TRANSLATION)
def translation(p, batch, cfg):
    source, target, targets, *keeps = batch
    V, B, T = len(p["E"]), len(source), target.shape[1]
    pointer, padding = getattr(cfg, "pointer", True), (source != 0)[:, None]
    memory = None
    for side, ids, keep, names in (("enc", source, keeps[0], ("self", "mlp")),
                                   ("dec", target, keeps[1], ("self", "cross", "mlp"))):
        x, keep = F.embedding(ids.where(ids < V, torch.tensor(3)), p["E"]) * keep[:, 0], keep[:, 1:]
        n = ids.shape[1]
        for at in [f"{side}{i}.{name}." for i in range(cfg.layers) for name in names]:
            q, name = part(p, at), at.split(".")[1]
            y = normalized(q, x).flatten(0, 1)
            if name == "mlp":
                y = torch_swiglu_mlp(y, q)
            elif name == "cross":
                y = torch_rotary_multihead(y, q, memory, cfg.heads, B, padding[:, None], torch.zeros(1, 1))
            else:
                mask = padding[:, None] if side == "enc" else torch.ones(n, n, dtype=torch.bool).tril()
                y = torch_rotary_multihead(y, q, y, cfg.heads, B, mask, torch.arange(n)[:, None])
            x, keep = x + keep[:, 0] * y.unflatten(0, (B, n)), keep[:, 1:]
        x = normalized(p, x, side + ".").flatten(0, 1)
        memory = x if memory is None else memory
    z = (x @ p["E"].T).unflatten(0, (B, T))
    if pointer:
        c = torch_pointer(x, part(p, "copy."), memory, B).masked_fill(~padding, -math.inf)
        z = torch.cat([z, c], dim=2)
        right = torch.cat([F.one_hot(targets, max(V, targets.max() + 1))[:, :, :V].bool(),
                           targets[:, :, None] == source[:, None]], dim=2)
        return torch_copy_cross_entropy(z[targets != 0], right[targets != 0], V, cfg.label_smoothing)
    targets = targets.where(targets < V, torch.tensor(3))
    return F.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=0, label_smoothing=cfg.label_smoothing)


# mae.py

def encoded(p, x, cfg):
    """All patches of x (N, T, P), embedded by an nn.Conv2d whose stride is the patch.   -> (N, T, D)."""
    N, T, P = x.shape
    n, k = math.isqrt(T), cfg.patch_size
    C, D = P // k ** 2, p["Wp"].shape[1]
    images = x.reshape(N, n, n, k, k, C).permute(0, 5, 1, 3, 2, 4).reshape(N, C, n * k, n * k)
    filters = p["Wp"].reshape(k, k, C, D).permute(3, 2, 0, 1)
    y = call(nn.Conv2d(C, D, k, stride=k), {"weight": filters, "bias": p["bp"]}, images)
    return y.flatten(2).transpose(1, 2) + p["Penc"]


def pick(x, ids):
    """The tokens at ids (N, K).   x (N, T, D) -> (N, K, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


MAE = dict(layers=2, dim=8, decoder_layers=2, decoder_dim=6, heads=2, batch_size=3)


@model("mae", "spine", **MAE)
@model("mae", "mnist", dict(norm_pixels=True), dict(norm_pixels=False), **MAE)
@model("mae", "cifar", **MAE)
def mae(p, batch, cfg):
    x, visible, masked, _ = batch
    z = blocks(p, pick(encoded(p, x, cfg), visible), cfg, side="enc")
    tokens = p["mask_token"].expand(*masked.shape, -1)
    ids = torch.cat([visible, masked], dim=1)[:, :, None].expand(-1, -1, cfg.decoder_dim)
    z = torch.cat([F.linear(z, p["Wd"].T, p["bd"]), tokens], dim=1)
    z = torch.zeros_like(z).scatter(1, ids, z) + p["Pdec"]
    y = F.linear(pick(blocks(p, z, cfg, side="dec"), masked), p["Wx"].T, p["bx"])
    if getattr(cfg, "norm_pixels", False):
        x = F.layer_norm(x, x.shape[2:], eps=1e-6)
    return nn.MSELoss()(y, pick(x, masked))


@model("mae", "finetune", **MAE)
def classifier(p, batch, cfg):
    x, labels = batch
    z = blocks(p, encoded(p, x, cfg), cfg, side="enc").mean(dim=1)
    return F.cross_entropy(F.linear(z, p["Wy"].T, p["by"]), labels)


# autodiff.py

def xor_net(p, x):
    return F.linear(F.relu(F.linear(x, p["W0"].T, p["b0"])), p["W1"].T, p["b1"])


@model("autodiff", "spine")
def autodiff_xor(p, batch, cfg):
    return F.cross_entropy(xor_net(p, batch[0]), batch[1])


@model("autodiff", "mnist", layers=2, dim=8, batch_size=3)
@model("autodiff", "tape", layers=2, dim=8, batch_size=3)
def autodiff_transformer(p, batch, cfg, residual=True):
    x, targets = batch
    x, B = (x @ p["Wp"] + p["P"]).flatten(0, 1), len(x)
    for i in range(cfg.layers):
        x = torch_layer(x, {s: p[f"W{s}{i}"] for s in "qkvoud"}, B, residual)
    x = F.layer_norm(x, x.shape[-1:]).unflatten(0, (B, -1))
    return F.cross_entropy(x.mean(dim=1) @ p["Wy"], targets)


@pytest.mark.skipif("autodiff" not in LESSONS, reason="not there yet")
def test_autodiff_without_residual_connections():
    _, params, batch, cfg = prepared("autodiff mnist")
    module, p = lesson("autodiff"), tensor(params)
    plain_loss = functools.partial(module.transformer_loss, residual=False)
    loss, grads = module.loss_and_grads(params, batch, cfg, plain_loss)
    compare("autodiff mnist, plain", loss, grads,
            autodiff_transformer(p, [tensor(a, False) for a in batch], cfg, residual=False), p)


@pytest.mark.skipif("autodiff" not in LESSONS, reason="not there yet")
@pytest.mark.parametrize("label", [label for label in OPERATIONS if label.split()[0] == "operation"])
def test_second_derivative(label):
    """Of the sum of R op(x)^3: gradients of the sum of the squares of its gradients."""
    a, (case, function) = lesson("autodiff"), OPERATIONS[label]
    op, *args = case.values()
    R = np.random.default_rng(2).standard_normal(np.shape(a.COMPUTE[op](*args)))
    arrays = {str(k): x for k, x in enumerate(args) if isinstance(x, np.ndarray)} | {"R": R}
    nodes = {name: a.Node("input", name, x.shape) for name, x in arrays.items()}
    variables = [nodes[name] for name in arrays if name != "R"]
    loss = a.total(a.apply(op, *variables, *args[len(variables):]) ** 3 * nodes["R"], None)
    squares = [a.reshape(a.total(g ** 2, None), ()) for g in a.gradients(loss, variables)]
    total = functools.reduce(a.Node.__add__, squares)
    ours = a.Evaluator(a.gradients(total, variables))(arrays)
    tensors = [tensor(x) for x in args]
    theirs = (function(op, *tensors) ** 3 * torch.tensor(R)).sum()
    first = torch.autograd.grad(theirs, tensors[:len(variables)], create_graph=True)
    second = torch.autograd.grad(sum((g ** 2).sum() for g in first), tensors[:len(variables)])
    for k, (x, y) in enumerate(zip(ours, second, strict=True)):
        differ(f"autodiff {label}, second derivative by input {k}", x, y)


# gan.py

@model("gan", "spine", hidden=6, batch_size=5)
def gan(p, batch, cfg):
    real, noise, rivals = batch
    points = torch.cat([real, gan_net(rivals, "g", noise, 0)])
    targets = torch.tensor([[1.0], [0.0]]).repeat_interleave(len(real), dim=0)
    logits = gan_net(p, "d", points, 0.2), gan_net(rivals, "d", gan_net(p, "g", noise, 0), 0.2)
    return 2 * nn.BCEWithLogitsLoss()(logits[0], targets) + F.softplus(-logits[1]).mean()


def normalized_critic(p, rivals):
    """d_W1, d_W2, d_W3 over v^T W u, the vectors by ten rounds of power iteration on the rivals."""
    p = dict(p)
    for name in ("d_W1", "d_W2", "d_W3"):
        W, u = rivals[name], rivals[name][0]
        for _ in range(10):
            v = F.normalize(W @ u, dim=0)
            u = F.normalize(W.T @ v, dim=0)
        p[name] = p[name] / (v @ p[name] @ u)
    return p


@model("gan", "game", *options(
    loss=("non-saturating", "minimax", "hinge", "wasserstein"),
    constraint=("none", "clipping", "spectral", "penalty", "r1")), hidden=6, batch_size=5, strength=0.7)
@model("gan", "shapes", hidden=6, batch_size=5)
def gan_game(p, batch, cfg):
    real, noise, mix, rivals = batch
    if cfg.constraint == "spectral":
        p, rivals = normalized_critic(p, rivals), normalized_critic(rivals, rivals)
    fake = gan_net(rivals, "g", noise, 0)
    a, b = gan_net(p, "d", real, 0.2), gan_net(p, "d", fake, 0.2)
    c, d = gan_net(rivals, "d", real, 0.2), gan_net(rivals, "d", gan_net(p, "g", noise, 0), 0.2)
    log = F.softplus(-a).mean() + F.softplus(b).mean()
    gap = c.mean() - d.mean()
    critic = {"hinge": F.relu(1 - a).mean() + F.relu(1 + b).mean(), "wasserstein": b.mean() - a.mean()}
    generator = {"non-saturating": F.softplus(c).mean() + F.softplus(-d).mean(),
                 "minimax": -F.softplus(-c).mean() - F.softplus(d).mean()}
    loss = critic.get(cfg.loss, log) + generator.get(cfg.loss, gap)
    if cfg.constraint in ("penalty", "r1"):
        x, target = (mix * real + (1 - mix) * fake, 1) if cfg.constraint == "penalty" else (real, 0)
        x = x.detach().requires_grad_()
        slope = torch.autograd.grad(gan_net(p, "d", x, 0.2).sum(), x, create_graph=True)[0].norm(dim=1)
        loss = loss + cfg.strength * ((slope - target) ** 2).mean()
    return loss


# moe.py

@model("moe", "spine", dict(experts=2), dict(experts=8), dim=6, hidden=5, batch_size=30, balance=0.3)
@model("moe", "routes", dim=6, hidden=5, batch_size=30, balance=0.3)
@model("moe", "text", dim=6, hidden=5, batch_size=30, balance=0.3, context=3)
def moe(p, batch, cfg):
    """Switch layer in a residual connection; the embeddings of a token add up."""
    ids, targets = batch
    x = F.embedding_bag(ids, p["E"], mode="sum")
    D = x.shape[1:]
    h = F.rms_norm(x, D, p["gamma1"], eps=1e-5)
    probabilities = (h @ p["Wg"]).softmax(dim=1)
    w, chosen = probabilities.max(dim=1, keepdim=True)
    h = F.rms_norm(x + torch_experts(h, w, p["W1"], p["W2"], chosen), D, p["gamma2"], eps=1e-5)
    return F.cross_entropy(h @ p["Wout"], targets) + cfg.balance * torch_balance(probabilities, chosen)


# rlhf.py

def rlhf_logits(p, ids, heads):
    """Attention and an MLP with residual connections, without norms.   ids (B, T) -> (B, T, V)."""
    x = F.embedding(ids, p["E"]) + p["P"][:ids.shape[1]]
    future = ~torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    layer = nn.MultiheadAttention(x.shape[2], heads, batch_first=True)
    x = x + call(layer, attention_named("", p), x, x, x, attn_mask=future)[0]
    x = x + F.linear(F.linear(x, p["W1"].T, p["b1"]).tanh(), p["W2"].T, p["b2"])
    return F.linear(x, p["E"])


def rlhf_log_probs(p, ids, heads):
    """Of each word after the first, and 1 up to the first full stop, 0 after it.   -> (B, T - 1) each."""
    log_p = D.Categorical(logits=rlhf_logits(p, ids[:, :-1], heads)).log_prob(ids[:, 1:])
    stops = ids == lesson("rlhf").EOS
    return log_p, (stops.cumsum(dim=1) - stops.long() == 0)[:, 1:].double()


@model("rlhf", "spine", heads=2, dim=6, batch_size=4)
def rlhf(p, batch, cfg):
    ids, weights = batch
    return -(weights * rlhf_log_probs(p, ids, cfg.heads)[0]).sum()


@model("rlhf", "comparisons", batch_size=8)
def rlhf_bag(p, batch, cfg):
    return F.softplus(-torch.stack(batch) @ p["w"]).mean() + cfg.l2 / 2 * p["w"].square().sum()


@model("rlhf", "reward", heads=2, dim=6, batch_size=6)
def rlhf_reader(p, batch, cfg):
    ids = torch.stack(batch)
    ends = [row.index(lesson("rlhf").EOS) if lesson("rlhf").EOS in row else len(row) - 1 for row in ids.tolist()]
    r = rlhf_logits(p, ids, cfg.heads)[torch.arange(len(ids)), ends, 0]
    return F.softplus(r[len(r) // 2:] - r[:len(r) // 2]).mean() + cfg.l2 / 2 * r.square().mean()


@model("rlhf", "dpo", heads=2, dim=6, batch_size=6)
def rlhf_dpo(p, batch, cfg):
    ids, start = batch
    log_p, mask = rlhf_log_probs(p, ids, cfg.heads)
    better, worse = ((log_p * mask).sum(dim=1) - start.sum(dim=1)).chunk(2)
    return -F.logsigmoid(cfg.beta * (better - worse)).mean()


@model("rlhf", "grpo", dict(clip_ratio=0.2), dict(clip_ratio=1e6), heads=2, dim=6, batch_size=4)
def rlhf_grpo(p, batch, cfg):
    ids, before, start, A = batch
    log_p, mask = rlhf_log_probs(p, ids, cfg.heads)
    ratio, d = (log_p - before).exp(), start - log_p
    gain = torch.minimum(ratio * A, ratio.clamp(1 - cfg.clip_ratio, 1 + cfg.clip_ratio) * A)
    return (cfg.beta * (d.exp() - d - 1) - gain)[mask > 0].mean()


# ---- vae.py ----------------------------------------------------------------------------------------------------------

def vae_coder(p, x, side):
    for i in (1, 2):
        x = F.linear(x, p[f"{side}.W{i}"].T, p[f"{side}.b{i}"]).tanh()
    return F.linear(x, p[f"{side}.W3"].T, p[f"{side}.b3"])


def vae_clouds(p, x):
    mu, log_var = vae_coder(p, x, "enc").chunk(2, dim=1)
    return D.Normal(mu, (log_var / 2).exp())


@model("vae", "spine", dict(beta=1.0), dict(beta=0.3), latent=3, hidden=5, batch_size=4)
@model("vae", "mnist", latent=3, hidden=5, batch_size=4)
def vae(p, batch, cfg):
    x, e = batch
    q = vae_clouds(p, x)
    log_p = D.Bernoulli(logits=vae_coder(p, q.loc + q.scale * e, "dec")).log_prob(x)
    return (cfg.beta * D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(dim=1) - log_p.sum(dim=1)).mean()


@model("vae", "compare", dict(draws=1), dict(draws=6), latent=3, hidden=5, batch_size=4)
def importance(p, batch, cfg):
    x, e = batch
    q = D.Normal(*(a[:, None] for a in (vae_clouds(p, x).loc, vae_clouds(p, x).scale)))
    z = q.loc + q.scale * e
    log_p = D.Bernoulli(logits=vae_coder(p, z, "dec")).log_prob(x[:, None]).sum(dim=2)
    log_w = log_p + (D.Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(dim=2)
    return (math.log(cfg.draws) - log_w.logsumexp(dim=1)).mean()


def conditioned(p, x, c):
    """nn.SiLU of a linear layer on [x, c], layer by layer; a linear layer."""
    last = len(p) // 2 - 1
    for i in range(last):
        x = F.silu(F.linear(torch.cat([x, c], dim=1), p[f"W{i}"].T, p[f"b{i}"]))
    return F.linear(x, p[f"W{last}"].T, p[f"b{last}"])


@model("diffusion", "spine", hidden=5, layers=2, frequencies=3, batch_size=4)
@model("diffusion", "targets", *options(target=("noise", "v", "x0")), hidden=5, layers=2, batch_size=4)
def denoiser(p, batch, cfg):
    x, c, target = batch
    return nn.MSELoss()(conditioned(p, x, c), target)


@model("diffusion", "latent", coder=5, code=3, batch_size=4)
def codes(p, batch, cfg):
    x, e = batch
    mu, log_var = conditioned(part(p, "enc."), x, x[:, :0]).chunk(2, dim=1)
    q, prior = torch.distributions.Normal(mu, (log_var / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    logits = conditioned(part(p, "dec."), q.loc + q.scale * e, x[:, :0])
    nats = nn.BCEWithLogitsLoss(reduction="sum")(logits, x)
    return (nats + cfg.beta * torch.distributions.kl_divergence(q, prior).sum()) / len(x)


def unshuffled(x):
    """nn.PixelUnshuffle(2), then the channels of a pixel before those of the next."""
    return F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)


def shuffled(x):
    """The inverse of unshuffled."""
    return F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


def normed(p, x, k="", groups=4):
    """nn.GroupNorm."""
    return call(nn.GroupNorm(groups, x.shape[1]), {"weight": p[f"gamma{k}"], "bias": p[f"beta{k}"]}, x)


def convolved(W, x):
    """F.conv2d that keeps the size."""
    return F.conv2d(x, W.permute(3, 2, 0, 1), padding=len(W) // 2)


def timed_block(p, x, c):
    """GroupNorm, SiLU, convolution, twice, the time between them; and x past them."""
    y = convolved(p["W1"], F.silu(normed(p, x, 1))) + F.linear(c, p["V"].T, p["b"])[:, :, None, None]
    return x + convolved(p["W2"], F.silu(normed(p, y, 2)))


def attended(p, x, memory, heads):
    """Queries from the pixels of x (N, C, H, W) after GroupNorm, keys and values from memory (N, K, D)."""
    q = F.linear(normed(p, x).flatten(2).mT, p["Wq"].T, p["bq"])
    k, v = F.linear(memory, p["Wkv"].T, p["bkv"]).chunk(2, dim=2)
    y = SCALED(*(a.unflatten(2, (heads, -1)).transpose(1, 2) for a in (q, k, v))).transpose(1, 2).flatten(2)
    return x + F.linear(y, p["Wo"].T, p["bo"]).mT.reshape(x.shape)


@model("diffusion", "shapes", dict(target="noise"), dict(target="v"), channels=8, frequencies=3, batch_size=3)
def unet(p, batch, cfg):
    x, c, target = batch
    tokens = F.linear(c[:, -10:], p["label.W"].T, p["label.b"]).reshape(len(x), 4, -1)
    c = F.silu(conditioned(part(p, "time."), c, c[:, :0]))
    y = convolved(p["in.W"], unshuffled(x.reshape(-1, 1, 8, 8)))
    skip = timed_block(part(p, "res1."), y, c)
    y = timed_block(part(p, "res2."), convolved(p["down.W"], unshuffled(skip)), c)
    y = attended(part(p, "self."), y, y.flatten(2).mT, 4)
    y = attended(part(p, "cross."), y, tokens, 4)
    y = shuffled(convolved(p["up.W"], timed_block(part(p, "res3."), y, c)))
    y = timed_block(part(p, "res4."), convolved(p["merge.W"], torch.cat([y, skip], dim=1)), c)
    y = shuffled(convolved(p["out.W"], F.silu(normed(part(p, "out."), y))))
    return nn.MSELoss()(y.flatten(1), target)


# ---- lora.py ---------------------------------------------------------------------------------------------------------

LORA = dict(layers=2, heads=2, dim=8, digits=3, batch_size=6)


@model("lora", "spine", **LORA)
@model("lora", "quantize", **LORA)
def sorting_gpt(p, batch, cfg, scale=0.0):
    """A GPT with ReLU; with a scale, A and B of every linear layer are an adapter."""
    def layer(x, i, name):
        W, b, A, B = (p.get(f"{i}.{kind}{name}") for kind in "WbAB")
        y = F.linear(x, W.T, b)
        return y if A is None else y + scale * F.linear(F.linear(x, A.T), B.T)
    ids, targets = batch
    x = F.embedding(ids, p["E"]) + p["P"]
    for i in range(cfg.layers):
        y = layer(normalized(p, x, f"{i}.", "1"), i, "qkv")
        q, k, v = y.unflatten(2, (3, cfg.heads, -1)).permute(2, 0, 3, 1, 4)         # (B, H, T, d) each
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + layer(a.transpose(1, 2).flatten(2), i, "o")
        x = x + layer(F.relu(layer(normalized(p, x, f"{i}.", "2"), i, "1")), i, "2")
    logits = F.linear(normalized(p, x)[:, -cfg.digits:], p["Wout"].T, p["bout"])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@model("lora", "ranks", rank=3, alpha=2.1, **LORA)
@model("lora", "qlora", rank=3, alpha=2.1, **LORA)
def lora(p, batch, cfg):
    ids, targets, base = batch
    frozen = {name: w.detach() for name, w in base.items()}
    return sorting_gpt({**frozen, **p}, (ids, targets), cfg, cfg.alpha / cfg.rank)


# ---- ssm.py ----------------------------------------------------------------------------------------------------------

@model("ssm", "spine", dict(layers=1), dict(layers=2), length=7, dim=5, states=3, batch_size=4)
@model("ssm", "lengths", length=7, dim=5, states=3, batch_size=4)
@model("ssm", "copy", length=7, dim=5, states=3, batch_size=4)
@model("ssm", "text", length=7, dim=5, states=3, batch_size=4)
def mamba(p, batch, cfg):
    ids, targets = batch
    x = p["E"][ids.T]
    for i in range(cfg.layers):
        q = part(p, f"{i}.")
        u, gate = F.linear(F.rms_norm(x, (cfg.dim,), q["gamma"], 1e-5), q["Win"].T, q["bin"]).chunk(2, dim=2)
        u = F.silu(torch_causal_conv(u, q["Wconv"], q["bconv"]))
        y = F.linear(u, q["Wx"].T, q["bx"]) if "Wx" in q else q["bx"].expand(*u.shape[:2], -1)
        z, Bt, Ct = y.split([cfg.dim, cfg.states, cfg.states], dim=2)
        y = torch_selective_scan(u, F.softplus(z), Bt, Ct, q["A_log"], q["skip"])
        x = x + F.linear(y * F.silu(gate), q["Wout"].T, q["bout"])
    x = F.rms_norm(x[-targets.shape[1]:], (cfg.dim,), p["gamma"], 1e-5)
    return F.cross_entropy(F.linear(x, p["Wo"].T, p["bo"]).flatten(0, 1), targets.T.flatten())


@pytest.mark.parametrize("label", [label for label, (stem, *_) in MODELS.items() if stem in LESSONS])
def test_model(label):
    ours, params, batch, cfg = prepared(label)
    loss, grads, *_ = ours(params, batch, cfg)
    p = tensor(params)
    compare(label, loss, grads, MODELS[label][3](p, [tensor(a, False) for a in batch], cfg), p)


# ---- is anything missing? --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stem", LESSONS)
def test_every_model_has_a_row(stem):
    """Every function that returns a loss and gradients, of the spine and of a task."""
    module, labels = lesson(stem), [label for label in MODELS if MODELS[label][0] == stem]
    assert labels, f"{stem}.py has no row in MODELS"
    tasks = {name: task.loss_and_grads for name, task in module.TASKS.items()}
    tasks["spine"] = getattr(module, "loss_and_grads", None)
    compared = {prepared(label)[0] for label in labels}
    missing = [name for name, function in tasks.items() if function and function not in compared]
    assert not missing, f"{stem}.py: no row in MODELS for {missing}"


def compounds(stem):
    """The names of all operations that the models of a lesson run and that run others in turn."""
    found = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_name.endswith("_forward"):
            while frame := frame.f_back:
                found.add(frame.f_code.co_name)
    before = sys.getprofile()
    for label in MODELS:
        if MODELS[label][0] == stem:
            ours, *inputs = prepared(label)
            sys.setprofile(note)
            try:
                ours(*inputs)
            finally:
                sys.setprofile(before)
    return found


@pytest.mark.parametrize("stem", LESSONS)
def test_every_operation_has_a_row(stem):
    """A compound of operations needs none, if it is a part of a model."""
    names = [name.removesuffix("_forward") for name in definitions(stem) if name.endswith("_forward")]
    known = {label.split()[0] for label in OPERATIONS} | NO_COUNTERPART.keys()
    known |= {name.removesuffix("_forward") for name in compounds(stem)}
    missing = [name for name in names if name not in known]
    assert not missing, f"{stem}.py: neither OPERATIONS nor NO_COUNTERPART has {missing}"


# ---- optimizers, schedules, clipping ---------------------------------------------------------------------------------

def groups(params, weight_decay):
    """Weight decay for matrices only."""
    return [dict(params=[p], weight_decay=weight_decay * (p.ndim > 1)) for p in params]


def sgdw(params, **options):
    """SGD with decoupled weight decay: as AdamW, it shrinks the matrices before each step."""
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, **options)

    def shrink(*_):
        with torch.no_grad():
            for p in params:
                p.mul_(1 - 0.1 * 0.2 * (p.ndim > 1))
    optimizer.register_step_pre_hook(shrink)
    return optimizer


OPTIMIZERS = {
    "sgd_update": (lambda p: torch.optim.SGD(p, lr=0.1), {}),
    "momentum_update": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {}),
    "sgdw_update": (sgdw, {"weight_decay": 0.2}),
    "sgdw_update nesterov": (functools.partial(sgdw, nesterov=True), {"weight_decay": 0.2, "nesterov": True}),
    "adam_update": (lambda p: torch.optim.Adam(p, lr=0.1), {}),
    "adamw_update": (lambda p: torch.optim.AdamW(groups(p, 0.2), lr=0.1), {"weight_decay": 0.2}),
}


@pytest.mark.parametrize("name, stem", [(name, stem) for name in OPTIMIZERS
                                        for stem in having(name.split()[0])])
def test_optimizer(name, stem):
    (make, options), gen = OPTIMIZERS[name], np.random.default_rng(2)
    params, state = {"W": gen.standard_normal((3, 4)), "b": gen.standard_normal(4)}, {}
    tensors = {key: nn.Parameter(torch.tensor(value)) for key, value in params.items()}
    optimizer = make(list(tensors.values()))
    for step in range(1, 8):
        grads = {key: gen.standard_normal(value.shape) for key, value in params.items()}
        for key, g in grads.items():
            tensors[key].grad = torch.tensor(g)
        getattr(lesson(stem), name.split()[0])(params, grads, state, 0.1, **options)
        optimizer.step()
        for key in params:
            differ(f"{stem} {name}, step {step}, {key}", params[key], tensors[key])


def test_every_optimizer_has_a_row():
    names = {name for stem in LESSONS for name in definitions(stem) if name.endswith("_update")}
    assert names <= OPTIMIZERS.keys(), names - OPTIMIZERS.keys()


@pytest.mark.parametrize("limit", [0.7, 100.0])
@pytest.mark.parametrize("stem", having("clip_norm"))
def test_clip_norm(stem, limit):
    grads = {"W": normal(3, 4), "b": normal(4)}
    tensors = [nn.Parameter(torch.zeros(g.shape)) for g in grads.values()]
    for tensor, g in zip(tensors, grads.values()):
        tensor.grad = torch.tensor(g)
    norm = nn.utils.clip_grad_norm_(tensors, limit).item()
    differ(f"{stem} clip_norm", lesson(stem).clip_norm(grads, limit), norm)
    for tensor, g in zip(tensors, grads.values()):      # PyTorch divides by the norm + 1e-6
        exact = (norm + 1e-6) / norm if norm > limit else 1.0
        differ(f"{stem} clip_norm, gradients", g, tensor.grad * exact)


lr_scheduler = torch.optim.lr_scheduler
SCHEDULES = {               # function and choice: what comes in addition to the warmup
    "learning_rate": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "scheduled_rate cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "scheduled_rate constant": lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
    "scheduled_rate step": lambda o: lr_scheduler.MultiStepLR(o, [12, 17]),
}


def their_rates(make, steps):
    """The learning rates of a schedule, from 0.3."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = make(optimizer)
    rates = schedule.get_last_lr()
    for _ in range(steps - 1):
        optimizer.step()
        schedule.step()
        rates += schedule.get_last_lr()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 6])
@pytest.mark.parametrize("label, stem", [(label, stem) for label in SCHEDULES for stem in having(label.split()[0])])
def test_schedule(label, stem, warmup):
    name, *choice = label.split()
    cfg = SimpleNamespace(lr=0.3, warmup=warmup, steps=20, schedule=" ".join(choice))

    def schedule(optimizer):
        parts = [SCHEDULES[label](optimizer)]
        if warmup > 1:
            parts.append(lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1))
        return lr_scheduler.ChainedScheduler(parts)
    ours = [getattr(lesson(stem), name)(step, cfg) for step in range(1, 21)]
    differ(f"{stem} {label}, warmup {warmup}", ours, their_rates(schedule, 20))


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
@pytest.mark.parametrize("stem", having("one_cycle_rate"))
def test_one_cycle_rate(stem, schedule):
    """OneCycleLR ends at 0 and warms up as it cools down, so the last step and a cosine's warmup are left out."""
    cfg = SimpleNamespace(lr=0.3, warmup_fraction=0.25, steps=20, schedule=schedule)
    first = 1 if schedule == "one-cycle" else 5
    ours = [lesson(stem).one_cycle_rate(step, cfg) for step in range(first, 20)]
    theirs = their_rates(lambda o: lr_scheduler.OneCycleLR(
        o, 0.3, total_steps=20, pct_start=5 / 20, div_factor=5, final_div_factor=math.inf, cycle_momentum=False,
        anneal_strategy="linear" if schedule == "one-cycle" else "cos"), 20)
    differ(f"{stem} one_cycle_rate {schedule}", ours, theirs[first - 1:19])
