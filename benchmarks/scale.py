"""What grows with the size of a run, fabricated at a hundredth, a tenth and the whole of the paper's: a table, each row with its bar.

    python benchmarks/scale.py                      # all areas, in ten minutes and 8 GB; the last line says whether a row fails its bar
    python benchmarks/scale.py --only reading ranks
    python benchmarks/scale.py --markdown table.md  # the table, as docs/scale.md quotes it

The paper's run has 37 M pictures in 10,000 shards; ranks are counted for 64 processes where a row says nothing else. Figures that begin
with "->" were reckoned from smaller ones.
"""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from scale_row import SIZES, Measure, Row

AREAS = ("reading", "encoding", "starts", "ranks", "evaluation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=AREAS, default=AREAS, metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--place", type=Path, help="where to fabricate: a disk with 4 GB that are free [default: the temporary folder]")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    rows: list[Row] = []
    start = time.monotonic()
    for area in args.only:
        measure: Measure = importlib.import_module(f"scale_{area}").rows
        with tempfile.TemporaryDirectory(dir=args.place) as place:
            found = measure(Path(place))
        rows += found
        print(f"{area}, {time.monotonic() - start:.0f} s since the start", flush=True)
        for row in found:
            figures = ", ".join(f"{size}: {figure}" for size, figure in row.figures.items())
            print(f"  {'holds' if row.holds else 'FAILS'}  {row.what}\n         {figures}; bar: {row.bar}", flush=True)
    if args.markdown:
        args.markdown.write_text(markdown(rows), encoding="utf-8")
    failed = [row.what for row in rows if not row.holds]
    print(f"{len(rows)} rows, {len(failed)} fail{': ' + '; '.join(failed) if failed else ''}")
    sys.exit(1 if failed else 0)


def markdown(rows: list[Row]) -> str:
    """The table of docs/scale.md."""
    lines = [f"| what | {' | '.join(SIZES)} | bar | |", "|---" * (len(SIZES) + 3) + "|"]
    for row in rows:
        figures = " | ".join(row.figures.get(size, "") for size in SIZES)
        lines.append(f"| {row.what} | {figures} | {row.bar} | {'holds' if row.holds else 'fails'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
