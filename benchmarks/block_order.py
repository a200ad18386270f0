"""How random is the order `blocks`, beside the order `full`?

    python benchmarks/block_order.py [--steps 200 --seeds 3 --shuffled]

1. Neighbours, on the numbers of 10,000 shards of 3,700 rows: the chi-square, by degree of freedom, of the groups of shards of two samples
   that are so many places apart (1 if they are independent), and the number of shards of a batch of 2,048.
2. The loss of the demo's model on held-out emoji after the same number of steps in each order, by seed. The emoji are in shards of 64,
   and a block is four of them. They are in the order of Unicode, faces beside faces and flags beside flags, which is the worst that a set
   can be sorted; with --shuffled they are in random order, as the pictures of a crawl are.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from microdit.config.load import load_recipe
from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.sampler import BatchSampler, BlockOrder, SamplerPhase, ShardSizes
from microdit.data.shard_cache import BLOCK
from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.builtin import emoji_source
from microdit.distributed import start_world
from microdit.encoders.autoencoder import load_autoencoder
from microdit.encoders.text import load_text_encoder
from microdit.io.console import PlainConsole, Reporter
from microdit.training.trainer import Trainer

SHARDS, ROWS, BATCH, GROUPS, PAIRS = 10_000, 3_700, 2_048, 10, 500_000
SHARES = (0.0025, 0.01)  # of the set that a block takes: the cache takes four times as much
DISTANCES = (1, 2_048, 1_000_000)
EMOJI_ROWS, EMOJI_BLOCK = 64, 4  # rows of a shard, shards of a block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shuffled", action="store_true", help="put the emoji in random order first")
    args = parser.parse_args()
    print_neighbours()
    print_losses(args.steps, args.seeds, args.shuffled)


def print_neighbours() -> None:
    """Print the chi-square of neighbours, and the shards of a batch, for each order."""
    sizes = ShardSizes(np.full((SHARDS, 1), ROWS), np.full(SHARDS, 171_000_000))
    group = np.random.default_rng(0).integers(0, GROUPS, SHARDS)
    print(f"{'order':24}" + "".join(f"{f'{distance:,} apart':>18}" for distance in DISTANCES) + f"{'shards of a batch':>20}")
    for share in (None, *SHARES):
        blocks = None if share is None else BlockOrder((sizes,), share * float(sizes.bytes.sum()))
        sampler = BatchSampler(((SHARDS * ROWS,),), 0, (SamplerPhase(10**6, BATCH, (1,)),), blocks)
        at = np.random.default_rng(1).integers(0, SHARDS * ROWS - max(DISTANCES), PAIRS)
        shards = [sampler._rows(((0, 1),), 0, at + distance)[1] // ROWS for distance in (0, *DISTANCES)]
        chi = [chi_square(group[shards[0]], group[other]) for other in shards[1:]]
        held = len(np.unique(sampler.rows(1000)[2] // ROWS))
        name = "full" if share is None else f"blocks of {share:.2%}"
        print(f"{name:24}" + "".join(f"{value:18.2f}" for value in chi) + f"{held:20,}", flush=True)


def chi_square(one: np.ndarray, two: np.ndarray) -> float:  # type: ignore[type-arg]
    """Return the chi-square of the table of pairs for independence, divided by its degrees of freedom."""
    table = np.zeros((GROUPS, GROUPS))
    np.add.at(table, (one, two), 1)
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / table.sum()
    return float(((table - expected) ** 2 / expected).sum() / (GROUPS - 1) ** 2)


def print_losses(steps: int, seeds: int, shuffled: bool) -> None:
    """Print the held-out loss of the demo's model in each order, and the difference beside the spread over seeds."""
    encoders = load_autoencoder("icon"), load_text_encoder("minilm")
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        encode_source(small_parts(emoji_source("train"), shuffled), place / "emoji", EncodeSettings((64,)), *encoders)
        encode_source(emoji_source("held_out"), place / "held-out", EncodeSettings((64,)), *encoders)
        sizes = EncodedDataset(place / "emoji").shard_sizes()
        gigabytes = EMOJI_BLOCK * float(sizes.bytes.mean()) / BLOCK / 1e9
        print(f"\n{len(sizes.bytes)} shards of emoji; held-out loss after {steps} steps, by seed")
        for order in ("full", "blocks"):
            train = partial(train_and_measure, place, steps, order, gigabytes)
            losses[order] = [train(seed) for seed in range(seeds)]
            values = np.asarray(losses[order])
            print(f"{order:8}{', '.join(f'{loss:.4f}' for loss in values):40} mean {values.mean():.4f}", flush=True)
    differences = np.subtract(losses["blocks"], losses["full"])
    error = differences.std(ddof=1) / len(differences) ** 0.5
    print(f"blocks - full: {differences.mean():+.4f}, standard error {error:.4f}")


def small_parts(source: Source, shuffled: bool) -> Source:
    """Return the source in parts of EMOJI_ROWS records, which become shards, in random order if they are to be `shuffled`."""
    records = [record for part in source.parts for record in part.records()]
    order = np.random.default_rng(0).permutation(len(records)) if shuffled else np.arange(len(records))

    def some(first: int) -> Iterator[Record]:
        return (records[number] for number in order[first : first + EMOJI_ROWS])

    return replace(source, parts=[Part(f"{source.name}-{first}", partial(some, first)) for first in range(0, len(records), EMOJI_ROWS)])


def train_and_measure(place: Path, steps: int, order: str, gigabytes: float, seed: int) -> float:
    overrides = [f"seed={seed}", "data.sets={}", f"data.path={place / 'emoji'}", f"data.held_out={place / 'held-out'}"]
    overrides += [f"data.order={order}", f"data.cache.gigabytes={gigabytes}", "record.sample_prompts=[]", f"record.held_out_every={steps}"]
    overrides += [
        f"phases=[{{name: all, steps: {steps}, batch_size: 64, learning_rate: 1e-2, final_learning_rate: 0.01, warmup_steps: 30, "
    ]
    overrides[-1] += "grad_clip: 1.0}]"
    trainer = Trainer(
        load_recipe("emoji-fast", overrides), place / f"{order}-{seed}", Reporter(PlainConsole(quiet=True)), start_world("cpu")
    )
    trainer.train()
    assert trainer.held_out is not None
    return float(str(trainer._last["held_out_loss"]))


if __name__ == "__main__":
    main()
