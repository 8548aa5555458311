# syntax=docker/dockerfile:1

# minitron for DGX nodes, on NVIDIA's PyTorch image: its torch, Transformer Engine and apex are built
# for the GPU and stay exactly what they are.
#
#     docker build -t minitron .                     # --build-arg NGC_TAG=26.06-py3: another base
#     docker run --gpus all --ipc=host --ulimit memlock=-1 --user "$(id -u):$(id -g)" \
#         -e HOME=/tmp -e MINITRON_CACHE=/results/cache -v /models:/models -v /results:/results minitron \
#         torchrun --nproc-per-node 8 launch/distill.py --config ...
#     enroot import -o minitron.sqsh dockerd://minitron           # for pyxis, see launch/slurm/
#
# Nothing is written below /opt/minitron at run time, so any user can run it. The base image's
# entrypoint (a banner, then the command) is kept.
#
# This file was written where neither a Docker daemon nor nvcr.io could be reached: it has not been
# built. What its two Python blocks do was checked outside of Docker.

ARG NGC_TAG=26.03-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

ENV CUDA_HOME=/usr/local/cuda
WORKDIR /opt/minitron

# What the image has keeps its version; what it lacks comes at the tested one. If that cannot be
# reconciled, pip says so and the build ends, where it would otherwise replace torch. The base's own
# constraints (PIP_CONSTRAINT=/etc/pip/constraint.txt) are set aside for this command only.
COPY pyproject.toml constraints.txt ./
RUN python3 - <<'PYTHON' && PIP_CONSTRAINT= pip install --no-cache-dir \
        --requirement /tmp/requirements.txt --constraint /tmp/constraints.txt
import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path


def canonical(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


project = tomllib.loads(Path("pyproject.toml").read_text())
requirements = [
    *project["build-system"]["requires"],
    *project["project"]["dependencies"],
    *project["project"]["optional-dependencies"]["plot"],
]
present = {canonical(d.name): f"{d.name}=={d.version}" for d in distributions() if d.name}
present.pop("setuptools", None)  # a build tool; minitron needs a recent one
tested = [line for line in Path("constraints.txt").read_text().splitlines() if "==" in line]
lacking = [line for line in tested if line[0] != "#" and canonical(line) not in present]
Path("/tmp/requirements.txt").write_text("\n".join(requirements) + "\n")
Path("/tmp/constraints.txt").write_text("\n".join([*present.values(), *lacking]) + "\n")
PYTHON

# With the CUDA kernels, for all GPUs that setup.py names: a build needs nvcc, not a GPU.
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . && chmod -R a+rX .

# Say what this image has. Without the optional ones minitron runs, but slower.
RUN python3 - <<'PYTHON'
import importlib

for name, required in {
    "torch": True,
    "megatron.core": True,
    "minitron": True,
    "transformer_engine.pytorch": False,
    "amp_C": False,  # apex: fused optimizers and gradient clipping
    "fused_weight_gradient_mlp_cuda": False,  # apex: weight gradients added in place
}.items():
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken build raises more than ImportError
        if required:
            raise
        print(f"{name}: absent ({type(error).__name__}: {error})")
    else:
        root = importlib.import_module(name.partition(".")[0])
        version = getattr(module, "__version__", getattr(root, "__version__", "present"))
        print(f"{name}: {version}")
PYTHON
