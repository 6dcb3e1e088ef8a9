"""loss.png of a run folder: the training and evaluation loss, and the speed, against steps."""

from __future__ import annotations

from trainer.results.run_folder import RunFolder


def draw_curve(run: RunFolder) -> None:
    """Draw loss.png: training and evaluation loss above, tokens per second below, against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = run.read_metrics()
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained")
    for axes, key, label, style in ((above, "loss", "training loss", "-"),
                                    (above, "eval_loss", "evaluation loss", "o--"),
                                    (below, "tokens_per_second", "tokens/s", "-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    above.set_ylabel("loss (nats per token)")
    above.legend()
    above.set_title(run.path.name)
    below.set_ylabel("tokens/s")
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    scratch = run.curve.with_name("loss.part.png")
    figure.savefig(scratch, dpi=110)
    pyplot.close(figure)
    scratch.replace(run.curve)
