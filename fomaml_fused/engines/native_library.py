"""The native engine's code as a library: compiled for this processor at first use, and kept for later ones."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from .. import kernels

SOURCES = Path(kernels.__path__[0]) / "native"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
CACHE = "FOMAML_FUSED_CACHE"  # the variable that names a folder for what is compiled


@cache
def obstacle() -> str | None:
    """Why there is no library; None where there is one. Compiles it, which takes seconds, once on a machine."""
    try:
        library()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message says how.
        OSError: what it made cannot be loaded.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux":
        raise RuntimeError(f"it is for Linux, and this is {sys.platform}")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler; g++ or clang++ is looked for, and what CXX names")
    path = folder() / f"step-{_fingerprint(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    found = ctypes.CDLL(str(path))
    found.scratch_size.restype = ctypes.c_int64
    found.scratch_size.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    found.run_step.restype = None
    found.run_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p]
    return found


def _fingerprint(compiler: str) -> str:
    """What the library depends on: the sources, the compiler, and the processor that it is for."""
    of = hashlib.sha256(repr((FLAGS, _output(compiler, "--version"), platform.machine(), _processor())).encode())
    for source in sorted(SOURCES.glob("*")):
        of.update(source.read_bytes())
    return of.hexdigest()[:16]


def _processor() -> str:
    """The instructions that it has, as the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def folder() -> Path:
    """A folder of this user's own that can be written to."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE) or Path(home) / "fomaml_fused")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="fomaml_fused-"))


def _compile(compiler: str, path: Path) -> None:
    """Under another name first, so that no process loads half of it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        _output(compiler, *FLAGS, "-o", str(made), str(SOURCES / "step.cpp"))
        made.replace(path)


def _output(*command: str) -> str:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        complaint = next((line for line in found.stderr.splitlines() if "error" in line), found.stderr.strip())
        raise RuntimeError(f"{command[0]} failed with {found.returncode}: {complaint}")
    return found.stdout
