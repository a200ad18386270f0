"""A new routing method: `late` drops patches behind the first two blocks, which mix them, and never puts them back.

It is deferred masking without a patch-mixer: the backbone's own first blocks do the mixing, and the loss is on the kept patches.
The file is the command line with one row more, so every command knows the method:

    python examples/extend/routing.py budget emoji-fast model.routing=late model.mixer_depth=0 phases.0.mask_ratio=0.5
    python examples/extend/routing.py train emoji-fast model.routing=late model.mixer_depth=0 phases.0.mask_ratio=0.5 --out runs/late
    python examples/extend/routing.py sample runs/late "red heart" "owl"
"""

from microdit.cli.main import main
from microdit.models.routing import METHODS, Method

METHODS["late"] = Method(drop="blocks", dense_blocks=(2, 0), restore="nothing", loss="kept")

if __name__ == "__main__":
    main()
