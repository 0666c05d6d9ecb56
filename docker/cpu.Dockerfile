# Training, export, proof and bench on a CPU. In a checkout, with its data mounted when it runs:
#
#   docker build -f docker/cpu.Dockerfile -t faqd .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" faqd train distill --help
#
# PIP_FLAGS goes to pip: on x86-64 it takes the CUDA build of torch unless told otherwise (docs/install.md).

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY faqd faqd
RUN python -m pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG PIP_FLAGS=""
COPY constraints.txt /wheels/
COPY --from=wheel /wheels /wheels
RUN python -m pip install --no-cache-dir ${PIP_FLAGS} --constraint /wheels/constraints.txt \
    "$(echo /wheels/faqd-*.whl)[train,onnx]"
WORKDIR /data
ENTRYPOINT ["faqd"]
CMD ["--help"]
