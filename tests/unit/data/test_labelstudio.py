"""labelstudio: decisions made about flagged records come back to the same records, and to nothing else.

The exports below have the form that Label Studio writes (annotations with results; JSON-MIN made by label-studio-sdk 2.1.2's own
converter from the same annotations), not one that this package made.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fullrank.data import labelstudio
from fullrank.data.labelstudio import Applied, Decision, Row, apply, by_record, from_tasks, record_digest, rows_of, to_tasks
from fullrank.errors import DataError, UsageError
from fullrank.recipe import Source
from fullrank.records import Finding, Place

CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi\r\nthere"},
        {"role": "assistant", "content": "hÃ¼"},
    ]
}
PAIR = {"prompt": "p", "completion": "c", "id": 7}
TEXT = {"text": "doc"}


def place(line: int, path: str = "a.jsonl") -> Place:
    return Place(path=path, line=line, split="train")


def finding(*places: Place, kind: str = "mojibake", **changes: Any) -> Finding:
    facts = {"severity": "warning", "what": f"{kind} found", "count": len(places), "advice": f"Mend the {kind}."}
    return Finding(kind=kind, records=list(places), **{**facts, **changes})


def tasks() -> list[dict[str, Any]]:
    found = [finding(place(2))]
    return to_tasks([(place(2), CHAT, found), (place(5), PAIR, found), (place(7), TEXT, found)])


# ---- out --------------------------------------------------------------------------------------------------------------------


def test_a_task_shows_the_texts_and_what_was_found() -> None:
    both = [finding(place(2)), finding(place(2), kind="leak", severity="error")]
    (task,) = to_tasks([(place(2), CHAT, both)])
    assert task["data"] == {
        "origin": "a.jsonl:2",
        "path": "a.jsonl",
        "line": 2,
        "split": "train",
        "digest": record_digest(CHAT),
        "kinds": "mojibake, leak",
        "severity": "error",
        "findings": "mojibake (warning): mojibake found. Mend the mojibake.\nleak (error): leak found. Mend the leak.",
        "messages": CHAT["messages"],
        "prompt": "hi\r\nthere",
        "answer": "hÃ¼",
    }
    assert task["meta"]["findings"][1] == {
        "kind": "leak",
        "severity": "error",
        "what": "leak found",
        "advice": "Mend the leak.",
    }
    assert json.loads(json.dumps(task)) == task


@pytest.mark.parametrize(
    ("fields", "prompt", "answer"),
    [
        (PAIR, "p", "c"),
        (TEXT, "", "doc"),
        ({"instruction": "i", "input": "x", "output": "o"}, "i", "o"),
        ({"prompt": "p", "chosen": "good", "rejected": "bad"}, "p", "good"),
        ({"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}, "h", "g"),
        ({"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]}, "u", "a"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}, {"role": "assistant", "content": "a"}]},
            "u",
            "a",
        ),
        (
            # the last answer, and what was asked before it
            {
                "messages": [
                    {"role": r, "content": c}
                    for r, c in (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5"))
                ]
            },
            "3",
            "4",
        ),
        ({"messages": None, "prompt": "p", "completion": "c"}, "p", "c"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "", ""),
        ({"number": 3}, "", ""),
    ],
)
def test_the_prompt_and_the_answer_of_every_form(fields: dict[str, Any], prompt: str, answer: str) -> None:
    (task,) = to_tasks([(place(1), fields, [finding(place(1))])])
    assert (task["data"]["prompt"], task["data"]["answer"]) == (prompt, answer)


def test_what_is_no_text_is_shown_too() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    (task,) = to_tasks([(place(1), {"messages": [call], "tools": [{"name": "f"}], "n": 3}, [])])
    assert task["data"]["messages"] == [
        {"role": "assistant", "content": '{"tool_calls": [{"function": {"name": "f"}}]}'},
        {"role": "tools", "content": '[{"name": "f"}]'},
        {"role": "n", "content": "3"},
    ]


def test_findings_are_gathered_by_record() -> None:
    leak, twin = finding(place(9), place(2), kind="leak"), finding(place(2), kind="exact_duplicate")
    assert by_record([leak, twin]) == {place(2): [leak, twin], place(9): [leak]}
    assert list(by_record([leak, twin])) == [place(2), place(9)]


def test_the_interface_shows_what_tasks_hold_and_asks_what_comes_back() -> None:
    view = ElementTree.fromstring(labelstudio.LABELING_CONFIG)
    shown = {value[1:] for tag in view.iter() if (value := tag.get("value", "")).startswith("$")}
    assert shown == {"origin", "findings", "messages", "prompt", "answer"} <= tasks()[0]["data"].keys()
    assert [choice.get("value") for choice in view.iter("Choice")] == ["keep", "drop", "fix"]
    controls = {tag.get("name"): tag for tag in view.iter() if tag.get("toName")}
    assert set(controls) == {"decision", "corrected_prompt", "corrected_answer"}
    assert {tag.get("toName") for tag in controls.values()} == {"messages"}
    # JSON-MIN puts task data and answers side by side: one must not hide the other
    assert not controls.keys() & tasks()[0]["data"].keys()


# ---- back -------------------------------------------------------------------------------------------------------------------


def annotation(number: int, choice: str | None, prompt: Any = None, answer: Any = None, **changes: Any) -> dict[str, Any]:
    def result(name: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
        made = {"id": f"{name}{number}", "from_name": name, "to_name": "messages", "type": kind, "value": value}
        return {**made, "origin": "manual"}

    results = [result("decision", "choices", {"choices": [choice]})] if choice else []
    for name, text in (("corrected_prompt", prompt), ("corrected_answer", answer)):
        if text is not None:
            results.append(result(name, "textarea", {"text": text if isinstance(text, list) else [text]}))
    time = f"2026-01-{number:02}T00:00:00.000000Z"
    facts = {
        "id": number,
        "completed_by": 1,
        "result": results,
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": time,
        "updated_at": time,
        "lead_time": 3.1,
        "result_count": len(results),
        "task": 1,
    }
    return {**facts, **changes}


def export(path: Path, *annotations: list[dict[str, Any]], of: list[dict[str, Any]] | None = None) -> Path:
    """A JSON export: the tasks with their annotations."""
    rows = [
        {**task, "id": number, "annotations": made, "predictions": [], "created_at": "2026-01-01T00:00:00Z", "project": 1}
        for number, (task, made) in enumerate(zip(of or tasks(), annotations, strict=True), start=1)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


#: What label-studio-sdk's converter makes of the annotations in `test_json_and_json_min_say_the_same`, task data left out.
JSON_MIN = [
    {
        "task": 0,
        "id": 1,
        "decision": "fix",
        "corrected_prompt": "hi\nthere",
        "corrected_answer": "hü",
        "annotator": 1,
        "annotation_id": 3,
        "created_at": "2026-01-03T00:00:00.000000Z",
        "updated_at": "2026-01-03T00:00:00.000000Z",
        "lead_time": 3.1,
    },
    {
        "task": 0,
        "id": 1,
        "decision": "keep",
        "annotator": 1,
        "annotation_id": 1,
        "created_at": "2026-01-01T00:00:00.000000Z",
        "updated_at": "2026-01-01T00:00:00.000000Z",
        "lead_time": 3.1,
    },
    {
        "task": 1,
        "id": 2,
        "decision": "drop",
        "annotator": 1,
        "annotation_id": 2,
        "created_at": "2026-01-02T00:00:00.000000Z",
        "updated_at": "2026-01-02T00:00:00.000000Z",
        "lead_time": 3.1,
    },
    {
        "task": 2,
        "id": 3,
        "annotator": None,
        "annotation_id": None,
        "created_at": None,
        "updated_at": None,
        "lead_time": None,
    },
]

FIXED = Decision("a.jsonl", 2, record_digest(CHAT), "fix", None, "hü", 1)
DROPPED = Decision("a.jsonl", 5, record_digest(PAIR), "drop", None, None, 2)


def test_json_and_json_min_say_the_same(tmp_path: Path) -> None:
    full = export(
        tmp_path / "full.json",
        # the latest counts, wherever it stands; the cancelled one does not
        [annotation(3, "fix", "hi\nthere", "hü"), annotation(1, "keep"), annotation(4, "drop", was_cancelled=True)],
        [annotation(2, "drop")],
        [],
    )
    small = tmp_path / "min.json"
    rows = [{**tasks()[row["task"]]["data"], **{k: v for k, v in row.items() if k != "task"}} for row in JSON_MIN]
    small.write_text(json.dumps(rows), encoding="utf-8")
    # the text box turned \r\n into \n, which is no correction of the prompt
    assert list(from_tasks(full)) == list(from_tasks(small)) == [FIXED, DROPPED]


def test_the_latest_is_the_one_changed_last(tmp_path: Path) -> None:
    edited = annotation(1, "drop", updated_at="2026-02-01T00:00:00.000000Z")
    for made in ([edited, annotation(2, "keep")], [annotation(2, "keep"), edited]):
        path = export(tmp_path / "e.json", made, [], [])
        assert [decision.choice for decision in from_tasks(path)] == ["drop"]


def test_a_record_that_was_imported_twice_has_one_decision(tmp_path: Path) -> None:
    twice = [tasks()[0], tasks()[0]]
    path = export(tmp_path / "e.json", [annotation(5, "drop")], [annotation(2, "keep")], of=twice)
    assert [(decision.choice, decision.task) for decision in from_tasks(path)] == [("drop", 1)]


def test_texts_given_with_another_choice_change_nothing(tmp_path: Path) -> None:
    path = export(tmp_path / "e.json", [annotation(1, "keep", "other", "other")], [annotation(2, "drop", "other")], [])
    assert [(d.choice, d.prompt, d.answer) for d in from_tasks(path)] == [("keep", None, None), ("drop", None, None)]


def test_both_texts_can_be_corrected_and_an_answer_emptied(tmp_path: Path) -> None:
    path = export(tmp_path / "e.json", [annotation(1, "fix", "new", "")], [], [])
    assert [(d.prompt, d.answer) for d in from_tasks(path)] == [("new", "")]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (annotation(1, None), "task 1: no choice was made; allowed: keep, drop, fix"),
        (annotation(1, "burn"), "task 1: unknown choice 'burn'"),
        (annotation(1, "fix"), "task 1: `fix` was chosen, but neither prompt nor answer was changed"),
        (annotation(1, "fix", "hi\nthere", "hÃ¼"), "neither prompt nor answer was changed"),
        (annotation(1, "fix", None, ["a", "b"]), "task 1: 2 answers to `corrected_answer`"),
    ],
)
def test_an_answer_that_is_none_is_named_by_its_task(tmp_path: Path, made: dict[str, Any], words: str) -> None:
    path = export(tmp_path / "e.json", [made], [annotation(2, "drop")], [])
    with pytest.raises(DataError, match=f"(?s){path}: .*") as error:
        list(from_tasks(path))
    assert words in error.value.message and "JSON-MIN" in error.value.hint


def test_foreign_tasks_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    foreign = [{"id": n, "data": {"text": "x"}, "annotations": [annotation(1, "keep")]} for n in range(20)]
    path.write_text(json.dumps(foreign))
    with pytest.raises(DataError, match="task 0: it does not say which record") as error:
        list(from_tasks(path))
    assert len(error.value.message.splitlines()) == labelstudio.MOST_PROBLEMS
    for text in ('{"a": 1}', "[1]", "not json", ""):
        path.write_text(text)
        with pytest.raises(DataError, match=str(path)):
            list(from_tasks(path))
    with pytest.raises(DataError, match="nowhere"):
        list(from_tasks(tmp_path / "nowhere.json"))


# ---- carrying out -----------------------------------------------------------------------------------------------------------

LINES = [
    b'\xef\xbb\xbf{"prompt": "one", "completion": "eins"}\n',
    b'  {"completion":"zwei","prompt":"two","score":1e3}  \r\n',
    b"\n",
    b"{broken\n",
    b'{"prompt": "three", "completion": "drei \xc3\xbc"}\n',
    b'{"prompt": "four", "completion": "vier"}',
]


def written(path: Path, lines: Iterable[bytes] = LINES) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def decided(path: Path, line: int, choice: str, prompt: str | None = None, answer: str | None = None) -> Decision:
    fields = json.loads(path.read_bytes().split(b"\n")[line - 1].removeprefix(b"\xef\xbb\xbf"))
    return Decision(str(path), line, record_digest(fields), choice, prompt, answer, line)  # type: ignore[arg-type]


def rows(path: Path) -> Iterable[Row]:
    return rows_of(Source(path=str(path)))


def test_decisions_are_carried_out_and_every_other_byte_stays(tmp_path: Path) -> None:
    source, out = written(tmp_path / "a.jsonl"), tmp_path / "new" / "out.jsonl"
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    made = [
        decided(source, 1, "fix", answer="EINS"),
        decided(source, 2, "fix", prompt='"2" ü'),
        decided(source, 5, "keep"),
        decided(source, 6, "drop"),
    ]
    assert apply(rows(source), made, out) == Applied(untouched=2, kept=1, dropped=1, fixed=2)
    assert out.read_bytes().splitlines(keepends=True) == [
        b'\xef\xbb\xbf{"prompt": "one", "completion": "EINS"}\n',
        '{"completion": "zwei", "prompt": "\\"2\\" ü", "score": 1000.0}\r\n'.encode(),
        *LINES[2:5],
    ]
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_without_decisions_the_copy_is_the_source(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [*LINES, b"\n\n", b"[" * 200_000 + b"\n", b"x" * 3_000_000])
    assert apply(rows(source), [], tmp_path / "b.jsonl") == Applied(untouched=9, kept=0, dropped=0, fixed=0)
    assert (tmp_path / "b.jsonl").read_bytes() == source.read_bytes()


def test_a_record_that_changed_or_went_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    source, out = written(tmp_path / "a.jsonl"), tmp_path / "out.jsonl"
    stale = [
        Decision(str(source), 1, record_digest({"prompt": "one", "completion": "1"}), "keep", None, None, 11),
        Decision(str(source), 4, "0" * 64, "drop", None, None, 12),
        Decision(str(source), 99, "0" * 64, "drop", None, None, 13),
        Decision(str(tmp_path / "other.jsonl"), 1, "0" * 64, "drop", None, None, 14),
    ]
    with pytest.raises(DataError) as error:
        apply(rows(source), [*stale, decided(source, 6, "drop")], out)
    assert error.value.message.splitlines() == [
        f"{d.path}:{d.line}: the record of task {d.task} is not there, or has changed since" for d in stale
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_correction_without_a_place_is_named(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [b'{"text": "doc"}\n'])
    with pytest.raises(DataError, match=r"a\.jsonl:1: task 1 corrects the prompt, but the record has none"):
        apply(rows(source), [decided(source, 1, "fix", prompt="why")], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_is_the_same_by_a_shorter_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert apply(rows(Path("a.jsonl")), [decided(source, 6, "drop")], Path("out.jsonl")).dropped == 1


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="exists already"):
        apply(rows(source), [], source)
    assert source.read_bytes() == b"".join(LINES)


def test_two_files_stay_apart_where_the_first_has_no_last_line_end(tmp_path: Path) -> None:
    sources = [written(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    apply((row for source in sources for row in rows(source)), [decided(sources[1], 6, "drop")], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join([*LINES, b"\n", *LINES[:5]])


def test_a_compressed_file_is_read_as_it_was_before(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl.gz"
    source.write_bytes(gzip.compress(b"".join(LINES)))
    made = [Decision(str(source), 5, record_digest(json.loads(LINES[4])), "drop", None, None, 1)]
    apply(rows(source), made, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join([*LINES[:4], LINES[5]])
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d"):
        apply(rows(source), [], tmp_path / "again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()


def test_a_table_becomes_lines_and_its_decisions_hold(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text('prompt,completion\none,eins\n"two\nlines",zwei\nthree,drei\n', encoding="utf-8")
    lines = list(rows(source))
    assert [json.loads(row.raw) for row in lines] == [
        {"prompt": "one", "completion": "eins"},
        {"prompt": "two\nlines", "completion": "zwei"},
        {"prompt": "three", "completion": "drei"},
    ]
    middle = lines[1]
    made = [Decision(str(source), middle.line, record_digest(json.loads(middle.raw)), "fix", None, "2", 1)]
    apply(rows(source), made, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text().splitlines()[1] == '{"prompt": "two\\nlines", "completion": "2"}'


def test_records_of_an_array_on_one_line_are_told_apart(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text('[{"text": "one"}, {"text": "two"}, {"text": "three"}]')
    made = [Decision(str(source), 1, record_digest({"text": "two"}), "drop", None, None, 1)]
    assert apply(rows(source), made, tmp_path / "out.jsonl") == Applied(untouched=2, kept=0, dropped=1, fixed=0)
    assert (tmp_path / "out.jsonl").read_text() == '{"text": "one"}\n{"text": "three"}\n'


def test_a_source_s_limit_does_not_shorten_the_copy(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        source = tmp_path / name
        source.write_text("text\n" * (name == "a.csv") + '{"text": 1}\n' * 3)
        assert len(list(rows_of(Source(path=str(source), limit=1)))) == 3


def test_a_record_that_cannot_be_copied_stops_the_copy(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text("prompt,completion\none\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:2"):
        apply(rows(source), [], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_from_flagged_to_fixed(tmp_path: Path) -> None:
    """The whole way round: flagged, exported, decided, carried out."""
    source = written(tmp_path / "a.jsonl", [json.dumps(fields).encode() + b"\n" for fields in (PAIR, CHAT, TEXT)])
    flagged = [(place(n, str(source)), fields, [finding()]) for n, fields in ((1, PAIR), (2, CHAT), (3, TEXT))]
    path = export(
        tmp_path / "e.json",
        [annotation(1, "drop")],
        [annotation(1, "fix", None, "hü")],
        [annotation(1, "fix", "", "text")],
        of=to_tasks(flagged),
    )
    apply(rows(source), from_tasks(path), tmp_path / "out.jsonl")
    fixed = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert fixed == [{"messages": [*CHAT["messages"][:2], {"role": "assistant", "content": "hü"}]}, {"text": "text"}]
