"""Loss, learning rate and gradient norm of a run as one picture."""

from pathlib import Path
from typing import Any

from ftray.train.track.jsonl import FILE, read_records


def plot_run(run_dir: Path) -> Path | None:
    """Draw `run_dir/loss.png` from its metrics; None if there is nothing to draw yet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_records(run_dir / FILE)
    panels = [("loss", "loss"), ("learning_rate", "learning rate"), ("grad_norm", "gradient norm")]
    if not any("loss" in record for record in records):
        return None
    figure = Figure(figsize=(12, 3.4))
    # Fixed margins: a layout that measures every label takes as long as drawing.
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.15, top=0.91, wspace=0.3)
    FigureCanvasAgg(figure)
    for axis, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.plot(*_series(records, key), linewidth=1, label="training")
        if key == "loss" and any("eval_loss" in record for record in records):
            axis.plot(*_series(records, "eval_loss"), marker="o", markersize=3, label="validation")
            axis.legend()
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=100)
    return path


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in points], [value for _, value in points]
