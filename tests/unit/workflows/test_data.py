"""The data of a recipe by themselves: what is found is returned, what is asked wrongly is told, labels come back as given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from staging import leftovers, write_case
from tiny import chat_rows, write_jsonl

from fullrank.cli.options import loaded
from fullrank.data.labelstudio import Applied
from fullrank.errors import DataError, DataRefused, FullrankError, UsageError
from fullrank.plan import speed
from fullrank.run import read_json_lines
from fullrank.workflows import data as workflow
from fullrank.workflows.stages import run_until

KEY = "AKIAIOSFODNN7EXAMPLX"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure", lambda *arguments, **options: None)


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    return write_case(tmp_path, tiny_model_folder("llama"))


@pytest.fixture
def flawed(case: Path) -> Path:
    """Training data with a secret on line 3, and a test set whose first record is line 5 of it."""
    rows = chat_rows(12)
    rows[2]["messages"][-1]["content"] += f" and the key is {KEY}"
    write_jsonl(case.parent / "train.jsonl", rows)
    write_jsonl(case.parent / "test.jsonl", [rows[4], {"prompt": "which way is up", "completion": "this one"}])
    document = json.loads(case.read_text(encoding="utf-8"))
    document["data"]["test"] = {"unseen": "test.jsonl"}
    case.write_text(json.dumps(document), encoding="utf-8")
    return case


def prepare(case: Path, *overrides: str) -> workflow.Prepared:
    runs = case.parent / "runs"
    return workflow.prepare(loaded(str(case), list(overrides), runs), runs)


def show(case: Path, *overrides: str, **asked: Any) -> list[Any]:
    runs = case.parent / "runs"
    options: dict[str, Any] = {"split": "train", "examples": [], "record": None, "count": 3, **asked}
    return workflow.show(loaded(str(case), list(overrides), runs), runs, None, **options)


def flag(case: Path, out: Path, *kinds: str) -> int:
    runs = case.parent / "runs"
    return workflow.flag(loaded(str(case), [], runs), runs, None, kinds=kinds, out=out)


# ---- preparing ------------------------------------------------------------------------------------------------------


def test_good_data_are_not_refused(case: Path) -> None:
    prepared = prepare(case)
    assert prepared.refusal is None
    said = prepared.as_json()
    assert (said["read"], said["used"], said["quarantined"], said["refused"]) == (20, 20, 0, None)
    assert said["run"] == str(case.parent / "runs" / "tiny")


def test_what_is_wrong_is_written_first_and_returned(flawed: Path) -> None:
    prepared = prepare(flawed)
    assert isinstance(prepared.refusal, DataRefused)
    findings = {finding["kind"]: finding for finding in prepared.as_json()["findings"] if finding["severity"] == "error"}
    assert set(findings) == {"secret", "leak"}
    train = str(flawed.parent / "train.jsonl")
    assert [(place["path"], place["line"], place["split"]) for place in findings["secret"]["records"]] == [(train, 3, "train")]
    assert {(Path(place["path"]).name, place["line"]) for place in findings["leak"]["records"]} == {
        ("train.jsonl", 5),
        ("test.jsonl", 1),
    }
    assert all(finding["advice"] for finding in findings.values())
    assert "secret" in prepared.refusal.message and f"{train}:3" in prepared.refusal.message
    assert "data.audit.accept=[" in prepared.refusal.hint
    assert {path.name for path in prepared.run.data.iterdir()} >= {
        "card.json",
        "audit.json",
        "quarantine.jsonl",
        "shown.jsonl",
        "terms.json",
        "train",
        "validation",
        "tests",
        "shards",
    }
    assert leftovers(flawed.parent) == []


def test_counts_are_over_all_splits(flawed: Path) -> None:
    (flawed.parent / "test.jsonl").write_text('{"text": "x"}\n' + json.dumps(chat_rows(9)[8]) + "\n", encoding="utf-8")
    with (flawed.parent / "validation.jsonl").open("a", encoding="utf-8") as file:
        file.write("{\n")
    said = prepare(flawed).as_json()
    assert (said["read"], said["used"], said["quarantined"]) == (12 + 5 + 2, 12 + 4 + 1, 2)
    said = prepare(flawed, "data.validation.ratio=0.25", "name=share").as_json()
    assert (said["read"], said["used"], said["quarantined"]) == (12 + 2, 12 + 1, 1)


@pytest.mark.parametrize("stage", ["plan", "train"])
def test_errors_stop_every_stage_until_they_are_accepted_by_name(flawed: Path, stage: str) -> None:
    runs = flawed.parent / "runs"

    def go(*overrides: str) -> None:
        run_until(stage, loaded(str(flawed), list(overrides), runs), runs)  # type: ignore[arg-type]

    for accepted, left in (("", ["leak", "secret"]), ("leak", ["secret"]), ("secret", ["leak"])):
        with pytest.raises(DataRefused, match="the audit of the data found errors") as caught:
            go(f"data.audit.accept=[{accepted}]")
        assert [kind for kind in ("leak", "secret") if f"{kind}: " in caught.value.message] == left
        assert not any((runs / "tiny" / name).exists() for name in ("plan.json", "train", "model"))
        # What the hint says to type must be enough, whatever was accepted before.
        named = caught.value.hint.rpartition("data.audit.accept=[")[2].rstrip("]").split(",")
        assert sorted(named) == ["leak", "secret"]
    if stage == "plan":
        go("data.audit.accept=[leak, secret]")
        assert (runs / "tiny" / "plan.json").exists()


def test_skipping_or_masking_mends_as_well(flawed: Path) -> None:
    assert prepare(flawed, "data.audit.skip=[leak]", "data.audit.mask=[secret]").refusal is None


def test_an_unknown_kind_is_no_kind(flawed: Path) -> None:
    with pytest.raises(FullrankError, match="accept"):
        prepare(flawed, "data.audit.accept=[leeks]")


def test_a_test_set_may_not_be_named_as_a_split(flawed: Path) -> None:
    """Findings name records by their split."""
    for name in ("train", "validation"):
        with pytest.raises(FullrankError, match="cannot be the name of a test set"):
            prepare(flawed, f"data.test={{{name}: test.jsonl}}")


def test_files_that_cannot_be_used_at_all_are_raised(case: Path) -> None:
    (case.parent / "train.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl: holds no records"):
        prepare(case)
    assert leftovers(case.parent) == []


# ---- looking --------------------------------------------------------------------------------------------------------


def test_examples_are_shown_by_number_line_and_place(case: Path) -> None:
    train = case.parent / "train.jsonl"
    for asked in ({"examples": [6]}, {"record": "7"}, {"record": "train.jsonl:7"}, {"record": f"{train}:7"}):
        (example,) = show(case, **asked)
        assert (example.example, example.origin) == (6, f"{train}:7"), asked
    assert [example.example for example in show(case, examples=[5, 2])] == [5, 2]
    (example,) = show(case, split="validation", record="2")
    assert example.origin == f"{case.parent / 'validation.jsonl'}:2"


def test_telling_examples_are_shown_when_none_is_asked_for(case: Path) -> None:
    shown = show(case)
    assert len(shown) == 3 and len({example.example for example in shown}) == 3
    lengths = [example.tokens for example in show(case, count=100)]
    assert max(lengths) == prepare(case).card.train.lengths.longest and min(lengths) == prepare(case).card.train.lengths.shortest


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"split": "test"}, "there is no split 'test' to show; allowed: train, validation"),
        ({"record": "train.jsonl"}, "a record is named by its line, or by file:line"),
        ({"record": "train.jsonl:"}, "a record is named by its line, or by file:line"),
        ({"record": "99"}, "no example of train was made from it"),
        ({"record": "other.jsonl:1"}, "no example of train was made from it"),
        ({"examples": [16]}, "train has no example 16: there are 16, counted from 0"),
    ],
)
def test_what_is_not_there_is_told(case: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        show(case, **asked)


def test_a_wrong_split_is_told_before_anything_is_prepared(case: Path) -> None:
    with pytest.raises(UsageError, match="there is no split"):
        show(case, split="tests")
    assert not (case.parent / "runs" / "tiny" / "data").exists()


def test_a_rejected_record_has_no_example(case: Path) -> None:
    with (case.parent / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "who"}\n')
    assert prepare(case).refusal is not None
    with pytest.raises(UsageError, match="no example of train was made from it") as caught:
        show(case, record="17")
    assert "quarantine.jsonl" in caught.value.hint
    (example,) = show(case, record="3")  # refused data can be looked at
    assert example.example == 2


def test_a_record_is_found_by_what_it_is_called(case: Path) -> None:
    """Where a file has no lines, origins say `record 3`, and what is shown may be asked for again."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"prompt": [f"the sky {n}" for n in range(4)], "completion": ["blue"] * 4})
    parquet.write_table(table, case.parent / "rows.parquet")
    (example,) = show(case, "data.train=rows.parquet", examples=[2])
    assert example.origin == f"{case.parent / 'rows.parquet'}:record 3"
    for name in (example.origin, "rows.parquet:record 3", "rows.parquet:3", "3", "record 3"):
        assert show(case, "data.train=rows.parquet", record=name) == [example], name


