"""The second campaign: options out of their range. Each is to be refused in one line, with nothing left behind."""

import random
from pathlib import Path

from torture_harness.damage import copy
from torture_harness.runner import Call, Runner
from torture_harness.specimens import OVERRIDES, RUN, Specimens, fit_args
from torture_harness.verdict import Allowed, Outcome, judge

CKPT = f"{RUN}/checkpoints/last.ckpt"
NUMBERS = ("-1", "nan", "inf", "x")
FIT: dict[str, tuple[str, ...]] = {
    "model.lr": NUMBERS,
    "model.betas": ("[2,0.9]", "[-1,0.9]", "[0.9]", "x"),
    "model.weight_decay": NUMBERS,
    "model.warmup": ("-1", "-0.5", "nan", "x"),
    "model.decay_start": ("-1", "-0.5", "nan", "x"),
    "model.min_lr_ratio": ("-1", "2", "nan"),
    "model.chunk_tokens": ("0", "-1", "1.5"),
    "model.taper": ("some", "3"),
    "model.preset": ("gpt9", ""),
    "model.overrides.d_model": ("1000000000", "0", "-16", "2.5", "x"),
    "model.overrides.n_layer": ("1000000000", "0", "1.5"),
    "model.overrides.n_head": ("0", "7", "x"),
    "model.overrides.block_size": ("1000000000000", "0"),
    "model.overrides.norm_eps": ("-1", "nan"),
    "model.overrides.rope_theta": ("0", "inf"),
    "model.overrides.position": ("x",),
    "data.block_size": ("0", "-1", "x", "1000000"),
    "data.batch_size": ("0", "-1", "1000000"),
    "data.val_fraction": ("0", "1", "-1", "nan"),
    "data.seed": ("-1", "x"),
    "data.num_workers": ("-1", "x"),
    "data.vocab_size": ("3", "-1", "1000000"),
    "data.files": ("nothing/*", "[]"),
    "data.tokenizer": ("nothing.json", "corpus", "binary.bin"),
    "data.tokenizer_bytes": ("0", "x"),
    "data.max_tokens": ("-1", "0"),
    "data.max_documents": ("-1", "0"),
    "data.cache_dir": ("binary.bin",),
    "trainer.max_steps": ("-7", "x"),
    "trainer.max_epochs": ("-7",),
    "trainer.gradient_clip_val": ("-1", "nan", "x"),
    "trainer.accumulate_grad_batches": ("0", "-1", "x"),
    "trainer.val_check_interval": ("0", "-1", "x"),
    "trainer.limit_val_batches": ("-1", "x"),
    "trainer.log_every_n_steps": ("-1", "x"),
    "trainer.devices": ("0", "-7", "x"),
    "trainer.accelerator": ("abacus",),
    "trainer.precision": ("7", "x"),
    "trainer.strategy": ("x",),
    "trainer.logger.name": ("../x",),
    "trainer.logger.version": ("../../x",),
    "trainer.logger.sub_dir": ("../../../x",),
    "trainer.logger.save_dir": ("binary.bin",),
    "seed_everything": ("-1", "1000000000000000000000", "x"),
    "ckpt_path": ("nothing.ckpt", "folded", "binary.bin", "corpus", "best"),
    "taper.gate.warmup": ("-1", "x", "9"),
    "taper.gate.end": ("-1", "1", "nan"),
    "taper.monitor.every": ("0", "-1", "x"),
    "taper.anchor.weight": ("-1", "nan"),
    "taper.anchor.fade": ("-1", "1.5", "nan"),
    "taper.ema_rate": ("-1", "2", "nan"),
    "taper.tail.every": ("0",),
    "taper.nothing": ("true",),
    "config": ("nothing.yaml", "binary.bin", "corpus"),
}
EVALUATE = ("", "nothing.ckpt", "folded", "binary.bin", "best")
FOLD = {
    "ckpt": ("", "nothing.ckpt", "folded", "binary.bin", "corpus"),
    "out": ("corpus", "binary.bin/x", "folded"),
    "tied": ("x", "3"),
    "force": ("x", "7"),
    "nothing": ("1",),
}
GENERATE = {
    "model": ("", "nothing", "corpus", "binary.bin"),
    "temperature": ("-1", "nan", "inf", "1e-40", "x"),
    "top_k": ("0", "-1", "1.5", "x"),
    "top_p": ("0", "2", "-1", "nan"),
    "min_p": ("-1", "2", "nan"),
    "repetition_penalty": ("0", "-1", "nan", "inf"),
    "max_new_tokens": ("0", "-1", "x"),
    "batch_size": ("0", "-1", "x"),
    "seed": ("1000000000000000000000000000000", "x"),
    "stop": ("no such token",),
    "stop_tokens": ("-1", "1000000000", "x"),
    "dtype": ("int8", "x"),
    "backend": ("x",),
    "device": ("abacus", "cuda:99", "-1"),
    "prompts": ("nothing.txt", "binary.bin", "corpus"),
    "out": ("binary.bin", "binary.bin/x", "corpus"),
    "config": ("binary.bin", "nothing.yaml"),
}
EXPORT = {
    "model": ("", "nothing", "corpus", "binary.bin"),
    "to": ("x", "3"),
    "dtype": ("int8", "float16"),
    "results": ("nothing.json", "binary.bin", "corpus"),
    "out": ("corpus", "binary.bin/x"),
}
STRESS = {
    "model": ("", "nothing", "corpus", "binary.bin"),
    "device": ("abacus", "cuda:99"),
    "seed": ("x", "1000000000000000000000000000000"),
    "quick": ("x",),
    "json": ("corpus", "binary.bin/x", "no/such/folder.json"),
}
DECODE = {
    "preset": ("x",),
    "batch": ("0", "-1", "x"),
    "prompt": ("0", "-1", "x"),
    "new_tokens": ("1", "0", "x"),
    "dtype": ("int8",),
    "backend": ("x",),
    "rounds": ("0", "-1"),
    "device": ("abacus", "cuda:99"),
    "json": ("corpus", "binary.bin/x"),
    "taper": ("x",),
}
TRAIN = {
    "preset": ("x",),
    "batch": ("0",),
    "block": ("0", "x"),
    "steps": ("0", "-1"),
    "rounds": ("0",),
    "dtype": ("x",),
}
REPORT = {"out": ("binary.bin/x", "corpus"), "new_tokens": ("0", "-1", "x"), "seed": ("x",)}

