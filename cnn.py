"""cnn.py: the same small detector at every position of the image.

A linear layer on pixels learns an edge anew for every position where one can be. A convolution
learns it once: a filter of k x k pixels slides over the image and outputs at every position how
well the patch there matches the filter. All positions share the weights of the filter, so these are
few, and where the input shifts, the output shifts with it. Pooling halves the image, so that the
filters of the next layer cover more of it: first edges, then parts, then shapes.

Forward, output pixel q, offsets p from -(k // 2) to k // 2; x[q] (C,), W[p] a matrix (C, M):
    conv         y[q] = sum_p x[q + p] W[p]   as one product: y = patches W, one patch per row
    batchnorm2d  xhat = (x - mean) / std, y = gamma xhat + beta; mean and std of a channel over all
                 pixels of all images; in evaluation those of the training (moving averages)
    maxpool      y = the largest x of a 2 x 2 window
Backward:
    conv         dW[p] = sum_q x[q + p]^T dy[q]   as one product: dW = patches^T dy
                 dx[r] = sum_p dy[r - p] W[p]^T   x[r] is in y[q] for every q = r - p: so dx is dy,
                                convolved with W rotated by 180 degrees, C and M swapped
    batchnorm2d  g = gamma dy, dx = (g - mean(g) - xhat mean(g xhat)) / std
    maxpool      dy goes to the largest pixel of its window; the others get 0

Run    python cnn.py      (ten shapes; python cnn.py --help lists the other tasks)
Papers: LeCun et al. 1998 (convolutional networks), Ioffe and Szegedy 2015 (BatchNorm), He et al.
2015 (initialisation), Kingma and Ba 2015 (Adam).
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
    """Tell ten shapes apart, at any position, in any size and color."""
    size: int = 16          # pixels per side, a multiple of 8
    channels: int = 8       # filters of the first layer; the second has twice, the third four times
    batch_size: int = 64    # images per step
    steps: int = 600        # optimizer steps
    lr: float = 0.01        # peak learning rate
    warmup: int = 50        # steps of linear warmup
    seed: int = 0           # random seed


# ---- layers: N images of H x W pixels (else W: weights), C channels in, M out, k x k filters -----

def conv_forward(x, W):
    """y[q] = sum_p x[q + p] W[p]; zeros around x, k // 2 deep, keep the size; k is odd.
    x (N, H, W, C), W (k, k, C, M) -> (N, H, W, M)."""
    k, _, C, M = W.shape
    edge = (k // 2, k // 2)
    padded = np.pad(x, ((0, 0), edge, edge, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(1, 2))
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, k * k * C)        # a patch per row
    y = patches @ W.reshape(-1, M)                      # (N H W, M)
    return y.reshape(*x.shape[:3], M), (patches, W)


def conv_backward(dout, cache):
    """dW = patches^T dout. dx is dout, convolved with W rotated by 180 degrees, C and M swapped."""
    patches, W = cache
    dW = patches.T @ dout.reshape(-1, dout.shape[3])
    dx, _ = conv_forward(dout, W[::-1, ::-1].swapaxes(2, 3))
    return dx, dW.reshape(W.shape)


def batchnorm2d_forward(x, gamma, beta, running=None, eps=1e-5):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + eps), mean and var of each channel over
    all pixels of all images; in evaluation running = (mean, var).   x (N, H, W, C), gamma (C,)."""
    mean, var = running or (x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)))
    inv_std = (var + eps) ** -0.5
    xhat = (x - mean) * inv_std
    return gamma * xhat + beta, (xhat, gamma, inv_std, not running, mean, var)


def batchnorm2d_backward(dout, cache):
    """g = gamma dout, dx = (g - mean(g) - xhat mean(g xhat)) / std, since every x moves mean and
    std, too; in evaluation they are constants. dgamma = sum dout xhat, dbeta = sum dout."""
    xhat, gamma, inv_std, training, _, _ = cache
    g = gamma * dout
    moved = g.mean(axis=(0, 1, 2)) + xhat * (g * xhat).mean(axis=(0, 1, 2))
    dx = (g - training * moved) * inv_std
    return dx, (dout * xhat).sum(axis=(0, 1, 2)), dout.sum(axis=(0, 1, 2))


def relu_forward(x):
    """y = max(x, 0), entry by entry."""
    return np.maximum(x, 0), x


def relu_backward(dout, cache):
    """dx = dout where x > 0, else 0."""
    x = cache
    return dout * (x > 0)


def maxpool_forward(x):
    """The largest pixel of each 2 x 2 window, of equals the first.   x (N, H, W, C), H and W even
    -> (N, H / 2, W / 2, C)."""
    N, H, W, C = x.shape
    windows = x.reshape(N, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 5, 2, 4)     # (..., 2, 2)
    windows = windows.reshape(N, H // 2, W // 2, C, 4)
    argmax = windows.argmax(axis=4)[..., None]
    return np.take_along_axis(windows, argmax, axis=4)[..., 0], (argmax, x.shape)


def maxpool_backward(dout, cache):
    """The largest pixel of a window gets the whole gradient, the others get 0."""
    argmax, (N, H, W, C) = cache
    dwindows = np.zeros((*dout.shape, 4), dout.dtype)
    np.put_along_axis(dwindows, argmax, dout[..., None], axis=4)
    dwindows = dwindows.reshape(N, H // 2, W // 2, C, 2, 2)
    return dwindows.transpose(0, 1, 4, 2, 5, 3).reshape(N, H, W, C)


def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


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

SHAPES = "disc ring square frame triangle diamond plus cross lines bars".split()


def draw_shapes(labels, size, rng):
    """Images of ten shapes at any position, in any size and color, with noise.
    labels (N,) indices of SHAPES -> (N, size, size, 3), from about -1 to 1."""
    N = len(labels)
    radius = rng.uniform(0.3, 0.45, (N, 1)) * size
    center = radius + rng.random((2, N, 1)) * (size - 1 - 2 * radius)
    y, x = (np.arange(size) - center) / radius          # (N, size) each; the shape is within 1
    y, x = np.broadcast_arrays(y[:, :, None], x[:, None, :])    # (N, size, size)
    ax, ay, r = abs(x), abs(y), np.hypot(x, y)
    far, near = np.maximum(ax, ay), np.minimum(ax, ay)
    inside = [r < 1,                                    # disc
              (0.6 < r) & (r < 1),                      # ring
              far < 0.85,                               # square
              (0.45 < far) & (far < 0.85),              # frame
              (y < 0.75) & (ax < (y + 1) * 0.55),       # triangle
              ax + ay < 1.05,                           # diamond
              (near < 0.25) & (far < 1),                # plus
              (abs(ax - ay) < 0.3) & (far < 0.8),       # cross
              (abs(ay - 0.55) < 0.22) & (ax < 0.9),     # lines
              (abs(ax - 0.55) < 0.22) & (ay < 0.9)]     # bars
    mask = np.choose(labels[:, None, None], inside)[..., None]
    ground, ink = rng.random((2, N, 1, 1, 3))
    alike = abs(ink - ground).sum(axis=3, keepdims=True) < 0.75
    ink = np.where(alike, 1 - ground.round(), ink)      # every shape has to be visible
    images = np.where(mask, ink, ground)
    return (images - 0.5) * 2 + 0.2 * rng.standard_normal(images.shape)


def make_batch(cfg, step, dtype=np.float32):
    """New shapes at every step.   -> x (N, size, size, 3), labels (N,)."""
    rng = np.random.default_rng((cfg.seed, step))
    labels = rng.integers(0, 10, cfg.batch_size)
    return draw_shapes(labels, cfg.size, rng).astype(dtype), labels


# ---- model: three times convolution, BatchNorm, ReLU, pooling; then two linear layers ------------

def init_params(cfg, rng, dtype=np.float32):
    """W1 (3, 3, C, M), gamma1, beta1 (M,), ... W3, gamma3, beta3; W4, b4, W5, b5. Weights with
    standard deviation sqrt(2 / inputs) (He et al. 2015)."""
    channels = [3, cfg.channels, 2 * cfg.channels, 4 * cfg.channels]
    params = {}
    for i in (1, 2, 3):
        C, M = channels[i - 1], channels[i]
        params[f"W{i}"] = rng.standard_normal((3, 3, C, M)) * (2 / (9 * C)) ** 0.5
        params[f"gamma{i}"], params[f"beta{i}"] = np.ones(M), np.zeros(M)
    features, hidden = M * (cfg.size // 8) ** 2, 8 * cfg.channels
    for i, D, M in ((4, features, hidden), (5, hidden, 10)):
        params[f"W{i}"] = rng.standard_normal((D, M)) * (2 / D) ** 0.5
        params[f"b{i}"] = np.zeros(M)
    return {name: value.astype(dtype) for name, value in params.items()}


def cnn_forward(params, x, running=None):
    """x (N, H, W, 3) -> logits (N, 10). running: mean and var of every BatchNorm, in evaluation."""
    blocks = []
    for i in (1, 2, 3):
        x, conv = conv_forward(x, params[f"W{i}"])
        statistics = running and tuple(running[f"norm{i}"])         # None in training
        x, norm = batchnorm2d_forward(x, params[f"gamma{i}"], params[f"beta{i}"], statistics)
        x, relu = relu_forward(x)
        x, pool = maxpool_forward(x)
        blocks.append((conv, norm, relu, pool))
    shape = x.shape
    x, hidden = linear_forward(x.reshape(len(x), -1), params["W4"], params["b4"])
    x, relu = relu_forward(x)
    logits, out = linear_forward(x, params["W5"], params["b5"])
    return logits, (blocks, shape, hidden, relu, out)


def cnn_backward(dout, cache):
    """cnn_forward in reverse order -> gradients under the keys of params."""
    (blocks, shape, hidden, relu, out), grads = cache, {}
    dx, grads["W5"], grads["b5"] = linear_backward(dout, out)
    dx, grads["W4"], grads["b4"] = linear_backward(relu_backward(dx, relu), hidden)
    dx = dx.reshape(shape)
    for i in (3, 2, 1):
        conv, norm, relu, pool = blocks[i - 1]
        dx = relu_backward(maxpool_backward(dx, pool), relu)
        dx, grads[f"gamma{i}"], grads[f"beta{i}"] = batchnorm2d_backward(dx, norm)
        dx, grads[f"W{i}"] = conv_backward(dx, conv)
    return grads


def moving_averages(running, statistics):
    """0.9 running + 0.1 statistics of a batch, by name; at the first step the statistics."""
    running = running or {}
    return {name: 0.9 * running.get(name, new) + 0.1 * new for name, new in statistics.items()}


def loss_and_grads(params, batch, cfg, running=None):
    """One forward and one backward pass -> loss, gradients, running statistics after it."""
    x, labels = batch
    logits, cache = cnn_forward(params, x)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels)
    grads = cnn_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)
    (blocks, *_), statistics = cache, {}
    for i, (_, norm, _, _) in enumerate(blocks, 1):
        *_, mean, var = norm
        statistics[f"norm{i}"] = np.stack([mean, var])
    return loss, grads, moving_averages(running, statistics)


# ---- training and demo ---------------------------------------------------------------------------

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


def train(params, cfg, running, make_batch=make_batch, loss_and_grads=loss_and_grads,
          update=adam_update, rate=learning_rate, state=None, losses=None, note=lambda: "",
          after_step=lambda step: None):
    """Train params and running in place -> losses.   Later parts pass their own functions."""
    state = {} if state is None else state
    losses = [] if losses is None else losses
    for step in progress(cfg.steps, losses, note):
        loss, grads, new = loss_and_grads(params, make_batch(cfg, step), cfg, running)
        update(params, grads, state, rate(step, cfg))
        running.update(new)
        losses.append(float(loss))
        after_step(step)
    check_finite(losses[-1], params)
    return losses


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def side_by_side(titles, pictures, gap="   "):
    """Print several pictures, each a list of lines, next to each other under their titles."""
    columns = [[title, *lines] for title, lines in zip(titles, pictures)]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns):
        print(gap.join(map(str.ljust, row, widths)).rstrip())


