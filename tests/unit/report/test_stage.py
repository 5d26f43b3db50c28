"""stage: the page, its figures and the card are written, whole or not at all, with the charts' extra or without it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from fullrank.errors import UsageError
from fullrank.report import html
from fullrank.report.stage import stage
from fullrank.run import Run, verify_manifest

MakeRun = Callable[..., Run]


def test_everything_is_written(make_run: MakeRun) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    run = make_run()
    (run.report / "figures").mkdir(parents=True)
    (run.report / "figures" / "stale.png").write_bytes(b"old")
    path = stage(run)
    assert path == run.report / "index.html"
    assert path.read_text(encoding="utf-8").count("<svg") == 6
    assert sorted(file.name for file in (run.report / "figures").iterdir()) == [
        "changed.png",
        "gradient_norm.png",
        "learning_rate.png",
        "loss.png",
        "scores.png",
        "speed.png",
    ]
    assert (run.model / "README.md").read_text(encoding="utf-8").startswith("---\nbase_model:")
    assert verify_manifest(run.model) is None
    assert '"README.md"' in (run.model / "MANIFEST.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["altair", "vl_convert"])
def test_without_charts_the_page_says_how_to_get_them(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    text = stage(make_run()).read_text(encoding="utf-8")
    assert "<svg" not in text and "No charts here" in text and "pip install &#39;fullrank[report]&#39;" in text
    assert "F1 rose from 0.15 to 0.96" in text


def test_without_an_export_no_model_folder_appears(make_run: MakeRun) -> None:
    run = make_run(only_training=True)
    assert stage(run).is_file()
    assert not run.model.exists()


def test_a_failure_leaves_the_old_report_standing(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(only_training=True)
    before = stage(run).read_bytes()

    def fail(*_: object) -> str:
        raise RuntimeError

    monkeypatch.setattr(html, "render", fail)
    with pytest.raises(RuntimeError):
        stage(run)
    assert (run.report / "index.html").read_bytes() == before
    assert sorted(path.name for path in run.root.iterdir() if "report" in path.name) == ["report"]


def test_nothing_to_report_names_the_stage_to_run(tmp_path: object) -> None:
    with pytest.raises(UsageError, match="fullrank train"):
        stage(Run(f"{tmp_path}/nothing"))
