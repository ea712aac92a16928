"""The DataModule: text to blocks, cached on disk, in an order that a checkpoint can return to."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from taperlit.checkpoint.atomic import aside, write_directory
from taperlit.data.loader import BlockSampler, ResumableLoader
from taperlit.data.sources import Piece, describe_files, expand_globs, python_files, read_files, read_hub
from taperlit.data.tokenizer import fingerprint, largest_id, load_tokenizer, train_tokenizer
from taperlit.data.tokens import SPLITS, TokenBlocks, check_tokens, read_meta, split_of, write_tokens
from taperlit.distributed import data_rank, gather
from taperlit.errors import TaperlitError
from taperlit.ranges import require_range, require_seed

CACHE_FORMAT = 2
CHECKED_ALWAYS = 1 << 28  # bytes of tokens, a fraction of a second; where a run goes on, any number is checked


def default_cache() -> Path:
    """``$TAPERLIT_CACHE``, or ``taperlit`` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TAPERLIT_CACHE") or f"{base}/taperlit").expanduser()


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process prepares the cache; the system gives a dead one's lock back."""
    name = aside(path, "lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            rank_zero_info(f"Waiting for another process that prepares the token cache {path}.")
            lock.acquire()
    except OSError as error:
        raise TaperlitError(f"{path} cannot be written: {error.strerror or error}.") from error
    try:
        yield
    finally:
        name.unlink(missing_ok=True)  # who waits for it looks for the cache next
        lock.release()


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise TaperlitError(f"The token cache {path} is damaged ({error}); delete it.") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> TaperlitError:
    return TaperlitError(
        f"The token cache {error.filename or path} cannot be read: {error.strerror}; give yourself the right to, or "
        "name another data.cache_dir."
    )


def _divisors_around(blocks: int, processes: int) -> list[int]:
    """The number of processes if it divides the blocks, else the nearest below and above, up to twice as many."""
    below = next(n for n in range(processes, 0, -1) if blocks % n == 0)
    above = [n for n in range(processes, min(blocks, 2 * processes) + 1) if blocks % n == 0]
    return sorted({below, *above[:1]})


class TextDataModule(L.LightningDataModule):
    """Documents from local files, the hub or (the default) Python's standard library, as packed blocks of tokens.

    ``files`` wins over ``hub``. A document goes to the validation split by its hash. The tokens are made once and
    cached under a key of everything they depend on; they are memory-mapped, so the corpus may exceed memory. A hub data
    set that is streamed leaves only its tokens on disk.

    Each document is followed by the end-of-text token. Where a document's own text has that token's name
    (``<|endoftext|>``), as between the stories of a single file, it is that token too; such a file is still one
    document, and on one side of the split.

    Args:
        files: globs of local files: ``.jsonl`` (also ``.zst``, ``.gz``) and ``.parquet`` hold a document a row, any
            other file is a document.
        hub: name of a data set on the hub.
        hub_config: its configuration.
        hub_split: its split to read.
        streaming: read it as a stream, and do not download it first.
        text_column: the column of a row that is the text.
        python_packages: with no ``files`` and no ``hub``: the installed packages' source too.
        tokenizer: a ``tokenizer.json`` or a name on the hub; None trains one.
        vocab_size: of a trained tokenizer.
        tokenizer_bytes: training text it sees, in bytes.
        block_size: tokens predicted a block.
        batch_size: blocks a batch, on one device.
        val_fraction: share of the documents held out for ``validate``, ``test`` and ``predict``.
        max_documents: read no more than these.
        max_tokens: stop reading after the document with which the training split has this many.
        seed: of the training order.
        num_workers: processes that read blocks.
        cache_dir: where tokens are cached; None is :func:`default_cache`.

    Raises:
        TaperlitError: an argument out of its range; in ``prepare_data``, no documents, or files that cannot be read.
    """

    def __init__(
        self,
        files: str | list[str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        hub_split: str = "train",
        streaming: bool = True,
        text_column: str = "text",
        python_packages: bool = False,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        tokenizer_bytes: int = 1 << 26,
        block_size: int = 512,
        batch_size: int = 16,
        val_fraction: float = 0.01,
        max_documents: int | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        require_range("data.vocab_size", vocab_size, least=1)
        require_range("data.tokenizer_bytes", tokenizer_bytes, least=1)
        require_range("data.block_size", block_size, least=1)
        require_range("data.batch_size", batch_size, least=1)
        require_range("data.val_fraction", val_fraction, above=0, below=1)
        require_range("data.max_documents", max_documents, least=1)
        require_range("data.max_tokens", max_tokens, least=1)
        require_seed("data.seed", seed)
        require_range("data.num_workers", num_workers, least=0)
        self.save_hyperparameters(logger=False)
        self.block_size = block_size
        self.tokenizer_json: str | None = None
        self._blocks: dict[str, TokenBlocks] = {}
        self._meta: dict[str, Any] = {}

    @property
    def vocab_size(self) -> int:
        """What all token ids are below, once ``setup`` has run: the tokenizer's size, or more if its ids have gaps."""
        tokenizer = self.tokenizer
        return max(tokenizer.get_vocab_size(), largest_id(tokenizer) + 1)

    @property
    def largest_token(self) -> int:
        """The largest id in the data, which is read whole, once ``setup`` has run; -1 where there is none."""
        return max(int(blocks.tokens.max(initial=0)) if len(blocks.tokens) else -1 for blocks in self._blocks.values())

    @property
    def in_words(self) -> str:
        """How much there is, in a line, once ``setup`` has run."""
        tokens = self._meta["tokens"]
        return (
            f"{self._source_name()}: {tokens['train']:,} tokens to train on, {tokens['val']:,} held out; "
            f"blocks of {self.block_size}, {self.tokenizer.get_vocab_size():,} different tokens"
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, once ``setup`` has run."""
        return Tokenizer.from_str(cast(str, self.tokenizer_json))

    def _files(self) -> list[str]:
        if self.hparams.files is not None:
            return expand_globs(self.hparams.files)
        return python_files(self.hparams.python_packages)

    def _documents(self) -> Iterator[Piece]:
        h = self.hparams
        if h.files is None and h.hub is not None:
            pieces = read_hub(h.hub, h.hub_config, h.hub_split, h.streaming, h.text_column)
        else:
            pieces = read_files(self._files(), h.text_column)
        documents = 0
        for piece in pieces:
            if h.max_documents is not None and documents >= h.max_documents:
                return
            yield piece
            documents += piece.last

    def _training_text(self) -> Iterator[str]:
        size = 0
        for piece in self._documents():
            if split_of(piece.document, self.hparams.val_fraction) == "train":
                yield piece.text
                size += len(piece.text.encode())
                if size >= self.hparams.tokenizer_bytes:
                    return

    def cache_path(self) -> Path:
        """Where the tokens of this source, tokenizer and split are, or will be."""
        h = self.hparams
        if h.files is None and h.hub is not None:
            source: Any = [h.hub, h.hub_config, h.hub_split, h.text_column]
            if (folder := Path(h.hub)).exists():  # load_dataset reads one too, whatever is in it now
                files = sorted(str(path) for path in folder.resolve().rglob("*") if path.is_file())
                source.append(describe_files(files))
        else:
            source = [describe_files(self._files()), h.text_column]
        if h.tokenizer is None:
            tokenizer: Any = [h.vocab_size, h.tokenizer_bytes]
        else:
            tokenizer = fingerprint(load_tokenizer(h.tokenizer).to_str())
        # The text tells it from caches of when tokens were counted by the batch; those without a limit stay valid.
        limit = None if h.max_tokens is None else f"{h.max_tokens} by the document"
        key = json.dumps([CACHE_FORMAT, source, tokenizer, h.val_fraction, h.max_documents, limit])
        root = default_cache() if h.cache_dir is None else Path(h.cache_dir).expanduser()
        return root / hashlib.sha256(key.encode()).hexdigest()[:24]

    def prepare_data(self) -> None:
        """Train or load the tokenizer and write the tokens, unless they are cached; compare them with their checksums.

        Of several runs that want the same tokens at once, one prepares them. A cache of over 256 MiB is compared only
        where a run goes on from a checkpoint, once that is loaded.

        Raises:
            TaperlitError: no documents, files that cannot be read or written, or a damaged cache.
        """
        path = self.cache_path()
        if not _is_there(path):
            with _one_at_a_time(path):
                if not _is_there(path):
                    write_directory(path, self._fill)
        with _damage_told(path):
            check_tokens(path, at_most=CHECKED_ALWAYS)

    def _fill(self, directory: Path) -> None:
        h = self.hparams
        if next(self._training_text(), None) is None:
            raise TaperlitError(f"{self._source_name()}: no documents to train on; every one is empty or held out.")
        if h.tokenizer is None:
            tokenizer = train_tokenizer(self._training_text(), h.vocab_size)
        else:
            tokenizer = load_tokenizer(h.tokenizer)
        (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
        write_tokens(directory, self._documents(), tokenizer, h.val_fraction, h.max_tokens)

    def _source_name(self) -> str:
        h = self.hparams
        return f"data.files {h.files}" if h.files is not None else f"data.hub {h.hub}" if h.hub else "Python's source"

    def setup(self, stage: str) -> None:
        """Map the tokens.

        Raises:
            TaperlitError: a damaged cache, or too few tokens to validate one block or, in a fit, to train one batch.
        """
        path = self.cache_path()
        with _damage_told(path):
            self._meta = read_meta(path)
            self.tokenizer_json = (path / "tokenizer.json").read_text()
            for split in SPLITS:
                self._blocks[split] = TokenBlocks(path / f"{split}.bin", self._meta["dtype"], self.block_size)
        if not len(self._blocks["val"]):
            raise TaperlitError(
                f"The validation split has {self._meta['tokens']['val']} tokens, less than one block of "
                f"{self.block_size}; raise data.val_fraction, lower data.block_size or add text."
            )
        _, world_size = data_rank(self.trainer)
        if stage == "fit" and len(self._blocks["train"]) < self.hparams.batch_size * world_size:
            raise TaperlitError(
                f"The training split has {len(self._blocks['train'])} blocks of {self.block_size} tokens, less than "
                f"one batch of {self.hparams.batch_size * world_size}; lower data.batch_size or data.block_size, or "
                "add text."
            )

    def _sampler(self, split: str, train: bool) -> BlockSampler:
        rank, world_size = data_rank(self.trainer)
        return BlockSampler(self._blocks[split], self.hparams.batch_size, rank, world_size, self.hparams.seed, train)

    @property
    def _workers(self) -> dict[str, Any]:
        workers = self.hparams.num_workers
        return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}

    def _loader(self, split: str, train: bool) -> ResumableLoader:
        return ResumableLoader(self._blocks[split], self._sampler(split, train), **self._workers)

    def train_dataloader(self) -> ResumableLoader:
        """Training blocks, shuffled.

        Raises:
            TaperlitError: Lightning is to take the same few each time, for which it needs a loader of torch's own.
        """
        if self.trainer is not None and self.trainer.overfit_batches:
            raise TaperlitError("trainer.overfit_batches is not for this data; set trainer.limit_train_batches.")
        return self._loader("train", train=True)

    def val_dataloader(self) -> ResumableLoader:
        """Held-out blocks, each once."""
        return self._loader("val", train=False)

    def test_dataloader(self) -> ResumableLoader:
        """The same held-out blocks."""
        return self._loader("val", train=False)

    def predict_dataloader(self) -> DataLoader:
        """The same held-out blocks; Lightning rebuilds this loader around indices, which only torch's own allows."""
        sampler = self._sampler("val", train=False)
        return DataLoader(self._blocks["val"], batch_size=self.hparams.batch_size, sampler=sampler, **self._workers)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to be used alone (tokenizer, a few held-out blocks), and to be resumed rightly."""
        blocks = self._blocks["val"]
        return {
            "tokenizer": self.tokenizer_json,
            "corpus": self._meta["corpus"],
            **self._fixed(),
            "global_batch": self.hparams.batch_size * data_rank(self.trainer)[1],
            "sample": torch.stack([blocks[i] for i in itertools.islice(range(len(blocks)), 4)]).int(),
        }

    def _fixed(self) -> dict[str, Any]:
        """What the order of the blocks depends on, and the split, by the option's name."""
        return {"seed": self.hparams.seed, "val_fraction": self.hparams.val_fraction, "block_size": self.block_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint goes with this data.

        Raises:
            TaperlitError: another tokenizer; or, to go on training, another corpus, split, length of blocks, seed or
                global batch.
        """
        own, other = fingerprint(cast(str, self.tokenizer_json)), fingerprint(state_dict["tokenizer"])
        if own != other:
            raise TaperlitError(
                f"The checkpoint's tokenizer ({other[:12]}) is not the data's ({own[:12]}); set data.tokenizer to "
                "the tokenizer.json beside the checkpoint's run."
            )
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        if state_dict["corpus"] != self._meta["corpus"]:
            raise TaperlitError("The checkpoint's run had other training data; resume it with the same data options.")
        for name, mine in self._fixed().items():
            if (theirs := state_dict.get(name, mine)) != mine:  # older checkpoints do not have all
                raise TaperlitError(f"The checkpoint's run had data.{name} {theirs}, not {mine}; resume it with that.")
        processes = data_rank(self.trainer)[1]
        if state_dict["global_batch"] != self.hparams.batch_size * processes:
            # Lightning counts batches, so its place in the data would be another block.
            blocks = state_dict["global_batch"]
            ways = " or ".join(f"{blocks // n} on {n}" for n in _divisors_around(blocks, processes))
            raise TaperlitError(
                f"The checkpoint's run had {blocks} blocks a batch over all processes; resume it with data.batch_size "
                f"{ways}."
            )
        self._check_large_files()

    def _check_large_files(self) -> None:
        """Compare what ``prepare_data`` left at its size, on the first process of each machine, for all of them."""
        path, found = self.cache_path(), None
        if self.trainer.local_rank == 0:
            try:
                with _damage_told(path):
                    check_tokens(path, more_than=CHECKED_ALWAYS)
            except TaperlitError as error:
                found = str(error)
        if told := next((each for each in gather(found) if each is not None), None):
            raise TaperlitError(told)
