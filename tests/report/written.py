"""Runs as loggers leave them, written without training, and a page read back."""

import json
from html.parser import HTMLParser
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from torch.utils.tensorboard import SummaryWriter

from taperlit.report.markup import el, html
from taperlit.schedule import gate_at

STEPS, WARMUP, END = 40, 10, 25
CONFIG = f"""\
seed_everything: 7
trainer: {{max_steps: {STEPS}, accumulate_grad_batches: 2, callbacks: []}}
model: {{preset: small_1m, taper: internal, lr: 0.002}}
data: {{files: text.txt, batch_size: 4, block_size: 32}}
taper:
  gate: {{class_path: taperlit.GateSchedule, init_args: {{warmup: 0.25, end: {END}}}}}
  monitor: {{class_path: taperlit.TaperMonitor}}
"""


def a_taper(shift: float = 0.0) -> dict[str, list[tuple[int, float]]]:
    """Made-up traces, exact in float32; validation every 10 steps."""
    steps = range(STEPS)
    traces = {
        "taper/gate": [(k, gate_at(k + 1, WARMUP, END)) for k in steps],
        "taper/pre_logit_rms": [(k, 1 + k / 8) for k in steps],
        "taper/logit_norm": [(k, 64 + k / 4) for k in steps],
        "taper/radial_gradient": [(k, -k / 1024) for k in steps],
        "train/loss": [(k, 8 - k / 16 + shift) for k in steps],
        "train/lr": [(k, k / 4096) for k in steps],
        "val/loss": [(k, 8 - k / 16 + shift) for k in range(9, STEPS, 10)],
        "strange/trace": [(k, k % 3 / 4) for k in steps],
    }
    for block in range(2):
        for part in ("attn_norm", "mlp_norm"):
            scale = 2.0 ** (4 - block)
            traces[f"taper/alignment/model.blocks.{block}.{part}"] = [(k, scale / (1 + k / 32)) for k in steps]
    for part in ("attn.q_proj", "mlp.up_proj", "attn_norm"):
        traces[f"grad_norm/model.blocks.{part}.weight"] = [(k, (k % 7) / 16) for k in steps]
    return traces


def tensorboard_run(folder: Path, traces=None, config: str | None = CONFIG) -> Path:
    """A run's folder with event files."""
    writer = SummaryWriter(folder)
    for tag, points in (a_taper() if traces is None else traces).items():
        for step, value in points:
            writer.add_scalar(tag, value, step)
    writer.close()
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def csv_run(folder: Path, traces=None) -> Path:
    """A run's folder as Lightning's CSVLogger leaves it."""
    logger = CSVLogger(folder.parent, name="", version=folder.name)
    by_step: dict[int, dict[str, float]] = {}
    for tag, points in (a_taper() if traces is None else traces).items():
        for step, value in points:
            by_step.setdefault(step, {})[tag] = value
    for step, values in sorted(by_step.items()):
        logger.log_metrics(values, step)
    logger.save()
    return folder


class Page(HTMLParser):
    """A page read strictly: every element that is opened is closed, in order.

    Args:
        text: of the page.
    """

    VOID = ("meta", "wbr", "br", "link", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []  # (element's name, text)
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.texts.append((self.open[-1][0], data))

    @property
    def charts(self) -> list[dict]:
        """What the script knows of each chart of lines."""
        texts = [text for tag, text in self.texts if tag == "script" and text.startswith("{")]
        return [json.loads(text) for text in texts]

    @property
    def words(self) -> str:
        """All that is to be read, spaces as one."""
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())

    def lines(self, name: str) -> list[list[tuple[int, float]]]:
        """The points of every line of that name, in all charts, as (step counted from 1, value)."""
        series = [each for chart in self.charts for each in chart["series"] if each["name"] == name]
        return [[*zip(each["steps"], each["values"], strict=True)] for each in series]


def parsed(element) -> Page:
    """A part of a page alone."""
    return Page(html(el("div", element)))
