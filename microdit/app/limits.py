"""What one request may ask for: a bound on the time and the memory that anybody can take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """`pixels` are of all pictures of a request together. How many steps a sampler takes is bounded by `SamplerSettings`."""

    connections: int = 512  # open at the same time, or half of the files that the process may open, if those are fewer
    keep_alive_seconds: int = 5  # between two requests of a connection
    header_seconds: float = 10  # until all headers of a request have come
    body_bytes: int = 64 * 1024
    body_seconds: float = 10  # until the whole of it has come
    answer_seconds: float = 60  # until a client takes what is sent to it
    computations: int = 8  # that wait at the same time, for a budget or a report
    computation_seconds: float = 20
    prompt_letters: int = 2000
    pictures: int = 16
    side: int = 1024
    pixels: int = 4 * 1024 * 1024
    last_seed: int = 2**53 - 1  # the largest that JavaScript counts exactly
