"""Build of dqn_fused: pure Python, and the libraries of csrc/ that this machine can compile.

``DQN_FUSED_BUILD`` says what to compile: ``auto`` (what can be), ``0``, or one or more of ``cpu``, ``cuda`` and
``autograd``, with commas between them (those or an error). The first two use only torch's stable ABI and no Python;
``autograd`` fits only the torch and the Python it is built with, and both are in its file's name.
``TORCH_CUDA_ARCH_LIST`` says for which GPUs. torch must be importable: ``pip install --no-build-isolation .``.
The folder kernels/ is installed as the package dqn_fused.kernels.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, __version__, setup

if int(__version__.split(".")[0]) < 77:  # pip looks at build-system.requires in an isolated build only
    raise SystemExit(f"dqn_fused: expected setuptools 77 or later, got {__version__}; pip install --upgrade setuptools")

from setuptools.command.bdist_wheel import bdist_wheel

SOURCES = {
    "cpu": [
        f"csrc/cpu/{name}.cpp"
        for name in (
            "td_loss",
            "forward",
            "backward",
            "rows",
            "distributions",
            "categorical",
            "categorical_ops",
            "atoms",
            "quantile",
            "quantile_ops",
            "pairs",
        )
    ],
    "cuda": ["csrc/cuda/td_loss.cu"],
    "autograd": ["csrc/autograd/nodes.cpp", "csrc/autograd/module.cpp"],  # which include the others
}
HEADERS = sorted(str(path) for suffix in ("h", "cuh") for path in Path("csrc").rglob(f"*.{suffix}"))
HEADERS += sorted(str(path) for path in Path("csrc/autograd").glob("*.cpp"))
GPUS = ("8.0", "8.6", "9.0", "10.0", "12.0")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10 and every later one
RETRY = "pip install --no-build-isolation . tries again"


class CannotBuildError(Exception):
    """A library cannot be compiled here; the message says why."""


def leave_out(which: str, reason: object, then: str = RETRY) -> None:
    """Go on without a library, unless it was asked for by name."""
    line = f"dqn_fused: the {which} library is left out: {reason}; {then}"
    if which in MODE.split(",") or which == MODE:
        raise SystemExit(line)
    print(line, file=sys.stderr)


def cuda_home(torch: Any) -> str:
    """Root of the toolkit, whose nvcc must be of torch's CUDA major version."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if nvcc is None:
        raise CannotBuildError("no nvcc")
    # Asked of nvcc itself: it may be a link or a script on the PATH.
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    dry_run = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    release, top = re.search(r"release (\d+)", answer), re.search(r"TOP=(\S+)", dry_run)
    if release is None or top is None:
        raise CannotBuildError(f"{nvcc} does not answer as nvcc does")
    if torch.version.cuda is None and MODE != "cuda":
        raise CannotBuildError("this torch has no CUDA")
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != release[1]:
        raise CannotBuildError(f"nvcc is of CUDA {release[1]} and torch of CUDA {torch.version.cuda}")
    return os.path.normpath(top[1])


def default_gpus(home: str) -> str:
    """GPUs that this nvcc knows, and PTX for later ones."""
    known = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return ";".join(gpu for gpu in GPUS if f"sm_{gpu.replace('.', '')}" in known) + "+PTX"


def library(which: str, torch: Any) -> Extension:
    """Build description of dqn_fused._C_<which>: for a device a plain library on LibTorch's stable ABI."""
    root = Path(torch.__file__).parent
    if which == "autograd":
        return Extension(
            "dqn_fused._C_autograd",
            SOURCES[which],
            depends=HEADERS,
            include_dirs=[str(root / "include"), str(root / "include/torch/csrc/api/include")],
            libraries=["torch_python", "torch_cpu", "torch", "c10"],
            library_dirs=[str(root / "lib")],
            extra_compile_args={"cxx": ["-O3", "-g0", "-fvisibility=hidden"]},
        )
    # Without c10: it exports parts of std::, which the library would take from it, and which differ between versions.
    include, libraries, link = [str(root / "include")], ["torch_cpu"], [str(root / "lib")]
    if which == "cuda":
        from torch.utils import cpp_extension

        home = cuda_home(torch)
        cpp_extension.CUDA_HOME = home  # a torch without CUDA does not look for it
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_gpus(home))
        include.append(f"{home}/include")
        libraries.append("cudart")
        if torch.version.cuda:  # beside a torch without CUDA the library still compiles, and cannot load
            libraries.append("torch_cuda")
        link += [str(Path(home, folder)) for folder in ("lib64", "lib") if Path(home, folder).is_dir()]
    return Extension(
        f"dqn_fused._C_{which}",
        SOURCES[which],
        depends=HEADERS,
        include_dirs=include,
        libraries=libraries,
        library_dirs=link,
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-fwrapv", "-fvisibility=hidden", STABLE_ABI],
            "nvcc": ["-O3", "-DUSE_CUDA", STABLE_ABI],
        },
    )


