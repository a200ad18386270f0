"""The terminal, which the command line alone owns: its console and reporter, options that commands share, logs of libraries."""

import logging
import os
import sys
import traceback
from typing import Annotated

import typer

from microdit.io.console import PlainConsole, PrintableFormatter, Reporter
from microdit.io.text import printable

SOURCE_HELP = (
    "emoji and scenes are built in. Else: a folder of pictures with .txt files, metadata.jsonl or metadata.csv; .tar files (WebDataset); "
    ".parquet files; hf:NAME[:SPLIT] of the hub or a path; or NAME:PATH of cc12m, sa1b, textcaps, journeydb, diffusiondb, coco2014."
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps. auto: the GPU, where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16. auto: bfloat16 on a GPU that has it, else float32.")]
TrainingDtype = Annotated[
    str, typer.Option(help="Of matrix products: auto, float32 or bfloat16. auto: as the recipe says, or bfloat16 on a GPU that has it.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="How many pictures at a time. Fewer need less memory.")]


console = PlainConsole()
reporter = Reporter(console)
warn, progress = reporter.warn, reporter.progress


def take_logs() -> None:
    """Print what libraries log or warn of, and do not print themselves, without its commands to the terminal, too."""
    if (handler := logging.lastResort) is not None:
        handler.setFormatter(PrintableFormatter())
        logging.getLogger("py.warnings").addHandler(handler)
        logging.captureWarnings(True)


def print_traceback() -> None:
    """Of the exception that is being handled: a mistake of ours, whose message may hold anything."""
    sys.stderr.write(printable(traceback.format_exc()))


def share() -> tuple[int, int]:
    """This process's number and their count, under torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
