"""One run: settings, their hash, ``taperlit fit`` in this process, and the record of what came of it."""

import contextlib
import datetime
import hashlib
import io
import json
import logging
import math
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from traces import last_run, scalars

from paper_harness import corpus, ideas
from paper_harness.sizes import SIZES, Size
from taperlit import LossTails, Trainer
from taperlit.bench import machine
from taperlit.cli.train import TaperlitCLI, build_cli
from taperlit.errors import TaperlitError
from taperlit.transformer import Transformer

FORMAT = 1
RECORDS = 60  # of every trace
WINDOWS = 200  # of the training loss
RANDOM_SEQUENCES, RANDOM_TOKENS = 32, 256
PACKAGES = ("taperlit", "torch", "lightning", "tokenizers")
TRACES = re.compile(r"taper/(gate|pre_logit_rms|logit_norm|radial_gradient)$|grad_norm/|train/(grad_norm|scale_loss)$")
# FiniteGuard's error.
NOT_FINITE = re.compile(
    r"step (?P<step>\d+)(?P<phase>(?: \(.*?, gate (?P<gate>[^)]+)\))?): the (loss|gradient) is not finite"
)

# The paper's own settings (arXiv:2602.10408), spelled out: a default of the package may change, a stored run may not.
PAPER = {"warmup": 0.05, "end": 0.5, "shape": "cosine", "ema_rate": 0.01, "weight": 0.1}
# FakeLN's freezes, in the proportion of its schedule for GPT-2 Small (arXiv:2507.02559): the first of 300 steps is the
# 20th, then 2, 2 and 3 steps from one of 12 blocks to the next. Sigma is its moving average: the one that is measured
# once, before the first step, is of pretrained weights, and from random ones it would be of nothing.
FAKELN = {
    "start": 0.067, "mlp": 0.08, "qk": 0.08, "v": 0.12, "final": None,
    "sigma": "moving", "halves": True, "aux_weight": 0.1,
}  # fmt: skip
# DyT's and Derf's scalar after the embedding at first. The authors' sqrt(d_model) is for widths of 1024 and more; from
# nano's 6.9 neither learns more than how often each token occurs. DyT's validation loss at 2 tokens per parameter, seed
# 0: 5.790 at 6.9 and 20 (at 6.9 with learning rates of 5e-4, 1e-3 and 2e-3 too), 5.328 at 50, 4.868 at 100 and at 300.
EMBEDDING_SCALE = 100.0
# A norm after the embedding would undo that scalar.
NO_EMBED_NORM = ("dyt", "derf")
POLICIES = {
    "baseline": "none",
    "internal": "internal",
    "internal_aux": "internal",
    "all": "all",
    "all_aux": "all",
    "fakeln": "fakeln",
    "dyt": "dyt",
    "derf": "derf",
}
"""``model.taper`` of each variant, as in configs/taper."""


@dataclass(frozen=True)
class Run:
    """One run to do.

    Args:
        size: name in ``SIZES``.
        corpus: name in ``CORPORA``.
        variant: name in ``POLICIES``.
        seed: of the initial weights and the order of the data.
        tokens_per_parameter: how long.
        lr: peak learning rate; None is the size's.
        method: settings in the place of some of ``PAPER``.
        idea: name in ``IDEAS``, or None.
        draw: its number in ``short``, or None; its rivals are of the same draw.
    """

    size: str
    corpus: str
    variant: str
    seed: int
    tokens_per_parameter: float
    lr: float | None = None
    method: dict[str, Any] = field(default_factory=dict)
    idea: str | None = None
    draw: int | None = None

    @property
    def own_idea(self) -> str | None:
        """The idea, as far as it changes this run: of a baseline no more than its model."""
        if self.idea is None or self.variant != "baseline":
            return self.idea
        return ideas.of_the_model(self.idea)

    def settings(self) -> dict[str, Any]:
        """Everything that determines the result; see :func:`hash_of`."""
        size = SIZES[self.size]
        steps, every = size.length(self.tokens_per_parameter)
        lr = size.lr if self.lr is None else self.lr
        config = _config(size, self.corpus, self.variant, self.seed, steps, every, lr, {**PAPER, **self.method})
        more: dict[str, Any] = {} if self.draw is None else {"draw": self.draw}
        if self.variant in NO_EMBED_NORM:
            more["embedding_scale"] = EMBEDDING_SCALE
        if (idea := self.own_idea) is not None:
            more["idea"] = idea
            config = ideas.with_idea(config, idea, tapered=self.variant != "baseline")
        return {
            "format": FORMAT,
            "size": self.size,
            "corpus": self.corpus,
            "corpus_sha256": _sha256(self.corpus, size.shape["vocab_size"]),
            "variant": self.variant,
            "seed": self.seed,
            "tokens_per_parameter": float(self.tokens_per_parameter),
            "steps": steps,
            "lr": lr,
            **more,
            "config": config,
        }


