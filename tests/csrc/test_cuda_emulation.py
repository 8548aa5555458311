"""The CUDA kernels on a CPU: the tests of the ops, run on emulation/'s coroutines.

g++ compiles kernels and bindings as they are, but that `CUDA` becomes `CPU` where they are
registered and that streams are left out. What this cannot see: races between threads that no
barrier separates, what the compiler for the GPU makes of the code, and speed.
"""

import pytest

from tests.csrc import building

pytestmark = pytest.mark.slow

EMULATION = building.ROOT / "tests/csrc/emulation"
OPS = ("logit_kl", "linear_kl", "activation_stats", "block_cosine")
STREAM = """#pragma once
#include <ATen/core/Tensor.h>
namespace minitron {
struct OnDevice {
    OnDevice(const at::Tensor&, std::initializer_list<const at::Tensor*>) {}
    void* stream() const { return nullptr; }
};
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A directory with a minitron whose CPU kernels are the CUDA kernels, emulated."""
    build, directory = building.setup_script(), tmp_path_factory.mktemp("emulated")
    bindings = directory / "bindings"
    bindings.mkdir()
    for source in (building.ROOT / "csrc/bindings").iterdir():
        text = source.read_text().replace('"../c', f'"{building.ROOT}/csrc/c')
        (bindings / source.name).write_text(
            text.replace("(minitron, CUDA, m)", "(minitron, CPU, m)")
        )
    (bindings / "stream.h").write_text(STREAM)
    kernels = sorted((building.ROOT / "csrc/cuda").glob("*.cu"))
    flags = ["-std=c++20", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    include = ["-I", str(EMULATION), "-I", str(building.ROOT / "csrc/include")]
    commands = [
        [build.compiler(), *flags, *include, "-x", "c++", "-c", str(kernel)] for kernel in kernels
    ]
    base = [flag for flag in build.base_command() if flag != "-O3"]
    for name in ("cuda", "module"):
        commands.append([*base, "-O0", "-c", str(bindings / f"{name}.cpp")])
    objects = [directory / f"{number}.o" for number in range(len(commands))]
    commands = [[*c, "-o", str(o)] for c, o in zip(commands, objects, strict=True)]
    building.run_all(commands)
    building.run_all([build.link(objects, building.extension_in(directory))])
    return directory


@pytest.mark.parametrize(
    "shared_bytes", [232448, 40000, 12000, 2000], ids=["one block", "2 and 4", "8", "two sweeps"]
)
def test_ops(emulated, shared_bytes):
    """With memory for whole rows, for parts of them in clusters, or for none."""
    tests = [f"tests/ops/test_{op}.py" for op in OPS]
    selected = [] if shared_bytes == 232448 else ["-k", "fused or dead_logits or kernels_equal"]
    building.python_in(
        emulated,
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, *selected),
        EMULATED_SHARED_BYTES=str(shared_bytes),
    )
