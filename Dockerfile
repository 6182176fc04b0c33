# CPU:          docker build -t vlarl:cpu .
# NVIDIA GPUs:  docker build -t vlarl:cuda --build-arg ACCELERATOR=cuda .
# See docs/docker.md.
ARG ACCELERATOR=cpu

# The versions of Python that the two locks are made for.
FROM python:3.11-slim-bookworm AS python-cpu

# CUDA's libraries come with the lock's wheels; the NVIDIA Container Toolkit adds the driver, with EGL for MuJoCo.
FROM python:3.12-slim-bookworm AS python-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics

# hadolint ignore=DL3006
FROM python-${ACCELERATOR}
ARG ACCELERATOR
ARG USER_ID=1000
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore UV_NO_CACHE=1 OMP_NUM_THREADS=1

WORKDIR /opt/vlarl
COPY scripts scripts
RUN sh scripts/system_packages.sh && rm -rf /var/lib/apt/lists/*
# The version is free, as in the Makefile: uv only installs what the lock names.
# hadolint ignore=DL3013
RUN python -m pip install --quiet uv
COPY requirements requirements
RUN sh scripts/install.sh /usr/local/bin/python "requirements/$ACCELERATOR.lock" lock-only
COPY . .
RUN sh scripts/install.sh /usr/local/bin/python "requirements/$ACCELERATOR.lock"

# Runs and caches belong to a user without rights; nothing of the installation does.
RUN useradd --create-home --uid "$USER_ID" vlarl && install --directory --owner vlarl /workspace
USER $USER_ID
WORKDIR /workspace
ENTRYPOINT ["vlarl"]
CMD ["--help"]
