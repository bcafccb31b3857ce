# An image for GPU nodes: the locked requirements and the CUDA kernels for A100, A40 and H100.
#
#   docker build -t cca_ds .
#   docker run --gpus all --ipc host -v /data:/data cca_ds deepspeed --module cca_ds.train --recipe llamagen-3b ...
#
# --ipc host: data loaders and NCCL use shared memory. The toolkit is of the CUDA version that the locked PyTorch has.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-dev python3-venv g++ make git openssh-client \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/cca_ds/bin:$PATH
RUN python3 -m venv /opt/cca_ds
WORKDIR /workspace

COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN CCA_DS_BUILD=cuda pip install --no-cache-dir --no-build-isolation --no-deps . && rm -rf build && python -m cca_ds

CMD ["python", "-m", "cca_ds"]
