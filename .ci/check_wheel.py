"""Run inside a fresh environment that holds only the wheel and its core dependencies."""

import sys
from importlib import metadata, resources
from pathlib import Path

import pagedtq
from pagedtq.backends import kernel_source

installed = {dist.name.lower() for dist in metadata.distributions()}
surplus = installed - {"pagedtq", "numpy", "msgspec", "pip", "setuptools"}
if surplus:
    sys.exit(f"the core dependencies pulled in {', '.join(sorted(surplus))}")

package = Path(pagedtq.__file__).parent
if Path(sys.prefix) not in package.parents:
    sys.exit(f"imported {package}, not the installed wheel")
if metadata.version("pagedtq") != pagedtq.__version__:
    sys.exit(f"metadata says {metadata.version('pagedtq')}, the package {pagedtq.__version__}")
if not resources.files("pagedtq").joinpath("py.typed").is_file():
    sys.exit("py.typed is missing")

files = kernel_source.read_kernels()
if kernel_source.kernel_folder().parent != package or not files:
    sys.exit(f"no kernels inside the wheel, found {kernel_source.kernel_folder()}")
print(f"wheel ok: pagedtq {pagedtq.__version__}, {len(files)} kernel files")
