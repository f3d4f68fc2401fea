# Two images from one file, for `make build_api` and `make build_dev`:
#   api   serving: ONNX Runtime, no TensorFlow, one model
#   dev   training: TensorFlow with its CUDA libraries; the code is mounted at run time

ARG BASE=python:3.11-slim-bookworm
ARG DEV_BASE=tensorflow/tensorflow:2.21.0-gpu

# --- api ---------------------------------------------------------------------------

FROM ${BASE} AS api-packages
WORKDIR /build
COPY requirements-serve.txt ./
RUN python3 -m venv --without-pip /opt/venv \
 && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir \
      --disable-pip-version-check --only-binary :all: -r requirements-serve.txt

# What .dockerignore lets through; .api_model is there only if a model was trained.
# Files keep their modes on the way, so a strict umask would hide them from the user.
FROM ${BASE} AS api-files
WORKDIR /bertflask
COPY . /context
RUN cp /context/bertflask.py . \
 && mkdir models \
 && if [ -d /context/.api_model ]; then cp -r /context/.api_model/. models; fi \
 && chmod -R a+rX .

FROM ${BASE} AS api
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /bertflask
COPY --from=api-packages /opt/venv /opt/venv
COPY --from=api-files /bertflask /bertflask
USER 10001:10001
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", \
  "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:5000/health_check', timeout=4)"]
ENTRYPOINT ["python", "bertflask.py"]
CMD ["serve", "--host", "0.0.0.0", "--port", "5000"]

# --- dev ---------------------------------------------------------------------------

FROM ${DEV_BASE} AS dev
# TensorFlow's images ship cuDNN 8, which TensorFlow 2.18 and later cannot use: they find
# no GPU. So CUDA comes with pip, and the base's own copy is kept off the library path.
# Without a GPU: --build-arg TENSORFLOW=tensorflow
ARG TENSORFLOW=tensorflow[and-cuda]
ENV PATH=/opt/venv/bin:$PATH \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /bertflask
COPY requirements.txt requirements-serve.txt build-constraints.txt /opt/
RUN python3 -m venv /opt/venv \
 && python -m pip install --no-cache-dir --upgrade -c /opt/build-constraints.txt pip \
 && python -m pip install --no-cache-dir --build-constraint /opt/build-constraints.txt \
      -r /opt/requirements.txt "${TENSORFLOW}"
EXPOSE 6006
# TensorBoard runs for as long as the command does.
ENTRYPOINT ["sh", "-c", "CUDA_VISIBLE_DEVICES=-1 tensorboard --logdir models/trained --bind_all --port 6006 >/tmp/tensorboard.log 2>&1 & exec \"$@\"", "sh"]
CMD ["python", "bertflask.py", "train"]
