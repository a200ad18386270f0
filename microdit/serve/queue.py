"""The work queue of the image server: one worker thread, which owns the models, runs the jobs in turn; each can be cancelled at any time.

The queue is bounded, so the number of clients does not affect its memory. Nothing here depends on HTTP.
"""

import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from torch import Tensor

from microdit.devices import device_errors_explained
from microdit.diffusion.samplers import Step
from microdit.errors import UserError
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings

State = Literal["waiting", "running", "done", "failed", "cancelled"]
GENERATION_FAILED = "The image could not be generated because of an internal error. The server's log has the details."
LESS_MEMORY = "request fewer or smaller images, or start the server with --dtype bfloat16"

log = logging.getLogger(__name__)


class QueueFullError(UserError):
    """The maximum number of jobs are waiting already."""


class QueueClosedError(UserError):
    """The queue is closed and takes no more jobs."""


class _CancelledError(Exception):
    """Raised between two steps of the sampler, to end it."""


@dataclass(frozen=True)
class JobSpec:
    """The images that a job generates: `count` images of one prompt, from the seeds `seed`, `seed` + 1, ...

    `height` and `width` are in pixels; None selects the training size.
    """

    model: str
    prompt: str
    settings: SamplerSettings
    seed: int = 0
    count: int = 1
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""


class Job:
    """The state of a job. Attributes may be read, and `cancel` called, from any thread.

    `done_steps`, out of `all_steps`, counts the sampling steps of all images. `latents_BCHW` is the denoised estimate after the latest
    step, None before the first. `warnings` name the parts of the prompt that the text encoder does not read. In the state "failed", `error`
    is a sentence, and `fault` tells whether the request or the server caused it.
    """

    def __init__(self, spec: JobSpec):
        self.spec = spec
        self.state: State = "waiting"
        self.done_steps = 0
        self.all_steps = spec.count * spec.settings.num_inference_steps
        self.latents_BCHW: Tensor | None = None
        self.images: list[Image.Image] = []
        self.error = ""
        self.warnings: list[str] = []
        self.fault: Literal["client", "server"] = "client"
        self.ended = threading.Event()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop the job after its current step; without effect if it has ended."""
        self._cancelled.set()

    def after_step(self, step: Step) -> None:
        """Record a step, as the `on_denoised` callback of a pipeline."""
        if self._cancelled.is_set():
            raise _CancelledError
        self.latents_BCHW = step.denoised_BCHW.cpu()
        self.done_steps += len(step.denoised_BCHW)

    def end(self, state: State, error: str = "", fault: Literal["client", "server"] = "client") -> None:
        self.error, self.fault, self.state = error, fault, state
        self.latents_BCHW = None  # thousands of ended jobs may be kept: only their images remain
        self.ended.set()


class WorkQueue:
    """A queue of at most `capacity` waiting jobs behind the running one. `models` by name. Use as a context manager, or call `close`."""

    def __init__(self, models: Mapping[str, MicroDiTPipeline], capacity: int):
        if capacity < 1:
            raise UserError(f"The queue must hold at least 1 waiting job, not {capacity}.")
        self.models = models
        self.capacity = capacity
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="images", daemon=True)
        self._worker.start()

    def __enter__(self) -> "WorkQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of waiting jobs."""
        return len(self._waiting)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def add(self, spec: JobSpec) -> Job:
        """Append a job. Raises QueueFullError or QueueClosedError."""
        job = Job(spec)
        with self._changed:
            if self._closed:
                raise QueueClosedError("The server is shutting down: try again when it is back.")
            if len(self._waiting) >= self.capacity:
                raise QueueFullError(f"The queue is full with {self.capacity} waiting jobs: try again in a few seconds.")
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job: a waiting one at once, a running one after its current step."""
        with self._changed:
            job.cancel()
            if job in self._waiting:
                self._waiting.remove(job)
                job.end("cancelled")

    def place(self, job: Job) -> int:
        """Return the number of jobs before this one, including the running one; 0 if it is no longer waiting."""
        with self._changed:
            return self._waiting.index(job) + (self._running is not None) if job in self._waiting else 0

    def close(self, seconds: float = 30) -> None:
        """Cancel all jobs, waiting and running, and wait up to `seconds` for the worker to end."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                job.end("cancelled")
            self._waiting.clear()
            if self._running:
                self._running.cancel()
            self._changed.notify_all()
        self._worker.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
                job.state = "running"
            self._run(job)
            with self._changed:
                self._running = None

    def _run(self, job: Job) -> None:
        """Run a job to its end; an error ends the job, never the worker."""
        spec = job.spec
        try:
            with device_errors_explained(LESS_MEMORY):
                job.images = self.models[spec.model].generate(
                    [spec.prompt] * spec.count,
                    spec.settings,
                    spec.seed,
                    height=spec.height,
                    width=spec.width,
                    negative_prompts=[spec.negative_prompt] if spec.negative_prompt else None,
                    on_denoised=job.after_step,
                    warn=job.warnings.append,
                )
        except _CancelledError:
            job.end("cancelled")
        except UserError as error:
            job.end("failed", str(error))
        except Exception:
            log.exception("The images of %r could not be generated.", spec.prompt)
            job.end("failed", GENERATION_FAILED, "server")
        else:
            job.end("done")
