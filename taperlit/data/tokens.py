"""Documents to two flat files of tokens, and blocks out of them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from taperlit.data.sources import Piece
from taperlit.data.tokenizer import end_of_text_id

BATCH_CHARACTERS = 1 << 22
SPLITS = ("train", "val")


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


def write_tokens(
    directory: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, val_fraction: float, max_tokens: int | None
) -> dict:
    """Tokenize documents (in parallel, inside ``tokenizers``) into ``train.bin`` and ``val.bin``, end to end.

    Each document is followed by the end-of-text token. Tokens take two bytes while the vocabulary fits, else four.
    Memory is bounded by the batch, whatever the corpus.

    Args:
        directory: written into, with a ``meta.json``.
        pieces: the documents.
        tokenizer: encodes them.
        val_fraction: share of the documents that goes to ``val.bin``.
        max_tokens: stop after the document that reaches this many; None takes all.

    Returns:
        What ``meta.json`` holds: counts, dtype, and a hash of all tokens.
    """
    dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4")
    end = end_of_text_id(tokenizer)
    hasher = hashlib.blake2b(digest_size=16)
    tokens, documents = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    with (
        open(directory / "train.bin", "wb") as train,
        open(directory / "val.bin", "wb") as val,
        tqdm(desc="tokenizing", unit=" tokens", unit_scale=True, leave=False) as bar,
    ):
        files = dict(zip(SPLITS, (train, val), strict=True))
        for batch in _batches(pieces):
            encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
            for piece, encoding in zip(batch, encodings, strict=True):
                split = split_of(piece.document, val_fraction)
                ids = encoding.ids + [end] * piece.last
                data = np.array(ids, dtype=dtype).tobytes()
                hasher.update(data)
                files[split].write(data)
                tokens[split] += len(ids)
                documents[split] += piece.last
                bar.update(len(ids))
            if max_tokens is not None and sum(tokens.values()) >= max_tokens:
                break
    meta = {"dtype": dtype.str, "tokens": tokens, "documents": documents, "corpus": hasher.hexdigest()}
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


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