def libraries() -> tuple[list[Extension], dict[str, Any]]:
    """Libraries to try and the command that builds them."""
    wanted = {"auto": list(SOURCES), "0": []}.get(MODE, MODE.split(","))
    if not set(wanted) <= SOURCES.keys():
        raise SystemExit(f"DQN_FUSED_BUILD: expected auto, 0, or one or more of {', '.join(SOURCES)}, got {MODE!r}")
    if not wanted or DESCRIBED:
        return [], {}
    if sys.platform == "win32" or (sys.platform == "darwin" and MODE == "auto"):
        then = "the torch backend serves" if sys.platform == "win32" else "DQN_FUSED_BUILD=cpu tries it"
        leave_out("compiled" if MODE == "auto" else MODE, "it is tested on Linux only", then)
        return [], {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except Exception as error:  # of many types: torch missing, its libraries, or those it does not agree with
        leave_out(MODE if MODE != "auto" else "compiled", f"torch cannot be imported here ({error})")
        return [], {}
    extensions = []
    for which in wanted:
        try:
            extensions.append(library(which, torch))
        except (CannotBuildError, OSError, subprocess.SubprocessError) as error:
            leave_out(which, error)

    class BuildLibraries(BuildExtension):
        """Leaves out what does not compile: with ninja, Extension(optional=True) does not."""

        extensions: list[Extension]

        def get_ext_filename(self, ext_name: str) -> str:
            name = str(super().get_ext_filename(ext_name))
            if not ext_name.endswith("_C_autograd"):
                return name
            return name.removesuffix(".so") + f".{sys.implementation.cache_tag}.torch-{torch.__version__}.so"

        def build_extensions(self) -> None:
            built: list[Extension] = []
            for ext in list(self.extensions):
                self.extensions = [ext]
                library = Path(self.get_ext_fullpath(ext.name))
                library.unlink(missing_ok=True)
                try:
                    super().build_extensions()
                    built.append(ext)
                except Exception as error:  # of many types; the compiler's own words are above
                    leave_out(ext.name.removeprefix("dqn_fused._C_"), f"it does not compile ({error})")
            self.extensions = built
            self.distribution.ext_modules = built

    return extensions, {"build_ext": BuildLibraries.with_options(no_python_abi_suffix=True)}


class Wheel(bdist_wheel):
    """Tagged by what is in it: only the autograd library knows Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return super().get_tag()
        built = [ext.name for ext in self.distribution.ext_modules or ()]
        if "dqn_fused._C_autograd" in built:
            return super().get_tag()
        return ("py3", "none", super().get_tag()[2] if built else "any")


MODE = os.environ.get("DQN_FUSED_BUILD", "auto").lower()
# pip asks for requirements and metadata before it builds, each in a process of its own; torch takes 2 s to import.
DESCRIBED = not {"egg_info", "dist_info"}.isdisjoint(sys.argv)
EXTENSIONS, COMMANDS = libraries()

setup(
    packages=["dqn_fused", "dqn_fused._backends", "dqn_fused.head", "dqn_fused.kernels"],
    package_dir={"dqn_fused": "dqn_fused", "dqn_fused.kernels": "kernels"},
    package_data={"dqn_fused": ["py.typed"]},
    ext_modules=EXTENSIONS,
    cmdclass={"bdist_wheel": Wheel, **COMMANDS},
)
