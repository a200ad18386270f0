"""microdit: train text-to-image diffusion transformers from scratch on a micro-budget."""

import os

__version__ = "0.1.0"

# Before PyTorch is imported: how long its OpenMP threads spin while they wait for each other. By libgomp's default, training beside other
# programs is almost twice as slow, since a thread spins for one that does not run (benchmarks/spinning.py).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Before diffusers is imported, wherever that is: it warns of its own configuration keys, and of packages that are not needed.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
