# The image of the daemon: a Python base, one virtual environment, one user without rights.
#   docker build -t cachd:0.1.0 .
# Any other base that holds python3 >= 3.11, pip and useradd will do: --build-arg BASE=...
# The digest is that of all platforms on 2026-09-04; `make base` puts today's here.
ARG BASE=docker.io/library/python:3.13-slim-trixie@sha256:9d2e5553305c7c7b0097999bb17187c69b921ccd6bc9d40e4bb5ebe652c00285

FROM ${BASE} AS build
WORKDIR /src
COPY lock ./lock
# Every package is a wheel of the lock files with its hash, those that build cachd's own included. pip works on the
# environment from outside, so the environment itself never holds pip.
RUN python3 -m venv --without-pip /opt/cachd \
    && python3 -m pip --python /opt/cachd install --no-cache-dir --no-deps --only-binary=:all: \
               --require-hashes --requirement lock/image.lock \
    && python3 -m venv /build \
    && /build/bin/python -m pip install --no-cache-dir --no-deps --only-binary=:all: \
               --require-hashes --requirement lock/build.lock
COPY pyproject.toml README.md LICENSE ./
COPY cachd ./cachd
RUN /build/bin/python -m pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /dist . \
    && python3 -m pip --python /opt/cachd install --no-cache-dir --no-index --no-deps /dist/*.whl \
    && install -D --mode=0444 --target-directory=/opt/cachd/share/cachd lock/image.lock lock/sbom.cdx.json

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cachd" \
      org.opencontainers.image.description="Node-local model cache daemon" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# A daemon needs no installer; only a pip that the distribution packaged stays, for pip cannot remove that.
# The group first: useradd alone would choose its number. The cache directory is made, with its owner, for a
# volume of plain Docker.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip uninstall --yes --root-user-action=ignore pip \
    && groupadd --gid 65532 cachd \
    && useradd --uid 65532 --gid 65532 --no-log-init --no-create-home --home-dir /tmp \
               --shell /usr/sbin/nologin cachd \
    && install --directory --owner=65532 --group=65532 --mode=0755 /var/lib/cachd

COPY --from=build /opt/cachd /opt/cachd

# The root file system may be read-only: no bytecode is written, and HOME is where a writable /tmp is mounted.
ENV PATH=/opt/cachd/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    CACHD_ROOT=/var/lib/cachd

# By number: runAsNonRoot cannot judge a name.
USER 65532:65532
WORKDIR /tmp
EXPOSE 8470
STOPSIGNAL SIGTERM
ENTRYPOINT ["cachd"]
CMD ["serve"]
