"""``taperlit bench``: decoding, training and folding, measured in turns and told as ratios with their spread."""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Literal

from taperlit.cli.options import call
from taperlit.errors import TaperlitError

Dtype = Literal["float32", "bfloat16", "float16"]

_command: str = "taperlit bench"  # as it was typed, for the record


def bench(name: str, args: Sequence[str]) -> None:
    """Run ``bench decode``, ``bench train`` or ``bench fold``.

    Raises:
        TaperlitError: there is no such bench, or as that one.
    """
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, BENCHES))
        print("usage: taperlit bench WHAT [options]\n")
        print("\n".join(f"  {what:<{width}}  {(run.__doc__ or '').splitlines()[0]}" for what, run in BENCHES.items()))
        print("\ntaperlit bench WHAT --help lists the options.")
        if not args:
            raise TaperlitError(f"bench what? Choose {', '.join(BENCHES)}.")
        return
    what, *rest = args
    if what not in BENCHES:
        raise TaperlitError(f"there is no bench {what!r}; choose from {', '.join(BENCHES)}.")
    global _command
    from taperlit.bench.machine import command_line

    _command = command_line(f"{name} {what}", rest)
    call(BENCHES[what], f"{name} {what}", rest)


def bench_decode(
    preset: str | list[str] | None = None,
    batch: int | list[int] | None = None,
    prompt: int | list[int] | None = None,
    new_tokens: int | None = None,
    dtype: Dtype = "float32",
    backend: Literal["eager", "compile"] | list[Literal["eager", "compile"]] | None = None,
    taper: Literal["internal", "all"] = "all",
    rounds: int | None = None,
    seed: int = 0,
    device: str = "auto",
    peers: bool = True,
    quick: bool = False,
    json: str | None = None,
    png: str | None = None,
) -> None:
    """Decode with normalized, explicit and folded norms, and with transformers and onnxruntime.

    All variants have the same weights, take turns in one process and must give the tokens of a forward pass without a
    cache, or the bench fails. A list is given as '[small_1m, small_30m]'.

    Args:
        preset: shapes of the models; by default small_1m and small_30m.
        batch: rows decoded together; by default 1.
        prompt: tokens of each prompt; by default 128.
        new_tokens: decoded after each prompt; by default 64.
        dtype: of weights and activations.
        backend: of our engine; by default eager and compile.
        taper: which norms are tapered and folded: those in the blocks, or all.
        rounds: times that each variant is measured; by default 7.
        seed: of the random weights.
        device: cpu, cuda, or auto for a GPU if there is one.
        peers: measure transformers and onnxruntime too.
        quick: by default one small model and few tokens, so that it ends within a minute.
        json: write the rows, with versions, device, commit and command, to this file.
        png: draw the ratios into this file.

    Raises:
        TaperlitError: no such preset or device, sizes that do not fit, a variant that decodes other tokens, or a file
            that cannot be written.
    """
    import torch

    from taperlit.bench.decode import COLUMNS, Models, Setting, decode_rows
    from taperlit.bench.machine import pick_device, read_bandwidth

    presets = _list(preset, ["small_1m"] if quick else ["small_1m", "small_30m"])
    batches, prompts = _list(batch, [1]), _list(prompt, [16 if quick else 128])
    backends = _list(backend, ["eager", "compile"])
    new_tokens = new_tokens if new_tokens is not None else 17 if quick else 64
    rounds = rounds if rounds is not None else 3 if quick else 7
    _at_least(1, rounds=rounds, batch=min(batches), prompt=min(prompts))
    _at_least(2, new_tokens=new_tokens)
    configs = {name: _config(name, max(prompts) + new_tokens, "--prompt and --new_tokens") for name in presets}
    where = pick_device(device)

    def rows() -> Iterator[dict[str, Any]]:
        for name, config in configs.items():
            models = Models.build(config, taper, seed)
            for kind in backends:
                for size in batches:
                    for length in prompts:
                        setting = Setting(
                            name, size, length, new_tokens, getattr(torch, dtype), kind, where, rounds, bandwidth
                        )
                        yield from decode_rows(models, setting, peers)

    _check(json, png)
    bandwidth = read_bandwidth(where)
    groups = ("preset", "backend", "batch", "prompt", "dtype")
    _report(rows(), COLUMNS, where, json, png, "Decoding against normalized", groups, bandwidth)


