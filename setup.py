"""Builds the optional kernels with squizd/kernels/build.py; everything else is in pyproject.toml.

A machine without a compiler installs all the same: squizd then computes through MLX and says so.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        spec = importlib.util.spec_from_file_location("squizd_kernels_build", "squizd/kernels/build.py")
        assert spec is not None
        assert spec.loader is not None
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        try:
            recipe.build(Path(self.get_ext_fullpath(ext.name)).parent)
        except recipe.BuildError as error:
            print(f"squizd: installing without kernels: {error}", file=sys.stderr)


kernels = [Extension("squizd.kernels._native", [], optional=True)] if sys.platform == "linux" else []
setup(ext_modules=kernels, cmdclass={"build_ext": BuildKernels})
