"""Check the installed library: run with the Python of an environment that has the wheel.

It is the wheel that is imported, nothing that only an extra installs is imported with it, and an
example runs; the program says what it needs. (Started as a file, Python does not look for modules
in the working folder.)
"""

import doctest
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import sysconfig

REQUIREMENTS = importlib.metadata.requires("mtl-jax") or []
EXTRA = {re.split(r"[\s<>=;\[]", r)[0].replace("-", "_") for r in REQUIREMENTS if "extra ==" in r}


class Refuse:
    """An import hook to which what the extras install is not there."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise an error for a package of an extra."""
        if name.partition(".")[0] in EXTRA - {"mtl_jax", "absl_py"}:
            raise ModuleNotFoundError(f"{name} is not a dependency of the library")


sys.meta_path.insert(0, Refuse())  # pyright: ignore[reportArgumentType]

import mtl_jax  # noqa: E402
import mtl_jax._train  # noqa: E402

assert mtl_jax.__version__ == importlib.metadata.version("mtl-jax")
here = pathlib.Path(mtl_jax.__file__).resolve()
assert here.is_relative_to(pathlib.Path(sysconfig.get_path("purelib")).resolve()), here
assert (here.parent / "py.typed").exists()
tested = doctest.testmod(mtl_jax._train)
assert (tested.attempted > 5, tested.failed) == (True, 0), tested

program = pathlib.Path(sys.executable).with_name("mtl-jax")
asked = subprocess.run([program, "list"], capture_output=True, text=True)
assert asked.returncode == 2, asked
assert "pip install 'mtl-jax[compare]'" in asked.stderr, asked
print(f"mtl-jax {mtl_jax.__version__} is installed and works without its extras.")