def hash_of(settings: dict[str, Any]) -> str:
    """The name of a run: 16 hexadecimal digits of the SHA-256 of its settings as sorted JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


_HASHES: dict[tuple[str, int], str] = {}  # of corpora that are not known until they are read


def _sha256(name: str, vocab_size: int) -> str:
    """Of a packaged corpus the text's, of others that of the tokens."""
    if (known := corpus.CORPORA[name].sha256) is not None:
        return known
    key = name, vocab_size
    if key not in _HASHES:
        _HASHES[key] = corpus.tokens_of(corpus.data_of(name, vocab_size))["sha256"]
    return _HASHES[key]


def _config(
    size: Size, corpus_name: str, variant: str, seed: int, steps: int, every: int, lr: float, method: dict[str, Any]
) -> dict[str, Any]:
    """What of a ``taperlit fit`` config determines the result: not paths, devices or what only watches."""
    return {
        "seed_everything": seed,
        "model": {
            "preset": "small_1m",  # of which the overrides leave nothing
            "overrides": _shape(size, variant),
            "taper": POLICIES[variant],
            "lr": lr,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "warmup": 0.05,
            "min_lr_ratio": 0.1,
            **({"decay_start": size.decay_start} if size.decay_start else {}),  # a stored run keeps its hash
            "chunk_tokens": 4096,
        },
        "data": {
            **corpus.text_options(corpus_name),
            "vocab_size": size.shape["vocab_size"],
            "tokenizer_bytes": corpus.TOKENIZER_BYTES,
            "block_size": size.shape["block_size"],
            "batch_size": size.batch_size,
            "seed": seed,
        },
        "trainer": {
            "precision": size.precision,
            "max_steps": steps,
            "gradient_clip_val": 1.0,
            "accumulate_grad_batches": 1,
            "val_check_interval": every,
            "check_val_every_n_epoch": None,
            "limit_val_batches": size.val_batches,
        },
        "taper": _callbacks(variant, method),
    }


def _shape(size: Size, variant: str) -> dict[str, Any]:
    """The size's, as far as the variant has it."""
    without = {"embed_norm": False} if variant in NO_EMBED_NORM and "embed_norm" in size.shape else {}
    return {**size.shape, **without}


def _callbacks(variant: str, method: dict[str, Any]) -> dict[str, Any]:
    """The slots of the callbacks that act."""
    if variant == "fakeln":
        return {"fakeln": _spec("FakeLNSchedule", dict(FAKELN))}
    if POLICIES[variant] not in ("internal", "all"):
        return {}
    boundaries = {key: method[key] for key in ("warmup", "end", "shape")}
    rate = method["ema_rate"]
    anchor = {"module": "model.final_norm", "weight": method["weight"], "ema_rate": rate, "kind": None, "skip": 0}
    return {
        "gate": _spec("GateSchedule", {**boundaries, "closed": "refuse"}),
        "alignment": _spec("AlignmentFreeze", {"ema_rate": rate, "fit": "energy", "skip": 0}),
        "anchor": _spec("ScaleAnchor", anchor) if variant.endswith("_aux") else None,
    }


