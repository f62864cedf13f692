"""Prints the path of the nvcc that the wheel nvidia-cuda-nvcc installed for this interpreter, or nothing."""

import importlib.util
from pathlib import Path

spec = importlib.util.find_spec("nvidia")  # a namespace package
for root in (spec and spec.submodule_search_locations) or ():
    for toolkit in sorted(Path(root).glob("cu1[3-9]"), reverse=True):
        nvcc, cicc = toolkit / "bin" / "nvcc", toolkit / "nvvm" / "bin" / "cicc"
        if nvcc.is_file() and cicc.is_file():
            print(nvcc)
            raise SystemExit
