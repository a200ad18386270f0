"""A line of work before one worker, which owns the models: jobs wait, are drawn one after another, and can be called off at any time.

The line is bounded, so that any number of people who ask cost no more memory than it holds. Nothing here knows of a network.
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
OUR_MISTAKE = "The picture could not be drawn, by a mistake of this program and not of yours; its log says more."
LESS_MEMORY = "ask for fewer pictures, or for smaller ones; or start the server with --dtype bfloat16"

log = logging.getLogger(__name__)


class QueueFullError(UserError):
    """As many jobs wait as may."""


class QueueClosedError(UserError):
    """The worker is going home."""


class _CalledOffError(Exception):
    """Raised between two steps of the sampler, to end it."""


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn: `count` pictures of one prompt, of the seeds `seed`, `seed` + 1, ... Sides in pixels; None: as in training."""

    model: str
    prompt: str
    settings: SamplerSettings
    seed: int = 0
    count: int = 1
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""


class Job:
    """A drawing on its way. All may be read from any thread; `cancel` may be called from any.

    `done_steps`, of `all_steps`, count each picture's. `latents_BCHW`: what the pictures are taken for so far; None before the first step.
    `warnings` say which part of the prompt the text encoder does not read. `error` is a sentence, and `at_fault` who is to blame for it,
    once the state is "failed".
    """

    def __init__(self, drawing: Drawing):
        self.drawing = drawing
        self.state: State = "waiting"
        self.done_steps = 0
        self.all_steps = drawing.count * drawing.settings.num_inference_steps
        self.latents_BCHW: Tensor | None = None
        self.pictures: list[Image.Image] = []
        self.error = ""
        self.warnings: list[str] = []
        self.at_fault: Literal["user", "us"] = "user"
        self.ended = threading.Event()
        self._called_off = threading.Event()

    def cancel(self) -> None:
        """At once if it waits, after the current step if it runs, and without effect if it has ended."""
        self._called_off.set()

    @property
    def called_off(self) -> bool:
        return self._called_off.is_set()

    def after_step(self, step: Step) -> None:
        """For `on_denoised` of a pipeline."""
        if self.called_off:
            raise _CalledOffError
        self.latents_BCHW = step.denoised_BCHW.cpu()
        self.done_steps += len(step.denoised_BCHW)

    def end(self, state: State, error: str = "", at_fault: Literal["user", "us"] = "user") -> None:
        self.error, self.at_fault, self.state = error, at_fault, state
        self.latents_BCHW = None  # of thousands of ended jobs none may hold on to more than its pictures
        self.ended.set()


class WorkQueue:
    """`waiting` jobs at most stand in line behind the one that is drawn. `models` by name. Use as a context manager, or call `close`."""

    def __init__(self, models: Mapping[str, MicroDiTPipeline], waiting: int):
        if waiting < 1:
            raise UserError(f"The queue must hold at least 1 waiting job, not {waiting}.")
        self.models = models
        self.waiting = waiting
        self._line: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="pictures", daemon=True)
        self._worker.start()

    def __enter__(self) -> "WorkQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._line)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def add(self, drawing: Drawing) -> Job:
        """To the end of the line. Raises QueueFullError, QueueClosedError."""
        job = Job(drawing)
        with self._changed:
            if self._closed:
                raise QueueClosedError("The server is shutting down: ask again when it is back.")
            if len(self._line) >= self.waiting:
                raise QueueFullError(f"{self.waiting} jobs are waiting already, and no more may: ask again in a few seconds.")
            self._line.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Whether it waits or runs. One that waits leaves the line at once."""
        with self._changed:
            job.cancel()
            if job in self._line:
                self._line.remove(job)
                job.end("cancelled")

    def place(self, job: Job) -> int:
        """How many are drawn before it, the running one included; 0 if it is no longer waiting."""
        with self._changed:
            return self._line.index(job) + (self._running is not None) if job in self._line else 0

    def close(self, seconds: float = 30) -> None:
        """Call off all jobs, waiting and running, and let the worker end."""
        with self._changed:
            self._closed = True
            for job in self._line:
                job.end("cancelled")
            self._line.clear()
            if self._running:
                self._running.cancel()
            self._changed.notify_all()
        self._worker.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if self._closed:
                    return
                job = self._running = self._line.popleft()
                job.state = "running"
            self._draw(job)
            with self._changed:
                self._running = None

    def _draw(self, job: Job) -> None:
        """Whatever happens, the job ends and the worker lives."""
        drawing = job.drawing
        try:
            with device_errors_explained(LESS_MEMORY):
                job.pictures = self.models[drawing.model].generate(
                    [drawing.prompt] * drawing.count,
                    drawing.settings,
                    drawing.seed,
                    height=drawing.height,
                    width=drawing.width,
                    negative_prompts=[drawing.negative_prompt] if drawing.negative_prompt else None,
                    on_denoised=job.after_step,
                    warn=job.warnings.append,
                )
        except _CalledOffError:
            job.end("cancelled")
        except UserError as error:
            job.end("failed", str(error))
        except Exception:
            log.exception("a picture of %r could not be drawn", drawing.prompt)
            job.end("failed", OUR_MISTAKE, "us")
        else:
            job.end("done")
