"""Real documents without a network: what the machine has, and their embedding as q, k, v."""

import gzip
import hashlib
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# Debian packages whose files are long texts, and the files in them.
INSTALLED_TEXTS = {
    "linux-doc": "usr/share/doc/linux-doc*/html/_sources/**/*.rst.txt",
    "perl-doc": "usr/share/perl/5.*/pod/*.pod",
    "python3-doc": "usr/share/doc/python3*/html/_sources/**/*.txt",
    "anarchism": "usr/share/doc/anarchism/**/*.md.gz",
    "debian-policy": "usr/share/doc/debian-policy/policy.txt.gz",
    "jargon-text": "usr/share/doc/jargon-text/jargon.txt.gz",
}


class TextError(Exception):
    """A document cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    prompt: Bytes at its beginning that are read and not learned.
    """

    name: str
    data: bytes
    prompt: int = 0

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the text, and of where its prompt ends if it has one."""
        end = f"\n{self.prompt}" if self.prompt else ""
        return hashlib.sha256(self.data + end.encode()).hexdigest()


def read_document(path: Path | str) -> Document:
    """The bytes of one file, unpacked if it ends in .gz; TextError if there is nothing to read."""
    path = Path(path)
    if not path.exists():
        raise TextError(f"{path}: no such file")
    if path.is_dir():
        raise TextError(f"{path}: is a directory, expected a text file")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:  # BadGzipFile is an OSError
        raise TextError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not data:
        raise TextError(f"{path}: the file is empty")
    return Document(str(path), data)


def default_document(root: Path | str = "/") -> Document:
    """The longest installed text below `root`, else the source of Python's standard library."""
    found = [document for document in _installed(Path(root)) if document is not None]
    return max(found, key=lambda document: len(document.data)) if found else standard_library()


def standard_library() -> Document:
    """The top-level modules of Python's standard library as one document."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if not files:
        raise TextError(f"{folder}: no Python sources there; name a text with --text")
    return Document(
        f"Python's standard library ({folder}/*.py)", b"".join(f.read_bytes() for f in files)
    )


def embed(
    data: bytes, heads: int, head_dim: int, *, seed: int = 0, width: int = 256
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (1, len(data), heads, head_dim) fp32 of a text: a seeded random layer over its bytes.

    Token t is the RMS-normalised sum of a vector for byte t, one for byte t - 1 and a sinusoidal
    position, so equal bytes at different places differ; q, k, v are three seeded projections of it,
    each with unit variance.

    >>> q, k, v = embed(b"to be or not to be", heads=2, head_dim=8)
    >>> q.shape, bool((q[:, 0] == q[:, 13]).all())
    (torch.Size([1, 18, 2, 8]), False)
    """
    generator = torch.Generator().manual_seed(seed)
    table, previous = torch.randn(2, 256, width, generator=generator)
    project = torch.randn(3, width, heads * head_dim, generator=generator) * width**-0.5

    tokens = torch.tensor(list(data), dtype=torch.long)
    x = table[tokens]
    x[1:] += 0.5 * previous[tokens[:-1]]
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(len(data))[:, None] * frequency
    x += torch.cat([angle.sin(), angle.cos()], dim=1)
    x /= x.square().mean(1, keepdim=True).sqrt()
    q, k, v = ((x @ w).view(1, len(data), heads, head_dim) for w in project)
    return q, k, v


def _installed(root: Path) -> Iterator[Document | None]:
    for pattern in INSTALLED_TEXTS.values():
        files = (f for f in root.glob(pattern) if f.is_file())
        longest = max(files, key=lambda f: f.stat().st_size, default=None)
        if longest is not None:
            try:
                yield read_document(longest)
            except TextError:
                continue
    yield _bible() if root == Path("/") else None


def _bible() -> Document | None:
    """The King James Bible of Debian's bible-kjv, printed by its own tool."""
    tool = shutil.which("bible")
    if tool is None:
        return None
    command = [tool, "-f", "gen1:1-rev22:21"]
    try:
        data = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return Document("bible-kjv", data) if data else None
