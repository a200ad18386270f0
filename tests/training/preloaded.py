"""Imported once, by the process from which all processes of the tests are forked: what they would each import, and measure, anew."""

import datasets  # noqa: F401
import emoji  # noqa: F401
import torch
import transformers.models.bert.modeling_bert  # noqa: F401
import typer._adapters  # noqa: F401

import microdit.cli.main
import microdit.data.encode
import microdit.evaluation.evaluate
import microdit.lab.run_study
import microdit.lab.study_report
import microdit.training.multi_phase  # noqa: F401
from microdit.encoders.autoencoder import load_autoencoder
from microdit.encoders.text import MiniLM
from microdit.evaluation.features import EfficientNetFeatures
from microdit.planning.hardware import peak_flops

torch.set_num_threads(1)  # a product by several threads leaves a pool of them, which hangs in forked processes
peak_flops(torch.device("cpu"), torch.float32)
MiniLM().encode(["what networks import at their first use"])
load_autoencoder("icon")
EfficientNetFeatures()
