"""report.html and curves.png of a run, written from the files that the run left on disk."""

from pathlib import Path

from opsd.common.files import part, write_whole
from opsd.runs.read import read_results


def write_report(run_dir: Path) -> dict[str, Path]:
    """Write `report.html` and `curves.png` into `run_dir` and return their paths by name.

    run_dir: an `opsd train` directory or a quickstart directory; the run may still be going on, or
    have been cut off. Existing files are replaced. UserError where the directory holds no run.
    """
    from opsd.report.curves_png import write_curves
    from opsd.report.page import page

    run_dir = Path(run_dir)
    results = read_results(run_dir)
    paths = {"report": run_dir / "report.html", "curves": run_dir / "curves.png"}
    write_whole(paths["report"], page(results))  # a reader never sees half a file
    write_curves(results, part(paths["curves"]))
    part(paths["curves"]).replace(paths["curves"])
    return paths
