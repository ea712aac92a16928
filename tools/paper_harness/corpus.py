"""The corpora: where each comes from, checked by hash, as options of ``TextDataModule``."""

import base64
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from taperlit.data.module import TextDataModule, default_cache
from taperlit.data.sources import python_files
from taperlit.data.tokens import SPLITS
from taperlit.errors import TaperlitError


@dataclass(frozen=True)
class Corpus:
    """Text to train on.

    Args:
        title: on the page.
        val_fraction: share of the documents that is held out.
        hub: name on the hub, or None.
        package: Debian package that ships it, or None.
        sha256: of the file of documents made from the package.
    """

    title: str
    val_fraction: float
    hub: str | None = None
    package: str | None = None
    sha256: str | None = None


CORPORA = {
    "gcide": Corpus(
        "the GNU Collaborative International Dictionary of English (Webster 1913 and WordNet), an entry per document",
        0.006,
        package="dict-gcide=0.48.5+nmu2",
        sha256="b6f088f2a1bea43699028d9f1a19626987bf19347b9727b8e989ffc7df54096c",
    ),
    "foldoc": Corpus(
        "the Free On-line Dictionary of Computing, an entry per document",
        0.03,
        package="dict-foldoc=20230119-1",
        sha256="e4a36c73f04b06046c40e98438f4f7000537be5e412a32b2a364988d3f670750",
    ),
    "tinystories": Corpus("TinyStories", 0.01, hub="roneneldan/TinyStories"),
    "embedded": Corpus("Python's own source, which differs between machines", 0.02),
}
"""``gcide`` and ``foldoc`` want no hub; ``tinystories`` is the paper's; ``embedded`` is there without any network."""
TOKENIZER_BYTES = 1 << 26  # of training text that a tokenizer is made from


def find(name: str) -> Corpus:
    """The corpus of a name.

    Raises:
        TaperlitError: there is none.
    """
    if name not in CORPORA:
        raise TaperlitError(f"there is no corpus {name!r}; choose from {', '.join(CORPORA)}.")
    return CORPORA[name]


def text_options(name: str) -> dict[str, Any]:
    """The options of ``TextDataModule`` that tell which text is read."""
    corpus = find(name)
    return {"hub": corpus.hub, "text_column": "text", "val_fraction": corpus.val_fraction}


def place_options(name: str) -> dict[str, Any]:
    """The options that tell where it lies; what is not in the cache is fetched.

    Raises:
        TaperlitError: it cannot be had.
    """
    path = fetch(name)
    return {} if path is None else {"files": str(path)}


def data_of(name: str, vocab_size: int, **options: Any) -> TextDataModule:
    """A corpus as a run's data."""
    text = {**text_options(name), "vocab_size": vocab_size, "tokenizer_bytes": TOKENIZER_BYTES}
    return TextDataModule(**text, **place_options(name), **options)


def tokens_of(data: TextDataModule) -> dict[str, Any]:
    """Make the tokens, unless they are there, and tell their numbers (``tokens``) and SHA-256 (``sha256``).

    Args:
        data: of a run; ``prepare_data`` is called.
    """
    data.prepare_data()
    path = data.cache_path()
    digest = hashlib.sha256()
    for split in SPLITS:
        with open(path / f"{split}.bin", "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return {"tokens": json.loads((path / "meta.json").read_text())["tokens"], "sha256": digest.hexdigest()}


def fetch(name: str) -> Path | None:
    """The file of a corpus in the cache: a JSON object with its text per line, in the order of their hashes.

    Returns:
        Its path; None of a corpus on the hub.

    Raises:
        TaperlitError: it cannot be had, or is another text than is known.
    """
    corpus = find(name)
    if corpus.hub is not None:
        return None
    source = f"python-{platform.python_version()}" if corpus.package is None else corpus.package.replace("=", "-")
    path = default_cache() / "corpora" / f"{source}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = _python_source() if corpus.package is None else _entries(_download(corpus.package))
        # In any order but the alphabet's, so that the first part is a sample of the whole. ASCII, for it has no line
        # break that another reader might find.
        lines = [json.dumps({"text": text}) + "\n" for text in sorted(set(texts), key=_hash)]
        partly = path.with_suffix(f".{os.getpid()}.partial")
        partly.write_text("".join(lines), encoding="ascii")
        partly.rename(path)
    if corpus.sha256 is not None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != corpus.sha256:
            raise TaperlitError(f"{path} is not the known text (its SHA-256 is {digest}); delete it to fetch it again.")
    return path


def _python_source() -> Iterator[str]:
    for path in python_files():
        yield Path(path).read_text(encoding="utf-8", errors="replace")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _download(package: str) -> bytes:
    """A Debian package's bytes; it is not installed."""
    if shutil.which("apt-get") is None:
        raise TaperlitError(f"there is no apt-get to fetch {package} with; choose --corpus tinystories or embedded.")
    print(f"fetching the Debian package {package}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["apt-get", "download", "-q", package]
        got = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).glob("*.deb"))
        if got.returncode or len(files) != 1:
            reason = " ".join((got.stderr or got.stdout).split())[-200:]
            mend = "run apt-get update, or choose --corpus tinystories or embedded."
            raise TaperlitError(f"{package} cannot be fetched ({reason}); {mend}")
        return files[0].read_bytes()


def _entries(package: bytes) -> Iterator[str]:
    """The texts of a dictionary in dictd's format, a compressed file and an index of places in it."""
    with tarfile.open(fileobj=io.BytesIO(_data_of(package))) as archive:
        members = {Path(m.name).suffix: m for m in archive if m.isfile() and "/dictd/" in m.name}
        data, index = (cast(IO[bytes], archive.extractfile(members[kind])).read() for kind in (".dz", ".index"))
    text = gzip.decompress(data)
    for line in index.decode().splitlines():
        headword, start, length = line.split("\t")[:3]
        if not headword.startswith("00-database"):  # about the dictionary
            yield text[_number(start) : _number(start) + _number(length)].decode("utf-8", "replace").strip()


def _data_of(package: bytes) -> bytes:
    """The member ``data.tar.*`` of a Debian package, which is an ``ar`` archive: headers of 60 bytes, even places."""
    at = 8
    while at < len(package):
        name, size = package[at : at + 16].decode().strip(" /"), int(package[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise TaperlitError("the Debian package has no data.")


def _number(word: str) -> int:
    """dictd writes numbers in the digits of base64."""
    digits = "A" * (-len(word) % 4) + word
    return int.from_bytes(base64.b64decode(digits), "big")
