# The environment of the pipeline: Python, the lock, git and an init. The repository is mounted at /workspace, so no code, no
# data and no secret is in a layer. docs/CONTAINER.md has the commands.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# PyTorch and what only it needs (5.6 of 6.9 GB) change rarely: apart from the rest of the lock, they keep their layer when
# anything else changes, because COPY --from is cached by content.
FROM ${BASE_IMAGE} AS lock
ARG TORCH_INDEX=
WORKDIR /lock
COPY requirements.txt .
# A requirement is a line that begins in the first column, with indented lines (hashes, comments) after it. An index of other
# builds has other hashes, and its torch needs none of the CUDA packages.
RUN awk -v other="$TORCH_INDEX" ' \
      /^[^ #]/ { name = $0; sub(/[^a-z0-9-].*/, "", name); torch = name ~ /^(torch|torchvision)$/; \
                 cuda = name ~ /^(triton|cuda-.*|nvidia-.*)$/ && name != "nvidia-ml-py"; print > "/dev/null" } \
      torch && other { if (/^[^ ]/) { sub(/ *\\$/, ""); print > "torch.txt" }; next } \
      cuda && other { next } \
      { print > (torch || cuda ? "torch.txt" : "rest.txt") }' requirements.txt

FROM ${BASE_IMAGE}
ARG TORCH_INDEX=
LABEL org.opencontainers.image.title="driftline" \
      org.opencontainers.image.description="Environment of a reproducible image classification pipeline" \
      org.opencontainers.image.licenses="MIT"

# Debian keeps one version at a time: a pinned one would break the build with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends dumb-init git make \
 && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY --from=lock /lock/torch.txt /opt/driftline/
RUN python -m pip install --quiet --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r /opt/driftline/torch.txt
COPY --from=lock /lock/rest.txt /opt/driftline/
RUN python -m pip install --quiet --no-deps -r /opt/driftline/rest.txt

# Any user may run it (--user), whom no passwd file knows: HOME and what is below is everybody's, like /tmp, and the name comes
# from USER. The mounted repository may belong to anybody; DVC commits experiments, for which git wants a name.
RUN useradd --uid 1000 --create-home driftline \
 && mkdir -p /home/driftline/.cache/driftline /home/driftline/.config /workspace \
 && chmod -R 1777 /home/driftline /workspace \
 && git config --system --add safe.directory '*' \
 && git config --system user.name driftline \
 && git config --system user.email driftline@localhost
ENV HOME=/home/driftline \
    USER=driftline \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DVC_NO_ANALYTICS=1 \
    DVC_SITE_CACHE_DIR=/tmp/dvc-site \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY docker-entrypoint.sh /usr/local/bin/

USER 1000:1000
WORKDIR /workspace
# SIGTERM arrives as SIGINT, at all processes: dvc then waits for its stage, which writes a checkpoint. By SIGTERM dvc would
# die at once, and with it the container, before the stage has written anything.
ENTRYPOINT ["dumb-init", "--rewrite", "15:2", "--", "docker-entrypoint.sh"]
CMD ["dvc", "repro"]
