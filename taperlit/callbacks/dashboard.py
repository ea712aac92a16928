"""TensorBoard's dashboard of a tapered run: which traces stand on one chart, and the gains as histograms."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Layout = dict[str, dict[str, tuple[str, list[str]]]]  # category -> chart -> its kind and regular expressions of tags

PREFIX = "(?:.*-)?"  # what a logger may put before every tag: TensorBoardLogger(prefix=...)
TRACES = {
    # Lightning's users write train/loss or train_loss, and self.log adds where it was logged.
    "Losses": {"training and validation": r"(?:train|val|valid|validation)[/_]loss(?:_step|_epoch)?$"},
    "Taper": {"gate": "taper/gate$", "c of every norm": "taper/alignment/"},
    "Scales at the norms' inputs, over their mean": {
        "largest of all": "taper/scale_max$",
        "largest": "taper/scale_max/",
        "99.9th percentile": "taper/scale_p999/",
    },
    "Pre-logit residual": {
        "RMS": "taper/pre_logit_rms$",
        "logit norm": "taper/logit_norm$",
        "radial gradient": "taper/radial_gradient$",
    },
}
GRADIENTS = "Gradient norms by weight type"
BINS = 64  # of equal width; torch's own are wide by 10%, which is two of them for gains between 0.9 and 1.1


def layout(tags: Iterable[str]) -> Layout:
    """The charts of a run that logs these tags, for ``SummaryWriter.add_custom_scalars``.

    TensorBoard shows the charts of several runs as one dashboard, and those that are the same in all of them once. So
    each is told by one regular expression that does not depend on the model's depth: one for every ``c``, one for the
    weights of each part of the model (``blocks.attn``: its four projections). A chart that would stay empty is left
    out, but for the losses: others than these tags' logger log them.

    Args:
        tags: as the loggers get them.
    """
    tags = list(tags)
    charts: Layout = {}
    for category, patterns in TRACES.items():
        for title, pattern in patterns.items():
            if category == "Losses" or any(re.match(pattern, tag) for tag in tags):
                charts.setdefault(category, {})[title] = ("Multiline", [PREFIX + pattern])
    weights = [tag.removeprefix("grad_norm/").split(".") for tag in tags if tag.startswith("grad_norm/")]
    for part in dict.fromkeys(".".join(path[:-2]) for path in weights):
        charts.setdefault(GRADIENTS, {})[part or "outermost"] = ("Multiline", [PREFIX + _gradients_of(part)])
    return charts


def _gradients_of(part: str) -> str:
    """The pattern of the gradient norms in a part's own layers; the outermost part has weights of its own too."""
    return f"grad_norm/{re.escape(part + '.')}[^.]+[.][^.]+$" if part else "grad_norm/(?:[^.]+[.])?[^.]+$"


def writers(trainer: L.Trainer) -> "list[SummaryWriter]":
    """What TensorBoard's loggers write with, which takes more than scalars; none but on rank 0."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def add_gains(writer: "SummaryWriter", gains: dict[str, Tensor], step: int) -> None:
    """Draw each norm's gains, (d,) by name, as a histogram ``gain/<norm>``; not finite, they cannot be."""
    for name, gain in gains.items():
        if gain.isfinite().all():
            writer.add_histogram(f"gain/{name}", gain.cpu().numpy(), step, bins=BINS)
