"""Every operation that PyTorch has, and every model built from torch.nn modules: values and gradients in float64."""
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
LESSONS = {p.stem: p for p in sorted(ROOT.glob("*.py"))
           if "# ==== A complete program ends here." in p.read_text(encoding="utf-8")}
TOLERANCE = 1e-10
differences = {}


def load(name):
    """A lesson as a module."""
    if "parity_" + name not in sys.modules:
        spec = importlib.util.spec_from_file_location("parity_" + name, LESSONS[name])
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules["parity_" + name]


def differ(what, ours, theirs):
    """Hold two arrays equal; keep the largest difference for the report."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    assert np.shape(ours) == theirs.shape, f"{what}: {np.shape(ours)}, PyTorch {theirs.shape}"
    difference = float(np.abs(ours - theirs).max(initial=0) / max(1.0, np.abs(theirs).max(initial=0)))
    differences[what] = difference
    assert difference < TOLERANCE, f"{what} differs by {difference:.1e}"


rng = np.random.default_rng(0)


def normal(*shape):
    """Standard normal numbers."""
    return rng.standard_normal(shape)


def torch_batchnorm(x, gamma, beta, running=None):
    """F.batch_norm in training, or with given statistics."""
    if running is None:
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5)
    mean, var = (torch.as_tensor(a) for a in running)
    return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=1e-5)


def torch_rope(x, cos, sin):
    """Rotation of each pair as a product of complex numbers."""
    a, b = x.chunk(2, dim=3)
    y = torch.complex(a, b) * torch.complex(torch.as_tensor(cos), torch.as_tensor(sin))
    return torch.cat([y.real, y.imag], dim=3)


def torch_channels_first(function):
    """A function of PyTorch for images (N, C, H, W), for ours of (N, H, W, C)."""
    return lambda x, *args: function(x.permute(0, 3, 1, 2), *args).permute(0, 2, 3, 1)


# name of the operation: (inputs in forward's order; floats get gradients), the same in PyTorch
OPERATIONS = {
    "linear": (dict(x=normal(3, 5), W=normal(5, 7), b=normal(7)), lambda x, W, b: F.linear(x, W.T, b)),
    "relu": (dict(x=normal(3, 5)), F.relu),
    "sigmoid": (dict(x=normal(3, 5)), torch.sigmoid),
    "tanh": (dict(x=normal(3, 5)), torch.tanh),
    "gelu": (dict(x=normal(3, 5)), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (dict(x=normal(3, 5)), F.silu),
    "swiglu": (dict(gate=normal(3, 5), up=normal(3, 5)), lambda gate, up: F.silu(gate) * up),
    "layernorm": (dict(x=normal(3, 5), gamma=normal(5), beta=normal(5)),
                  lambda x, gamma, beta: F.layer_norm(x, (5,), gamma, beta, 1e-5)),
    "rmsnorm": (dict(x=normal(3, 5), gamma=normal(5)), lambda x, gamma: F.rms_norm(x, (5,), gamma, 1e-5)),
    "batchnorm": (dict(x=normal(6, 5), gamma=normal(5), beta=normal(5)), torch_batchnorm),
    "embedding": (dict(ids=rng.integers(0, 5, (3, 4)), E=normal(5, 2)), F.embedding),
    "mse": (dict(y=normal(3, 5), targets=normal(3, 5)), F.mse_loss),
    "binary_cross_entropy": (dict(logits=normal(3, 5), targets=rng.integers(0, 2, (3, 5)).astype(float)),
                             F.binary_cross_entropy_with_logits),
    "softmax_cross_entropy": (dict(logits=normal(3, 5), targets=rng.integers(0, 5, 3)), F.cross_entropy),
    "smoothed_cross_entropy": (dict(logits=normal(3, 5), targets=rng.integers(0, 5, 3), label_smoothing=0.3),
                               lambda z, t, s: F.cross_entropy(z, t, label_smoothing=s)),
    "penalty": (dict(W=normal(3, 5), l1=0.3, l2=0.2),
                lambda W, l1, l2: l1 * W.abs().sum() + l2 / 2 * W.pow(2).sum()),
    "causal_attention": (dict(q=normal(2, 3, 5, 6), k=normal(2, 3, 5, 6), v=normal(2, 3, 5, 6)),
                         lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "bidirectional_attention": (dict(q=normal(2, 3, 5, 6), k=normal(2, 3, 5, 6), v=normal(2, 3, 5, 6)),
                                F.scaled_dot_product_attention),
    "attention": (dict(q=normal(2, 3, 5, 6), k=normal(2, 3, 7, 6), v=normal(2, 3, 7, 6),
                       mask=np.arange(7) < np.array([4, 7])[:, None, None, None]),
                  lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, torch.as_tensor(mask))),
    "rope": (dict(x=normal(2, 3, 5, 6), cos=np.cos(np.outer(np.arange(5), [1, 0.1, 0.01])),
                  sin=np.sin(np.outer(np.arange(5), [1, 0.1, 0.01]))), torch_rope),
    "batchnorm2d": (dict(x=normal(3, 4, 2, 5), gamma=normal(5), beta=normal(5)),
                    torch_channels_first(torch_batchnorm)),
    "conv": (dict(x=normal(2, 6, 5, 3), W=normal(3, 3, 3, 4)),
             torch_channels_first(lambda x, W: F.conv2d(x, W.permute(3, 2, 0, 1), padding=1))),
    "maxpool": (dict(x=normal(2, 6, 4, 3)), torch_channels_first(lambda x: F.max_pool2d(x, 2))),
    "avgpool": (dict(x=normal(2, 6, 4, 3)), torch_channels_first(lambda x: F.avg_pool2d(x, 2))),
    "globalpool": (dict(x=normal(2, 6, 4, 3)), lambda x: x.mean(dim=(1, 2))),
    "groupnorm": (dict(x=normal(2, 5, 3, 6), gamma=normal(6), beta=normal(6), groups=3),
                  torch_channels_first(lambda x, gamma, beta, n: F.group_norm(x, n, gamma, beta, 1e-5))),
}
NO_GRADIENT = {"targets", "mask", "cos", "sin"}


def has(name):
    """The lessons that have this operation."""
    return [lesson for lesson in LESSONS if f"\ndef {name}_forward(" in LESSONS[lesson].read_text(encoding="utf-8")]


@pytest.mark.parametrize("name, lesson", [(name, lesson) for name in OPERATIONS for lesson in has(name)[:1]])
def test_operation(name, lesson):
    module, (case, function) = load(lesson), OPERATIONS[name]
    out, cache = getattr(module, name + "_forward")(*case.values())
    tensors = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in case.items()}
    wanted = [k for k, v in case.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f" and k not in NO_GRADIENT]
    for k in wanted:
        tensors[k].requires_grad_()
    theirs = function(*tensors.values())
    differ(name, out, theirs)
    dout = np.random.default_rng(1).standard_normal(np.shape(out))
    grads = getattr(module, name + "_backward")(dout if np.ndim(out) else float(dout), cache)
    theirs.backward(torch.as_tensor(dout))
    for k, g in zip(wanted, grads if isinstance(grads, tuple) else (grads,)):
        differ(f"{name}, gradient of {k}", g, tensors[k].grad)


CONV2D = [dict(k=k, stride=stride, padding=padding, dilation=dilation, groups=groups)
          for k, stride, padding, dilation, groups in (
              (3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (2, 1, 0, 2, 1), (3, 1, 1, 1, 2), (3, 2, 2, 2, 3),
              (1, 2, 0, 1, 1), (2, 3, 3, 1, 2), (3, 1, 1, 1, 6))]


@pytest.mark.skipif(not has("conv2d"), reason="no lesson has it")
@pytest.mark.parametrize("options", CONV2D, ids=lambda o: "-".join(map(str, o.values())))
def test_conv2d(options):
    module, k, groups = load(has("conv2d")[0]), options["k"], options["groups"]
    x, W = normal(2, 9, 8, 6), normal(k, k, 6 // groups, 12)
    rest = {key: options[key] for key in ("stride", "padding", "dilation", "groups")}
    out, cache = module.conv2d_forward(x, W, **rest)
    tx, tW = torch.tensor(x, requires_grad=True), torch.tensor(W, requires_grad=True)
    theirs = F.conv2d(tx.permute(0, 3, 1, 2), tW.permute(3, 2, 0, 1), **rest).permute(0, 2, 3, 1)
    differ(f"conv2d {options}", out, theirs)
    dout = normal(*out.shape)
    dx, dW = module.conv2d_backward(dout, cache)
    theirs.backward(torch.as_tensor(dout))
    differ("conv2d, gradient of x", dx, tx.grad)
    differ("conv2d, gradient of W", dW, tW.grad)


def leaves(params):
    """Parameters as tensors that get gradients."""
    return {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}


def compare_model(what, module, cfg, init, batch, ours, theirs):
    """Loss and all gradients of a model, ours and one of torch.nn modules: theirs(tensors) -> loss."""
    params = init(cfg, np.random.default_rng(0), np.float64)
    for name, value in params.items():
        params[name] = value + 0.3 * np.random.default_rng(len(name)).standard_normal(value.shape)
    loss, grads = ours(params, batch, cfg)
    tensors = leaves(params)
    their_loss = theirs(tensors)
    their_loss.backward()
    differ(what, loss, their_loss)
    for name, g in grads.items():
        differ(f"{what}, gradient of {name}", g, tensors[name].grad)


def test_mlp():
    module = load("mlp")
    cfg = module.Config(hidden="5,4", batch_size=7)
    x, targets = module.make_batch(cfg, 1, np.float64)

    def theirs(p):
        net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4), torch.nn.Tanh(),
                                  torch.nn.Linear(4, 1))
        named = {f"{2 * i}.weight": p[f"W{i}"].T for i in range(3)}
        named.update({f"{2 * i}.bias": p[f"b{i}"] for i in range(3)})
        logits = torch.func.functional_call(net, named, torch.tensor(x))
        return torch.nn.BCEWithLogitsLoss()(logits, torch.tensor(targets))
    compare_model("mlp", module, cfg, module.init_params, (x, targets), module.loss_and_grads, theirs)


def test_lstm():
    module = load("lstm")
    cfg = module.Config(length=6, hidden=5, batch_size=4)
    x, targets = module.make_batch(cfg, 1, np.float64)

    def theirs(p):
        named = {"weight_ih_l0": p["Wx"].T, "weight_hh_l0": p["Wh"].T, "bias_ih_l0": p["b"],
                 "bias_hh_l0": torch.zeros_like(p["b"])}
        h, _ = torch.func.functional_call(torch.nn.LSTM(1, 5), named, torch.tensor(x))
        return F.mse_loss(F.linear(h[-1], p["Wo"].T, p["bo"]), torch.tensor(targets))
    compare_model("lstm", module, cfg, module.init_params, (x, targets), module.loss_and_grads, theirs)


def test_gru_and_plain_cell():
    module = load("lstm")
    T, N, D, H = 6, 4, 3, 5
    for name, kind, blocks in (("gru", torch.nn.GRU, 3), ("rnn", torch.nn.RNN, 1)):
        x, Wx, Wh, b = normal(T, N, D), normal(D, blocks * H), normal(H, blocks * H), normal(blocks * H)
        bn, h0 = normal(H), normal(N, H)
        p = leaves(dict(Wx=Wx, Wh=Wh, b=b, bn=bn))
        hidden = torch.cat([torch.zeros(2 * H), p["bn"]]) if name == "gru" else torch.zeros(H)
        named = {"weight_ih_l0": p["Wx"].T, "weight_hh_l0": p["Wh"].T, "bias_ih_l0": p["b"], "bias_hh_l0": hidden}
        theirs, _ = torch.func.functional_call(kind(D, H), named, (torch.tensor(x), torch.tensor(h0)[None]))
        args = (x @ Wx + b, h0, Wh, bn) if name == "gru" else (x @ Wx + b, h0, Wh)
        out, cache = getattr(module, name + "_forward")(*args)
        out = out[0] if isinstance(out, tuple) else out
        differ(name, out, theirs)
        dout = normal(*out.shape)
        dz, _, dWh, *dbn = getattr(module, name + "_backward")(dout, cache)
        theirs.backward(torch.tensor(dout))
        differ(f"{name}, gradient of Wh", dWh, p["Wh"].grad)
        differ(f"{name}, gradient of b", dz.sum(axis=(0, 1)), p["b"].grad)
        for g in dbn:
            differ(f"{name}, gradient of bn", g, p["bn"].grad)


def test_gpt():
    module = load("transformer")
    cfg = module.Config(layers=2, heads=2, dim=6, context=7, batch_size=3)
    ids, targets = module.make_batch(cfg, 1, np.float64)

    def theirs(p):
        x = F.embedding(torch.tensor(ids), p["E"]) + p["P"]
        mask = torch.nn.Transformer.generate_square_subsequent_mask(7)
        for i in range(2):
            q = {name[2:]: value for name, value in p.items() if name.startswith(f"{i}.")}
            layer = torch.nn.TransformerEncoderLayer(
                6, 2, 24, dropout=0.0, norm_first=True, batch_first=True,
                activation=lambda z: F.gelu(z, approximate="tanh"))
            named = {"self_attn.in_proj_weight": q["Wqkv"].T, "self_attn.in_proj_bias": q["bqkv"],
                     "self_attn.out_proj.weight": q["Wo"].T, "self_attn.out_proj.bias": q["bo"],
                     "linear1.weight": q["W1"].T, "linear1.bias": q["b1"], "linear2.weight": q["W2"].T,
                     "linear2.bias": q["b2"], "norm1.weight": q["gamma1"], "norm1.bias": q["beta1"],
                     "norm2.weight": q["gamma2"], "norm2.bias": q["beta2"]}
            x = torch.func.functional_call(layer, named, (x,), dict(src_mask=mask, is_causal=True))
        x = F.layer_norm(x, (6,), p["gamma"], p["beta"])
        return F.cross_entropy((x @ p["E"].T).flatten(0, 1), torch.tensor(targets).flatten())
    compare_model("gpt", module, cfg, module.init_params, (ids, targets), module.loss_and_grads, theirs)


def test_softmax_regression():
    module = load("perceptron")
    cfg = module.Config()
    x, targets = module.make_batch(cfg, 1, np.float64)

    def theirs(p):
        logits = F.linear(torch.tensor(x), p["W"].T, p["b"])
        return F.binary_cross_entropy_with_logits(logits, torch.tensor(targets))
    compare_model("perceptron", module, cfg, module.init_params, (x, targets), module.loss_and_grads, theirs)


# ---- optimizers, clipping --------------------------------------------------------------------------------------------

def torch_steps(make, shapes=((3, 4), (4,)), steps=7):
    """Parameters after some steps of a PyTorch optimizer on given gradients, and those gradients."""
    gen = np.random.default_rng(2)
    params = [torch.nn.Parameter(torch.tensor(gen.standard_normal(s))) for s in shapes]
    start = [p.detach().numpy().copy() for p in params]
    optimizer, all_grads = make(params), []
    for _ in range(steps):
        all_grads.append([gen.standard_normal(s) for s in shapes])
        for p, g in zip(params, all_grads[-1]):
            p.grad = torch.tensor(g)
        optimizer.step()
    return start, all_grads, params


def first_with(name):
    """The first lesson that defines a function."""
    found = [lesson for lesson in LESSONS if f"\ndef {name}(" in LESSONS[lesson].read_text(encoding="utf-8")]
    return load(found[0]) if found else None


OPTIMIZERS = {
    "sgd_update": (lambda p: torch.optim.SGD(p, lr=0.1), {}),
    "momentum_update": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {}),
    "adam_update": (lambda p: torch.optim.Adam(p, lr=0.1), {}),
    "adamw_update": (lambda p: torch.optim.AdamW([dict(params=p[:1], weight_decay=0.2),
                                                  dict(params=p[1:], weight_decay=0.0)], lr=0.1),
                     {"weight_decay": 0.2}),
    "sgdw_update": (lambda p: torch.optim.SGD([dict(params=p[:1], weight_decay=0.0),
                                               dict(params=p[1:], weight_decay=0.0)], lr=0.1, momentum=0.9),
                    {"weight_decay": 0.0}),
}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if first_with(name)])
def test_optimizer(name):
    make, options = OPTIMIZERS[name]
    start, all_grads, theirs = torch_steps(make)
    params, state = {"W": start[0].copy(), "b": start[1].copy()}, {}
    for grads in all_grads:
        getattr(first_with(name), name)(params, dict(zip("Wb", grads)), state, 0.1, **options)
    for ours, tensor in zip(params.values(), theirs):
        differ(name, ours, tensor)


def test_clip_norm():
    grads = {"W": normal(3, 4), "b": normal(4)}
    tensors = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads.values()]
    for tensor, g in zip(tensors, grads.values()):
        tensor.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(tensors, 0.7)
    differ("clip_norm", first_with("clip_norm").clip_norm(grads, 0.7), norm)
    for tensor, g in zip(tensors, grads.values()):
        assert np.abs(g - tensor.grad.numpy()).max() < 1e-5     # PyTorch divides by the norm + 1e-6


def test_learning_rate():
    module = first_with("learning_rate")
    cfg = type("C", (), dict(lr=0.3, warmup=0, steps=20))()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(1, 21):
        differ("learning_rate", np.array(module.learning_rate(step, cfg)), torch.tensor(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()


def test_report(capsys):
    """Last of all: print the largest difference."""
    if differences:
        what = max(differences, key=differences.get)
        with capsys.disabled():
            print(f"\n{len(differences)} comparisons, largest difference {differences[what]:.1e} ({what})")
