# The commands of one's own machine, in a container:  docker build -t molf . && docker run --init -it -v molf:/molf molf
# For GPUs:  docker build -t molf:cuda --build-arg DEVICE=cuda . && docker run --init -it --gpus all -v molf:/molf molf:cuda
FROM python:3.11-slim-bookworm

# g++ compiles the optimizer's kernels for the very processor, and Triton's launchers; without it all is slower.
# Debian's release is pinned above; its versions are security updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 molf \
    && install --directory --owner molf --group molf /molf \
    && git config --system safe.directory '*' \
    && git config --system user.name molf \
    && git config --system user.email molf@localhost
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# The environment is a layer of its own: only a change of these three files installs it again. The package is
# installed as a link to the code that comes after.
ARG DEVICE=cpu
# PyTorch's index of builds without CUDA ("Get started" on its site names it): an image gigabytes smaller. Empty: the
# default index, whose builds bring CUDA along.
ARG CPU_INDEX=
WORKDIR /image
COPY pyproject.toml constraints.txt container/requirements.py ./
RUN python -m venv /opt/venv \
    && case "$DEVICE" in \
        cpu) pip install --no-deps --constraint constraints.txt ${CPU_INDEX:+--index-url "$CPU_INDEX"} torch ;; \
        cuda) ;; \
        *) echo "error: DEVICE is '$DEVICE', not cpu or cuda" && exit 2 ;; \
    esac \
    && python requirements.py pipeline s3 > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt \
    && install -D /dev/null src/molf/__init__.py && touch LICENSE README.md \
    && pip install --no-deps --no-build-isolation --editable .

COPY . .

# Nothing phones home.
ENV DVC_NO_ANALYTICS=1 \
    DO_NOT_TRACK=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PYTHONPATH=/molf/src:/molf
# The project lies in /molf, best a volume: `container/entry` brings this image's code there and keeps what is edited.
USER 1000:1000
WORKDIR /molf
ENTRYPOINT ["/image/container/entry"]
CMD ["molf", "run"]
HEALTHCHECK --interval=1m --timeout=10s --start-period=1m \
    CMD ["sh", "-c", "test -w dvc.yaml && git rev-parse --quiet --verify HEAD"]
