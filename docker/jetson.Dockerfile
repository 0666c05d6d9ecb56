# Engines and their bench on a Jetson with JetPack 6: no torch, no onnx, no training. In a checkout, on the board:
#
#   docker build -f docker/jetson.Dockerfile -t faqd-jetson .
#   docker run --rm --runtime nvidia -v "$PWD:/data" faqd-jetson deploy doctor
#
# BASE brings TensorRT with its Python bindings, and has to fit the JetPack of the board (docs/jetson.md): an engine
# runs only on the version that built it.

ARG BASE=nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY faqd faqd
RUN python -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE}
COPY --from=wheel /wheels /wheels
# The wheel is made elsewhere: the setuptools of JetPack 6 is too old to be relied on.
RUN python3 -m pip install --no-cache-dir "$(echo /wheels/faqd-*.whl)[device]"
WORKDIR /data
ENTRYPOINT ["faqd"]
CMD ["deploy", "doctor"]
