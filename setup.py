"""Build hook of minitron: the C++ and CUDA extension `minitron._C` of csrc/.

Everything declarative lives in pyproject.toml. The extension is optional: without it, every op runs
its PyTorch reference. Kernels are compiled once per instruction set from one source, which torch's
own extension builder, with its one set of flags for all files, cannot do. Nor does that builder
compile CUDA for a torch that has none, as a login node or CI may have; the CUDA runtime is linked
statically, so that what is built there loads with and without a GPU.

    CUDA_HOME=/usr/local/cuda           build the CUDA kernels too, with its nvcc
    MINITRON_CUDA_ARCHITECTURES="90"    for these compute capabilities (default: those of 80, 90 and
                                        100 that nvcc knows), and as PTX for GPUs after the last
    MINITRON_BUILD_EXT=0                do not build the extension
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
X86 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = {"DEFAULT": []}
if X86:
    INSTRUCTION_SETS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] = [
        *INSTRUCTION_SETS["AVX2"],
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ]
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall"),
    # GCC 12 takes the undefined operands of its own AVX-512 intrinsics for mistakes.
    *("-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-uninitialized"),
    "-Wno-maybe-uninitialized",
    *(["-DMINITRON_X86"] if X86 else []),
]
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Werror", "all-warnings"),
]
ARCHITECTURES = ("80", "90", "100")


class Build(build_ext):
    """Compiles the objects in parallel and links them."""

    def build_extension(self, extension: Extension) -> None:
        """Build `minitron._C`, or say in one line why not and leave the package pure Python."""
        reason = missing()
        if reason:
            print(f"minitron: no C++ extension ({reason}); ops run in PyTorch", file=sys.stderr)
            return
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        commands = compilations(objects)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands.values()))
        run(link([objects / name for name in sorted(commands)], output))

    def get_outputs(self) -> list[str]:
        """What was built; nothing where the extension was left out."""
        return [path for path in super().get_outputs() if Path(path).exists()]


def missing() -> str | None:
    """Why the extension cannot be built, if so."""
    if os.environ.get("MINITRON_BUILD_EXT") == "0":
        return "MINITRON_BUILD_EXT=0"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable here; pip install --no-build-isolation builds it"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler {compiler()!r}; set CXX"
    return None


def compiler() -> str:
    """The C++ compiler's name."""
    return os.environ.get("CXX", "c++")


def compilations(objects: Path) -> dict[str, list[str]]:
    """The command for every object file, by its name."""
    commands = cuda_compilations()
    for source in sorted(CSRC.glob("cpu/*.cpp")):
        for name, flags in INSTRUCTION_SETS.items():
            capability = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
            command = [*base_command(), *flags, *capability, "-c", str(source)]
            commands[f"{source.stem}.{name}.o"] = command
    for source in sorted(CSRC.glob("bindings/*.cpp")):
        if not source.stem.startswith("cuda") or cuda_home():
            commands[f"bindings_{source.stem}.o"] = [*base_command(), "-c", str(source)]
    return {name: [*command, "-o", str(objects / name)] for name, command in commands.items()}


def base_command() -> list[str]:
    """The C++ compiler with the flags that all files share."""
    import torch
    from torch.utils.cpp_extension import include_paths

    abi = int(torch.compiled_with_cxx11_abi())
    paths = [*include_paths(), sysconfig.get_paths()["include"], str(CSRC / "include")]
    command = [compiler(), *CXX_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    command += ["-DMINITRON_CUDA"] if cuda_home() else []
    return command + [
        flag for path in paths for flag in ("-isystem" if "torch" in path else "-I", path)
    ]


def cuda_compilations() -> dict[str, list[str]]:
    """The nvcc command for every object file of CUDA kernels, without its output."""
    if not cuda_home():
        return {}
    compile_all = [nvcc(), *NVCC_FLAGS, "-I", str(CSRC / "include"), *code_generation()]
    return {
        f"{source.stem}.cuda.o": [*compile_all, "-ccbin", compiler(), "-c", str(source)]
        for source in sorted(CSRC.glob("cuda/*.cu"))
    }


def cuda_home() -> Path | None:
    """The CUDA toolkit to build with, if any."""
    home = os.environ.get("CUDA_HOME")
    return Path(home) if home else None


def nvcc() -> str:
    """The CUDA compiler of CUDA_HOME."""
    home = cuda_home()
    assert home is not None
    path = home / "bin" / "nvcc"
    if not path.exists():
        raise SystemExit(
            f"CUDA_HOME={home} has no bin/nvcc; set it to a CUDA toolkit, or unset it to build for "
            "CPUs alone"
        )
    return str(path)


def code_generation() -> list[str]:
    """nvcc's flags that name the GPUs to compile for."""
    command = [nvcc(), "--list-gpu-arch"]
    listed = subprocess.run(command, capture_output=True, text=True)
    known = [line.removeprefix("compute_") for line in listed.stdout.split()]
    asked = os.environ.get("MINITRON_CUDA_ARCHITECTURES", "").replace(",", " ").split()
    unknown = [architecture for architecture in asked if architecture not in known]
    if unknown or not known:
        raise SystemExit(
            f"{nvcc()} cannot compile for {' '.join(unknown) or 'any GPU'}; "
            f"set MINITRON_CUDA_ARCHITECTURES to some of: {' '.join(known)}"
        )
    chosen = sorted(asked or [a for a in ARCHITECTURES if a in known], key=int)
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def link(objects: list[Path], output: Path) -> list[str]:
    """The command that links the extension."""
    from torch.utils.cpp_extension import library_paths

    search = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    home = cuda_home()
    if home:
        runtime = next(home.glob("lib*/libcudart_static.a"), None)
        if runtime is None:
            raise SystemExit(
                f"CUDA_HOME={home} has no libcudart_static.a; set it to a whole toolkit"
            )
        libraries += [str(runtime), "-ldl", "-lrt", "-lpthread"]
    inputs = [*map(str, objects), *search, *libraries]
    return [compiler(), "-shared", "-fopenmp", *inputs, "-o", str(output)]


def run(command: list[str]) -> None:
    """Run a command and end the build with its output if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)


if __name__ == "__main__":
    # Optional: an editable install would otherwise insist on copying what was left out.
    extension = Extension("minitron._C", sources=[], optional=True)
    setup(ext_modules=[extension], cmdclass={"build_ext": Build})