def test_a_run_is_looked_at_by_its_name(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(case)
    monkeypatch.chdir(case.parent)
    runs = Path("runs")
    (example,) = workflow.show(loaded("tiny", None, runs), runs, None, split="train", examples=[1], record=None, count=3)
    assert example.example == 1


def test_a_repeated_record_is_shown_once(case: Path) -> None:
    write_jsonl(case.parent / "few.jsonl", [{"prompt": "the sky", "completion": "blue"}])
    mixed = "data.train=[{path: train.jsonl, weight: 1}, {path: few.jsonl, weight: 1, repeat: 3}]"
    (example,) = show(case, mixed, record="few.jsonl:1")
    assert example.origin == f"{case.parent / 'few.jsonl'}:1"


# ---- labelling ------------------------------------------------------------------------------------------------------


def annotated(tasks: list[dict[str, Any]], *decisions: dict[str, str]) -> list[dict[str, Any]]:
    """An export as Label Studio writes it: each task with one annotation."""
    exported = []
    for number, (task, decision) in enumerate(zip(tasks, decisions, strict=True), start=1):
        result = []
        for name, value in decision.items():
            is_choice = name == "decision"
            result.append(
                {
                    "id": f"r{number}-{name}",
                    "from_name": name,
                    "to_name": "messages",
                    "type": "choices" if is_choice else "textarea",
                    "value": {"choices": [value]} if is_choice else {"text": [value]},
                }
            )
        annotation = {"id": 100 + number, "was_cancelled": False, "updated_at": "2026-01-02T03:04:05Z", "result": result}
        exported.append({"id": number, "annotations": [annotation], "data": task["data"], "meta": task["meta"]})
    return exported


def tasks_of(case: Path, *kinds: str) -> list[dict[str, Any]]:
    count = flag(case, case.parent / "tasks.json", *kinds)
    tasks: list[dict[str, Any]] = json.loads((case.parent / "tasks.json").read_text(encoding="utf-8"))
    assert len(tasks) == count and (case.parent / "tasks.xml").read_text(encoding="utf-8").startswith("<View>")
    return tasks


def test_flagged_records_are_those_that_findings_name(flawed: Path) -> None:
    errors = tasks_of(flawed, "secret", "leak")
    named = {(Path(task["data"]["path"]).name, task["data"]["line"]): task["data"] for task in errors}
    assert set(named) == {("train.jsonl", 3), ("train.jsonl", 5), ("test.jsonl", 1)}
    assert named["train.jsonl", 3]["kinds"] == "secret" and named["train.jsonl", 3]["severity"] == "error"
    assert KEY in named["train.jsonl", 3]["answer"]
    everything = {(task["data"]["path"], task["data"]["line"]) for task in tasks_of(flawed)}
    said = {(place.path, place.line) for finding in prepare(flawed).audit.findings for place in finding.records}
    assert everything == said


def test_no_finding_is_of_that_kind(flawed: Path) -> None:
    with pytest.raises(UsageError, match=r"no finding is of kind 'mojibake'; found: .*leak, .*secret"):
        flag(flawed, flawed.parent / "tasks.json", "secret", "mojibake")
    assert not (flawed.parent / "tasks.json").exists()


def test_labels_come_back(flawed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of two files, into each of them by its short name, and the new data are not refused."""
    folder = flawed.parent
    tasks = tasks_of(flawed, "secret", "leak")
    decisions = {
        ("train.jsonl", 3): {"decision": "fix", "corrected_answer": "the borrower is 3", "corrected_prompt": ""},
        ("train.jsonl", 5): {"decision": "drop"},
        ("test.jsonl", 1): {"decision": "keep"},
    }
    made = [decisions[Path(task["data"]["path"]).name, task["data"]["line"]] for task in tasks]
    for task, decision in zip(tasks, made, strict=True):
        if "corrected_prompt" in decision:
            decision["corrected_prompt"] = task["data"]["prompt"]  # the box opens with it and is sent unchanged
    exported = folder / "export.json"
    exported.write_text(json.dumps(annotated(tasks, *made)), encoding="utf-8")
    before = {name: (folder / name).read_bytes() for name in ("train.jsonl", "test.jsonl")}
    monkeypatch.chdir(folder)
    done = workflow.relabel(Path("train.jsonl"), Path("export.json"), Path("new/train.jsonl"))
    assert done == Applied(untouched=10, kept=0, dropped=1, fixed=1)
    assert workflow.relabel(Path("test.jsonl"), exported, folder / "new" / "test.jsonl") == Applied(1, 1, 0, 0)
    assert {name: (folder / name).read_bytes() for name in before} == before
    old, new = (folder / "train.jsonl").read_bytes().splitlines(), (folder / "new" / "train.jsonl").read_bytes().splitlines()
    assert [*new[:2], *new[3:]] == [*old[:2], old[3], *old[5:]]
    assert json.loads(new[2])["messages"][-1]["content"] == "the borrower is 3"
    assert prepare(flawed, "data.train=new/train.jsonl", "name=mended").refusal is None


def test_an_export_about_other_files_changes_nothing(flawed: Path) -> None:
    tasks = tasks_of(flawed, "secret")
    exported = flawed.parent / "export.json"
    exported.write_text(json.dumps(annotated(tasks, {"decision": "drop"})), encoding="utf-8")
    with pytest.raises(DataError, match=r"export\.json"):
        workflow.relabel(flawed.parent / "validation.jsonl", exported, flawed.parent / "new.jsonl")
    assert not (flawed.parent / "new.jsonl").exists()


def test_a_record_that_has_changed_is_not_relabelled(flawed: Path) -> None:
    tasks = tasks_of(flawed, "secret")
    exported = flawed.parent / "export.json"
    exported.write_text(json.dumps(annotated(tasks, {"decision": "drop"})), encoding="utf-8")
    path = flawed.parent / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(KEY.encode(), b"gone"))
    with pytest.raises(DataError, match=r"train\.jsonl:3: the record of task 1 is not there, or has changed since"):
        workflow.relabel(path, exported, flawed.parent / "new.jsonl")
    assert not (flawed.parent / "new.jsonl").exists()


def test_flagging_from_compressed_and_one_line_files(flawed: Path) -> None:
    rows = [json.loads(line) for line in (flawed.parent / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    (flawed.parent / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    document = json.loads(flawed.read_text(encoding="utf-8"))
    document["data"]["train"] = "train.json"
    flawed.write_text(json.dumps(document), encoding="utf-8")
    tasks = tasks_of(flawed, "secret")
    assert any(KEY in task["data"]["answer"] for task in tasks)
    assert all(task["data"]["path"].endswith("train.json") for task in tasks)


def test_the_run_keeps_its_quarantine(case: Path) -> None:
    with (case.parent / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "who"}\n')
    prepared = prepare(case)
    (row,) = read_json_lines(prepared.run.data / "quarantine.jsonl")
    assert (row["path"], row["line"], row["split"]) == (str(case.parent / "train.jsonl"), 17, "train")
