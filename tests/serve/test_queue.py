"""The work queue, with the tiny trained model and no web library."""

import threading

import pytest
import torch

from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings
from microdit.serve.queue import OUR_MISTAKE, Drawing, QueueClosedError, QueueFullError, WorkQueue
from tests.serve.conftest import LONG
from tests.training.processes import HANG

SHORT = SamplerSettings(num_inference_steps=2)


@pytest.fixture
def queue(tiny: MicroDiTPipeline):
    with WorkQueue({"tiny": tiny}, 3) as queue:
        yield queue
    assert not queue._worker.is_alive()


def drawing(prompt: str = "red heart", **more) -> Drawing:
    return Drawing("tiny", prompt, **{"settings": SHORT, **more})


def until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not happen in 10 s")


def test_a_job_gives_the_pictures_of_the_pipeline(queue, tiny):
    job = queue.add(drawing(seed=5, count=2, negative_prompt="blue"))
    assert job.ended.wait(HANG)
    wanted = tiny.generate(["red heart"] * 2, SHORT, 5, negative_prompts=["blue"])
    assert [p.tobytes() for p in job.pictures] == [p.tobytes() for p in wanted]
    assert (job.state, job.done_steps, job.all_steps) == ("done", 4, 4)


def test_jobs_are_drawn_in_the_order_they_came(queue):
    first = queue.add(drawing(settings=LONG))
    until(lambda: first.state == "running")
    others = [queue.add(drawing(name)) for name in "abc"]
    assert [queue.place(job) for job in others] == [1, 2, 3]
    ended: list[str] = []
    for job in others:
        job.end = lambda *a, job=job, end=job.end: (ended.append(job.drawing.prompt), end(*a))
    queue.cancel(first)
    assert all(job.ended.wait(HANG) for job in others)
    assert ended == ["a", "b", "c"]


def test_a_full_queue_refuses_until_a_job_has_left(queue):
    first = queue.add(drawing(settings=LONG))
    until(lambda: first.state == "running")
    waiting = [queue.add(drawing()) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 jobs are waiting already"):
        queue.add(drawing())
    assert len(queue) == 3
    queue.cancel(waiting[1])
    assert waiting[1].state == "cancelled"
    assert waiting[1].ended.is_set()
    queue.add(drawing())


def test_a_running_job_shows_how_far_it_is_and_ends_between_two_steps(queue, tiny):
    job = queue.add(drawing(settings=LONG))
    until(lambda: job.latents_BCHW is not None)
    latents_BCHW = job.latents_BCHW
    assert latents_BCHW is not None
    assert tiny.decode(latents_BCHW)[0].size == (64, 64)
    queue.cancel(job)
    assert job.ended.wait(HANG)
    assert job.state == "cancelled"
    assert 0 < job.done_steps < job.all_steps
    assert (job.pictures, job.latents_BCHW) == ([], None)
    assert queue.add(drawing()).ended.wait(HANG)


def test_an_error_ends_its_job_and_not_the_worker(queue, caplog):
    wrong = queue.add(drawing(height=63))
    broken = queue.add(Drawing("no such model", "red heart", SHORT))
    right = queue.add(drawing())
    assert right.ended.wait(HANG)
    assert (wrong.state, wrong.at_fault) == ("failed", "user")
    assert "height 63 must be a multiple of" in wrong.error
    assert (broken.state, broken.at_fault, broken.error) == ("failed", "us", OUR_MISTAKE)
    assert "KeyError" in caplog.text
    assert right.state == "done"


class FullMemory(Pixels):
    """Decodes nothing, for want of memory, as a GPU says it."""

    def decode(self, latents_BCHW):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.75 GiB")


class WithFullMemory(MicroDiTPipeline):
    autoencoder = FullMemory()


def test_out_of_memory_ends_a_job_with_advice(tiny, tiny_run):
    with WorkQueue({"tiny": tiny, "full": WithFullMemory.from_pretrained(tiny_run)}, 2) as queue:
        large, right = queue.add(Drawing("full", "red heart", SHORT)), queue.add(drawing())
        assert right.ended.wait(HANG)
    assert (large.state, large.at_fault) == ("failed", "user")
    assert large.error == (
        "The GPU's memory does not suffice (2.00 GiB more were asked for, of 11.75 GiB in all): "
        "ask for fewer pictures, or for smaller ones; or start the server with --dtype bfloat16."
    )
    assert right.state == "done"


def test_closing_calls_off_all_jobs_and_takes_no_more(tiny):
    queue = WorkQueue({"tiny": tiny}, 2)
    running = queue.add(drawing(settings=LONG))
    until(lambda: running.state == "running")
    waiting = queue.add(drawing())
    queue.close()
    assert (running.state, waiting.state) == ("cancelled", "cancelled")
    with pytest.raises(QueueClosedError, match="shutting down"):
        queue.add(drawing())


def test_a_line_of_none_is_refused(tiny):
    with pytest.raises(UserError, match="at least 1"):
        WorkQueue({"tiny": tiny}, 0)


def test_work_in_line_holds_no_tensors(queue):
    """The bound on memory: what waits is a few settings."""
    first = queue.add(drawing(settings=LONG))
    until(lambda: first.state == "running")
    job = queue.add(drawing(count=16))
    assert not any(isinstance(value, torch.Tensor) for value in vars(job).values())
