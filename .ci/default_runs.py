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