def _spec(name: str, init_args: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": f"taperlit.{name}", "init_args": init_args}


def fit_config(
    settings: dict[str, Any], work: Path, accelerator: str = "auto", compiled: bool = False
) -> dict[str, Any]:
    """The whole config for ``taperlit fit``: the settings', with where it reads and writes and what watches.

    Args:
        settings: of a run.
        work: the run's own folder.
        accelerator: as Lightning names it.
        compiled: with ``torch.compile``.
    """
    config: dict[str, Any] = json.loads(json.dumps(settings["config"]))
    config["model"] |= {"compile": compiled}
    config["data"] |= {**corpus.place_options(settings["corpus"]), "num_workers": 0}
    logger = {"save_dir": str(work), "name": "run"}
    config["trainer"] |= {
        "accelerator": accelerator,
        "devices": 1,
        "default_root_dir": str(work),
        "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        # At every validation: without a score each is the best. Lightning saves a last one only beside a best one.
        "callbacks": [_spec("RunCheckpoint", {"monitor": None}), *_first_scale(settings)],
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    }
    every = math.ceil(settings["steps"] / RECORDS)
    monitor = {"every": every, "residual": "model.final_norm", "logits": "model.head"}
    guard = _spec("FiniteGuard", {"skip": False})
    watching = {"monitor": _spec("TaperMonitor", monitor), "guard": guard, "fold": None, "tails": None}
    config["taper"] = ideas.merged(watching, config["taper"])  # an idea may have the guard act
    if config["taper"].get("anchor"):  # the paper's does not fade; a stored run keeps its hash
        config["taper"]["anchor"]["init_args"].setdefault("fade", None)
    return config


def _first_scale(settings: dict[str, Any]) -> list[dict[str, Any]]:
    scale = settings.get("embedding_scale")
    name = "paper_harness.peers.FirstEmbeddingScale"
    return [] if scale is None else [{"class_path": name, "init_args": {"scale": scale}}]


def record_path(out: Path, name: str) -> Path:
    """Where the record of a run is, or will be."""
    return out / "runs" / f"{name}.json"


def read(path: Path) -> dict[str, Any]:
    """A stored record."""
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def train(
    settings: dict[str, Any], out: Path, work: Path, accelerator: str = "auto", compiled: bool = False
) -> dict[str, Any]:
    """Do a run and write its record; a run that was killed goes on from its last checkpoint.

    Args:
        settings: of the run.
        out: folder of the results; the record goes to ``runs`` in it.
        work: folder of all runs under way; this one's is deleted once its record is written.
        accelerator: as Lightning names it.
        compiled: with ``torch.compile``.

    Returns:
        The record.

    Raises:
        TaperlitError: the run failed, other than by a loss that is not finite, which is a result.
    """
    folder = work / hash_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(fit_config(settings, folder, accelerator, compiled)))
    resumed = any(folder.rglob("last.ckpt"))
    wall, cpu = time.perf_counter(), time.process_time()
    cli, complaint = None, ""
    with _quiet():
        try:
            cli = _fit(path)
        except TaperlitError as error:
            complaint = str(error)
            if NOT_FINITE.match(complaint) is None:
                raise
        logged = {tag: _last_of_each_step(values) for tag, values in scalars(last_run(folder / "run")).items()}
        result = _result(settings, logged, cli, complaint)
    ran = {
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "compiled": compiled,
        "resumed": resumed,  # then the time is that of its last part
        "date": datetime.date.today().isoformat(),
        "machine": machine.name_of(torch.device("cpu") if cli is None else cli.model.device),
        "commit": machine.commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    record = {"settings": settings, "result": result, "ran": ran}
    _write(record_path(out, hash_of(settings)), _dump(record) + "\n")
    shutil.rmtree(folder)
    return record


def _fit(path: Path) -> TaperlitCLI:
    """What ``taperlit fit --config path --ckpt_path last`` does; with what it made."""
    torch.set_float32_matmul_precision("high")
    torch.compiler.reset()  # of the runs before in this process, whose graphs count toward dynamo's limit
    argv, sys.argv = sys.argv, ["taperlit", "fit", "--config", str(path), "--ckpt_path", "last"]
    try:
        return build_cli("fit")
    finally:
        sys.argv = argv


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors are told: of dozens of runs nobody reads what devices there are."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _last_of_each_step(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The values after each step, counted from 1; a run that was killed and went on may have logged some twice."""
    return [(step + 1, value) for step, value in sorted(dict(values).items())]


# ---- the result


def _result(
    settings: dict[str, Any], logged: dict[str, list[tuple[int, float]]], cli: TaperlitCLI | None, complaint: str
) -> dict[str, Any]:
    size = SIZES[settings["size"]]
    val = logged.get("val/loss", [])
    diverged = _diverged(complaint) if cli is None else _lost(val, size.shape["vocab_size"])
    if cli is not None and diverged is not None:
        gates = [gate for step, gate in logged.get("taper/gate", []) if step <= diverged["step"]]
        diverged["gate"] = gates[-1] if gates else None
    result = {
        "parameters": size.parameters,
        "tokens": settings["steps"] * size.tokens_per_step,
        "val": _points(val),
        "train": _windows(logged.get("train/loss", []), settings["steps"]),
        "traces": {tag: _points(values) for tag, values in sorted(logged.items()) if TRACES.match(tag)},
        "tails": None,
        "random": None,
        "diverged": diverged,
    }
    if diverged is None:
        assert cli is not None
        result["tails"] = _tails(cli, settings)
        result["random"] = _on_random_tokens(cli.model.model, size.shape["vocab_size"], size.shape["block_size"])
        end = result["val"][-1] if result["val"] else [0, math.nan]
        if end[0] != settings["steps"] or not math.isclose(end[1], result["tails"]["loss"], rel_tol=1e-4):
            raise TaperlitError(
                f"the last validation, {end}, is not what the trained model gives at step {settings['steps']}, "
                f"{result['tails']['loss']}."
            )
    return result


def _diverged(complaint: str) -> dict[str, Any]:
    """What FiniteGuard says, taken apart."""
    found = NOT_FINITE.match(complaint)
    assert found is not None
    gate = found["gate"]
    why = re.split(r"\. (?:The last good|No) checkpoint", complaint[found.end("phase") + 1 :])[0].strip()
    return {"step": int(found["step"]), "gate": None if gate is None else float(gate), "why": why}


def _lost(val: list[tuple[int, float]], vocab_size: int) -> dict[str, Any] | None:
    """Where the validation losses are lost: one is not finite, or the last is over that of a uniform guess."""
    for step, loss in val:
        if not math.isfinite(loss):
            return {"step": step, "why": "the validation loss is not finite"}
    if val and val[-1][1] > math.log(vocab_size):
        step, loss = val[-1]
        return {"step": step, "why": f"the validation loss ends at {loss:.4g}, over a uniform guess's"}
    return None


def _points(values: list[tuple[int, float]]) -> list[list[float]]:
    """What is finite, to the digits of float32."""
    return [[step, _short(value)] for step, value in values if math.isfinite(value)]


def _short(value: float, digits: int = 7) -> float:
    return float(f"{value:.{digits}g}")


def _windows(values: list[tuple[int, float]], steps: int) -> list[list[float]]:
    """Means over equal windows of steps, at each one's last."""
    width = math.ceil(steps / WINDOWS)
    windows: dict[int, list[float]] = {}
    for step, value in values:
        windows.setdefault((step - 1) // width, []).append(value)
    means = ((min(steps, (index + 1) * width), sum(each) / len(each)) for index, each in windows.items())
    return _points(list(means))


def _tails(cli: TaperlitCLI, settings: dict[str, Any]) -> dict[str, float]:
    """What ``taperlit validate`` reports of the trained model."""
    trainer = Trainer(
        accelerator=cli.config_init["fit"]["trainer"]["accelerator"],
        devices=1,
        precision=settings["config"]["trainer"]["precision"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=settings["config"]["trainer"]["limit_val_batches"],
        callbacks=[LossTails()],
    )
    with contextlib.redirect_stdout(io.StringIO()):  # a table for the reader
        (figures,) = trainer.validate(cli.model, cli.datamodule, verbose=False)
    return {key.removeprefix("val/"): _short(value, 9) for key, value in figures.items()}


@torch.no_grad()
def _on_random_tokens(model: Transformer, vocab_size: int, block_size: int) -> dict[str, float | None]:
    """The pre-logit residual's root mean square per token, and the losses, where nothing is as in the training text.

    Returns:
        ``largest_rms``, ``median_rms``, their ``ratio`` and ``largest_loss``; None where it is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(vocab_size, (RANDOM_SEQUENCES, min(RANDOM_TOKENS, block_size) + 1), generator=generator)
    sizes: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(args[0].float().square().mean(-1).sqrt().flatten().cpu())

    device = next(model.parameters()).device
    handle = model.final_norm.register_forward_pre_hook(watch)
    try:
        losses = [model.token_losses(b[:, :-1], b[:, 1:]).float().max().cpu() for b in blocks.to(device).split(8)]
    finally:
        handle.remove()
    rms = torch.cat(sizes)
    largest, median = rms.max().item(), rms.median().item()
    found = {"largest_rms": largest, "median_rms": median, "ratio": largest / median}
    found["largest_loss"] = torch.stack(losses).max().item()
    return {key: _short(value) if math.isfinite(value) else None for key, value in found.items()}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partly = path.with_suffix(".partial")
    partly.write_text(text)
    partly.rename(path)


def _dump(value: Any, indent: str = "") -> str:
    """JSON with a line per key, and every list on one."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    inner = indent + " "
    lines = [f"{inner}{json.dumps(key)}: {_dump(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
