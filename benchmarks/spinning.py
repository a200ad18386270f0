"""What OpenMP's waiting costs a small model's training steps, on a quiet machine and beside other work.

    python benchmarks/spinning.py

Between two parallel loops the threads of PyTorch's OpenMP (libgomp) spin. Where other programs want the same cores, a thread spins
for one that does not run. GOMP_SPINCOUNT says how long; microdit sets it to 10,000 (`microdit/__init__.py`), unless it is set.
"""

import os
import subprocess
import sys

STEPS = """
import time, torch
from microdit.models.microdit import MicroDiT
from microdit.models.config import Size, resolve
size = Size(dim=128, depth=4, head_dim=32, mixer_dim=128, mixer_depth=1, num_experts=0, round_ffn_to=64, routing="none")
model = MicroDiT(resolve(size, in_channels=8, caption_channels=384))
latents, text = torch.randn(128, 8, 8, 8), torch.randn(128, 12, 384)
done, started = -1, 0.0
while done < 0 or time.perf_counter() - started < 6:
    model(latents, torch.zeros(128), model.embed_caption(text)).square().mean().backward()
    started = started or time.perf_counter()  # behind the first step
    done += 1
print(f"{128 * done / (time.perf_counter() - started):.0f} images/s")
"""
WAYS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    for busy in (0, os.cpu_count() or 1):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            print(f"beside {busy} busy processes" if busy else "alone")
            for _ in range(2):  # in turns, twice
                for name, settings in WAYS.items():
                    done = subprocess.run(
                        [sys.executable, "-c", STEPS], env={**os.environ, **settings}, capture_output=True, text=True, check=True
                    )
                    print(f"  {name}: {done.stdout.strip()}", flush=True)
        finally:
            for other in others:
                other.kill()


if __name__ == "__main__":
    main()
