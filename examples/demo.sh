#!/usr/bin/env bash
# The whole pipeline on a small data set: encode once, train, sample, measure. `make demo` calls this.
set -euo pipefail
microdit=${1:-microdit}

if [ ! -d data/emoji ]; then
  "$microdit" data encode emoji --out data/emoji
fi
if [ ! -d data/scenes ]; then
  "$microdit" data encode scenes:1000 --out data/scenes
fi
"$microdit" train emoji-flow --out runs/emoji --resume

# Two rows of training captions, then two of colours and objects that never appeared together in training.
"$microdit" sample runs/emoji --steps 18 --guidance 2.5 --out runs/emoji/grid.png \
  "red heart" "bicycle" "cat face" "flag of Japan" "green apple" "fire engine" "owl" "pizza" \
  "crab" "sunflower" "police car" "grinning face" "banana" "soccer ball" "blue book" "mushroom" \
  "green cat" "blue apple" "purple car" "red banana" "yellow heart with ribbon" "blue mushroom" "green pizza" "purple whale" \
  "blue cat face" "red owl" "green bicycle" "yellow crab" "purple apple" "red sunflower" "black heart button" "pink car"
"$microdit" evaluate runs/emoji --steps 18 --guidance 2
echo "Your images: $PWD/runs/emoji/grid.png"
