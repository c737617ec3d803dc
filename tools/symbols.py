"""What a compiled library asks of torch outside its stable ABI, or of Python: python tools/symbols.py LIBRARY [...].

The stable ABI is what torch's own headers declare for the version that csrc/ targets. A library that asks for nothing
else fits that version of torch and every later one, and every Python. Its ELF symbols are read, by nm and readelf.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

TARGET = "0x020a000000000000"  # torch 2.10, as in setup.py
HEADER = "#include <torch/csrc/stable/c/shim.h>\n"  # it includes the ops of torch/csrc/inductor/aoti_torch/c/shim.h
SYSTEM = re.compile(r"@+(GLIBC_|GLIBCXX_|CXXABI_|GCC_|libcudart)")
LIBRARIES = re.compile(r"(libtorch_(cpu|cuda)|libcudart|libstdc\+\+|libm|libgcc_s|libc|ld-linux-[\w-]+)\.so(\.\d+)*")


def run(*command: str, text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def stable_abi(include: Path) -> set[str]:
    """C functions that the headers of the installed torch declare for the target."""
    compiler = os.environ.get("CXX", "c++")
    options = ["-x", "c++", "-E", "-P", "-I", str(include), f"-DTORCH_TARGET_VERSION={TARGET}", "-DUSE_CUDA", "-"]
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", run(compiler, *options, text=HEADER)))


def asked(library: Path) -> list[str]:
    """Symbols that must be found in other libraries, except those of the system's libraries, which have versions."""
    lines = [line.split() for line in run("nm", "-D", "--undefined-only", str(library)).splitlines()]
    return sorted(name for kind, name in lines if kind == "U" and not SYSTEM.search(name))


def needed(library: Path) -> list[str]:
    """Names of the libraries that it is linked with."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", str(library)))


def foreign(library: Path, include: Path) -> list[str]:
    """Symbols and libraries that it asks for, and that some torch from the target on does not have."""
    stable = stable_abi(include)
    symbols = [name for name in asked(library) if name not in stable]
    return symbols + [name for name in needed(library) if not LIBRARIES.fullmatch(name)]


def main() -> None:
    import torch

    include = Path(torch.__file__).parent / "include"
    found = {library: foreign(Path(library), include) for library in sys.argv[1:]}
    for library, names in found.items():
        print(f"{library}: {', '.join(names) or f'{len(asked(Path(library)))} symbols, all of the stable ABI'}")
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
