"""Read the scalars of a run's TensorBoard files."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def last_run(directory: Path) -> Path:
    """The newest ``version_N`` of a logger's directory."""
    versions = sorted(directory.glob("version_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    if not versions:
        raise SystemExit(f"{directory} has no runs")
    return versions[-1]
