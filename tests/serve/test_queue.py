"""The work queue, with the tiny trained model and without HTTP."""

import threading

import pytest
import torch

from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings
from microdit.serve.queue import GENERATION_FAILED, JobSpec, QueueClosedError, QueueFullError, WorkQueue
from tests.serve.conftest import LONG
from tests.training.processes import HANG

SHORT = SamplerSettings(num_inference_steps=2)


@pytest.fixture
def queue(tiny: MicroDiTPipeline):
    with WorkQueue({"tiny": tiny}, 3) as queue:
        yield queue
    assert not queue._worker.is_alive()


def spec(prompt: str = "red heart", **more) -> JobSpec:
    return JobSpec("tiny", prompt, **{"settings": SHORT, **more})


def until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not happen in 10 s")


def test_a_job_generates_the_images_of_the_pipeline(queue, tiny):
    job = queue.add(spec(seed=5, count=2, negative_prompt="blue"))
    assert job.ended.wait(HANG)
    wanted = tiny.generate(["red heart"] * 2, SHORT, 5, negative_prompts=["blue"])
    assert [p.tobytes() for p in job.images] == [p.tobytes() for p in wanted]
    assert (job.state, job.done_steps, job.all_steps) == ("done", 4, 4)


def test_jobs_run_in_the_order_they_came(queue):
    first = queue.add(spec(settings=LONG))
    until(lambda: first.state == "running")
    others = [queue.add(spec(name)) for name in "abc"]
    assert [queue.place(job) for job in others] == [1, 2, 3]
    ended: list[str] = []
    for job in others:
        job.end = lambda *a, job=job, end=job.end: (ended.append(job.spec.prompt), end(*a))
    queue.cancel(first)
    assert all(job.ended.wait(HANG) for job in others)
    assert ended == ["a", "b", "c"]


def test_a_full_queue_refuses_until_a_job_has_left(queue):
    first = queue.add(spec(settings=LONG))
    until(lambda: first.state == "running")
    waiting = [queue.add(spec()) for _ in range(3)]
    with pytest.raises(QueueFullError, match="full with 3 waiting jobs"):
        queue.add(spec())
    assert len(queue) == 3
    queue.cancel(waiting[1])
    assert waiting[1].state == "cancelled"
    assert waiting[1].ended.is_set()
    queue.add(spec())


def test_a_running_job_shows_its_progress_and_ends_between_two_steps(queue, tiny):
    job = queue.add(spec(settings=LONG))
    until(lambda: job.latents_BCHW is not None)
    latents_BCHW = job.latents_BCHW
    assert latents_BCHW is not None
    assert tiny.decode(latents_BCHW)[0].size == (64, 64)
    queue.cancel(job)
    assert job.ended.wait(HANG)
    assert job.state == "cancelled"
    assert 0 < job.done_steps < job.all_steps
    assert (job.images, job.latents_BCHW) == ([], None)
    assert queue.add(spec()).ended.wait(HANG)


def test_an_error_ends_its_job_and_not_the_worker(queue, caplog):
    wrong = queue.add(spec(height=63))
    broken = queue.add(JobSpec("no such model", "red heart", SHORT))
    right = queue.add(spec())
    assert right.ended.wait(HANG)
    assert (wrong.state, wrong.fault) == ("failed", "client")
    assert "height 63 must be a multiple of" in wrong.error
    assert (broken.state, broken.fault, broken.error) == ("failed", "server", GENERATION_FAILED)
    assert "KeyError" in caplog.text
    assert right.state == "done"


class FullMemory(Pixels):
    """Raises the error of a GPU that is out of memory."""

    def decode(self, latents_BCHW):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.75 GiB")


class WithFullMemory(MicroDiTPipeline):
    autoencoder = FullMemory()


def test_out_of_memory_ends_a_job_with_advice(tiny, tiny_run):
    with WorkQueue({"tiny": tiny, "full": WithFullMemory.from_pretrained(tiny_run)}, 2) as queue:
        large, right = queue.add(JobSpec("full", "red heart", SHORT)), queue.add(spec())
        assert right.ended.wait(HANG)
    assert (large.state, large.fault) == ("failed", "client")
    assert large.error == (
        "The GPU's memory does not suffice (2.00 GiB more were asked for, of 11.75 GiB in all): "
        "request fewer or smaller images, or start the server with --dtype bfloat16."
    )
    assert right.state == "done"


def test_closing_cancels_all_jobs_and_takes_no_more(tiny):
    queue = WorkQueue({"tiny": tiny}, 2)
    running = queue.add(spec(settings=LONG))
    until(lambda: running.state == "running")
    waiting = queue.add(spec())
    queue.close()
    assert (running.state, waiting.state) == ("cancelled", "cancelled")
    with pytest.raises(QueueClosedError, match="shutting down"):
        queue.add(spec())


def test_a_queue_without_capacity_is_refused(tiny):
    with pytest.raises(UserError, match="at least 1"):
        WorkQueue({"tiny": tiny}, 0)


def test_waiting_jobs_hold_no_tensors(queue):
    """A waiting job holds a few settings only, which bounds the memory of the queue."""
    first = queue.add(spec(settings=LONG))
    until(lambda: first.state == "running")
    job = queue.add(spec(count=16))
    assert not any(isinstance(value, torch.Tensor) for value in vars(job).values())