BASES = {
    "fit": fit_args(2, saves="work/runs"),
    "fold": ["fold", f"--ckpt={CKPT}", "--out=work/out"],
    "generate": ["generate", "--model=folded", "--prompt=def", "--max_new_tokens=2"],
    "export": ["export", "--to=transformers", "--model=folded", "--out=work/out"],
    "stress": ["stress", "--model=folded", "--quick"],
    "report": ["report", RUN, "--samples=false", "--out=work/report.html"],
}


def all_faults() -> list[tuple[str, list[str]]]:
    """Every fault: the command, and all of its arguments."""
    base = BASES["fit"]
    faults = [("fit", [*base, _option(name, value)]) for name, values in FIT.items() for value in values]
    faults += [("fit", [*base, f"--{word}"]) for word in ("model.lr", "no.such.option=1")]
    for command in ("validate", "test", "predict"):
        faults += [(command, [command, *base[1:], f"--ckpt_path={value}"]) for value in EVALUATE]
        faults += [(command, [command, *base[1:]]), (command, [command, "--config", "binary.bin"])]
    generate = BASES["generate"]
    for command, args, options in (
        ("fold", BASES["fold"], FOLD),
        ("generate", generate, GENERATE),
        ("export", BASES["export"], EXPORT),
        ("stress", BASES["stress"], STRESS),
        ("bench decode", ["bench", "decode", "--quick"], DECODE),  # it takes a minute, so that it is not checked
        ("bench train", ["bench", "train", "--quick"], TRAIN),
        ("report", BASES["report"], REPORT),
    ):
        faults += [(command, [*args, f"--{name}={value}"]) for name, values in options.items() for value in values]
    faults += [
        ("fold", ["fold"]),
        ("generate", ["generate", "--model=folded"]),
        ("generate", [*generate[:2], "--prompt="]),
        ("generate", [*generate[:2], "--prompts=corpus/00.txt", "--prompt=\udcff\udcfe"]),
        ("export", ["export", "--model=folded"]),
        ("export", ["export", "--to=transformers", f"--model={RUN}/checkpoints/best.ckpt", "--out=corpus"]),
        ("stress", ["stress"]),
        ("report", ["report"]),
        ("report", ["report", "nothing"]),
        ("report", ["report", "corpus"]),
        ("bench", ["bench"]),
        ("bench", ["bench", "x"]),
        ("bench fold", ["bench", "fold", "--preset=x"]),
        ("bench fold", ["bench", "fold", "--rounds=0"]),
        ("nothing", ["nothing"]),
        ("nothing", ["--nothing"]),
    ]
    return faults


