"""Find an installed PyTorch without importing it; printed as ``<directory>;<version>``.

Under build isolation torch is not importable, but pip keeps ``sys.prefix``: the user's own
site-packages is still where ``sysconfig`` says it is.
"""

import importlib.util
import re
import site
import sysconfig
from pathlib import Path


def candidates():
    """Yield directories that may hold torch, the importable one first."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    yield Path(sysconfig.get_path("platlib"), "torch")
    yield Path(site.getusersitepackages(), "torch")


def find_torch():
    """Return (directory, version) of the first torch found, or None."""
    for directory in candidates():
        version_file = directory / "version.py"
        if version_file.is_file():
            match = re.search(r"__version__ = '([^']+)'", version_file.read_text())
            if match:
                return directory, match.group(1)
    return None


if __name__ == "__main__":
    found = find_torch()
    if found:
        print(*found, sep=";")
