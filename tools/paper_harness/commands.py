"""The experiments that are commands of ours, with results of their own: ``finetune`` and ``decode``."""

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from paper_harness import corpus
from taperlit.errors import TaperlitError

ROOT = Path(__file__).resolve().parents[2]
# The least that goes through every part; the numbers mean nothing.
TOY_FINETUNE = ("--steps", "6", "--batch-size", "2", "--block-size", "16", "--val-blocks", "2", "--new-tokens", "4")
TOY_FINETUNE += ("--variants", "internal")
TOY_CONFIG = {"model": {"taper": "internal", "lr": 1e-3}, "trainer": {"gradient_clip_val": 1.0}}
TOY_TOKENS = 100_000
TOY_DECODE = ("--quick=true", "--backend=eager", "--peers=false", "--rounds=1")


def finetune(size: str, out: Path, work: Path) -> None:
    """A pretrained model's norms taken away: ``tools/smollm2``, to ``smollm2.json`` beside ``out``.

    Args:
        size: at ``toy`` a tiny model of random weights is in the pretrained one's place.
        out: folder of the paper's results.
        work: folder of runs under way.

    Raises:
        TaperlitError: it failed; it has told why.
    """
    result = out.parent / "smollm2.json"
    words = ["tools/smollm2_run.py", "--out", str(out.parent.absolute())]
    if size != "toy" or result.exists():
        _once(result, words)
        return
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work.absolute()) as folder:
        model, config = Path(folder, "random-llama"), Path(folder, "config.yaml")
        data = {
            "max_tokens": TOY_TOKENS,
            "val_fraction": 0.2,
            "cache_dir": f"{folder}/tokens",
            **corpus.place_options("embedded"),
        }
        config.write_text(yaml.safe_dump({**TOY_CONFIG, "data": data}))
        _random_llama(model)
        words += ["--gguf", str(model), "--work", f"{folder}/runs", "--config", str(config), *TOY_FINETUNE]
        _once(result, words)


def decode(size: str, out: Path, work: Path) -> None:
    """Tokens per second with and without norms: ``taperlit bench decode``, to ``bench_decode.json`` beside ``out``.

    Args:
        size: at ``toy`` the bench's quick part.
        out: folder of the paper's results.
        work: not used.

    Raises:
        TaperlitError: it failed; it has told why.
    """
    result = out.parent / "bench_decode.json"
    quick = TOY_DECODE if size == "toy" else ()
    _once(result, ["-m", "taperlit", "bench", "decode", "--json", str(result.absolute()), *quick])


COMMANDS: dict[str, Callable[[str, Path, Path], None]] = {"finetune": finetune, "decode": decode}
"""By name; each is done once: its result is not made again while it is there."""


def _once(result: Path, words: Sequence[str]) -> None:
    if result.exists():
        print(f"paper: {result} is there already; delete it to measure it again.", file=sys.stderr)
        return
    result.parent.mkdir(parents=True, exist_ok=True)
    words = [word.removeprefix(f"{ROOT}/") for word in words]  # the result records them, and machines differ
    print("+", shlex.join(["python", *words]), file=sys.stderr, flush=True)
    status = subprocess.run([sys.executable, *words], stdout=sys.stderr, cwd=ROOT).returncode
    if status:
        raise TaperlitError(f"{shlex.join(words[:4])} failed with status {status}, see above.")


def _random_llama(folder: Path) -> None:
    """Write a model of transformers with random weights and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    data = corpus.data_of("embedded", 512, max_tokens=TOY_TOKENS, cache_dir=f"{folder}-tokens")
    data.prepare_data()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (data.cache_path() / "tokenizer.json").rename(folder / "tokenizer.json")
