"""Tiny models with random weights, saved in the formats of the real ones."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderTiny
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
    T5Tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTEXT = 12


def save_kl(folder: Path, channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = 3
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.4,
        shift_factor=shift,
    )
    model.save_pretrained(folder)
    return model.eval()


def save_tiny(folder: Path) -> AutoencoderTiny:
    torch.manual_seed(0)
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=0.7,
    )
    model.save_pretrained(folder)
    return model.eval()


def save_dc(folder: Path) -> AutoencoderDC:
    torch.manual_seed(0)
    model = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41,
    )
    model.save_pretrained(folder)
    return model.eval()


def save_flux2(folder: Path) -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    blocks = 3
    model = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    model.bn.running_mean.copy_(torch.randn(16))
    model.bn.running_var.copy_(torch.rand(16) + 0.5)
    model.save_pretrained(folder)
    return model.eval()


def save_qwen_image(folder: Path) -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    model = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 2.0, 1.0],
    )
    model.save_pretrained(folder)
    return model.eval()


def save_clip(folder: Path) -> CLIPTextModel:
    tokenizer = save_clip_tokenizer(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config).eval()
    make_busy(model)
    model.save_pretrained(folder)
    return model


def save_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a vocabulary for CLIP's tokenizer: every letter, inside and at the end of a word, and the word "red"."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[("r", "e"), ("re", "d</w>")], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_t5(folder: Path) -> T5EncoderModel:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁red", -1.0), *((letter, -3.0) for letter in LETTERS)]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)).eval()
    make_busy(model)
    model.save_pretrained(folder)
    return model


def save_bert(folder: Path) -> BertModel:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "cat", *LETTERS]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=CONTEXT, **sizes), add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    return model


LANGUAGE_MODELS = ("qwen2", "qwen3", "llama", "gemma", "gemma2", "gemma3_text", "mistral", "t5gemma")


def save_language_model(folder: Path, model_type: str, with_start: bool = False) -> PreTrainedModel:
    """Save a causal language model, or a T5Gemma with its decoder, as they are published. The tokenizer adds nothing but a start token."""
    words = ["<pad>", "<s>", "<unk>", "<|end|>", "red", "cat", "picture", ":", *LETTERS, "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if with_start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)  # no pad token, as Llama's
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 2048}
    if model_type == "t5gemma":
        both = {"encoder": T5GemmaModuleConfig(**sizes), "decoder": T5GemmaModuleConfig(**sizes)}
        model = T5GemmaForConditionalGeneration(T5GemmaConfig(**both, vocab_size=len(words)))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    make_busy(model)
    model.save_pretrained(folder)
    return model.eval()


class OpenClipText(nn.Module):
    """The text encoder of open_clip in plain torch, with the same names of weights."""

    def __init__(self, vocab: int, width: int, heads: int, layers: int, quick_gelu: bool):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenClipBlock(width, heads, quick_gelu) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, width))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, ids_BL: Tensor) -> Tensor:
        length = ids_BL.shape[1]
        causal_LL = torch.full((length, length), float("-inf")).triu(1)
        x_BLE = self.token_embedding(ids_BL) + self.positional_embedding[:length]
        for block in self.transformer.resblocks:
            x_BLE = block(x_BLE, causal_LL)
        return self.ln_final(x_BLE)


class OpenClipBlock(nn.Module):
    """Attention and a feed-forward network of 4 times the width, both with a preceding norm."""

    def __init__(self, width: int, heads: int, quick_gelu: bool):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.quick_gelu = quick_gelu

    def forward(self, x_BLE: Tensor, causal_LL: Tensor) -> Tensor:
        normed_BLE = self.ln_1(x_BLE)
        x_BLE = x_BLE + self.attn(normed_BLE, normed_BLE, normed_BLE, need_weights=False, attn_mask=causal_LL)[0]
        hidden = self.mlp.c_fc(self.ln_2(x_BLE))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else nn.functional.gelu(hidden)
        return x_BLE + self.mlp.c_proj(hidden)


def save_open_clip(folder: Path, quick_gelu: bool = False, prefix: str = "", as_bin: bool = False) -> OpenClipText:
    """Save a checkpoint of open_clip. `prefix` is "text." in newer ones. It also holds a few weights of the image encoder."""
    vocab = len(save_clip_tokenizer(folder))
    torch.manual_seed(0)
    model = OpenClipText(vocab, 16, 4, 3, quick_gelu).eval()
    make_busy(model)
    text_cfg = {"context_length": CONTEXT, "vocab_size": vocab, "width": 16, "heads": 4, "layers": 3}
    model_cfg = {"embed_dim": 16, "vision_cfg": {"layers": 1}, "text_cfg": text_cfg, **({"quick_gelu": True} if quick_gelu else {})}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    outside = {"logit_scale"}
    weights = {name if name in outside else prefix + name: tensor for name, tensor in model.state_dict().items()}
    weights["visual.transformer.resblocks.0.ln_1.weight"] = torch.ones(4)
    if as_bin:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(weights, folder / "open_clip_model.safetensors")
    return model


def make_busy(model: nn.Module) -> None:
    """Give all weights random values other than zero and one, so that each one matters."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.3)
