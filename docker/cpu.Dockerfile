# The project for CPUs: tools, demo, servers. From the root of the clone:
#   docker build -f docker/cpu.Dockerfile -t zppo_mm:cpu .
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# Debian has one version of a package at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/zppo_mm
ENV PATH=/opt/venv/bin:$PATH \
    OMP_NUM_THREADS=1 \
    TORCHDYNAMO_DISABLE=1

# torch comes first and alone: nothing later may replace its CPU build, and its layer is the largest.
ARG TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
COPY constraints.txt .
# hadolint ignore=SC2086
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -c constraints.txt ${TORCH_FLAGS} torch

COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e '.[parquet,s3]'

CMD ["python", "tools/train_zppo.py", "--help"]
