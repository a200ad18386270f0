"""The terminal, which belongs to the command line alone: console, reporter, options that commands share, logs of libraries."""

import logging
import os
import sys
import traceback
from typing import Annotated

import typer

from microdit.io.console import PlainConsole, PrintableFormatter, Reporter
from microdit.io.untrusted_text import printable

SOURCE_HELP = (
    "emoji and scenes are built in, icons are emoji from npm packages. Otherwise: a folder of pictures with .txt files, metadata.jsonl or "
    "metadata.csv; such a list alone; .tar files (WebDataset); .parquet files; hf:NAME, with :SPLIT or :CONFIG:SPLIT, for a data set of "
    "the hub or a path; or NAME:PATH with cc12m, sa1b, textcaps, journeydb, diffusiondb or coco2014."
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps. auto: the GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16. auto: bfloat16 on a GPU that supports it, else float32.")]
TrainingDtype = Annotated[
    str,
    typer.Option(
        help="Precision of matrix products: auto, float32 or bfloat16. auto: the recipe's, or bfloat16 on a GPU that supports it."
    ),
]
Rewrite = Annotated[
    str | None,
    typer.Option(
        help="Let a language model rewrite the prompts as detailed captions first: the base URL of an OpenAI-compatible API (its key is "
        "read from MICRODIT_JUDGE_KEY), or the folder or hub name of a model of transformers. (default: draw prompts as they are)"
    ),
]
RewriteModel = Annotated[str | None, typer.Option(help="The model's name at the --rewrite URL.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures per batch. Fewer need less memory.")]


console = PlainConsole()
reporter = Reporter(console)
warn, progress = reporter.warn, reporter.progress


def take_logs() -> None:
    """Print log messages and warnings of libraries without the escape sequences that they may hold."""
    if (handler := logging.lastResort) is not None:
        handler.setFormatter(PrintableFormatter())
        logging.getLogger("py.warnings").addHandler(handler)
        logging.captureWarnings(True)


def print_traceback() -> None:
    """Print the traceback of the exception being handled, without escape sequences."""
    sys.stderr.write(printable(traceback.format_exc()))


def share() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
