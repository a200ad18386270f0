"""Small real things that many tests share."""

import fcntl
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each, numpy's too, which must know before it is imported
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from shutil import copytree

import pytest
import torch
from hypothesis import settings

from microdit.data.sources.base import Part, Source
from microdit.io.places import Place
from microdit.models.config import Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.models.routing import METHODS
from microdit.process_limits import keep_freed_memory
from tests.commands import microdit
from tests.io.store_server import CREDENTIALS, Proxy, shared_server
from tests.training.processes import HANG, RECIPE

settings.register_profile("machine", deadline=None)  # how long an example takes says more of the machine than of the code
settings.load_profile("machine")
keep_freed_memory()  # as the commands do: half of the time of small networks goes into clearing pages
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    torch.set_num_threads(1)
# A shell starts what runs in its background with Ctrl-C ignored, which the commands that tests interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def official_fixture() -> Path:
    """Numbers made by the authors' own code."""
    return FIXTURES / "official_a.safetensors"


@pytest.fixture
def tiny_model() -> MicroDiT:
    """A whole MicroDiT (mixer narrower than the backbone, experts, width scaling) with weights that are nowhere zero, in float64."""
    return busy_model(Size(dim=32, depth=4, head_dim=8, mixer_dim=16, mixer_depth=2, num_experts=4, round_ffn_to=8))


def busy_model(size: Size, **settings: int | float | bool) -> MicroDiT:
    """Fresh weights start at zero in places; these do not, so that every part does something."""
    settings = {"caption_channels": 12, "patch_size": 2, **settings}
    generator = torch.Generator().manual_seed(0)
    model = MicroDiT(resolve(size, **settings)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def routed(size: Size, routing: str) -> Size:
    """`size` with this routing; where that has a decoder, one of two blocks."""
    return replace(size, routing=routing, decoder_depth=2 if METHODS[routing].decoder else None)


@pytest.fixture(scope="session")
def text_encoder():
    from microdit.encoders.text import MiniLM

    return MiniLM()


def first_of(source: Source, count: int) -> Source:
    """A source of one part: the first `count` records."""
    return Source(f"{source.name}, first {count}", [Part("first", lambda: islice(source.parts[0].records(), count))])


@contextmanager
def _made_once(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """Give a folder that the processes of a test run share, and whether it is still to be filled. The others wait meanwhile."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once-{name}"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield shared, not shared.exists()


@pytest.fixture(scope="session")
def encoded_emoji(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """40 emoji as 16 x 16 pixels with their MiniLM captions, encoded by the real code, which only those who need it import."""
    with _made_once(tmp_path_factory, "encoded") as (shared, missing):
        if missing:
            from microdit.data.encode import EncodeSettings, encode_source
            from microdit.data.sources.builtin import emoji_source
            from microdit.encoders.autoencoder import Pixels

            encoder = request.getfixturevalue("text_encoder")
            encode_source(first_of(emoji_source("train"), 40), shared, EncodeSettings((16,), "fp16", "fp16"), Pixels(), encoder)
    return copytree(shared, tmp_path_factory.mktemp("encoded") / "emoji")


@pytest.fixture(scope="session")
def aligned_emoji(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """24 emoji as 32 x 32 pixels with their MiniLM captions and 2 x 2 features of EfficientNet."""
    with _made_once(tmp_path_factory, "aligned") as (shared, missing):
        if missing:
            from microdit.data.encode import EncodeSettings, encode_source
            from microdit.data.sources.builtin import emoji_source
            from microdit.encoders.autoencoder import Pixels
            from microdit.encoders.vision import load_vision_encoder

            encoders, settings = (Pixels(), request.getfixturevalue("text_encoder")), EncodeSettings((32,), "fp16", "fp16")
            encode_source(first_of(emoji_source("train"), 24), shared, settings, *encoders, vision=load_vision_encoder("efficientnet"))
    return copytree(shared, tmp_path_factory.mktemp("aligned") / "emoji")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded with the bundled autoencoder and trained for a few steps, by the commands."""
    with _made_once(tmp_path_factory, "workplace") as (shared, missing):
        if missing:
            _work(shared.with_name("workplace"))
            shared.with_name("workplace").rename(shared)
    return copytree(shared, tmp_path_factory.mktemp("workplace") / "place")


def _work(place: Path) -> None:
    place.mkdir()
    encoded = microdit("data", "encode", "emoji:held_out", "--out", "data/emoji", cwd=place)
    assert encoded.returncode == 0, encoded.output
    assert "kept at 64 px" in encoded.output
    overrides = [
        "data.path=data/emoji",
        "phases.0.steps=4",
        "phases.1.steps=2",
        "record.sample_prompts=[red heart]",
        "record.sample_steps=2",
    ]
    trained = microdit("train", RECIPE, *overrides, cwd=place)
    assert trained.returncode == 0, trained.output


@pytest.fixture(scope="session")
def _proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store"
    with Proxy(shared_server(folder)).running() as proxy:
        yield proxy


@pytest.fixture
def proxy(_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What lies between the tests, and the commands that they start, and a real S3 server on this machine: no faults at first."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": _proxy.address, "AWS_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    _proxy.reset()
    yield _proxy
    _proxy.reset()


@pytest.fixture
def bucket(proxy: Proxy) -> Place:
    """An empty bucket, whose deadline only something that hangs would meet."""
    return Place(f"s3://{proxy.make_bucket()}", deadline=HANG)


class WaitedTime:
    """The clock of stores where only waits between attempts take time, and none in truth: a deadline depends on no machine's speed.

    After four attempts, `HANG` has passed.
    """

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> WaitedTime:
    clock = WaitedTime()
    monkeypatch.setattr("microdit.io.places.time", clock)
    for name in ("FIRST_WAIT", "LONGEST_WAIT"):
        monkeypatch.setattr(f"microdit.io.places.{name}", HANG / 4)
    return clock
