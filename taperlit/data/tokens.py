"""Documents to two flat files of tokens, and blocks out of them."""

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from taperlit.checkpoint.checksum import CHECKSUMS, checksum, checksum_of
from taperlit.checkpoint.plain import parse_json
from taperlit.data.sources import Piece
from taperlit.data.tokenizer import end_of_text_id, largest_id, parse_tokenizer
from taperlit.fields import mismatch

BATCH_CHARACTERS = 1 << 22
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "tokenizer.json", "meta.json")


class _Counts(TypedDict):
    train: int
    val: int


class Meta(TypedDict):
    """What a cache's ``meta.json`` holds.

    Keys:
        dtype: numpy's name for the tokens.
        tokens: in each split.
        documents: in each split.
        corpus: a hash of all tokens.
        checksums: the CRC-32 of each file, and of this one's other keys.
    """

    dtype: Literal["<u2", "<u4"]
    tokens: _Counts
    documents: _Counts
    corpus: str
    checksums: dict[str, int]


def split_of(document: bytes, val_fraction: float) -> str:
    """``val`` or ``train``, by the document's hash alone: the same on every machine, and for every copy."""
    return "val" if int.from_bytes(document, "big") < val_fraction * 2**64 else "train"


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, list[int]]]:
    for batch in _batches(pieces):
        encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            yield piece, encoding.ids


def write_tokens(
    directory: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, val_fraction: float, max_tokens: int | None
) -> dict:
    """Tokenize documents (in parallel, inside ``tokenizers``) into ``train.bin`` and ``val.bin``, end to end.

    Each document is followed by the end-of-text token. Tokens take two bytes while the vocabulary fits, else four.
    Memory is bounded by the batch, whatever the corpus.

    Args:
        directory: written into, with a ``meta.json``; the tokenizer's ``tokenizer.json`` is there.
        pieces: the documents.
        tokenizer: encodes them.
        val_fraction: share of the documents that goes to ``val.bin``.
        max_tokens: stop after the document with which ``train.bin`` reaches this many; None takes all.

    Returns:
        What ``meta.json`` holds: counts, dtype, a hash of all tokens, and the checksums of all files.
    """
    dtype = np.dtype("<u2" if max(tokenizer.get_vocab_size(), largest_id(tokenizer) + 1) <= 1 << 16 else "<u4")
    end = end_of_text_id(tokenizer)
    hasher = hashlib.blake2b(digest_size=16)
    tokens, documents = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    sums = dict.fromkeys(SPLITS, 0)
    with (
        open(directory / "train.bin", "wb") as train,
        open(directory / "val.bin", "wb") as val,
        tqdm(desc="tokenizing", unit=" tokens", unit_scale=True, leave=False) as bar,
    ):
        files = dict(zip(SPLITS, (train, val), strict=True))
        for piece, encoded in _encoded(pieces, tokenizer):
            split = split_of(piece.document, val_fraction)
            ids = encoded + [end] * piece.last
            data = np.array(ids, dtype=dtype).tobytes()
            hasher.update(data)
            sums[split] = zlib.crc32(data, sums[split])
            files[split].write(data)
            tokens[split] += len(ids)
            documents[split] += piece.last
            bar.update(len(ids))
            if max_tokens is not None and piece.last and tokens["train"] >= max_tokens:
                break
    meta: dict = {"dtype": dtype.str, "tokens": tokens, "documents": documents, "corpus": hasher.hexdigest()}
    own = {f"{split}.bin": value for split, value in sums.items()}
    own["tokenizer.json"] = checksum(directory / "tokenizer.json")
    meta[CHECKSUMS] = {**own, "meta.json": checksum_of(meta)}
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def read_meta(directory: Path) -> dict:
    """What :func:`write_tokens` returned, once the sizes of the token files are known to be those of its counts.

    Raises:
        OSError: a file is missing.
        ValueError: something is not as it was written, named.
    """
    try:
        meta = parse_json((directory / "meta.json").read_bytes().decode("utf-8"))
    except ValueError as error:
        raise ValueError("meta.json is not as it was written") from error
    if (wrong := mismatch(meta, Meta, "it")) is None:
        numbers = [*meta["tokens"].values(), *meta["documents"].values()]
        if min(numbers) < 0:
            wrong = f"it counts {min(numbers)}"
        elif {*meta[CHECKSUMS]} != {*FILES}:
            wrong = "it has the checksums of other files"
        elif meta[CHECKSUMS]["meta.json"] != checksum_of(meta):
            wrong = "its checksum differs"
    if wrong is not None:
        raise ValueError(f"meta.json is not as it was written: {wrong}")
    for split in SPLITS:
        if (directory / f"{split}.bin").stat().st_size != meta["tokens"][split] * np.dtype(meta["dtype"]).itemsize:
            raise ValueError(f"{split}.bin is truncated")
    return meta


def check_tokens(directory: Path, at_most: float = math.inf, more_than: int = -1) -> None:
    """Compare every byte of a cache with its checksum, and every token with its tokenizer's largest id.

    Args:
        directory: that :func:`write_tokens` filled.
        at_most: leave out files of more bytes than this.
        more_than: leave out files of no more bytes than this.

    Raises:
        OSError: a file is missing.
        ValueError: something is not as it was written, named.
    """
    meta = read_meta(directory)
    for name in FILES:
        if name == "meta.json" or not more_than < (directory / name).stat().st_size <= at_most:
            continue
        if checksum(directory / name) != meta[CHECKSUMS][name]:
            raise ValueError(f"{name} is not as it was written")
    limit = largest_id(parse_tokenizer((directory / "tokenizer.json").read_text(encoding="utf-8"), "in it"))
    for split in SPLITS:
        path = directory / f"{split}.bin"
        if max(0, more_than) < path.stat().st_size <= at_most:
            largest = int(np.memmap(path, dtype=meta["dtype"], mode="r").max())
            if largest > limit:
                raise ValueError(f"{path.name} has the token {largest}, and its tokenizer's largest is {limit}")


class TokenBlocks(Dataset):
    """Consecutive blocks of a memory-mapped token file.

    Block ``i`` is tokens ``i * block_size`` to ``(i + 1) * block_size`` inclusive, so every token but the file's first
    is predicted once. Index -1 is padding: all -100.

    Args:
        path: of the file.
        dtype: numpy's name for its tokens.
        block_size: tokens predicted a block.
    """

    def __init__(self, path: Path, dtype: str, block_size: int) -> None:
        self.block_size = block_size
        # An empty file cannot be mapped.
        self.tokens = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.block_size)

    def __getitem__(self, index: int) -> Tensor:
        """(block_size + 1,) int64."""
        if index < 0:
            return torch.full((self.block_size + 1,), -100)
        start = index * self.block_size
        return torch.from_numpy(self.tokens[start : start + self.block_size + 1].astype(np.int64))
