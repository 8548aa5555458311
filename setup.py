"""Build hook of minitron: the C++ extension `minitron._C` of csrc/.

Everything declarative lives in pyproject.toml. The extension is optional: without it, every op runs
its PyTorch reference. Kernels are compiled once per instruction set from one source, which torch's
own extension builder, with its one set of flags for all files, cannot do.

    MINITRON_BUILD_EXT=0    do not build it
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
        commands = [(objects / name, command) for name, command in compilations(objects).items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: run(job[1]), commands))
        run(link(sorted(path for path, _ in commands), output))

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
    import torch
    from torch.utils.cpp_extension import include_paths

    abi = int(torch.compiled_with_cxx11_abi())
    paths = [*include_paths(), sysconfig.get_paths()["include"], str(CSRC / "include")]
    base = [compiler(), *CXX_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    base += [flag for path in paths for flag in ("-isystem" if "torch" in path else "-I", path)]
    commands = {}
    for source in sorted(CSRC.glob("cpu/*.cpp")):
        for name, flags in INSTRUCTION_SETS.items():
            capability = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
            commands[f"{source.stem}.{name}.o"] = [*base, *flags, *capability, "-c", str(source)]
    for source in sorted(CSRC.glob("bindings/*.cpp")):
        commands[f"bindings_{source.stem}.o"] = [*base, "-c", str(source)]
    return {name: [*command, "-o", str(objects / name)] for name, command in commands.items()}


def link(objects: list[Path], output: Path) -> list[str]:
    """The command that links the extension."""
    from torch.utils.cpp_extension import library_paths

    search = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    return [
        compiler(),
        "-shared",
        "-fopenmp",
        *map(str, objects),
        *search,
        *libraries,
        "-o",
        str(output),
    ]


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
