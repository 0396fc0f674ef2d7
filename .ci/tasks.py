"""Run what needs no file and hold the metrics of the last line against floors.

    python .ci/tasks.py              every built-in task of every lesson
    python .ci/tasks.py mlp.py       those of one lesson
    python .ci/tasks.py --spines     every spine alone, cut at its line, ended with main(Config())
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lessons import BUDGET, LESSONS, NEW, ROOT, source, spine, tasks

SECONDS = 30        # for one task on two cores; machines differ, so twice as long is tolerated
FILE = "needs --data"
TIMES = r"\w*speedup|wide_over_top1\w*" # ratios of times, which the program beside it disturbs
FLOORS = {          # lesson: {task: {metric: at least (>=) or at most (<=)}}; old form: one default run
    "perceptron.py": {
        "gates": {f"{gate}_{n}": ">= 1" for gate in ("AND", "OR", "NAND") for n in (2, 3)} | {
            "XOR_2": "<= 0.75", "XOR_3": ">= 1"},
        "names": {"counted": "<= 2.2", "trained": "<= 2.2"}, "mnist": FILE},
    "mlp.py": {
        "points": {"xor_accuracy": ">= 1", "xor_loss": "<= 0.0002", "spirals_accuracy": ">= 0.99"},
        "net": {"accuracy": ">= 0.99"}, "gates": {"accuracy": ">= 1"}, "inits": {},
        "optimizers": {"sgd": ">= 0.9", "momentum": ">= 0.99", "adam": ">= 0.99", "adamw": ">= 0.99"},
        "names": {"test_loss": "<= 3.29"}, "mnist": FILE},
    "vanilla_rnn.py": {
        "wave": {"mse": "<= 0.003", "free_mse": "<= 0.05"},
        "explode": {"unclipped_steps": "<= 199", "clipped_loss": "<= 0.05"},
        "recall": {"full": ">= 0.99", "window_10": "<= 0.985", "window_5": "<= 0.9"},
        "text": {"validation": "<= 0.1"}},
    "lstm.py": {
        "remember": {"error": "<= 0.005"}, "long": {"error_after_100": "<= 0.05"},
        "gradient": {"rnn": "<= 1e-4", "lstm": ">= 1e-3"},
        "add": {"lstm_mse": "<= 0.001", "rnn_mse": ">= 0.01"},
        "reverse": {"exact": ">= 0.999", "padding": "<= 0"}, "text": {"validation": "<= 0.2"}},
    "transformer.py": {
        "rhyme": {"loss": "<= 0.1", "recited": ">= 0.99"}, "generate": {"same": ">= 1"},
        "modern": {"gpt_loss": "<= 0.1", "modern_loss": "<= 0.1"}, "positions": {},
        "fill": {"right": ">= 0.8"}, "mnist": FILE, "reverse": {"exact": ">= 0.995", "padding": "<= 0"},
        "sort": {"exact": ">= 0.995", "padding": "<= 0"},
        "text": FILE},
    "mae.py": {
        "shapes": {"error": "<= 0.22", "mean_patch_error": ">= 0.33"},
        "probe": {"error": "<= 0.22", "raw_200": "<= 0.26", "untrained_200": "<= 0.32", "ratio": ">= 1.4",
                  "probe_2000": ">= 0.56"},
        "finetune": {"finetuned": ">= 0.27", "from_scratch": "<= 0.25"}, "cifar": FILE, "mnist": FILE},
    "seq2seq.py": {
        "reverse": {"exact": ">= 0.99"}, "letters": {"exact": ">= 0.985"},
        "words": {"exact": ">= 0.99"},
        "lengths": {"forwards": ">= 0.985", "backwards": ">= 0.97", "padding": "<= 0"}},
    "cnn.py": {
        "shapes": {"accuracy": ">= 0.97"}, "net": {"accuracy": ">= 0.97"},
        "gradients": {"range_batch": "<= 30", "range_none": ">= 1e4"},
        "lr-sweep": {"spread_batch": "<= 5", "spread_none": ">= 50"},
        "resnet18": {"accuracy": ">= 0.96"}, "mnist": FILE, "cifar": FILE},
    "attention.py": {
        "reverse": {"exact": ">= 0.99", "alignment": ">= 0.95"},
        "copy": {"exact": ">= 0.99", "alignment": ">= 0.95"},
        "lengths": {"attention_exact": ">= 0.98", "none_exact": "<= 0.8"},
        "dates": {"exact": ">= 0.99", "alignment": ">= 0.9"},
        "pairs": {"validation": "<= 0.02", "exact": ">= 0.98"}},
    "nested_attention.py": {
        "recall": {"delta_accuracy": ">= 0.99", "hebb_accuracy": "<= 0.65"},
        "rule": {"delta_accuracy_32": ">= 0.99", "delta_accuracy_128": ">= 0.98",
                 "delta_accuracy_512": ">= 0.98"},
        "rules": {"delta_accuracy_32": ">= 0.99", "delta_accuracy_512": ">= 0.98",
                  "hebb_accuracy_32": "<= 0.65"},
        "memories": {"gain_over_4_4_4": ">= 0.15", "gain_over_16_16_16": ">= 0.15"},
        "inner": {"momentum_over_delta_repeated": "<= 0.7", "adam_over_delta_axes": "<= 0.6",
                  "adam_over_delta_rotated": ">= 0.8"},
        "identities": {"identity_error": "<= 1e-12"}},
    "vae.py": {
        "shapes": {"elbo": ">= -18.3", "ok": ">= 0.7", "templates": ">= 40"},
        "compare": {"vae_elbo": ">= -19.4", "vae_L_1000": ">= -18", "vae_ok": ">= 0.6",
                    "vae_templates": ">= 40", "ae_fitted_ok": "<= 0.075", "iwae_L_1000": ">= -17.5"},
        "sweep": {"beta_10_rate": "<= 0.01", "beta_10_elbo": ">= -32.8"}, "mnist": FILE},
    "translation.py": {
        "headlines": {"pointer_known": ">= 0.99", "pointer_unseen": ">= 0.99",
                      "no_pointer_known": ">= 0.95", "no_pointer_unseen": "<= 0.01"},
        "pairs": {"bleu": ">= 45"}},
    "gan.py": {
        "ring": {"modes": "<= 3", "distance": ">= 1"},
        "game": {"modes": ">= 8", "quality": ">= 0.78", "distance": "<= 0.12"},
        "shapes": {"plain_good": ">= 0.8", "plain_templates": "<= 26", "game_templates": ">= 37",
                   "game_shapes": ">= 10"}},
    "autodiff.py": {
        "xor": {"accuracy": ">= 1", "loss": "<= 0.002", "second_error": "<= 1e-8"},
        "tape": {"slope_error": "<= 1e-6", "difference": "<= 1e-10", "numeric_error": "<= 1e-4",
                 "memory_graph": "<= 1.2", "memory_recomputed": "<= 0.6"}, "mnist": FILE},
    "faster.py": {
        "repeat": {"accuracy": ">= 0.99", "difference": "<= 1e-10", "memory_ratio": ">= 20",
                   "speedup": ">= 1.2"},
        "lengths": {"tiles_128_memory_ratio": ">= 20", "row_blocks_128_memory_ratio": ">= 8",
                    "tiles_128_speedup": ">= 1.2", "window_2_tiles_128_speedup": ">= 3"},
        "patterns": {"window_1": ">= 63", "window_1_first": "<= 2", "window_1_first_causal": ">= 62",
                     "window_1_2_random_causal": "<= 20"},
        "exact": {"right_p": ">= 0.001", "redraw_from_p_p": "<= 1e-12", "accept_always_p": "<= 1e-12",
                  "accept_q_by_p_p": "<= 1e-12"},
        "text": {"validation": "<= 0.4", "gap": "<= 0.06", "per_pass_3_4": ">= 3",
                 "layers_12_3_4_speedup": ">= 1.3"}},
    "rlhf.py": {
        "leash": {"accuracy": ">= 0.9", "proxy_0": ">= 15", "true_0": "<= -8", "true_1": ">= 0.85"},
        "best": {"true_1": "<= 0.2", "true_16": ">= 1"},
        "reward": {"accuracy": ">= 0.9", "true_0": "<= 0", "true_0_5": ">= 0.85"},
        "comparisons": {"right_750": ">= 0.9", "best_750": ">= 0.7", "best_at_750": "<= 40",
                        "end_750": "<= -8", "end_3000": "<= -8", "end_true": ">= 1.2"},
        "dpo": {"best_true": ">= 0.4", "better": "<= -1", "worse": "<= -3"},
        "grpo": {"true_clip": ">= -1"}},
    "diffusion.py": {
        "ring": {"modes": ">= 8", "near": ">= 0.9", "sw": "<= 0.05"},
        "targets": {"noise_ddpm_modes": ">= 8", "v_ddpm_near": ">= 0.9", "noise_ddim_20_near": ">= 0.8"},
        "shapes": {"ddpm_ok": ">= 0.85", "ddim_20_ok": ">= 0.68", "guided_1_accuracy": ">= 0.93"},
        "latent": {"ddim_20_ok": ">= 0.9", "ddim_20_templates": ">= 40", "fitted_normal_ok": "<= 0.38",
                   "reconstructed_ok": ">= 0.99"},
        "mnist": FILE, "pixels": FILE},
    "lora.py": {
        "adapt": {"before_sort": ">= 0.98", "adapter_descend": ">= 0.55", "adapter_sort": "<= 0.1",
                  "adapter_off_sort": ">= 0.98", "same": ">= 1"},
        "ranks": {"rank_8_descend": ">= 0.55", "full_old_sort": ">= 0.9", "adapter_old_sort": ">= 0.9"},
        "quantize": {"bits_8_tensor": ">= 0.98", "bits_3_trained": ">= 0.98", "token_400": "<= 0.1",
                     "kept_400": ">= 0.98", "smoothed_400": ">= 0.98", "e4m3_400": ">= 0.98"},
        "qlora": {"bits_4_lora_descend": ">= 0.55"}, "speed": {}},
    "moe.py": {
        "facts": {"right_1": "<= 0.55", "right_8": ">= 0.95", "fullest": "<= 1.6"},
        "routes": {"none_emptiest": "<= 0.1", "loss_right": ">= 0.95", "bias_right": ">= 0.95",
                   "bias_fullest": "<= 1.3", "bias_information": ">= 0.55", "top2_right": ">= 0.99",
                   "half_right": "<= 0.97"},
        "time": {"wide_over_top1_128": ">= 1.5"}, "text": FILE},
    "ssm.py": {
        "induction": {"accuracy_24": ">= 0.99", "accuracy_96": ">= 0.99"},
        "lengths": {"selective_24": ">= 0.99", "selective_96": ">= 0.99", "twin_96": "<= 0.5"},
        "copy": {"selective_16": ">= 0.95", "selective_32": ">= 0.98", "twin_32": "<= 0.8"},
        "scan": {"halves": "<= 1e-5", "fft": "<= 1e-4", "attention": "<= 1e-3"}, "text": FILE},
}


def jobs(name, spines):
    """-> (label, command, floors) of one lesson; floors None: nobody has written them."""
    floors = FLOORS.get(name, {})
    if spines:
        first = next(iter(tasks(name)), "")
        return [("spine", [f"my_{name}"], floors.get(first))]
    if name not in NEW:
        return [("", [ROOT / name], floors.get(""))]
    assert tasks(name), f"{name} cannot be loaded"
    return [(task, [ROOT / name, task], floors.get(task)) for task in tasks(name)]


def run(command, folder):
    """-> exit status, output, errors, seconds (of the clock or, if the machine is busy with other
    programs, of the processor), the longest time without a line."""
    with tempfile.TemporaryFile("w+") as errors:
        start = last = time.perf_counter()
        lines, silence = [], 0
        with subprocess.Popen([sys.executable, "-W", "error", *command], cwd=folder, text=True,
                              stdout=subprocess.PIPE, stderr=errors) as process:
            for line in process.stdout:
                now = time.perf_counter()
                silence, last = max(silence, now - last), now
                lines.append(line)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        seconds = min(time.perf_counter() - start, used.ru_utime + used.ru_stime)
        return process.returncode, "".join(lines), errors.read(), seconds, silence


def faults(status, out, errors, floors):
    """What is wrong with a run, as a list of sentences."""
    if floors is None:
        return ["has no floors"]
    if floors == FILE:
        refused = status == 2 and "--data" in errors and len(errors.splitlines()) == 1
        return [] if refused else [f"exit status {status}, expected 2: {errors[-2000:]}"]
    if status or errors:
        return [f"exit status {status}\n{out[-2000:]}\n{errors[-2000:]}"]
    metrics, found = dict(re.findall(r"(\S+)=(\S+)", out.splitlines()[-1])), []
    for name, floor in floors.items():
        kind, bound = floor.split()
        value = float(metrics.get(name, "nan"))
        if not (value >= float(bound) if kind == ">=" else value <= float(bound)):
            found.append(f"{name} is {value}, the floor is {floor}")
    return found


def form(text, first, trains):
    """What an output lacks: chance level, progress, a picture under its legend, commands, result."""
    lines = text.splitlines()
    dense = [line.replace(" ", "") for line in lines]
    drawn = [i for i, line in enumerate(dense) if not lines[i].startswith("step") and (
        len(line) > 2 and 2 * len(re.findall("[-.:=+*#%@ox]", line)) >= len(line)
        or re.search(r"\|[-.:=+*#%@]+\|$", line))]
    legend = [i for i, line in enumerate(lines) if re.search(r"(?i)rows|columns|shades|dark|blank|[@#] is|\(#\)", line)]
    wanted = {"chance level": not trains or re.search(r"chance level: loss \d", text),
              "progress": not trains or re.search(r"^step +\d+/\d+  mean loss \S+.*\|  [\d.]+ s  \(", text, re.M),
              "a picture": not first or len(drawn) >= 4,
              "a legend": not drawn or legend and legend[0] < drawn[-1],
              "Next:": re.search(r"^Next: python \S+\.py", text, re.M),
              "result": lines[-1].startswith("result: task="),
              "ASCII": text.isascii() and "\r" not in text,
              "at most 100 columns": max(map(len, lines[:-1]), default=0) <= 100}
    return [f"not in the output: {name}" for name, ok in wanted.items() if not ok]


def main(names, spines):
    """Run, two programs at a time, and report -> number of faults."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        todo, alone = [], []
        for name in names or (NEW if spines else LESSONS):
            Path(folder, f"my_{name}").write_text(spine(name) + "\nmain(Config())\n", "utf-8")
            for label, command, floors in jobs(name, spines):
                todo.append((name, label, command, floors, pool.submit(run, command, folder)))
        for name, label, command, floors, done in todo:
            status, out, errors, seconds, silence = done.result()
            found = faults(status, out, errors, floors)
            if name in NEW and not status:
                first = next(iter(tasks(name)))
                config = tasks(name)[first if label == "spine" else label].config
                found += form(out, label in ("spine", first), hasattr(config, "steps"))
                if seconds > 2 * SECONDS or silence > 3 * SECONDS:
                    found.append(f"{seconds:.0f} s, {silence:.0f} s of them without a line")
            late = " (slow)" if name in NEW and seconds > SECONDS else ""
            last = (out.splitlines() or errors.splitlines() or [""])[-1]
            print(f"{name:19s} {label:11s} {seconds:5.1f} s{late}  {last}", flush=True)
            if spines:
                sizes = [len(text.splitlines()) for text in (spine(name), source(name))]
                print("    lines of the spine {}, of the file {}; budgets {}, {}".format(
                    *sizes, *BUDGET[name.removesuffix(".py")]))
            if found and all(re.match(TIMES, sentence) for sentence in found):
                print(f"    {'; '.join(found)}: once more, alone, at the end")
                alone.append((name, label, command, floors))
                continue
            for sentence in found:
                print(f"    FAIL  {name} {label}: {sentence}", flush=True)
            missed += len(found)
        for name, label, command, floors in alone:
            status, out, errors, *_ = run(command, folder)
            found = faults(status, out, errors, floors)
            print(f"{name:19s} {label:11s} alone: {'; '.join(found) or 'every floor holds'}", flush=True)
            missed += len(found)
    print(f"{missed} misses" if missed else "every floor holds")
    return missed


if __name__ == "__main__":
    sys.exit(bool(main([a for a in sys.argv[1:] if a != "--spines"], "--spines" in sys.argv)))
