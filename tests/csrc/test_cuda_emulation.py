"""The CUDA kernels on a CPU: the tests of the ops, run on emulation/'s coroutines.

g++ compiles kernels and bindings as they are, but that `CUDA` becomes `CPU` where they are
registered and that streams are left out. What this cannot see: most races between threads that no
barrier separates, what the compiler for the GPU makes of the code, and speed.
"""

import pytest

from tests.csrc import building

pytestmark = pytest.mark.slow

EMULATION = building.ROOT / "tests/csrc/emulation"
OPS = (
    *("logit_kl", "long_rows", "losses", "cross_entropy", "linear_kl", "objectives", "sparse_kl"),
    *("top_tokens", "masks", "activation_stats", "block_cosine"),
)
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
    for source in [*sorted(bindings.glob("cuda*.cpp")), bindings / "module.cpp"]:
        commands.append([*base, "-O0", "-c", str(source)])
    objects = [directory / f"{number}.o" for number in range(len(commands))]
    commands = [[*c, "-o", str(o)] for c, o in zip(commands, objects, strict=True)]
    building.run_all(commands)
    building.run_all([build.link(objects, building.extension_in(directory))])
    return directory


def run(directory, *selected, **environment):
    tests = [f"tests/ops/test_{op}.py" for op in OPS]
    options = ("-q", "-x", "-p", "no:cacheprovider")
    building.python_in(directory, "-m", "pytest", *options, *tests, *selected, **environment)


def test_ops(emulated):
    run(emulated)


@pytest.mark.parametrize("shared_bytes", [40000, 12000, 2000], ids=["2 and 4", "8", "none"])
def test_clusters(emulated, shared_bytes):
    """Rows that only so many blocks together can hold, or that stay where they are."""
    selected = "fused or dead_logits or kernels_equal or many_blocks"
    run(emulated, "-k", selected, EMULATED_SHARED_BYTES=str(shared_bytes))


@pytest.mark.parametrize("why", ["error", "none fits"])
def test_a_device_that_refuses_clusters(emulated, why):
    selected = "many_blocks or test_kernels_equal"
    run(emulated, "-k", selected, EMULATED_SHARED_BYTES="12000", EMULATED_WITHOUT_CLUSTERS=why)


def test_the_last_thread_first(emulated):
    run(emulated, "-k", "not distributed and not ranks and not sharded", EMULATED_BACKWARDS="1")