def bench_train(
    preset: str | list[str] | None = None,
    batch: int | None = None,
    block: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    backend: Literal["eager", "compile"] | list[Literal["eager", "compile"]] | None = None,
    taper: Literal["internal", "all"] = "all",
    steps: int | None = None,
    rounds: int | None = None,
    device: str = "auto",
    peers: bool = True,
    lightning: bool = True,
    quick: bool = False,
    json: str | None = None,
    png: str | None = None,
) -> None:
    """Train in each phase of the taper, with plain norms, and with transformers.

    A step is a forward and a backward pass and AdamW's; the variants take turns in one process. Peak memory is what one
    step allocates, above weights and moments, and these. The variant lightning is our Trainer with the command line's
    callbacks, at g = 1; its overhead is over the bare loop of the same phase.

    Args:
        preset: shapes of the models; by default small_1m and small_9m.
        batch: blocks per step; by default 8.
        block: tokens per block; by default 256.
        dtype: float32, or bfloat16 for what bf16-mixed does.
        backend: by default eager and compile.
        taper: which norms are tapered: those in the blocks, or all.
        steps: per turn; by default 4.
        rounds: turns of each variant; by default 7.
        device: cpu, cuda, or auto for a GPU if there is one.
        peers: measure transformers too.
        lightning: measure our Trainer too.
        quick: by default one small model, few tokens and eager, so that it ends within a minute.
        json: write the rows, with versions, device, commit and command, to this file.
        png: draw the ratios into this file.

    Raises:
        TaperlitError: no such preset or device, sizes that do not fit, a peer that computes another loss, or a file
            that cannot be written.
    """
    import torch

    from taperlit.bench.machine import pick_device
    from taperlit.bench.train import COLUMNS, Setting, train_rows

    presets = _list(preset, ["small_1m"] if quick else ["small_1m", "small_9m"])
    backends = _list(backend, ["eager"] if quick else ["eager", "compile"])
    batch = batch if batch is not None else 2 if quick else 8
    block = block if block is not None else 64 if quick else 256
    steps = steps if steps is not None else 2 if quick else 4
    rounds = rounds if rounds is not None else 3 if quick else 7
    _at_least(1, batch=batch, block=block, steps=steps, rounds=rounds)
    configs = {name: _config(name, block, "--block") for name in presets}
    where = pick_device(device)

    def rows() -> Iterator[dict[str, Any]]:
        for name, config in configs.items():
            for kind in backends:
                setting = Setting(name, batch, block, getattr(torch, dtype), kind, where, steps, rounds)
                yield from train_rows(config, setting, taper, peers, lightning)

    _check(json, png)
    groups = ("preset", "backend", "batch", "block", "dtype")
    _report(rows(), COLUMNS, where, json, png, "Training against plain norms", groups)


def bench_fold(
    preset: str | list[str] | None = None,
    taper: Literal["internal", "all"] = "all",
    rounds: int | None = None,
    quick: bool = False,
    json: str | None = None,
) -> None:
    """Fold a checkpoint of random weights, in a process of its own: seconds and peak memory.

    Args:
        preset: shapes of the models; by default llama_350m.
        taper: which norms were tapered: those in the blocks, or all.
        rounds: times that each is folded; by default 3.
        quick: by default one small model, once.
        json: write the rows, with versions, device, commit and command, to this file.

    Raises:
        TaperlitError: no such preset, or a file that cannot be written.
    """
    import torch

    from taperlit.bench.fold import COLUMNS, fold_rows

    presets = _list(preset, ["small_1m" if quick else "llama_350m"])
    rounds = rounds if rounds is not None else 1 if quick else 3
    _at_least(1, rounds=rounds)
    for name in presets:
        _config(name, 1, "")
    _check(json, None)
    rows = (row for name in presets for row in fold_rows(name, taper, rounds))
    _report(rows, COLUMNS, torch.device("cpu"), json, None, "", ())


BENCHES: dict[str, Callable[..., None]] = {"decode": bench_decode, "train": bench_train, "fold": bench_fold}


def _list(given: Any, default: list[Any]) -> list[Any]:
    values = default if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if not values:
        raise TaperlitError("an empty list was given, so that there is nothing to measure; leave the option out.")
    return values


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise TaperlitError(f"--{name} must be at least {least}, not {value}.")


def _config(preset: str, tokens: int, options: str) -> Any:
    from taperlit.transformer import TransformerConfig

    config = TransformerConfig.from_preset(preset)
    if tokens > config.block_size:
        raise TaperlitError(
            f"{tokens} tokens are more than the context of {preset}, {config.block_size}; give less with {options}."
        )
    return config


def _check(json: str | None, png: str | None) -> None:
    import_module("taperlit.bench.results").check_paths(json, png)


def _report(
    rows: Iterator[dict[str, Any]],
    columns: dict[str, str],
    device: Any,
    json: str | None,
    png: str | None,
    title: str,
    groups: Sequence[str],
    bandwidth: float | None = None,
) -> None:
    """Measure, print a table, and write what is asked for."""
    from taperlit.bench.machine import about
    from taperlit.bench.results import table, write_json, write_png

    facts = {**about(_command, device), "bandwidth_gb_s": bandwidth}
    measured = list(rows)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version is not None)
    print(table(measured, columns))
    print(f"\n{facts['device']}; {versions}; {facts['commit']}")
    if facts["bandwidth_gb_s"] is not None:
        print(f"memory is read at {facts['bandwidth_gb_s']:.1f} GB/s")
    if json is not None:
        write_json(json, facts, measured)
        print(f"wrote {json}")
    if png is not None:
        write_png(png, title, measured, groups)
        print(f"wrote {png}")
