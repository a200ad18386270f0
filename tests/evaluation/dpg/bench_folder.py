"""A small DPG-Bench in the published layout."""

from pathlib import Path

import numpy as np
from PIL import Image

from microdit.evaluation.dpg.answers import write_grids
from microdit.evaluation.dpg.questions import DPGPrompt

HEADER = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
ROWS = [
    'cats7,"Two cats, black.",,1,0,entity,whole,entity - whole (cats),Are there cats?',
    'cats7,"Two cats, black.",,2,1,other,count,"other - count (cats, ==2)",Are there two cats?',
    "cats7,,,3,1,attribute,color,attribute - color (cats),Are the cats black?",
    'cats7,,,4,"2, 3",relation,spatial,relation - spatial (cats),"Do two black cats sit side by side, close?"',
    "room,,,1,0,global,,global - (photo),Is this a photo?",
    "room,,,2,0,entity,whole,entity - whole (room),Is there a room?",
]


def write_bench(folder: Path, rows: list[str] | None = None) -> Path:
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "cats7.txt").write_text("Two cats, black,\nside by side.\n")
    (folder / "prompts" / "room.txt").write_text("A photo of a room.")
    (folder / "dpg_bench.csv").write_text("\n".join([HEADER, *(ROWS if rows is None else rows)]) + "\n")
    return folder


def write_pictures(folder: Path, prompts: list[DPGPrompt]) -> Path:
    """Write grids whose pictures are red with a blue that counts them: 0, 1, 2, 3 for the first prompt, 4 to 7 for the second."""
    for number, prompt in enumerate(prompts):
        (folder / "pictures" / prompt.name).mkdir(parents=True)
        for picture in range(4):
            pixels = np.full((8, 12, 3), (255, 0, 4 * number + picture), np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / prompt.name / f"{picture}.png")
    write_grids(folder / "pictures", prompts, folder / "grids")
    return folder / "grids"
