# The image that every stage runs in, on Slurm, Kubernetes or by RUNTIME=podman: make image builds
# it (image/build.sh), from the pins of versions.env and requirements/*.lock.
#
# Written for Docker BuildKit, podman 4.3 and buildah 1.28 alike: no heredoc, no COPY --link, and no
# syntax line, for which BuildKit would ask a registry.
ARG BASE_IMAGE
# Empty, unless --build-context wheels=folder puts a folder of wheels in its place (make image
# WHEELS=folder), for a machine that reaches no package index.
FROM scratch AS wheels

FROM ${BASE_IMAGE} AS runtime
# triton and vLLM compile small stubs at run time: g++ and Python's headers stay. vLLM's CPU build
# needs libnuma. git tells a run's record the commit of a checkout that is mounted.
RUN if ! command -v apt-get > /dev/null; then \
      echo "error: BASE_IMAGE has no apt-get; give one of Debian or Ubuntu" >&2; exit 64; \
    fi \
 && apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates curl g++ git libnuma1 python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log

# EFA's user-space part: libfabric and the plugin by which NCCL finds it. The kernel's module is
# the host's. "none" leaves it out: InfiniBand needs nothing, NCCL speaks it itself.
ARG EFA_INSTALLER_VERSION=none
ARG EFA_INSTALLER_SHA256=
WORKDIR /tmp/efa
RUN if [ "$EFA_INSTALLER_VERSION" != none ]; then \
      curl --fail --silent --show-error --location --output efa.tar.gz \
        "https://efa-installer.amazonaws.com/aws-efa-installer-$EFA_INSTALLER_VERSION.tar.gz" \
   && echo "$EFA_INSTALLER_SHA256  efa.tar.gz" > checksum \
   && { sha256sum --check --status checksum || { \
        echo "error: the EFA installer $EFA_INSTALLER_VERSION has another checksum than" \
          "versions.env, which says how to verify it: $(sha256sum efa.tar.gz)" >&2; exit 64; }; } \
   && tar --extract --gzip --strip-components=1 --file efa.tar.gz \
   && apt-get update \
   && ./efa_installer.sh --yes --skip-kmod --skip-limit-conf --no-verify \
   && ldconfig \
   && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log; \
    fi \
 && rm -rf /tmp/efa

# All five tools in one environment, by hash. A layer of 4 to 9 GB: it is made anew only where a
# lock, the installing script or what stands above has changed.
WORKDIR /opt/torch-relay
ARG ACCELERATOR
ARG TORCH_CPU=
ARG TORCH_INDEX=
COPY versions.env ./
COPY requirements/install.sh requirements/uv.lock requirements/quantize.lock \
  requirements/${ACCELERATOR}.lock requirements/
# The secret is a certificate of the site's own, where its network needs one; it stays in no layer.
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=ca_bundle \
    if [ -e /run/secrets/ca_bundle ]; then \
      export SSL_CERT_FILE=/run/secrets/ca_bundle PIP_CERT=/run/secrets/ca_bundle; \
    fi \
 && if ls /wheels/*.whl > /dev/null 2>&1; then \
      export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels UV_OFFLINE=1 UV_NO_INDEX=1 \
        UV_FIND_LINKS=/wheels; \
    fi \
 && export PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 LOCKS="requirements/$ACCELERATOR.lock" \
 && sh requirements/install.sh \
 && .venv/bin/python -m uv pip install --no-deps --require-hashes --target .venv/quantize \
      --requirement requirements/quantize.lock \
 && rm -rf ~/.cache /tmp/*

# Any user may write this home: a launcher starts the image as the one who owns the run, and the
# tools cache there. USER and HOME, since such a user has no line in /etc/passwd.
RUN useradd --create-home --uid 2000 relay && chmod 0777 /home/relay
ENV HOME=/home/relay USER=relay PATH=/opt/torch-relay/.venv/bin:$PATH

# A checkout that is mounted and worked in wins over this copy. Last, so that an edited script
# costs a second.
COPY Makefile ./
COPY configs configs
COPY requirements requirements
COPY slurm slurm
COPY kubernetes kubernetes
COPY scripts scripts
ARG SOURCE=
ARG REVISION=
ARG LOCK_SHA256=
ARG BASE_IMAGE
RUN echo "$REVISION" > REVISION
LABEL org.opencontainers.image.title="Torch Relay" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="$BASE_IMAGE" \
      torch-relay.accelerator="$ACCELERATOR" \
      torch-relay.lock="$LOCK_SHA256" \
      torch-relay.efa="$EFA_INSTALLER_VERSION"
# By number: Kubernetes' runAsNonRoot looks for no name.
USER 2000
