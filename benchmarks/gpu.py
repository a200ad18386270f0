"""Does microdit work on a GPU, and how much of it does it use? One command, under eight minutes; nothing is downloaded.

    python benchmarks/gpu.py --out gpu                        # on the machine's first GPU
    python benchmarks/gpu.py --out gpu-smoke --smoke          # everything very small: does it run? (always so on a CPU)
    python benchmarks/gpu.py --out gpu --only ceilings xl     # some of the steps

Each step (gpu_steps.py) is a process of its own with a time limit; how it ends never ends the others. OUT/steps has its JSON and its log;
OUT/summary.md the table, OUT/results.json and OUT/logs.txt all of them in one file each, written anew after every step.
The emoji steps want data/emoji and data/scenes (microdit data encode emoji --out data/emoji, microdit data encode scenes:1000 --out
data/scenes), and take a held-out loss on data/held_out if it is there (microdit data encode emoji:held_out --out data/held_out).
gpu_wheels.sh gathers what a machine without a network may lack.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SMOKE_LIMIT = 240.0  # seconds of any step, on a CPU


@dataclass(frozen=True)
class Step:
    """`limit`: seconds it may take; `least`: with fewer left it is not begun."""

    name: str
    limit: float
    least: float
    what: str


STEPS = (
    Step("ceilings", 45, 10, "products and copies at their fastest"),
    Step("xl-compiled", 170, 30, "XL's step, compiled and recorded"),
    Step("xl-by-hand", 110, 40, "XL's step with kernels by hand"),
    Step("kernels", 90, 30, "the operations between XL's products, one by one"),
    Step("emoji", 60, 20, "emoji.yaml in float32, bfloat16, FSDP"),
    Step("demo", 70, 20, "emoji-fast by the command line, stopped and resumed"),
    Step("trainer", 100, 40, "XL by the real trainer"),
    Step("tiny", 60, 15, "Tiny_2, eager, recorded and compiled"),
    Step("xl", 100, 30, "XL's step, eager"),
    Step("sampling", 50, 15, "XL draws, 30 steps with guidance"),
    Step("encoders", 50, 15, "SDXL's autoencoder, CLIP-H's text model"),
)
"""In the order of what they decide."""


class Run:
    """All steps of one command, and what became of them."""

    def __init__(self, out: Path, scratch: Path, smoke: bool, seconds: float, only: list[str] | None):
        self.out, self.scratch, self.smoke, self.only = out, scratch, smoke, only
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._noting = threading.Lock()
        (out / "steps").mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def wanted(self, step: Step) -> bool:
        """Whether it is asked for, and there is time; if not, says so."""
        if self.only is not None and step.name not in self.only:
            return False
        if self.left < step.least:
            self.note(step, f"left out: {max(0, self.left):.0f} s were left", 0.0)
            return False
        return True

    def take(self, step: Step) -> None:
        """Run a step in its own process, not longer than its limit and the time that is left."""
        if not self.wanted(step):
            return
        process, began = self._start(step), time.monotonic()
        limit = min(SMOKE_LIMIT if self.smoke else step.limit, max(1.0, self.left))
        try:
            code = process.wait(limit)
            errors = [key for key, value in self.found(step).items() if isinstance(value, dict) and "error" in value]
            outcome = f"failed: {', '.join(errors)}" if errors else "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all of its own processes, which are a group
            process.wait()
            outcome = f"stopped at its limit of {limit:.0f} s"
        self.note(step, outcome, time.monotonic() - began)

    def _start(self, step: Step) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_steps.py"), step.name, str(self.out / "steps"), str(self.scratch)]
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"), "TRITON_CACHE_DIR": str(self.scratch / "triton")}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        if self.smoke:  # several processes share few cores, and threads that wait for each other make small steps slow
            settings |= {"OMP_NUM_THREADS": "1"}
        print(f"{self._clock()}  {step.name} begins: {step.what}", flush=True)
        with (self.out / "steps" / f"{step.name}.log").open("wb") as log:
            return subprocess.Popen(
                command + ["--smoke"] * self.smoke, stdout=log, stderr=subprocess.STDOUT, env=settings, cwd=ROOT, start_new_session=True
            )

    def note(self, step: Step, outcome: str, seconds: float) -> None:
        with self._noting:
            self.outcomes[step.name] = {
                "outcome": outcome,
                "seconds": round(seconds, 1),
                "ended_at": round(time.monotonic() - self.began, 1),
            }
            print(f"{self._clock()}  {step.name}: {outcome}", flush=True)
            self.write()

    def write(self) -> None:
        """Everything that is known so far."""
        found = {step.name: values for step in STEPS if (values := self.found(step))}
        whole = {"smoke": self.smoke, "steps": self.outcomes, "found": found}
        (self.out / "results.json").write_text(json.dumps(whole, indent=1))
        (self.out / "summary.json").write_text(json.dumps({"smoke": self.smoke, "steps": self.outcomes}, indent=1))
        (self.out / "summary.md").write_text(summary(self.outcomes, found))
        logs = [(step.name, self.out / "steps" / f"{step.name}.log") for step in STEPS]
        text = "".join(f"===== {name}\n{path.read_text(errors='replace')[-1_000_000:]}\n" for name, path in logs if path.is_file())
        (self.out / "logs.txt").write_text(text)
        pictures = self.out / "steps" / "pictures.png"
        if pictures.is_file():
            shutil.copyfile(pictures, self.out / "pictures.png")

    def found(self, step: Step) -> dict[str, Any]:
        path = self.out / "steps" / f"{step.name}.json"
        values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return values

    def _clock(self) -> str:
        seconds = round(time.monotonic() - self.began)
        return f"{seconds // 60}:{seconds % 60:02}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results; must be new")
    parser.add_argument("--smoke", action="store_true", help="the smallest size of everything")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all; steps that no longer fit are left out")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"{args.out} holds something already: name another --out.")
    scratch = Path(tempfile.mkdtemp(prefix="microdit-gpu-"))
    smoke = args.smoke or not torch.cuda.is_available()
    run = Run(args.out.resolve(), scratch, smoke, 60 * args.minutes, args.only)
    try:
        with ThreadPoolExecutor(2 if smoke else 1) as places:  # at smoke size most of a step is its start, and nothing is timed
            list(places.map(run.take, STEPS))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{(run.out / 'summary.md').read_text()}")


def summary(outcomes: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> str:
    """A table of the steps, then one of each step's numbers, then the costliest kernels."""
    lines = ["| step | outcome | seconds | ended at |", "|---|---|---|---|"]
    lines += [f"| {name} | {of['outcome']} | {of['seconds']} | {of['ended_at']} |" for name, of in outcomes.items()]
    for name, values in found.items():
        lines += ["", f"## {name}", *number_table({key: of for key, of in values.items() if isinstance(of, dict) and "kernels" not in of})]
        for key, of in values.items():
            if isinstance(of, dict) and "kernels" in of:
                lines += ["", f"{key}: {of['kernel_milliseconds']:.1f} ms in {of['calls']} calls; {of['kinds']}", ""]
                lines += [f"    {kernel['share']:6.1%} {kernel['calls']:6} calls  {kernel['name'][:110]}" for kernel in of["kernels"]]
    return "\n".join(lines) + "\n"


def number_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Rows with the same columns stand in one table."""
    lines: list[str] = []
    before: list[str] = []
    for name, row in rows.items():
        if list(row) != before:
            before = list(row)
            lines += ["", f"| | {' | '.join(before)} |", "|---" * (len(before) + 1) + "|"]
        lines.append(f"| {name} | {' | '.join(shown(key, value) for key, value in row.items())} |")
    return lines


def shown(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if key.startswith(("share", "spread", "apart", "widest", "allowed")) else f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


if __name__ == "__main__":
    main()