def show_images(images, titles):
    """Images (N, H, W) of numbers from 0 to 1, side by side; a line of text is two rows of pixels,
    since characters are tall."""
    pictures = []
    for image in images:
        lines = image.reshape(len(image) // 2, 2, -1).mean(axis=1)
        pictures.append(["".join(line) for line in shade(lines)])
    n = max(1, 103 // (images.shape[2] + 3))            # as many as fit into 100 columns
    for i in range(0, len(images), n):
        side_by_side(titles[i:i + n], pictures[i:i + n])


def show_filters(W):
    """The first eight filters of the first layer, W (k, k, C, M)."""
    print("Filters of the first layer, one channel below the other (= is 0; @ is the largest "
          "weight\nof a filter, blank is minus that)")
    W = W[..., :8] / (abs(W[..., :8]).max(axis=(0, 1, 2)) + 1e-9)
    rows = shade(0.5 + 0.5 * W).repeat(2, axis=1)       # (k, 2 k, C, M): a character is tall
    rows = rows.transpose(3, 2, 0, 1).reshape(W.shape[3], -1, 2 * len(W))   # (M, C k, 2 k)
    side_by_side([f"filter {m + 1}" for m in range(len(rows))],
                 [["".join(row) for row in filter] for filter in rows])


def show_confusion(outputs, labels, names):
    """The confusion matrix in percent, and the most confused pair in words."""
    table = np.zeros((10, 10), int)
    np.add.at(table, (labels, outputs), 1)
    print("Confusion matrix in percent. Rows: the true class; columns: what the net outputs")
    print(" " * 10 + "".join(f"{name[:5]:>6s}" for name in names))
    for name, row in zip(names, table):
        percent = 100 * row / max(1, row.sum())
        print(f"{name:>10s}" + "".join(f"{p:6.0f}" if p > 0.5 else "     ." for p in percent))
    pairs = np.triu(table + table.T, 1)                 # above the diagonal: both ways together
    a, b = np.unravel_index(pairs.argmax(), pairs.shape)
    if pairs.any():
        print(f"Most confused: {names[a]} and {names[b]}; {table[a, b]} of {table[a].sum()} images "
              f"of {names[a]} were\ntaken for {names[b]}, {table[b, a]} of {table[b].sum()} the "
              "other way round")


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
    """Learn to tell ten shapes apart; show filters, their outputs, and what is confused."""
    start, rng = time.perf_counter(), np.random.default_rng((cfg.seed, 10 ** 6))
    params, running = init_params(cfg, np.random.default_rng(cfg.seed)), {}
    size = sum(p.size for p in params.values())
    print(f"Ten shapes, {cfg.size} x {cfg.size} pixels in color, new ones in every batch; "
          f"{cfg.channels}, {2 * cfg.channels}, {4 * cfg.channels} filters,\n{size} parameters, "
          f"lr {cfg.lr}. Examples, the color of most contrast (blank is -1, @ is 1):")
    examples = draw_shapes(np.arange(10), cfg.size, rng).astype(np.float32)
    color = examples.std(axis=(1, 2)).argmax(axis=1)
    show_images(0.5 + 0.5 * examples[np.arange(10), :, :, color], SHAPES)
    print("chance level: loss 2.303, 10 % right")
    losses = train(params, cfg, running)
    labels = rng.integers(0, 10, 2000)
    x = draw_shapes(labels, cfg.size, rng).astype(np.float32)
    logits, _ = cnn_forward(params, x, running)
    loss, _ = softmax_cross_entropy_forward(logits, labels)
    check_finite(loss, params)
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    show_filters(params["W1"])
    _, (blocks, *_) = cnn_forward(params, examples[3:4], running)
    _, _, relu, _ = blocks[0]                           # what goes into the first ReLU
    maps = np.maximum(relu[0, :, :, :8], 0).transpose(2, 0, 1)
    print("Their outputs over the frame above, after BatchNorm and ReLU (blank is 0)")
    show_images(maps / (maps.max() + 1e-9), [f"filter {m + 1}" for m in range(len(maps))])
    show_confusion(logits.argmax(axis=1), labels, SHAPES)
    print(f"{accuracy:.2%} of 2000 fresh shapes right")
    print("\nNext: python cnn.py net --model linear      python cnn.py lr-sweep")
    print_result("shapes", cfg, accuracy=accuracy, test_loss=float(loss), params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: conv by its definition; stride, groups; residual nets; real images. =

MORE = """
Tasks (seconds and minutes on two cores)
    python cnn.py net --model resnet --norm group       any net, on the shapes; 20 s
    python cnn.py gradients                             layer by layer, with and without BatchNorm
    python cnn.py lr-sweep                              a hundredfold range of learning rates; 25 s
    python cnn.py lr-sweep --lr 0.02 --data cifar-10-binary.tar.gz                  on photographs
    python cnn.py resnet18                              ResNet-18, as it was published; 20 s
    python cnn.py mnist --data mnist                                            99.4 %, 3 minutes
    python cnn.py cifar --data cifar-10-binary.tar.gz --save plain.npz              the plain net
    python cnn.py cifar --data cifar-10-binary.tar.gz --save resnet.npz --model resnet \\
        --channels 24 --dropout 0 --optimizer nesterov --lr 0.15 --crop 3 --shift --steps 7000
                                                                                93.3 %, 90 minutes

Break it (what to change, and what comes of it)
    relu_forward: return x, x; relu_backward: return dout       99 %: max pooling is nonlinear, too
        the same, and python cnn.py net --pool average           9 %: the whole net is linear
    conv_backward: W.swapaxes(2, 3), not rotated                94 % instead of 98.5 %: a wrong
        gradient can pass for a right one, unless it is checked
    draw_shapes: np.where(mask, ink, ground)[:, np.random.default_rng(0).permutation(size)]
                                                                95 %: all images have their rows in
        the same wrong order, which a linear layer would not notice; filters need neighbours
    init_params: standard_normal((1, 1, C, M))                  41 %: filters without neighbours
    python cnn.py net --lr 0.1                                  99 %, as at a tenth of it;
        with --norm none                                        10 %: chance

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. Add a bias b to conv: y + b. Why is b useless if BatchNorm follows?
    2. Derive and add a stride to conv, before you look at conv2d.
    3. Halve the image by a stride of 2 in place of pooling (Springenberg 2015). Which is better?

Data
    curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
    mnist: python mlp.py --help says where to get it

Papers of these parts: Srivastava et al. 2014 (dropout), He et al. 2016 (residual nets), Szegedy et
al. 2016 (label smoothing), Howard et al. 2017 (depthwise), Goyal et al. 2017 (BatchNorm on many
workers, each with statistics of its own), Smith 2018 (one-cycle), Wu and He 2018 (GroupNorm),
Loshchilov and Hutter 2019 (weight decay), Sutskever et al. 2013 (Nesterov momentum).
"""

import argparse
import contextlib
import ctypes
import functools
import gzip
import inspect
import io
import json
import lzma
import re
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- convolution by its definition ---------------------------------------------------------------
# The formula as it stands: a sum over the k x k offsets p of the window. conv (above) does the same
# in one product, for which it writes out every patch; gradcheck.py holds the two equal.

def conv_loop_forward(x, W):
    """y[q] = sum_p x[q + p] W[p], where x has its zeros around and p begins at 0.
    x (N, H, W, C), W (k, k, C, M) -> (N, H, W, M)."""
    (_, H, width, _), k = x.shape, len(W)
    edge = (k // 2, k // 2)
    padded = np.pad(x, ((0, 0), edge, edge, (0, 0)))
    y = 0
    for i, j in np.ndindex(k, k):
        y = y + padded[:, i:i + H, j:j + width] @ W[i, j]
    return y, (padded, W)


def conv_loop_backward(dout, cache):
    """dW[p] = sum_q x[q + p]^T dout[q],  dx[q + p] += dout[q] W[p]^T for every p."""
    padded, W = cache
    (_, H, width, _), k = dout.shape, len(W)
    dpadded, dW = np.zeros_like(padded), np.zeros_like(W)
    for i, j in np.ndindex(k, k):
        window = np.s_[:, i:i + H, j:j + width]
        dW[i, j] = np.tensordot(padded[window], dout, axes=([0, 1, 2], [0, 1, 2]))
        dpadded[window] += dout @ W[i, j].T
    return dpadded[:, k // 2:k // 2 + H, k // 2:k // 2 + width], dW


# ---- stride, padding, dilation, groups -----------------------------------------------------------
# stride s: the window moves s pixels at a time, so the output is s times smaller. dilation d: the
# pixels of a window are d apart. groups g: the channels are cut into g groups, and every filter
# reads one group. With g = C each filter reads one channel (depthwise); a 1 x 1 convolution after
# that mixes the channels, and both together have (k^2 + M) C weights, not k^2 C M (Howard 2017).

def offset_views(x, k, stride=1, dilation=1):
    """For each offset in a k x k window the pixels of x that have it, over all windows.
    x (N, H, W, C) -> list of k k views (N, H', W', C)."""
    H, W = ((n - dilation * (k - 1) - 1) // stride + 1 for n in x.shape[1:3])
    offsets = range(0, k * dilation, dilation)
    return [x[:, i:i + H * stride:stride, j:j + W * stride:stride]
            for i in offsets for j in offsets]


def conv2d_forward(x, W, stride=1, padding=0, dilation=1, groups=1):
    """y[q] = sum_p x[stride q + dilation p] W[p], in every group of channels; padding: depth of the
    zeros around x.   x (N, H, W, C), W (k, k, C / groups, M) -> (N, H', W', M),
    H' = (H + 2 padding - dilation (k - 1) - 1) // stride + 1."""
    k, _, c, M = W.shape
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = dilation * (k - 1) + 1                       # pixels from first to last of a window
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    windows = windows[:, ::stride, ::stride, :, ::dilation, ::dilation]     # (N, H', W', C, k, k)
    N, H, width = windows.shape[:3]
    patches = windows.reshape(N, H, width, groups, c, k, k).transpose(3, 0, 1, 2, 5, 6, 4)
    patches = patches.reshape(groups, N * H * width, k * k * c)
    filters = W.reshape(k * k * c, groups, M // groups).swapaxes(0, 1)
    y = (patches @ filters).swapaxes(0, 1)              # (N H' W', groups, M / groups)
    return y.reshape(N, H, width, M), (patches, filters, W.shape, padded.shape, stride, padding,
                                       dilation)


def conv2d_backward(dout, cache):
    """dx[stride q + dilation p] += dout[q] W[p]^T, one offset p after the other; dW: below."""
    patches, filters, (k, _, c, _), shape, stride, padding, dilation = cache
    groups, M = len(patches), dout.shape[3]
    drows = dout.reshape(-1, groups, M // groups).swapaxes(0, 1)    # (groups, N H' W', M / groups)
    dpadded = np.zeros(shape, dout.dtype)
    for n, view in enumerate(offset_views(dpadded, k, stride, dilation)):
        W = filters[:, n * c:(n + 1) * c].swapaxes(1, 2)            # (groups, M / groups, c)
        view += (drows @ W).swapaxes(0, 1).reshape(view.shape)
    dx = dpadded[:, padding:shape[1] - padding, padding:shape[2] - padding]
    return dx, conv2d_filter_gradient(dout, cache)


def conv2d_filter_gradient(dout, cache):
    """dW = patches^T dout in every group.   dout (N, H', W', M) -> dW (k, k, C / groups, M)."""
    patches, _, W_shape, *_ = cache
    drows = dout.reshape(patches.shape[1], len(patches), -1).swapaxes(0, 1)
    return (patches.swapaxes(1, 2) @ drows).swapaxes(0, 1).reshape(W_shape)


# ---- BatchNorm and max pooling, fast -------------------------------------------------------------
# The same operations in fewer and longer loops; gradcheck.py holds them equal. Without them a step
# of the plain net on CIFAR-10 takes 1.6 times as long.

def channel_sums(rows, C):
    """Sum of every channel over rows (N H, W C) of pixels.   -> (C,)."""
    return (np.ones(len(rows), rows.dtype) @ rows).reshape(-1, C).sum(axis=0)


def channel_products(a, b, C):
    """Sum of a b of every channel over rows (N H, W C) of pixels.   -> (C,)."""
    return np.einsum("nc,nc->c", a, b).reshape(-1, C).sum(axis=0)


def fast_batchnorm2d_forward(x, gamma, beta, running=None, eps=1e-5):
    """batchnorm2d on rows of W C numbers (a long inner loop), with one factor and one summand per
    channel.   x (N, H, W, C), gamma, beta (C,)."""
    N, H, W, C = x.shape
    rows, n = x.reshape(N * H, W * C), N * H * W
    mean = channel_sums(rows, C) / n if running is None else running[0]
    centered = rows - np.tile(mean, W)
    var = channel_products(centered, centered, C) / n if running is None else running[1]
    inv_std = (var + eps) ** -0.5
    y = centered * np.tile(gamma * inv_std, W)
    y += np.tile(beta, W)
    return y.reshape(x.shape), (centered, gamma, inv_std, running is None, mean, var)


def fast_batchnorm2d_backward(dout, cache):
    """dx = gamma / std (dout - mean(dout) - centered mean(dout centered) / (var + eps)): that
    of batchnorm2d in terms of centered = x - mean.   -> dx, dgamma, dbeta."""
    centered, gamma, inv_std, training, _, _ = cache
    N, H, W, C = dout.shape
    drows, n = dout.reshape(N * H, W * C), N * H * W
    dbeta = channel_sums(drows, C)
    dgamma = channel_products(drows, centered, C) * inv_std
    if not training:
        return dout * (gamma * inv_std), dgamma, dbeta
    dx = drows - np.tile(dbeta / n, W)
    dx -= centered * np.tile(dgamma * inv_std / n, W)
    dx *= np.tile(gamma * inv_std, W)
    return dx.reshape(dout.shape), dgamma, dbeta


def fast_maxpool_forward(x, k=2, stride=2, padding=0):
    """maxpool by one comparison per offset in the window: y is the largest so far, argmax its
    offset. Windows may be larger than 2 x 2 and may overlap.   x (N, H, W, C) -> (N, H', W', C)."""
    if padding:
        edge = (padding, padding)
        x = np.pad(x, ((0, 0), edge, edge, (0, 0)), constant_values=-np.inf)
    first, *others = offset_views(x, k, stride)
    y, argmax = first.copy(), np.zeros(first.shape, np.uint8)
    for n, view in enumerate(others, 1):
        np.maximum(argmax, (view > y) * np.uint8(n), out=argmax)
        np.maximum(y, view, out=y)
    return y, (argmax, x.shape, k, stride, padding)


def fast_maxpool_backward(dout, cache):
    """The largest pixel of a window gets its gradient; those of several windows add up."""
    argmax, shape, k, stride, padding = cache
    dx = np.zeros(shape, dout.dtype)
    for n, view in enumerate(offset_views(dx, k, stride)):
        view += dout * (argmax == n)
    return dx[:, padding:shape[1] - padding, padding:shape[2] - padding]


# ---- average pooling, GroupNorm, dropout, label smoothing, bias ----------------------------------

def avgpool_forward(x):
    """The mean of each 2 x 2 window.   x (N, H, W, C), H and W even -> (N, H / 2, W / 2, C)."""
    N, H, W, C = x.shape
    return x.reshape(N, H // 2, 2, W // 2, 2, C).mean(axis=(2, 4)), None


def avgpool_backward(dout, cache):
    """Each of the four pixels gets a quarter."""
    return (dout * 0.25).repeat(2, axis=1).repeat(2, axis=2)


def globalpool_forward(x):
    """The mean of each channel over all pixels.   x (N, H, W, C) -> (N, C)."""
    return x.mean(axis=(1, 2)), x.shape


def globalpool_backward(dout, cache):
    """Every pixel gets an equal share."""
    N, H, W, C = cache
    return np.broadcast_to(dout[:, None, None] * (1 / (H * W)), (N, H, W, C)).copy()


def groupnorm_forward(x, gamma, beta, groups, eps=1e-5):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + eps), mean and var of each image over
    all pixels of a group of channels: no batch is needed (Wu and He 2018).   x (N, H, W, C)."""
    N, H, W, C = x.shape
    xg = x.reshape(N, H * W, groups, C // groups)
    mean, var = xg.mean(axis=(1, 3), keepdims=True), xg.var(axis=(1, 3), keepdims=True)
    inv_std = (var + eps) ** -0.5
    xhat = (xg - mean) * inv_std
    return gamma * xhat.reshape(x.shape) + beta, (xhat, gamma, inv_std)


def groupnorm_backward(dout, cache):
    """g = gamma dout, dx = (g - mean(g) - xhat mean(g xhat)) / std, with means over a group;
    dgamma = sum dout xhat, dbeta = sum dout."""
    xhat, gamma, inv_std = cache
    g = (gamma * dout).reshape(xhat.shape)
    mean_g = g.mean(axis=(1, 3), keepdims=True)
    mean_g_xhat = (g * xhat).mean(axis=(1, 3), keepdims=True)
    dx = (g - mean_g - xhat * mean_g_xhat) * inv_std
    dgamma = (dout * xhat.reshape(dout.shape)).sum(axis=(0, 1, 2))
    return dx.reshape(dout.shape), dgamma, dout.sum(axis=(0, 1, 2))


def dropout_forward(x, keep, rate):
    """y = x keep / (1 - rate): a fraction rate of the entries becomes 0, the others grow to make up
    for it (Srivastava et al. 2014).   x (N, D), keep (N, D) of True and False."""
    return x * keep * (1 / (1 - rate)), (keep, rate)


def dropout_backward(dout, cache):
    """dx = dout keep / (1 - rate)."""
    keep, rate = cache
    return dout * keep * (1 / (1 - rate))


def smoothed_cross_entropy_forward(logits, targets, label_smoothing):
    """-mean_n sum_k y_nk log softmax(logits)_nk, y = (1 - s) onehot(targets) + s / K, s the label
    smoothing (Szegedy 2016).   logits (N, K), targets (N,) ids -> scalar."""
    N, K = logits.shape
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    y = np.full_like(logits, label_smoothing / K)
    y[np.arange(N), targets] += 1 - label_smoothing
    return -(y * log_p).sum(axis=1).mean(), (log_p, y)


def smoothed_cross_entropy_backward(dout, cache):
    """dlogits = (p - y) / N."""
    log_p, y = cache
    return (np.exp(log_p) - y) * (dout / len(y))


def bias_forward(x, b):
    """y = x + b.   x (N, H, W, C), b (C,)."""
    return x + b, None


def bias_backward(dout, cache):
    """dx = dout, db = sum dout over all but the channels."""
    return dout, dout.sum(axis=(0, 1, 2))


# ---- nets with choices: python cnn.py net --model resnet --norm group ----------------------------
# A residual block is y = relu(f(x) + x): f has to learn only what x lacks, and the gradient of y
# reaches x directly, however little of it passes through f (He et al. 2016).

@dataclass
class Net:
    """Any net, on ten shapes."""
    model: Literal["plain", "resnet", "linear"] = "plain"  # linear: one layer on the pixels
    channels: int = 8       # filters of the first layer; later ones have more
    norm: Literal["batch", "group", "none"] = "batch"  # normalisation after each convolution
    pool: Literal["max", "average"] = "max"  # pooling
    dropout: float = 0.0    # fraction of the features dropped before the last layer
    label_smoothing: float = 0.0  # probability spread over all classes
    flip: bool = False      # mirror half of the training images; test on mirror images as well
    crop: int = 0           # data augmentation: largest shift of an image, in pixels
    shift: bool = False     # test on images shifted by a pixel as well: logits are summed
    batch_size: int = 64    # images per step
    steps: int = 600        # optimizer steps
    optimizer: Literal["momentum", "nesterov", "adam"] = "adam"  # update rule
    lr: float = 0.01        # peak learning rate
    weight_decay: float = 0.005  # weight decay of momentum and nesterov; adam has none
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"  # learning rate after the warmup
    warmup_fraction: float = 0.2  # fraction of the steps with linear warmup
    threads: int = 1        # micro-batches, each on a thread, with BatchNorm statistics of its own
    save: str = ""          # checkpoint file (.npz), written every 500 steps
    load: str = ""          # checkpoint file to resume from
    seed: int = 0           # random seed
    image = (16, 16, 3)     # height, width, channels


PLANS = {       # layers in their order, each with its output channels as a multiple of --channels
    "plain": dict(stem1=1, pool1=1, conv2=2, pool2=2, conv3=4, pool3=4),
    "resnet": dict(stem1=1, conv1=2, pool1=2, res1=2, conv2=8, pool2=8, res2=8, conv3=8, pool3=8,
                   res3=8),
    "linear": {}}
UNITS = {"stem": "a", "conv": "a", "res": "ab", "pool": ""}     # convolutions of a layer
NORMS = {       # forward, backward, parameters
    "batch": (fast_batchnorm2d_forward, fast_batchnorm2d_backward, ("gamma", "beta")),
    "group": (groupnorm_forward, groupnorm_backward, ("gamma", "beta")),
    "none": (bias_forward, bias_backward, ("bias",))}
POOLS = {"max": (fast_maxpool_forward, fast_maxpool_backward),
         "average": (avgpool_forward, avgpool_backward)}


def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


def prefixed(params, prefix):
    """The inverse of part."""
    return {prefix + name: w for name, w in params.items()}


def convnorm_params(rng, k, C, M, norm):
    """W (k, k, C, M); gamma and beta, or bias (M,)."""
    p = {"W": rng.standard_normal((k, k, C, M)) * (2 / (k * k * C)) ** 0.5}
    for name in NORMS[norm][2]:
        p[name] = np.ones(M) if name == "gamma" else np.zeros(M)
    return p


def convnorm_forward(x, params, norm, stride, running):
    """Convolution, then BatchNorm, GroupNorm (8 groups, if they fit) or a bias.
    x (N, H, W, C), W (k, k, C, M) -> (N, H', W', M)."""
    forward, _, names = NORMS[norm]
    y, conv = conv2d_forward(x, params["W"], stride, len(params["W"]) // 2)
    options = {"batch": [running], "group": [math.gcd(y.shape[3], 8)], "none": []}[norm]
    y, cache = forward(y, *(params[name] for name in names), *options)
    return y, (conv, cache, norm)


def convnorm_backward(dout, cache, first=False):
    """convnorm_forward in reverse order -> dx, gradients under the keys of params.   The first
    layer is without dx: images need no gradient, which saves a seventh of a step."""
    conv, cache, norm = cache
    _, backward, names = NORMS[norm]
    dy, *values = backward(dout, cache)
    grads = dict(zip(names, values))
    if first:
        return None, {**grads, "W": conv2d_filter_gradient(dy, conv)}
    dx, grads["W"] = conv2d_backward(dy, conv)
    return dx, grads


def convblock_forward(x, params, norm, stride, running):
    """relu(convnorm(x)).   params: a.W, ...; running: a."""
    y, a = convnorm_forward(x, part(params, "a."), norm, stride, running.get("a"))
    y, relu = relu_forward(y)
    return y, {"a": a, "relu": relu}


def convblock_backward(dout, cache, first=False):
    """convblock_forward in reverse order -> dx, gradients under the keys of params."""
    dx, grads = convnorm_backward(relu_backward(dout, cache["relu"]), cache["a"], first)
    return dx, prefixed(grads, "a.")


def residual_forward(x, params, norm, stride, running):
    """relu(f(x) + x), f = convnorm(relu(convnorm(x))); where f changes the size of x, x goes
    through a 1 x 1 convolution s.   params: a.W, ..., b.W, ... and perhaps s.W, ..."""
    y, a = convnorm_forward(x, part(params, "a."), norm, stride, running.get("a"))
    y, relu = relu_forward(y)
    y, b = convnorm_forward(y, part(params, "b."), norm, 1, running.get("b"))
    cache = {"a": a, "relu": relu, "b": b}
    if "s.W" in params:
        x, cache["s"] = convnorm_forward(x, part(params, "s."), norm, stride, running.get("s"))
    y, cache["last"] = relu_forward(y + x)
    return y, cache


def residual_backward(dout, cache):
    """residual_forward in reverse order; x is used twice, so its two gradients add."""
    dsum = relu_backward(dout, cache["last"])
    dy, g = convnorm_backward(dsum, cache["b"])
    dx, a = convnorm_backward(relu_backward(dy, cache["relu"]), cache["a"])
    grads = {**prefixed(a, "a."), **prefixed(g, "b.")}
    if "s" in cache:
        dsum, s = convnorm_backward(dsum, cache["s"])
        grads.update(prefixed(s, "s."))
    return dx + dsum, grads


def block_statistics(blocks):
    """Mean and var of every BatchNorm in the caches of blocks, by name.   -> {"res1.a": (2, M)}."""
    statistics = {}
    for name, block in blocks.items():
        for unit in sorted({"a", "b", "s"} & block.keys()):
            _, cache, norm = block[unit]
            if norm == "batch":
                *_, mean, var = cache
                statistics[f"{name}.{unit}"] = np.stack([mean, var])
    return statistics


BLOCKS = {"stem": (convblock_forward, functools.partial(convblock_backward, first=True)),
          "conv": (convblock_forward, convblock_backward),
          "res": (residual_forward, residual_backward)}


def init_net(cfg, rng, dtype=np.float32):
    """The parameters of every convolution; fc, the hidden layer of the plain net; out."""
    params, (H, W, C), D = {}, cfg.image, 8 * cfg.channels
    for name, multiple in PLANS[cfg.model].items():
        for unit in UNITS[name[:-1]]:
            p = convnorm_params(rng, 3, C, multiple * cfg.channels, cfg.norm)
            params.update(prefixed(p, f"{name}.{unit}."))
            C = multiple * cfg.channels
    if cfg.model == "plain":
        F = C * (H // 8) * (W // 8)
        params.update(prefixed(convnorm_params(rng, 1, F, D, cfg.norm), "fc.a."))
    D = H * W * C if cfg.model == "linear" else D
    params["out.W"], params["out.b"] = rng.standard_normal((D, 10)) * D ** -0.5, np.zeros(10)
    return {name: value.astype(dtype) for name, value in params.items()}


def convnet_forward(params, x, cfg, keep=None, running=None):
    """x (N, H, W, C) -> logits (N, 10). keep: what dropout keeps, None in evaluation; running: mean
    and var of every BatchNorm, None in training."""
    blocks = {}
    for name in PLANS[cfg.model]:
        if name[:4] == "pool":
            x, pool = POOLS[cfg.pool][0](x)
            blocks[name] = {"pool": pool}
        else:
            forward, _ = BLOCKS[name[:-1]]
            p, statistics = part(params, name + "."), part(running or {}, name + ".")
            x, blocks[name] = forward(x, p, cfg.norm, 1, statistics)
    shape, drop = x.shape, None
    if cfg.model == "resnet":
        x, _ = globalpool_forward(x)
    else:
        x = x.reshape(len(x), -1)
    if cfg.model == "plain":
        p, statistics = part(params, "fc."), part(running or {}, "fc.")
        x, blocks["fc"] = convblock_forward(x[:, None, None], p, cfg.norm, 1, statistics)
        x = x[:, 0, 0]                                  # a linear layer is a convolution of 1 pixel
    if keep is not None:
        x, drop = dropout_forward(x, keep, cfg.dropout)
    logits, out = linear_forward(x, params["out.W"], params["out.b"])
    return logits, (blocks, shape, drop, out, cfg)


def convnet_backward(dout, cache):
    """convnet_forward in reverse order -> gradients under the keys of params."""
    (blocks, shape, drop, out, cfg), grads = cache, {}
    dx, grads["out.W"], grads["out.b"] = linear_backward(dout, out)
    if drop is not None:
        dx = dropout_backward(dx, drop)
    if cfg.model == "plain":
        dx, g = convblock_backward(dx[:, None, None], blocks["fc"])
        grads.update(prefixed(g, "fc."))
        dx = dx[:, 0, 0]
    dx = globalpool_backward(dx, shape) if cfg.model == "resnet" else dx.reshape(shape)
    for name in reversed(PLANS[cfg.model]):
        if name[:4] == "pool":
            dx = POOLS[cfg.pool][1](dx, blocks[name]["pool"])
        else:
            _, backward = BLOCKS[name[:-1]]
            dx, g = backward(dx, blocks[name])
            grads.update(prefixed(g, name + "."))
    return grads


def net_loss_and_grads(params, batch, cfg, running=None):
    """One forward and one backward pass -> loss, gradients, running statistics."""
    x, labels, keep = batch
    logits, cache = convnet_forward(params, x, cfg, keep)
    loss, loss_cache = smoothed_cross_entropy_forward(logits, labels, cfg.label_smoothing)
    grads = convnet_backward(smoothed_cross_entropy_backward(1.0, loss_cache), cache)
    blocks, *_ = cache
    return loss, grads, moving_averages(running, block_statistics(blocks))


def crop_and_flip(images, crop, flip, rng):
    """Data augmentation: shift each image by up to crop pixels, reflecting at the borders; with
    flip mirror half of them.   images (N, H, W, C) -> the same shape."""
    N, H, W, _ = images.shape
    down, right = rng.integers(-crop, crop + 1, (2, N, 1))
    row, col = np.arange(H) + down, np.arange(W) + right            # (N, H), (N, W)
    row = (H - 1) - np.abs((H - 1) - np.abs(row))       # -1 becomes 1, H becomes H - 2
    col = (W - 1) - np.abs((W - 1) - np.abs(col))
    if flip:
        col = np.where(rng.random((N, 1)) < 0.5, col[:, ::-1], col)
    return images[np.arange(N)[:, None, None], row[:, :, None], col[:, None, :]]


def augmented_batch(cfg, rng, images, labels, prepare, dtype):
    """-> x (N, H, W, C), labels (N,), keep (N, D) for dropout."""
    x = prepare(crop_and_flip(images, cfg.crop, cfg.flip, rng)).astype(dtype, copy=False)
    D = math.prod(cfg.image) if cfg.model == "linear" else 8 * cfg.channels
    return x, labels, rng.random((len(x), D), np.float32) >= cfg.dropout


def net_batch(cfg, step, dtype=np.float32):
    """New shapes at every step.   -> the arrays of augmented_batch."""
    rng = np.random.default_rng((cfg.seed, step))
    labels = rng.integers(0, 10, cfg.batch_size)
    images = draw_shapes(labels, cfg.image[0], rng)
    return augmented_batch(cfg, rng, images, labels, np.asarray, dtype)


def fresh_shapes(seed, size, n, draw):
    """n shapes that are in no batch, others for every number draw.   -> images, labels."""
    rng = np.random.default_rng((seed, 10 ** 6 + draw))
    labels = rng.integers(0, 10, n)
    return draw_shapes(labels, size, rng).astype(np.float32), labels


def sgdw_update(params, grads, state, lr, weight_decay, nesterov=False, mu=0.9):
    """s <- mu s + g,  w <- w - lr (s + weight_decay w), the last term for matrices only. nesterov:
    the step is along mu s + g, which s becomes next if the gradient stays the same."""
    for name, g in grads.items():
        s = state[name] = mu * state.get(name, 0) + g
        if nesterov:
            s = mu * s + g
        if g.ndim > 1:
            s = s + weight_decay * params[name]
        params[name] -= lr * s


def one_cycle_rate(step, cfg):
    """Linear warmup, then down, along a straight line (one-cycle: Smith 2018) or half a cosine."""
    warmup = cfg.warmup_fraction * cfg.steps
    if step < warmup:
        return cfg.lr * step / warmup
    left = min(1, max(cfg.steps - step, 0.5) / (cfg.steps - warmup))    # the last step is not 0
    factor = {"one-cycle": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return cfg.lr * factor[cfg.schedule]


def thread_pool(cfg):
    """cfg.threads threads, each without the warnings that run switches off in its own."""
    quiet = functools.partial(np.seterr, over="ignore", invalid="ignore")
    return ThreadPoolExecutor(cfg.threads, initializer=quiet)


def views_of(x, cfg):
    """Test-time augmentation: x; with cfg.shift also x moved by a pixel, once up-left and once
    down-right; with cfg.flip also the mirror images of these.   x (N, H, W, C) -> a list of such.
    """
    views = [x]
    if cfg.shift:
        framed = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        views += [framed[:, 2:, 2:], framed[:, :-2, :-2]]
    if cfg.flip:
        views += [view[:, :, ::-1] for view in views]
    return views


def predict(params, x, cfg, running):
    """Logits (N, 10) in evaluation, summed over the views of an image. 50 images at a time, on
    cfg.threads threads, are faster than more at once."""
    def logits(chunk):
        views = views_of(chunk, cfg)
        return sum(convnet_forward(params, view, cfg, None, running)[0] for view in views)
    with thread_pool(cfg) as pool:
        return np.concatenate([*pool.map(logits, np.array_split(x, math.ceil(len(x) / 50)))])


def train_convnet(params, cfg, running, make_batch, **options):
    """train on cfg.threads threads -> losses."""
    sgdw = functools.partial(sgdw_update, weight_decay=cfg.weight_decay)
    update = {"momentum": sgdw, "nesterov": functools.partial(sgdw, nesterov=True),
              "adam": adam_update}[cfg.optimizer]
    with thread_pool(cfg) as pool:
        threaded = functools.partial(threaded_with_statistics, net_loss_and_grads, pool)
        return train(params, cfg, running, make_batch, threaded, update, one_cycle_rate, **options)


def run_images(task, cfg, make_batch, data, prepare, names, proposed):
    """Train a net; show its filters and what is confused.   data: validation and test, each images
    and labels; prepare: images -> x; proposed: the commands after Next."""
    start = time.perf_counter()
    params, running, state, losses = init_net(cfg, np.random.default_rng(cfg.seed)), {}, {}, []
    meta = dict(task=task, model=cfg.model, norm=cfg.norm, pool=cfg.pool, optimizer=cfg.optimizer)
    if cfg.load:
        load_checkpoint(cfg.load, meta, params, state, losses)
        running.update(part(state, "running "))
        state = {name: value for name, value in state.items() if not name.startswith("running ")}

    def save(step=500, dry_run=False):
        if cfg.save and step % 500 == 0:
            everything = {**state, **prefixed(running, "running ")}
            save_checkpoint(cfg.save, meta, params, everything, losses, dry_run)

    def logits_of(split):
        images, labels = data[split]
        logits = predict(params, prepare(images), cfg, running)
        return logits, float((logits.argmax(axis=1) == labels).mean())

    def glance():
        """The accuracy on the first 1,000 validation images, as they are, which takes a second."""
        images, labels = (part[:1000] for part in data["validation"])
        logits = predict(params, prepare(images), replace(cfg, flip=False, shift=False), running)
        return f"  {(logits.argmax(axis=1) == labels).mean():.1%} of {len(labels)} held-out images"
    save(dry_run=True)
    size = sum(p.size for p in params.values())
    print(f"{cfg.model} net, {cfg.channels} channels, norm {cfg.norm}, {size} parameters; "
          f"{cfg.optimizer}, lr {cfg.lr}, batches of {cfg.batch_size}, {cfg.threads} thread(s)")
    print("chance level: loss 2.303, 10 % right")
    train_convnet(params, cfg, running, make_batch, state=state, losses=losses, after_step=save,
                  note=glance)
    save()                                              # after Ctrl-C as well
    _, validation = logits_of("validation")
    logits, accuracy = logits_of("test")
    check_finite(logits.sum(), params)
    if cfg.model != "linear":
        show_filters(params["stem1.a.W"])
    show_confusion(logits.argmax(axis=1), data["test"][1], names)
    print(f"{validation:.2%} of {len(data['validation'][1])} validation images right, "
          f"{accuracy:.2%} of {len(logits)} test images")
    print(f"\nNext: {proposed}")
    print_result(task, cfg, accuracy=accuracy, validation=validation, params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


def run_net(cfg):
    """Train a net with the choices of the configuration on ten shapes."""
    size = cfg.image[0]
    data = {"validation": fresh_shapes(cfg.seed, size, 1000, 1),
            "test": fresh_shapes(cfg.seed, size, 2000, 2)}
    run_images("net", cfg, net_batch, data, np.asarray, SHAPES,
               "python cnn.py net --model resnet      python cnn.py gradients")


# ---- gradients with and without BatchNorm: python cnn.py gradients -------------------------------

@dataclass
class Gradients:
    """Norm of the gradient in every layer, with and without BatchNorm, before training."""
    model: Literal["plain", "resnet"] = "resnet"  # model of the task net
    channels: int = 8       # filters of the first layer; later ones have more
    batch_size: int = 64    # images
    seed: int = 0           # random seed


def run_gradients(cfg):
    """A table: the norm of dW in every layer, for initial weights of three sizes."""
    start, metrics = time.perf_counter(), {}
    print("Norm of the gradient of W before training. Columns: layers, from first to last. Rows:\n"
          "a factor, by which all initial weights are multiplied. BatchNorm removes this factor\n"
          "after each layer; without BatchNorm the factors of all layers multiply.")
    for norm, text in (("batch", "with"), ("none", "without")):
        net = Net(norm=norm, **vars(cfg))
        names = [name for name in init_net(net, np.random.default_rng(0)) if name.endswith("W")]
        print(f"{text:>7s} BatchNorm\n" + 11 * " " + "".join(f"{name[:-2]:>8s}" for name in names))
        largest, smallest = 0.0, math.inf
        for factor in (0.3, 1, 3):
            params = init_net(net, np.random.default_rng(cfg.seed))
            for name in names:
                params[name] *= factor
            _, grads, _ = net_loss_and_grads(params, net_batch(net, 1), net)
            norms = [float(np.linalg.norm(grads[name])) for name in names]
            print(f"{factor:>9}  " + "".join(f"{value:8.2g}" for value in norms))
            largest, smallest = max(largest, *norms), min(smallest, *norms)
        metrics[f"range_{norm}"] = largest / smallest
    print("In the result line: the largest norm over the smallest.")
    print("\nNext: python cnn.py gradients --model plain      python cnn.py lr-sweep")
    print_result("gradients", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- ResNet-18: python cnn.py resnet18 -----------------------------------------------------------

@dataclass
class ResNet18(Config):
    """Ten shapes by ResNet-18 as He et al. built it for 224 x 224 pixels, with fewer channels."""
    size: int = 32          # pixels per side
    channels: int = 8       # channels of the first stage, then 2, 4, 8 times as many (He: 64)
    steps: int = 500        # optimizer steps


STRIDES = {"11": 1, "12": 1, "21": 2, "22": 1, "31": 2, "32": 1, "41": 2, "42": 1}  # stage, block


def init_resnet18(cfg, rng, dtype=np.float32):
    """stem; residual blocks 11 to 42; out."""
    C = cfg.channels
    params = prefixed(convnorm_params(rng, 7, 3, C, "batch"), "stem.a.")
    for name, stride in STRIDES.items():
        M = C * stride                                  # half the pixels, twice the channels
        units = {"a": (3, C, M), "b": (3, M, M)}
        if stride == 2:
            units["s"] = (1, C, M)
        for unit, shape in units.items():
            params.update(prefixed(convnorm_params(rng, *shape, "batch"), f"{name}.{unit}."))
        C = M
    params["out.W"], params["out.b"] = rng.standard_normal((C, 10)) * C ** -0.5, np.zeros(10)
    return {name: value.astype(dtype) for name, value in params.items()}


def resnet18_forward(params, x, running=None):
    """x (N, H, W, 3) -> logits (N, 10)."""
    blocks, running = {}, running or {}
    p, statistics = part(params, "stem."), part(running, "stem.")
    x, blocks["stem"] = convblock_forward(x, p, "batch", 2, statistics)
    x, pool = fast_maxpool_forward(x, k=3, stride=2, padding=1)
    for name, stride in STRIDES.items():
        p, statistics = part(params, name + "."), part(running, name + ".")
        x, blocks[name] = residual_forward(x, p, "batch", stride, statistics)
    x, shape = globalpool_forward(x)
    logits, out = linear_forward(x, params["out.W"], params["out.b"])
    return logits, (blocks, pool, shape, out)


def resnet18_backward(dout, cache):
    """resnet18_forward in reverse order -> gradients under the keys of params."""
    (blocks, pool, shape, out), grads = cache, {}
    dx, grads["out.W"], grads["out.b"] = linear_backward(dout, out)
    dx = globalpool_backward(dx, shape)
    for name in reversed(STRIDES):
        dx, g = residual_backward(dx, blocks[name])
        grads.update(prefixed(g, name + "."))
    _, g = convblock_backward(fast_maxpool_backward(dx, pool), blocks["stem"], first=True)
    return {**grads, **prefixed(g, "stem.")}


def resnet18_loss_and_grads(params, batch, cfg, running=None):
    """One forward and one backward pass -> loss, gradients, running statistics."""
    x, labels = batch
    logits, cache = resnet18_forward(params, x)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels)
    grads = resnet18_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)
    blocks, *_ = cache
    return loss, grads, moving_averages(running, block_statistics(blocks))


def run_resnet18(cfg):
    """Train ResNet-18 on shapes; show the confusion matrix."""
    start = time.perf_counter()
    params, running = init_resnet18(cfg, np.random.default_rng(cfg.seed)), {}
    size = sum(p.size for p in params.values())
    print(f"ResNet-18 with {cfg.channels} channels, {size} parameters, on shapes of {cfg.size} x "
          f"{cfg.size} pixels, lr {cfg.lr}")
    print("chance level: loss 2.303, 10 % right")
    losses = train(params, cfg, running, make_batch, resnet18_loss_and_grads)
    x, labels = fresh_shapes(cfg.seed, cfg.size, 1000, 1)
    logits, _ = resnet18_forward(params, x, running)
    check_finite(logits.sum(), params)
    outputs = logits.argmax(axis=1)
    accuracy = float((outputs == labels).mean())
    show_confusion(outputs, labels, SHAPES)
    print(f"{accuracy:.2%} of 1000 fresh shapes right")
    print("\nNext: python cnn.py net --model resnet      python transformer.py")
    print_result("resnet18", cfg, accuracy=accuracy, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ---- handwritten digits: python cnn.py mnist --data mnist ----------------------------------------

@dataclass
class Mnist(Net):
    """Handwritten digits."""
    channels: int = 16      # filters of the first layer; later ones have more
    dropout: float = 0.3    # fraction of the features dropped before the last layer
    crop: int = 2           # data augmentation: largest shift of an image in pixels
    batch_size: int = 128   # images per step
    steps: int = 3000       # optimizer steps
    threads: int = 2        # micro-batches, each on a thread, with BatchNorm statistics of its own
    data: str = ""          # folder with the four files of MNIST
    image = (32, 32, 1)     # height, width, channels: 28 can be halved only twice


def read_idx(path):
    """An IDX file of bytes, gzipped or not: 0 0 8 ndim, sizes as big-endian uint32, the bytes.
    -> array of uint8.   Raises InputError."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected a whole gzip file, found: {error}") from None
    known = raw[:3] == b"\0\0\x08" and len(raw) > 3 and len(raw) >= 4 + 4 * raw[3]
    require(known, path, "an IDX file of bytes (0 0 8) with its sizes, gzip or not", raw[:8])
    sizes = np.frombuffer(raw[4:4 + 4 * raw[3]], ">u4").tolist()
    body = np.frombuffer(raw[4 + 4 * raw[3]:], np.uint8)
    expected = f"{' x '.join(map(str, sizes))} bytes after the header"
    require(len(body) == math.prod(sizes), path, expected, len(body))
    return body.reshape(sizes)


@functools.lru_cache
def load_mnist(folder):
    """The four files of MNIST, or of a data set in its format, gzipped or not.   -> dict: train,
    validation (the last 5,000 training images, or a tenth of fewer), test; each images (N, 784)
    with mean 0 and variance 1 on MNIST, labels (N,).   Without a folder noise, for gradient checks.
    Raises InputError."""
    if not folder:
        noise = np.random.default_rng(0).standard_normal((1000, 784)).astype(np.float32)
        return dict.fromkeys(("train", "validation", "test"), (noise, np.arange(1000) % 10))
    flag, parts = f"--data {folder}", {}
    for prefix in ("train", "t10k"):
        for kind, ndim in (("images", 3), ("labels", 1)):       # mirrors name them .idx3-ubyte, too
            paths = sorted(Path(folder).glob(f"{prefix}-{kind}?idx{ndim}-ubyte*"))
            expected = f"a folder with {prefix}-{kind}-idx{ndim}-ubyte.gz"
            require(paths, flag, expected, "no such file in it")
            parts[kind] = read_idx(paths[0])
        images, labels = parts["images"], parts["labels"]
        require(images.shape[1:] == (28, 28) and labels.shape == images.shape[:1], flag,
                f"{prefix}: images of 28 x 28 pixels and as many labels",
                (images.shape, labels.shape))
        require(len(images) >= 20, flag, f"{prefix}: 20 images or more", len(images))
        require(labels.max() < 10, flag, f"{prefix}: labels from 0 to 9",
                f"labels from {labels.min()} to {labels.max()}")
        x = images.reshape(len(images), 784) * np.float32(1 / 255)
        parts[prefix] = (x - np.float32(0.1307)) * np.float32(1 / 0.3081), labels.astype(int)
    x, y = parts["train"]
    n = min(5000, len(x) // 10)
    return {"train": (x[:-n], y[:-n]), "validation": (x[-n:], y[-n:]), "test": parts["t10k"]}


def mnist_images(x):
    """x (N, 784) of load_mnist, or (N, 28, 28, 1) -> (N, 32, 32, 1), with a frame of background."""
    background = -0.1307 / 0.3081
    frame = ((0, 0), (2, 2), (2, 2), (0, 0))
    return np.pad(x.reshape(-1, 28, 28, 1), frame, constant_values=background)


def epoch_indices(n, cfg, step):
    """Indices of the batch of this step, where every epoch is a new permutation of n examples."""
    at = np.arange((step - 1) * cfg.batch_size, step * cfg.batch_size)
    order = {e: np.random.default_rng((cfg.seed, e)).permutation(n) for e in np.unique(at // n)}
    return np.array([order[i // n][i % n] for i in at])


def mnist_batch(cfg, step, dtype=np.float32):
    """-> the arrays of augmented_batch."""
    x, labels = load_mnist(cfg.data)["train"]
    rows, rng = epoch_indices(len(x), cfg, step), np.random.default_rng((cfg.seed, step))
    images = x[rows].reshape(-1, 28, 28, 1)
    return augmented_batch(cfg, rng, images, labels[rows], mnist_images, dtype)


def run_mnist(cfg):
    """Learn to read digits."""
    require(cfg.data, "--data", "the folder of MNIST (python mlp.py --help says where)", cfg.data)
    run_images("mnist", cfg, mnist_batch, load_mnist(cfg.data), mnist_images, list("0123456789"),
               "python cnn.py cifar --data cifar-10-binary.tar.gz      python transformer.py")


# ---- photographs: python cnn.py cifar --data cifar-10-binary.tar.gz ------------------------------

@dataclass
class Cifar(Net):
    """CIFAR-10: photographs of ten kinds of animals and vehicles."""
    channels: int = 32      # filters of the first layer; later ones have more
    dropout: float = 0.2    # fraction of the features dropped before the last layer
    label_smoothing: float = 0.1  # probability spread over all classes
    flip: bool = True       # mirror half of the training images; test on mirror images as well
    crop: int = 4           # data augmentation: largest shift of an image in pixels
    batch_size: int = 128   # images per step
    steps: int = 5600       # optimizer steps
    optimizer: Literal["momentum", "nesterov", "adam"] = "momentum"  # update rule
    lr: float = 0.08        # peak learning rate
    warmup_fraction: float = 0.25  # fraction of the steps with linear warmup
    threads: int = 2        # micro-batches, each on a thread, with BatchNorm statistics of its own
    data: str = ""          # cifar-10-binary.tar.gz or its folder
    image = (32, 32, 3)     # height, width, channels


CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load_cifar(path):
    """CIFAR-10 in its binary layout, cifar-10-binary.tar.gz or its folder: a label, 32 x 32 reds,
    greens, blues, 10,000 times per file.   -> dict: train, test; each images (N, 32, 32, 3) of
    bytes, labels (N,).   Raises InputError."""
    flag, expected, files = f"--data {path}", "cifar-10-binary.tar.gz or its folder", {}
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    try:
        if Path(path).is_dir():
            paths = [*Path(path).glob("*.bin"), *Path(path).glob("cifar-10-batches-bin/*.bin")]
            files = {file.name: file.read_bytes() for file in paths if file.name in names}
        else:
            raw = Path(path).read_bytes()               # gzip checks its checksum, tarfile does not
            raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
            with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
                members = {Path(m.name).name: m for m in archive if m.isfile()}
                files = {name: archive.extractfile(m).read() for name, m in members.items()
                         if name in names}
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        found = str(getattr(error, "strerror", None) or error or type(error).__name__)
        raise InputError(f"{flag}: expected {expected}, found: {found.splitlines()[0]}") from None
    parts = []
    for name in names:
        require(name in files, flag, f"{expected}, with {name}", "no such file in it")
        raw = np.frombuffer(files[name], np.uint8)
        require(len(raw) and len(raw) % 3073 == 0, f"{flag}, {name}", "images of 3073 bytes each",
                len(raw))
        labels, pixels = np.split(raw.reshape(-1, 3073), [1], axis=1)
        require(labels.max() < 10, f"{flag}, {name}", "labels from 0 to 9", int(labels.max()))
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append((np.ascontiguousarray(images), labels[:, 0].astype(int)))
    return {"train": tuple(map(np.concatenate, zip(*parts[:5]))), "test": parts[5]}


@functools.lru_cache
def split_cifar(path):
    """load_cifar, the last 5,000 training images (or a tenth of fewer) as validation; noise without
    a path, for gradient checks."""
    if not path:
        noise = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)
        return dict.fromkeys(("train", "validation", "test"), (noise, np.arange(200) % 10))
    data = load_cifar(path)
    images, labels = data["train"]
    require(len(images) >= 20, f"--data {path}", "20 training images or more", len(images))
    n = min(5000, len(images) // 10)
    return {"train": (images[:-n], labels[:-n]), "validation": (images[-n:], labels[-n:]),
            "test": data["test"]}


def cifar_images(images):
    """Bytes (N, 32, 32, 3) -> numbers with mean 0 and variance 1 per color, over CIFAR-10."""
    mean, std = np.array([[125.3, 123.0, 113.9], [63.0, 62.1, 66.7]], np.float32)
    return (images - mean) * (1 / std)


def cifar_batch(cfg, step, dtype=np.float32):
    """-> the arrays of augmented_batch."""
    images, labels = split_cifar(cfg.data)["train"]
    rows, rng = epoch_indices(len(images), cfg, step), np.random.default_rng((cfg.seed, step))
    return augmented_batch(cfg, rng, images[rows], labels[rows], cifar_images, dtype)


def run_cifar(cfg):
    """Learn to tell photographs apart."""
    require(cfg.data, "--data", "cifar-10-binary.tar.gz (python cnn.py --help says where)",
            cfg.data)
    run_images("cifar", cfg, cifar_batch, split_cifar(cfg.data), cifar_images, CIFAR,
               "python cnn.py lr-sweep --lr 0.02 --data cifar-10-binary.tar.gz      "
               "python transformer.py")


# ---- learning rates with and without BatchNorm: python cnn.py lr-sweep ---------------------------

@dataclass
class LrSweep:
    """Accuracy at a hundredfold range of learning rates, with and without BatchNorm."""
    channels: int = 16      # filters of the first layer of a plain net
    batch_size: int = 128   # images per step
    steps: int = 160        # optimizer steps per training, on shapes
    epochs: int = 3         # passes over the training images per training, with --data
    lr: float = 0.03        # learning rate in the middle of the range
    threads: int = 2        # micro-batches, each on a thread, with BatchNorm statistics of its own
    data: str = ""          # cifar-10-binary.tar.gz or its folder; none: ten shapes
    seed: int = 0           # random seed


def accuracy_after_training(cfg, make_batch, x, labels):
    """-> accuracy on x (None, if the training diverges), whether all steps were made."""
    params, running, losses = init_net(cfg, np.random.default_rng(cfg.seed)), {}, []
    try:
        train_convnet(params, cfg, running, make_batch, losses=losses)
        logits = predict(params, x, cfg, running)
        check_finite(logits.sum(), params)
    except FloatingPointError:
        print("diverged: counted as 10 %")
        return None, True
    return float((logits.argmax(axis=1) == labels).mean()), len(losses) == cfg.steps


def run_lr_sweep(cfg):
    """Train a plain net at five learning rates, with and without BatchNorm; show the accuracies."""
    start, net, make_batch = time.perf_counter(), Net(steps=cfg.steps), net_batch
    x, labels = fresh_shapes(cfg.seed, net.image[0], 2000, 1)
    if cfg.data:
        data = split_cifar(cfg.data)
        x, labels = cifar_images(data["validation"][0]), data["validation"][1]
        steps = max(1, cfg.epochs * len(data["train"][0]) // cfg.batch_size)
        net, make_batch = Cifar(steps=steps, data=cfg.data), cifar_batch
    net = replace(net, dropout=0.0, label_smoothing=0.0, flip=False, crop=0, optimizer="adam",
                  schedule="cosine", channels=cfg.channels, batch_size=cfg.batch_size,
                  threads=cfg.threads, seed=cfg.seed)
    rates = [cfg.lr * 10 ** power for power in (-1, -0.5, 0, 0.5, 1)]
    found = {"batch": [], "none": []}
    for norm, lr in [(norm, lr) for norm in found for lr in rates]:
        print(f"\nnorm {norm}, lr {lr:.2g}; chance level: loss 2.303, 10 % right")
        one = replace(net, norm=norm, lr=lr)
        accuracy, complete = accuracy_after_training(one, make_batch, x, labels)
        found[norm].append(accuracy)
        if not complete:                                # Ctrl-C
            break
    if not any(found["batch"]):
        raise FloatingPointError("training diverged at every learning rate; lower --lr")
    pictures, spread = [], {}
    for norm, accuracies in found.items():
        accuracies = [accuracy or 0.1 for accuracy in accuracies]
        lines = [f"{lr:7.2g} {a:7.1%} {'#' * round(25 * a)}" for lr, a in zip(rates, accuracies)]
        pictures.append(lines + [""] * (len(rates) - len(lines)))
        spread[norm] = 100 * float(np.ptp(accuracies or [0.0]))
    print(f"\nAccuracy on {len(labels)} held-out images; rows are learning rates, a # is 4 %")
    side_by_side(["    with BatchNorm", "    without"], pictures)
    print(f"best minus worst: {spread['batch']:.1f} points with, {spread['none']:.1f} without")
    print("\nNext: python cnn.py net --norm none --lr 0.1      python cnn.py resnet18")
    print_result("lr-sweep", cfg, spread_batch=spread["batch"], spread_none=spread["none"],
                 seconds=time.perf_counter() - start)


# ---- threads: micro-batches on several cores -----------------------------------------------------

def split_batch(batch, n):
    """n micro-batches, each with its share of the loss terms (here: of the rows)."""
    parts = zip(*(np.array_split(array, n) for array in batch))
    return [(len(part[0]) / len(batch[0]), part) for part in parts]


def threaded_with_statistics(loss_and_grads, pool, params, batch, cfg, running):
    """Every thread takes a micro-batch: NumPy releases the interpreter lock while it computes.
    Gradients and running statistics are means over the micro-batches, weighted by their shares."""
    shares, parts = zip(*split_batch(batch, cfg.threads))
    results = list(pool.map(lambda part: loss_and_grads(params, part, cfg, running), parts))
    losses, grads, statistics = zip(*results)

    def mean(dicts):
        return {name: sum(share * d[name] for share, d in zip(shares, dicts)) for name in dicts[0]}
    loss = sum(share * loss for share, loss in zip(shares, losses))
    return loss, mean(grads), mean(statistics)


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


def threads_fit(cfg):
    """The constraint on --threads."""
    return (cfg.threads <= cfg.batch_size, "--threads", f"at most --batch-size {cfg.batch_size}",
            cfg.threads)


def net_fits(cfg):
    """The constraints on a net with choices. The hidden layer of the plain net normalises over the
    images (BatchNorm) or over groups of its 8 * channels numbers: of one number nothing is left."""
    side, data, save = cfg.image[0], getattr(cfg, "data", ""), cfg.save
    side = 28 if isinstance(cfg, Mnist) else side       # without the frame
    same = save and data and os.path.realpath(save) == os.path.realpath(data)
    alone = cfg.model == "plain" and cfg.batch_size < 2 * cfg.threads
    return [threads_fit(cfg),
            (cfg.norm != "batch" or not alone, "--batch-size", f"{2 * cfg.threads} or more, 2 per "
             "thread, for BatchNorm in the plain net", cfg.batch_size),
            (cfg.norm != "group" or cfg.model != "plain" or cfg.channels > 1, "--channels",
             "2 or more for GroupNorm in the plain net", cfg.channels),
            (cfg.crop < side, "--crop", f"less than {side}, the pixels per side", cfg.crop),
            (cfg.dropout < 1, "--dropout", "less than 1", cfg.dropout),
            (cfg.label_smoothing < 1, "--label-smoothing", "less than 1", cfg.label_smoothing),
            (cfg.warmup_fraction < 1, "--warmup-fraction", "less than 1", cfg.warmup_fraction),
            (not same, "--save", "another file than --data", save)]


CONSTRAINTS = {Config: lambda cfg: [(cfg.size % 8 == 0, "--size", "a multiple of 8", cfg.size)],
               Net: net_fits,
               Mnist: net_fits,
               Cifar: net_fits,
               LrSweep: lambda cfg: net_fits(Net(channels=cfg.channels, batch_size=cfg.batch_size,
                                                 threads=cfg.threads))}

GRADCHECK = {
    "conv": ["x 2 5 6 3, W 3 3 3 7", "x 2 7 6 3, W 5 5 3 4"],
    "conv2d": ["x 2 9 8 6, W 3 3 3 4, stride=2, padding=1, dilation=1, groups=2",
               "x 2 7 6 6, W 2 2 1 12, stride=1, padding=0, dilation=3, groups=6",
               "x 2 7 6 3, W 1 1 3 5, stride=3"],
    "maxpool": "x 2 6 4 3",
    "avgpool": "x 2 6 4 3",
    "globalpool": "x 2 5 6 3",
    "groupnorm": "x 2 5 3 6, gamma 6, beta 6, groups=3",
    "bias": "x 2 3 5 6, b 6",
    "smoothed_cross_entropy": "logits 3 5, targets<5 3, label_smoothing=0.3"}

TASKS = {"shapes": Task(Config, init_params, make_batch, loss_and_grads, main),
         "net": Task(Net, init_net, net_batch, net_loss_and_grads, run_net),
         "gradients": Task(Gradients, None, None, None, run_gradients),
         "lr-sweep": Task(LrSweep, None, None, None, run_lr_sweep),
         "resnet18": Task(ResNet18, init_resnet18, make_batch, resnet18_loss_and_grads,
                          run_resnet18),
         "mnist": Task(Mnist, init_net, mnist_batch, net_loss_and_grads, run_mnist),
         "cifar": Task(Cifar, init_net, cifar_batch, net_loss_and_grads, run_cifar)}

if __name__ == "__main__":
    run(TASKS)
