# An image with microdit and its demo extra. NOT BUILT: this file was written and linted, but never built or run.
#
#   docker build -t microdit .                                                       # CPU
#   docker build -t microdit --build-arg BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .             # NVIDIA GPUs; run with --gpus all
#   docker run --rm -v "$PWD:/work" microdit sample "red heart" --out heart.png
#
# The container runs as user 1000: give it `--user "$(id -u):$(id -g)"` if the mounted folder belongs to another user.
ARG BASE=ubuntu:24.04
# hadolint ignore=DL3006
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY microdit microdit
# PyTorch first, from the index that matches the base image; then everything else at the tested versions.
RUN pip install -c constraints.txt --index-url "${TORCH_INDEX}" torch \
    && pip install -c constraints.txt '.[demo]'

# Base images of Ubuntu 24.04 have a user with id 1000 already.
RUN (id -u 1000 >/dev/null 2>&1 || useradd --create-home --uid 1000 microdit) \
    && mkdir -p /work \
    && chown -R 1000:1000 /work
ENV HOME=/tmp
USER 1000
WORKDIR /work
ENTRYPOINT ["microdit"]
CMD ["--help"]
