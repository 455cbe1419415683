"""Installs the libraries of `make bench`'s peers, at the pins of peers.txt: beside torch here, and JAX for itself.

Of learn2learn, which does not build on today's Python, the modules of its algorithms that are plain Python are
unpacked from its source archive as they are, under an `__init__` that imports no more than them.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

PINS = Path(__file__).with_name("peers.txt")
PACKAGES = ("higher", "torchopt", "optree", "graphviz")  # without what they ask for: an older torch, in part
MODULES = (
    "_version.py",
    "algorithms/base_learner.py",
    "algorithms/maml.py",
    "algorithms/meta_sgd.py",
    "utils/__init__.py",
)
INITS = {
    "__init__.py": "from . import algorithms\nfrom ._version import __version__\nfrom .utils import *\n",
    "algorithms/__init__.py": "from .maml import MAML, maml_update\nfrom .meta_sgd import MetaSGD, meta_sgd_update\n",
}


def main() -> None:
    pip(sys.executable, "install", "--no-deps", *PACKAGES)
    unpack_learn2learn(Path(sysconfig.get_paths()["purelib"]))
    jax = Path(sys.prefix) / "jax"
    venv.create(jax, with_pip=True)
    pip(str(jax / "bin" / "python"), "install", "jax")


def pip(python: str, command: str, *arguments: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", command, *quiet, "--constraint", str(PINS), *arguments], check=True)


def unpack_learn2learn(site: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip(sys.executable, "download", "--no-deps", "--no-binary", "learn2learn", "--dest", folder, "learn2learn")
        (source,) = Path(folder).glob("learn2learn-*.tar.gz")
        root = source.name.removesuffix(".tar.gz")
        with tarfile.open(source) as archive:
            for module in MODULES:
                found = archive.extractfile(f"{root}/learn2learn/{module}")
                assert found is not None, module
                write(site / "learn2learn" / module, found.read())
    for module, text in INITS.items():
        write(site / "learn2learn" / module, text.encode())


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    main()
