from itertools import islice

from microdit.data.sources.builtin import emoji_images
from microdit.evaluation.generators import DrawSettings
from microdit.evaluation.recognition import evaluate_emoji_run
from microdit.io.files import from_checked_json


def test_pictures_are_looked_up_and_so_are_what_the_autoencoder_rebuilds(workplace):
    run, rows = workplace / "runs" / "tiny", list(islice(emoji_images("train"), 60))
    metrics = evaluate_emoji_run(run, rows, 6, DrawSettings(num_inference_steps=2, guidance_scale=2.0, seed=0, weights=None), print)
    assert from_checked_json((run / "metrics.json").read_bytes()) == metrics
    assert metrics["retrieval"]["captions"] == 6
    assert metrics["retrieval"]["chance_top_10"] == 10 / 60
    assert metrics["retrieval_of_reconstructions"]["top_1"] > 0.6
