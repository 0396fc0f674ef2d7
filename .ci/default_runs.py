"""Run every lesson as a reader does, with no argument, and hold the figures of its last line against floors."""
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {      # figure of the result line: at least (>=) or at most (<=)
    "perceptron.py": {"AND": ">= 1", "OR": ">= 1", "NAND": ">= 1", "XOR": "<= 0.75", "XOR_x1x2": ">= 1",
                      "layer": "<= 2.28", "seconds": "<= 30"},
    "mlp.py": {"xor_accuracy": ">= 1", "xor_loss": "<= 0.0002", "spirals_accuracy": ">= 0.99", "sgd": ">= 0.9",
               "momentum": ">= 0.99", "adam": ">= 0.99", "adamw": ">= 0.99", "seconds": "<= 30"},
    "vanilla_rnn.py": {"unclipped_steps": "<= 199", "clipped_loss": "<= 0.05", "value_loss": "<= 0.05",
                       "wave_mse": "<= 0.003", "wave_own_mse": "<= 0.05", "recall_bits": ">= 0.99",
                       "recall_bits_cut": "<= 0.97", "recall_bits_twice": "<= 0.97", "seconds": "<= 90"},
    "lstm.py": {"remember_error": "<= 0.005", "remember_error_at_100": "<= 0.05", "reverse_exact": ">= 0.999",
                "add_mse": "<= 0.001", "add_plain_mse": ">= 0.01", "seconds": "<= 90"},
    "transformer.py": {"reverse_exact": ">= 0.995", "reverse_padding": "<= 0", "text_validation": "<= 0.15",
                       "text_same": ">= 1", "text_future": "<= 0", "letters_right": ">= 0.8", "seconds": "<= 90"},
    "mae.py": {"error": "<= 0.22", "mean_patch_error": ">= 0.35", "raw": "<= 0.26", "untrained": "<= 0.32",
               "probe": ">= 0.34", "ratio": ">= 1.4", "raw_10": "<= 0.26", "untrained_10": "<= 0.5",
               "probe_10": ">= 0.58", "seconds": "<= 90"},
    "seq2seq.py": {"reverse_forwards": ">= 0.99", "translate_backwards": ">= 0.99", "words_backwards": ">= 0.99",
                   "seconds": "<= 90"},
    "cnn.py": {"accuracy": ">= 0.97", "linear": "<= 0.5", "seconds": "<= 90"},
    "attention.py": {"reverse_exact": ">= 0.99", "reverse_alignment": ">= 0.95", "copy_exact": ">= 0.99",
                     "copy_alignment": ">= 0.95", "dates_exact": ">= 0.99", "dates_alignment": ">= 0.9",
                     "seconds": "<= 90"},
    "nested_attention.py": {"d1": "<= 1e-12", "delta": ">= 0.99", "hebb": "<= 0.65", "delta_128": ">= 0.98",
                            "delta_512": ">= 0.98", "periods_gain": ">= 0.15", "momentum_repeat": "<= 0.7",
                            "adam_axes": "<= 0.6", "adam_rotated": ">= 0.8", "seconds": "<= 90"},
}


def run(lesson, *flags):
    """Output of a lesson; it must succeed and say nothing on stderr."""
    command = [sys.executable, "-W", "error", ROOT / lesson, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode or done.stderr:
        sys.exit(f"{lesson} {flags}: exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def below_floor(lesson, *flags):
    """Run a lesson -> figures that miss their floor, and the last line."""
    last = run(lesson, *flags).splitlines()[-1]
    figures = dict(re.findall(r"(\S+)=(\S+)", last))
    missed = []
    for name, floor in FLOORS[lesson].items():
        kind, bound = floor.split()
        value = float(figures.get(name, "nan"))
        if not (value >= float(bound) if kind == ">=" else value <= float(bound)):
            missed.append(f"{lesson} {' '.join(flags)}: {name} is {value}, the floor is {floor}")
    return missed, last


if __name__ == "__main__":
    lessons = sorted(p.name for p in ROOT.glob("*.py") if p.name != "gradcheck.py")
    missed = [f"{name} has no floors" for name in lessons if name not in FLOORS]
    for name in lessons:
        if name in FLOORS:
            start = time.perf_counter()
            found, last = below_floor(name, *sys.argv[1:])
            missed += found
            print(f"{name:22s} {time.perf_counter() - start:5.1f} s  {last}", flush=True)
    print("\n".join(missed) or "every floor holds")
    sys.exit(bool(missed))
