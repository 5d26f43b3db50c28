"""The report stage: gathers a run's records and writes the pages, the figures and the model card.

`report/` is replaced as a whole, so it never holds figures of an older state. Without the `report` extra the page is
written all the same, with tables only and a line that says how to get the charts.
"""

from __future__ import annotations

from pathlib import Path

from fullrank.errors import UsageError
from fullrank.report import card, data_page, html
from fullrank.report.figures import Figure, draw
from fullrank.report.gather import Report, gather
from fullrank.run import Run, new_folder, refresh_manifest, write_text


def stage(run: Run) -> Path:
    """Writes `report/` (`index.html`, `data.html`, `figures/*.png`) and, where there is an export, its `README.md` and manifest.

    Returns:
        the page.

    Raises:
        UsageError: the run has no training record yet, or the folder cannot be written.
        RecipeError: the saved recipe is not there or not valid.
        FitError: the disk is full.
    """
    report = gather(run)
    figures, charts_note = _figures(report)
    with new_folder(run.report) as folder:
        write_text(folder / "index.html", html.render(report, figures, charts_note))
        if report.data_page:
            write_text(folder / "data.html", data_page.render(report.data_page, report.root.name))
        (folder / "figures").mkdir()
        for figure in figures:
            (folder / "figures" / f"{figure.name}.png").write_bytes(figure.png)
    if report.export:
        write_text(run.model / "README.md", card.write(report))
        refresh_manifest(run.model, "README.md")
    return run.report / "index.html"


def _figures(report: Report) -> tuple[list[Figure], str]:
    """The charts, or none and the words to print in their place."""
    try:
        return draw(report), ""
    except UsageError as error:
        return [], f"No charts here: {error.message}; {error.hint}, then make the report again."
