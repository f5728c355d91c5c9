# The gateway:
#   docker build -t cachewise-gateway .
#   docker run -p 8080:8080 cachewise-gateway serve --pod http://my-vllm:8000
# Without a pod it serves two embedded ones. What it installs stands, with hashes, in
# requirements.lock; after a change of dependencies, make that anew:
#   uv pip compile --python-version 3.12 --python-platform linux --extra kubernetes --extra otel \
#       --extra redis --extra kv-events \
#       --generate-hashes --no-header --no-annotate -o requirements.lock pyproject.toml
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim AS dependencies
WORKDIR /build
COPY requirements.lock .
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps \
        --only-binary :all: --require-hashes --requirement requirements.lock

FROM python:${PYTHON_VERSION}-slim
COPY --from=dependencies /opt/venv /opt/venv
COPY engine_patch /opt/cachewise/engine_patch
COPY gateway /opt/cachewise/gateway
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/cachewise PYTHONUNBUFFERED=1
# The file system is read-only when it runs; hashes, not times, make the result the same each time.
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/cachewise \
    && install -d -o 10001 -g 10001 /var/lib/cachewise
ENV PYTHONDONTWRITEBYTECODE=1 CACHEWISE_HOST=0.0.0.0 XDG_STATE_HOME=/var/lib
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=2)"]
ENTRYPOINT ["python", "-m", "gateway.cli"]
CMD ["serve"]
