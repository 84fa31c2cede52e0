"""What pyproject.toml cannot say: kernels for Linux CPUs are compiled where they can be; squizd is installed anyway."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def _build_module() -> ModuleType:
    """`squizd/kernels/build.py` alone: the package needs what is not installed yet."""
    spec = util.spec_from_file_location("squizd_build", Path(__file__).parent / "squizd" / "kernels" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles by `squizd.kernels.build`; if that fails, one line says why and everything will run through MLX."""

    def build_extension(self, ext: Extension) -> None:
        """Compile one of the two."""
        build = _build_module()
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # of an earlier build in this folder, perhaps for another MLX
        transfers = ext.name.endswith("_transfer")
        try:
            (build.build_transfer if transfers else build.build)(target.parent)
        except (build.BuildError, OSError) as error:
            if not transfers:  # one line is enough; on a GPU without them `squizd run` says so
                self.warn(f"squizd is installed without its kernels: {error}")


# optional: what was not built is not looked for by an editable install either. Elsewhere MLX's own kernels are fast.
names = ("squizd.kernels._transfer", "squizd.kernels._native") if sys.platform == "linux" else ()
kernels = [Extension(name, sources=[], optional=True) for name in names]
setup(ext_modules=kernels, cmdclass={"build_ext": BuildKernels})