class Faults:
    """Cases by their number: a shuffled list of all faults, from its beginning again where more are wanted.

    Args:
        specimens: that the commands are given.
        runner: of the commands.
        seed: of the order.
    """

    def __init__(self, specimens: Specimens, runner: Runner, seed: int) -> None:
        self.specimens, self.runner = specimens, runner
        self.checked: set[str] = set()
        self.whole = specimens.folder.with_name("whole")
        self.faults = all_faults()
        random.Random(f"{seed}/faults").shuffle(self.faults)

    def kind_of(self, number: int) -> str:
        """The command of a case."""
        return self.faults[number % len(self.faults)][0]

    def run(self, number: int) -> tuple[Outcome, str, str]:
        """One case: its outcome, what shows it, and the options."""
        command, args = self.faults[number % len(self.faults)]
        if not self.whole.exists():
            copy(self.specimens.folder, self.whole)
        self._check_base(command)
        before = _files(self.specimens.folder)
        ended = self.runner.run(Call(args, self.specimens.folder, environment=self.specimens.environment))
        outcome, words = judge(ended, Allowed())
        new = sorted(_files(self.specimens.folder) ^ before)
        if new:
            copy(self.whole, self.specimens.folder)
        if outcome is Outcome.REFUSED and new:
            outcome, words = Outcome.LEFT, f"{new[0][0]} after: {words}"
        shown = args if command not in ("fit", "validate", "test", "predict") else [args[0], "...", args[-1]]
        return outcome, words, f"taperlit {' '.join(shown)}".encode(errors="backslashreplace").decode()

    def _check_base(self, command: str) -> None:
        """See that a command succeeds without the fault: else all of its faults would be refused for another reason.

        Raises:
            RuntimeError: it does not.
        """
        if command not in BASES or command in self.checked:
            return
        self.checked.add(command)
        ended = self.runner.run(Call(BASES[command], self.specimens.folder, environment=self.specimens.environment))
        if ended.status:
            raise RuntimeError(f"{command}: {ended.stderr[-2000:]}")
        copy(self.whole, self.specimens.folder)


def _option(name: str, value: str) -> str:
    """As it is written; a field of the model's shape among all of its fields."""
    dictionary, _, field = name.partition("overrides.")
    if field:
        return f"--{dictionary}overrides={OVERRIDES[:-1]}, {field}: {value}}}"
    return f"--{name}={value}"


def _files(folder: Path) -> set[tuple[str, int, int]]:
    """Every file with its size and the time when it was written; an empty folder holds nothing."""
    return {
        (str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns)
        for path in folder.rglob("*")
        for stat in [path.lstat()]
        if not path.is_dir() and not path.name.endswith(".lock")
    }
