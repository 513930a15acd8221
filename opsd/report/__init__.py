"""report.html and curves.png of a run, written from the files that the run left on disk.

`write_report` writes both. Other pages take their charts and markup from `charts` and `markup`.
"""

from pathlib import Path

from opsd.common.files import write_file
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
    write_file(paths["report"], page(results))
    write_file(paths["curves"], lambda file: write_curves(results, file))
    return paths
