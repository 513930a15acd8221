"""Write report.html and curves.png of a run from the files in its directory.

`write_report` writes both. Other pages use the charts of `charts` and the templates of `render`.
"""

from pathlib import Path

from opsd.common.files import write_file
from opsd.runs.read import read_results


def write_report(run_dir: Path) -> dict[str, Path]:
    """Write `report.html` and `curves.png` into `run_dir` and return their paths by name.

    run_dir: the directory of an `opsd train` run or a quickstart, finished or not. Existing files
    are replaced. Raises UserError if the directory holds no run.
    """
    from opsd.report.curves_png import write_curves
    from opsd.report.page import page

    run_dir = Path(run_dir)
    results = read_results(run_dir)
    paths = {"report": run_dir / "report.html", "curves": run_dir / "curves.png"}
    write_file(paths["report"], page(results))
    write_file(paths["curves"], lambda file: write_curves(results, file))
    return paths
