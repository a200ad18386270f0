"""Several processes that share a study: `microdit lab run --jobs`. Small models leave most of a GPU, or of several cores, idle."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO

from microdit.config.schema import Recipe
from microdit.errors import EXIT_BY_USER, EXIT_RESTART, StoppedError, UserError
from microdit.io.console import Reporter
from microdit.io.locks import try_lock
from microdit.io.untrusted_text import printable
from microdit.lab.equal_cost import ArmPlan, read_plan
from microdit.lab.run_study import measured_steps, read_results
from microdit.lab.study import Study

LOOK_EVERY = 0.5  # seconds
PATIENCE = 120.0  # seconds for a process to save its checkpoint when it is asked to stop
LAST_LINES = 2000  # characters of a failed process's log


def run_side_by_side(study: Study, recipes: dict[str, Recipe], command: list[str], out: Path, jobs: int, reporter: Reporter) -> None:
    """Run `command`, which trains arms of `study` into `out`, in `jobs` processes at once until all have ended.

    Their output goes to OUT/logs/N.txt, with numbers that no running process uses. Ctrl-C and SIGTERM are passed on to them. Raises
    StoppedError after such a request, and UserError with the end of its log if a process fails.
    """
    group = _Group()
    with group.signals_passed_on():
        for _ in range(jobs):
            group.start(command, out / "logs", cores=max(1, (os.cpu_count() or 1) // jobs))
        _watch(study, recipes, group, out, reporter)
    if group.failed and not group.asked_to_stop:
        log, process = group.failed[0]
        killed = f", killed by {signal.Signals(-process.returncode).name}" if process.returncode < 0 else ""
        end = printable(log.read_text(errors="replace").strip()[-LAST_LINES:], LAST_LINES)
        raise UserError(f"{len(group.failed)} of {jobs} processes failed{killed}. The end of {log}: {end or '(nothing)'}")
    if any(process.returncode for process in group.processes):
        raise StoppedError("The study was asked to stop. The same command continues it where it stopped.", EXIT_RESTART)


class _Group:
    """Processes that are stopped together."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []
        self.asked_to_stop = False
        self._fine = {0, EXIT_RESTART, EXIT_BY_USER}

    def start(self, command: list[str], logs: Path, cores: int) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": str(cores), **os.environ}
        log, file = _unused_log(logs)
        with file:
            # In a session of its own, a process is not reached by the terminal's Ctrl-C, which would end it before it is asked to stop.
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        self.processes.append(process)
        self.logs.append(log)

    @property
    def failed(self) -> list[tuple[Path, subprocess.Popen[bytes]]]:
        """The processes that have failed, with their logs."""
        ended = zip(self.logs, self.processes, strict=True)
        return [(log, process) for log, process in ended if process.poll() not in (None, *self._fine)]

    @property
    def running(self) -> bool:
        """Whether any process runs. If one has failed, the others are stopped."""
        if self.failed:
            self.stop()
        return any(process.poll() is None for process in self.processes)

    def stop(self) -> None:
        self._fine.add(-signal.SIGTERM)  # the end of a process that is asked to stop before it has a handler
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    @contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        """Pass Ctrl-C and SIGTERM on to the processes, as SIGTERM. All have ended when the block is left."""

        def stop(number: int, frame: object) -> None:
            self.asked_to_stop = True
            self.stop()

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            self.stop()
            self._end(time.monotonic() + PATIENCE)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, deadline: float) -> None:
        """Wait for all processes, and kill those that still run at the deadline."""
        while any(process.poll() is None for process in self.processes):
            time.sleep(LOOK_EVERY)
            if time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()


def _unused_log(folder: Path) -> tuple[Path, BinaryIO]:
    """Open the first log that no running process writes to. It is locked until all that inherit it have ended."""
    for number in count():
        log = folder / f"{number}.txt"
        file = log.open("ab")
        if try_lock(file, log):
            file.truncate(0)
            return log, file
        file.close()
    raise AssertionError("counting does not end")


def _watch(study: Study, recipes: dict[str, Recipe], group: _Group, out: Path, reporter: Reporter) -> None:
    """Show what has been measured until all processes have ended."""
    reporter.say(f"{len(group.processes)} processes share the study; their output is in {out / 'logs'}.")
    plans: dict[str, ArmPlan] = {}
    while group.running and not study.arms.keys() <= plans.keys():
        time.sleep(LOOK_EVERY)
        plans = read_plan(out) if (out / "plan.json").is_file() else {}
    if not study.arms.keys() <= plans.keys():
        return
    total = len(study.seeds) * sum(len(measured_steps(study, recipes[arm], plans[arm])) for arm in study.arms)
    seen = 0
    with reporter.progress(study.name, total) as advance:
        while group.running:
            time.sleep(LOOK_EVERY)
            results = [line for line in read_results(out) if line["arm"] in study.arms and line["seed"] in study.seeds]
            for line in results[seen:]:
                advance(1, f"{line['arm']}, seed {line['seed']}, step {line['step']:,}")
            seen = len(results)
