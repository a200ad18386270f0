import os
import threading
import time

import pytest

from microdit.config.load import load_recipe
from microdit.errors import UserError
from microdit.training.prefetch import NAME, Prefetcher
from microdit.training.setup import open_dataset
from tests.training.processes import HANG, RECIPE


def test_batches_come_in_order_and_not_far_ahead():
    made = []

    def make(step):
        made.append(step)
        return step * step

    loader = Prefetcher(make, range(3, 10), ahead=2, timeout=HANG, where=str)
    deadline = time.monotonic() + HANG
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # in which no more come
    assert made == [3, 4, 5]  # two wait, one is ready to be put
    assert [loader.next() for _ in range(7)] == [step * step for step in range(3, 10)]


def test_what_the_reading_raises_is_raised_in_the_loop():
    def make(step):
        if step == 2:
            raise UserError("row 7 is damaged")
        return step

    loader = Prefetcher(make, range(5), ahead=1, timeout=HANG, where=str)
    assert [loader.next(), loader.next()] == [0, 1]
    with pytest.raises(UserError, match="row 7 is damaged"):
        loader.next()


def test_closing_ends_the_thread():
    before = threading.active_count()
    loader = Prefetcher(lambda step: step, range(1000), ahead=1, timeout=HANG, where=str)
    loader.next()
    loader.close()
    deadline = time.monotonic() + HANG
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_disk_that_does_not_answer_is_named_after_the_time_out(tmp_path, encoded_emoji):
    """Reading a pipe that nobody writes to hangs as a lost network share does."""
    mixture = open_dataset(load_recipe(RECIPE, [f"data.path={encoded_emoji}"]), print)
    lost = tmp_path / "lost"
    os.mkfifo(lost)

    hanging = threading.Event()

    def make(step):
        batch = mixture.batch(step)
        if step < 2:
            return batch
        hanging.set()
        return lost.read_bytes()

    loader = Prefetcher(make, range(5), ahead=2, timeout=0.5, where=mixture.where)
    assert hanging.wait(HANG)
    assert len(loader.next().latents_BCHW) == len(loader.next().latents_BCHW) == 8
    with pytest.raises(UserError, match=rf"{NAME} has given no batch for 0.5 s .*reading row \d+ of {encoded_emoji}"):
        loader.next()
    loader.close()
    lost.write_bytes(b"")  # lets the thread go
