"""Load the text encoder of an open_clip checkpoint as a `CLIPTextModel` of transformers: the same network with other weight names."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from microdit.encoders.model_files import DOWNLOAD_AGAIN, check_complete, loading
from microdit.errors import UserError
from microdit.io.files import read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
PAD_ID = 0  # open_clip pads captions with zeros, whatever the tokenizer's files say

_DEFAULTS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}  # open_clip's defaults
_OTHER_NETWORKS = ("hf_model_name", "embed_cls", "no_causal_mask", "ls_init_value", "act_kwargs", "norm_kwargs")
_LAYER_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def load_open_clip(folder: Path, weights_file: Path) -> Any:
    """Load a `CLIPTextModel` in float32 from open_clip_config.json and the weights beside it. Raises UserError if they do not match."""
    from transformers import CLIPTextModel  # slow to import

    config = _text_config(folder / OPEN_CLIP_CONFIG)
    with loading(weights_file):
        weights = _read_text_half(weights_file)
    sources = _sources(config.num_hidden_layers)
    expected = {source for source, _ in sources.values()}
    check_complete(weights_file, [key for key in expected if key not in weights])
    strange = sorted(key for key in weights if key.startswith("transformer.") and key not in expected)
    if strange:
        raise UserError(
            f"{weights_file} has weights that {OPEN_CLIP_CONFIG} does not describe ({', '.join(strange[:4])}): they do not belong together."
        )
    with loading(weights_file):
        with torch.device("meta"):  # skips the random initialisation
            model = CLIPTextModel(config)
        model.load_state_dict({key: _pick(weights[source], third) for key, (source, third) in sources.items()}, assign=True)
        model.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]  # a buffer, which is not among the weights
    return model


def _text_config(path: Path) -> Any:
    from transformers import CLIPTextConfig

    model_cfg = read_json(path, DOWNLOAD_AGAIN).get("model_cfg")
    text_cfg = model_cfg.get("text_cfg") if isinstance(model_cfg, dict) else None
    if not isinstance(model_cfg, dict) or not isinstance(text_cfg, dict):
        raise UserError(f"{path} describes no text encoder (model_cfg.text_cfg): download it again.")
    other = [key for key in _OTHER_NETWORKS if text_cfg.get(key)]
    if other:
        raise UserError(f"{path} describes a text encoder that is not a plain CLIP model (text_cfg.{other[0]}): choose another.")
    sizes = {key: text_cfg.get(key, default) for key, default in _DEFAULTS.items()}
    with loading(path):
        return CLIPTextConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["width"],
            intermediate_size=int(sizes["width"] * sizes["mlp_ratio"]),
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            max_position_embeddings=sizes["context_length"],
            hidden_act="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
            bos_token_id=sizes["vocab_size"] - 2,
            eos_token_id=sizes["vocab_size"] - 1,
            pad_token_id=PAD_ID,
        )


def _read_text_half(path: Path) -> dict[str, Tensor]:
    """Read the weights of the text encoder by name. The prefix `text.` of newer checkpoints is removed."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {short: file.get_tensor(key) for key, short in _text_keys(list(file.keys())).items()}
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is damaged, or not in the format that torch has written since 2020: use a safetensors version of it.")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no named weights: download it again.")
    return {short: content[key] for key, short in _text_keys(list(content)).items()}


def _text_keys(keys: list[str]) -> dict[str, str]:
    prefix = "text." if "text.token_embedding.weight" in keys else ""
    return {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix) and not key.startswith("visual.")}


def _sources(layers: int) -> dict[str, tuple[str, int | None]]:
    """Map each weight of a `CLIPTextModel` to its name in open_clip, and to the third of it where query, key and value are stacked."""
    sources: dict[str, tuple[str, int | None]] = {
        "embeddings.token_embedding.weight": ("token_embedding.weight", None),
        "embeddings.position_embedding.weight": ("positional_embedding", None),
    }
    for part in ("weight", "bias"):
        sources[f"final_layer_norm.{part}"] = (f"ln_final.{part}", None)
        for layer in range(layers):
            ours, theirs = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            for our_name, their_name in _LAYER_PARTS.items():
                sources[f"{ours}{our_name}.{part}"] = (f"{theirs}{their_name}.{part}", None)
            for third, letter in enumerate("qkv"):
                sources[f"{ours}self_attn.{letter}_proj.{part}"] = (f"{theirs}attn.in_proj_{part}", third)
    return sources


def _pick(weight: Tensor, third: int | None) -> Tensor:
    """Return a copy of a weight or of one third of it, so that the model does not keep the file open."""
    return (weight if third is None else weight.chunk(3)[third]).to(torch.float32, copy=True)
