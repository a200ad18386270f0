"""Vision models of transformers that answer: real architectures with tiny random weights, in the files of published ones."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    ViltConfig,
    ViltForQuestionAnswering,
)

from microdit.errors import UserError
from microdit.evaluation.chat.request_log import Answer, Exchange
from microdit.evaluation.dpg.answerers import TransformersAnswerer, read_yes_or_no
from microdit.evaluation.dpg.answers import evaluate_dpg, find_grid_pictures
from microdit.evaluation.dpg.questions import read_dpg_prompts
from tests.encoders.tiny_models import LETTERS, make_busy, save_bert
from tests.evaluation.dpg.bench_folder import write_bench, write_pictures

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "yes", "no", "cat", *LETTERS]


def save_processor(folder: Path, image_type: str, processor: str, **settings: object) -> None:
    """Write the files beside weights that name a processor, as published models have them."""
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": image_type, "processor_class": processor, **settings})
    )


def save_words(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)


def save_vilt(folder: Path) -> Path:
    save_words(folder)
    torch.manual_seed(0)
    config = ViltConfig(
        **SIZES, vocab_size=len(WORDS), image_size=32, patch_size=16, max_position_embeddings=40, id2label={0: "yes", 1: "no", 2: "blue"}
    )
    model = ViltForQuestionAnswering(config)
    make_busy(model)
    with torch.no_grad():
        model.classifier[3].bias.copy_(torch.tensor([0.0, 0.0, -50.0]))
    model.save_pretrained(folder)
    save_processor(folder, "ViltImageProcessor", "ViltProcessor", size={"shortest_edge": 32}, size_divisor=16)
    return folder


def save_blip(folder: Path) -> Path:
    save_words(folder)
    torch.manual_seed(0)
    text = SIZES | {"vocab_size": len(WORDS), "max_position_embeddings": 40, "encoder_hidden_size": 16, "projection_dim": 16}
    text |= {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=SIZES | {"image_size": 32, "patch_size": 16}))
    make_busy(model)
    with torch.no_grad():  # it writes one word, "no", and ends
        model.text_decoder.cls.predictions.bias.zero_()
        model.text_decoder.cls.predictions.decoder.weight.mul_(0.01)
        model.text_decoder.cls.predictions.decoder.bias[WORDS.index("no")] = 5
    model.save_pretrained(folder)
    save_processor(folder, "BlipImageProcessor", "BlipProcessor", size={"height": 32, "width": 32})
    return folder


def save_llava(folder: Path) -> Path:
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", "yes", "no", "word:", "or", "one"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<image>"],
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SIZES, image_size=32, patch_size=16)
    text = LlamaConfig(**SIZES, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1))
    make_busy(model)
    model.save_pretrained(folder)
    crop = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    save_processor(folder, "CLIPImageProcessor", "LlavaProcessor", **crop)
    layout = {"processor_class": "LlavaProcessor", "patch_size": 16, "vision_feature_select_strategy": "default", "image_token": "<image>"}
    (folder / "processor_config.json").write_text(json.dumps(layout | {"num_additional_image_tokens": 1}))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}"
        "{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
    )
    return folder


def answer_of(model: TransformersAnswerer, question: str, seed: int) -> str:
    exchange, content = Exchange(lambda *_, **__: None), io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(content, "PNG")
    model(question, content.getvalue(), exchange)
    assert exchange.answers == [Answer(exchange.answers[0].answer, 0)]
    return exchange.answers[0].answer


def test_a_vilt_classifies_and_a_whole_benchmark_is_answered_by_it(tmp_path):
    model = TransformersAnswerer(str(save_vilt(tmp_path / "vilt")))
    assert {answer_of(model, "a cat?", seed) for seed in range(12)} == {"yes", "no"}  # the picture matters
    prompts = read_dpg_prompts(write_bench(tmp_path / "bench"), pytest.fail)
    pictures = find_grid_pictures(write_pictures(tmp_path, prompts), prompts, pytest.fail)
    summary = evaluate_dpg(pictures, model, tmp_path / "out", pytest.fail)
    assert (summary["questions"], summary["unreadable"], summary["tokens"]) == (24, 0, 0)
    assert summary["judge"].startswith(str(tmp_path / "vilt"))
    assert evaluate_dpg(pictures, TransformersAnswerer(str(tmp_path / "vilt")), tmp_path / "out", pytest.fail) == summary


def test_a_blip_writes_its_answer(tmp_path):
    assert answer_of(TransformersAnswerer(str(save_blip(tmp_path / "blip"))), "a cat?", 0).startswith("no")


def test_a_model_that_chats_writes_only_after_the_question(tmp_path):
    model = TransformersAnswerer(str(save_llava(tmp_path / "llava")))
    said = answer_of(model, "a cat?", 0)
    assert "USER" not in said
    assert len(said.split()) <= 16
    assert said == answer_of(model, "a cat?", 0)
    assert len({answer_of(model, "a cat?", seed) for seed in range(4)}) > 1  # the picture matters


def test_a_model_that_answers_nothing_is_refused(tmp_path):
    save_bert(tmp_path / "bert")
    with pytest.raises(UserError, match="of the type bert, which answers no questions about pictures"):
        TransformersAnswerer(str(tmp_path / "bert"))


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("yes", True),
        ("No.", False),
        ("**Yes**, there are two.", True),
        ('{"answer": "no"}', False),
        ("The answer is: yes", True),
        ("Let me see.\n\nNo", False),
        ("<think>yes or no?</think>\nno", False),
        ("Not sure", None),
        ("yesterday", None),
        ("", None),
        ("There are none.", None),
    ],
)
def test_answers_are_read(answer, read):
    assert read_yes_or_no(answer) is read
