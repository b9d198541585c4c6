"""How the tests of an example import its scripts."""

import importlib
import sys
from pathlib import Path

import pytest


NAMES = {script.stem for script in (Path(__file__).resolve().parents[2] / "examples").glob("*/*.py")}


@pytest.fixture(scope="module")
def scripts(request):
    """Imports a script of the module's `EXAMPLE` by its name; other examples have scripts of the same names."""
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    path = list(sys.path)
    sys.path.insert(0, str(request.module.EXAMPLE))
    yield importlib.import_module
    sys.path[:] = path  # a script may have added the folder of another example
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(kept)
