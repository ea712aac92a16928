"""Which traces stand together on a chart, and how each is drawn."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from taperlit.report.charts import Series
from taperlit.report.traces import Points

PLACE = r"\d+(?:-\d+)?"  # of a layer, or of positions in a block
COLOURS, RAMP, DASHES = 8, 12, 3  # classes of page.css: s0 to s7, r0 to r11, d0 (solid) to d2


class Group(NamedTuple):
    """A chart of traces.

    Args:
        title: above it.
        tags: patterns of the tags that are on it, each matched as a whole; a group in one is the line's name.
        log: take logarithms where values differ enough.
        note: beside the title.
        ramp: colour by depth in the model instead of one by one.
        monitored: TaperMonitor logs them.
    """

    title: str
    tags: tuple[str, ...]
    log: bool = False
    note: str = ""
    ramp: bool = False
    monitored: bool = False


MAIN = (
    Group("loss", ("(train)/loss", "(val)/loss", "(test)/loss"), note="nats per token"),
    Group("gate g", ("taper/(gate)",), monitored=True),
    Group("alignment scalars c", (r"taper/alignment/(.+)",), log=True, ramp=True, monitored=True),
    Group("scales", ("taper/(pre_logit_rms)", "taper/(logit_norm)"), log=True, monitored=True),
    Group("largest scale over the mean", ("taper/(scale_max)",), note="of all norms' inputs", log=True, monitored=True),
    Group(
        "radial gradient", ("taper/(radial_gradient)",), note="of the loss at the pre-logit residual", monitored=True
    ),
    Group("gradient norms by weight type", ("grad_norm/(.+)",), log=True, monitored=True),
    Group("learning rate", ("train/(lr)",)),
    Group("gradient norm of all weights", ("train/(grad_norm)",), log=True),
)
OTHERS = (
    Group("scale loss", ("train/(scale_loss)",), log=True),
    Group("largest scale over the mean, by norm", (r"taper/scale_max/(.+)",), log=True, ramp=True),
    Group("99.9% scale over the mean, by norm", (r"taper/scale_p999/(.+)",), log=True, ramp=True),
    Group("penalty on tails", ("train/(tail_loss)", "train/(tail_loss_random)"), log=True),
    Group("tails of the token losses", ("val/(loss_median)", "val/(loss_p999)", "val/(loss_max)"), note="nats"),
    Group("loss by position", ("val/loss_at/(.+)",), note="validation, nats", ramp=True),
    Group("mean gain", ("taper/gain_mean/(.+)",), log=True, ramp=True),
    Group("spread of the gains", ("taper/gain_std/(.+)",), log=True, ramp=True, note="standard deviation"),
)


def series_of(group: Group, traces: Mapping[str, Points]) -> dict[str, Series]:
    """The lines of a group's chart, by tag, in the order of its patterns and of the traces."""
    found: dict[str, str] = {}
    for pattern in group.tags:
        for tag in traces:
            if match := re.fullmatch(pattern, tag):
                found.setdefault(tag, match[1])
    names = dict(zip(found, _short(found.values()), strict=True))
    looks = _by_depth(names.values()) if group.ramp else _one_by_one(len(names))
    return {
        tag: Series(name, traces[tag], look, dots=tag.startswith(("val/", "test/")))
        for (tag, name), look in zip(names.items(), looks, strict=True)
    }


def rest_of(traces: Mapping[str, Points], used: Iterable[str]) -> list[Group]:
    """A group for each trace that moves and that no other group has; those of one folder share one."""
    seen = {*used}
    left = [tag for tag, points in traces.items() if tag not in seen and len({value for _, value in points}) > 1]
    folders: dict[str, list[str]] = {}
    for tag in left:
        folder = tag.rpartition("/")[0]
        folders.setdefault(folder if folder.count("/") else tag, []).append(tag)
    return [
        Group(folder, tuple(f"({re.escape(tag)})" for tag in tags), ramp=len(tags) > COLOURS)
        for folder, tags in folders.items()
    ]


def _short(names: Iterable[str]) -> list[str]:
    """Names without what most of them begin with (``model.``, ``blocks.``) and without ``.weight``."""
    short = [name.removesuffix(".weight") for name in names]
    while len(short) > 1:
        starts = Counter(name.partition(".")[0] for name in short if "." in name)
        common, count = next(iter(starts.most_common(1)), ("", 0))
        cut = [name.removeprefix(f"{common}.") for name in short]
        if 2 * count <= len(short) or len({*cut}) < len(cut):
            break
        short = cut
    return short


def _one_by_one(count: int) -> list[str]:
    return [f"s{i % COLOURS} d{i // COLOURS % DASHES}" for i in range(count)]


def _by_depth(names: Iterable[str]) -> list[str]:
    """A colour by place in the model, and a dash by what stands there, as far as there are dashes."""
    listed = list(names)
    places = {name: re.search(r"\d+", name) for name in listed}
    depths = list(dict.fromkeys(int(match[0]) if match else name for name, match in places.items()))
    kinds = list(dict.fromkeys(re.sub(PLACE, "", name) for name in listed))
    looks = []
    for i, name in enumerate(listed):
        match = places[name]
        depth, of = depths.index(int(match[0]) if match else name), len(depths)
        kind = kinds.index(re.sub(PLACE, "", name))
        if len(kinds) > DASHES:  # no block like another: count them through
            depth, of, kind = i, len(listed), 0
        looks.append(f"r{depth * (RAMP - 1) // max(1, of - 1)} d{kind}")
    return looks
