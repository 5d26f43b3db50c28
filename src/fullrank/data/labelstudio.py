"""Flagged records -> Label Studio tasks, and what people decided about them there -> a new file of records.

Out: each flagged record becomes a task with its texts, what was found in it and what to do about it. In: Label Studio's export
(JSON or JSON-MIN) is read back, and each record is kept, dropped or corrected in a copy; the source is never written to.

Promises: a decision is carried out only on the very record it was made about (its digest is in the task); of several annotations
of a record the latest counts, and cancelled ones do not; every other record goes into the copy as it is, byte for byte where the
source is JSON Lines. A task holds the texts as they are: where secrets or personal data were found, they travel with it.

Formats: https://labelstud.io/guide/task_format (tasks and annotations); JSON-MIN as label-studio-sdk's converter writes it, one
object an annotation, task data and answers side by side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fullrank.data import sources
from fullrank.data.convert import SPEAKERS
from fullrank.data.sources import RawRecord, Reject
from fullrank.data.streams import BOM, COMPRESSED, Stream
from fullrank.errors import DataError, UsageError
from fullrank.recipe import Source
from fullrank.records import Finding, Place
from fullrank.run import fingerprint, naming_disk_trouble

Choice = Literal["keep", "drop", "fix"]
CHOICES: tuple[Choice, ...] = ("keep", "drop", "fix")

#: Problems of one export that are listed before reading gives up.
MOST_PROBLEMS = 10

# Names of the controls in the labelling interface, by which annotations refer to them.
_DECISION, _PROMPT, _ANSWER = "decision", "corrected_prompt", "corrected_answer"

#: The labelling interface, to paste into a project's Settings > Labeling Interface > Code.
#:
#: It shows what was found, the whole conversation, and one choice. The boxes for a corrected prompt and answer open with the
#: present text when `fix` is chosen; Label Studio submits them whether they were touched or not, so an unchanged text changes
#: nothing.
LABELING_CONFIG = f"""<View>
  <Style>.htx-text {{ white-space: pre-wrap; }}</Style>
  <Header size="4" value="$origin"/>
  <Text name="findings" value="$findings"/>
  <Paragraphs name="messages" value="$messages" nameKey="role" textKey="content" layout="dialogue"/>
  <Choices name="{_DECISION}" toName="messages" choice="single-radio" showInline="true" required="true"
           requiredMessage="Keep the record as it is, drop it, or fix it">
    <Choice value="keep" hotkey="1"/>
    <Choice value="drop" hotkey="2"/>
    <Choice value="fix" hotkey="3"/>
  </Choices>
  <View visibleWhen="choice-selected" whenTagName="{_DECISION}" whenChoiceValue="fix">
    <Header size="5" value="Corrected prompt"/>
    <TextArea name="{_PROMPT}" toName="messages" value="$prompt" rows="6" editable="true" maxSubmissions="1"/>
    <Header size="5" value="Corrected answer"/>
    <TextArea name="{_ANSWER}" toName="messages" value="$answer" rows="6" editable="true" maxSubmissions="1"/>
  </View>
</View>
"""


# ---- out ------------------------------------------------------------------------------------------------------------


def by_record(findings: Iterable[Finding]) -> dict[Place, list[Finding]]:
    """The findings of each record that any of them lists, in the order of files and lines."""
    flagged: dict[Place, list[Finding]] = {}
    for finding in findings:
        for place in finding.records:
            flagged.setdefault(place, []).append(finding)
    return dict(sorted(flagged.items(), key=lambda item: (item[0].path, item[0].line)))


def to_tasks(flagged: Iterable[tuple[Place, Mapping[str, Any], Sequence[Finding]]]) -> list[dict[str, Any]]:
    """Tasks in Label Studio's import format, one a record, in their order.

    `data` holds what the labelling interface shows (`origin`, `findings`, `messages`, `prompt`, `answer`), what tasks can be
    filtered by (`kinds`, `severity`, `split`), and what the way back needs (`path`, `line`, `digest`). `meta` holds the findings
    as objects. The file to import is the JSON of the list.

    Args:
        flagged: of each record its place, its columns as read from the source, and what was found.
    """
    return [_task(place, fields, findings) for place, fields, findings in flagged]


def _task(place: Place, fields: Mapping[str, Any], findings: Sequence[Finding]) -> dict[str, Any]:
    severities = [severity for severity in ("error", "warning", "note") if any(f.severity == severity for f in findings)]
    texts = _Texts.of(fields)
    return {
        "data": {
            "origin": f"{place.path}:{place.line}",
            "path": place.path,
            "line": place.line,
            "split": place.split,
            "digest": record_digest(fields),
            "kinds": ", ".join(dict.fromkeys(finding.kind for finding in findings)),
            "severity": severities[0] if severities else "",
            "findings": "\n".join(f"{f.kind} ({f.severity}): {f.what}. {f.advice}" for f in findings),
            "messages": _messages(fields),
            "prompt": texts.read(fields, texts.prompt),
            "answer": texts.read(fields, texts.answer),
        },
        "meta": {"findings": [finding.model_dump(include={"kind", "severity", "what", "advice"}) for finding in findings]},
    }


def record_digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 of a record's columns, whatever their order."""
    return fingerprint(dict(fields))


_Path = tuple[str | int, ...]
"""The keys and positions that lead from a record's columns to one text in them."""


class _Texts(NamedTuple):
    """Where the prompt and the answer stand that people may correct; None where there is none, or not as one text.

    The answer is the last of the record, and the prompt the last text that a user wrote before it.
    """

    prompt: _Path | None
    answer: _Path | None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> _Texts:
        for asked, answered in (("prompt", "chosen"), ("prompt", "completion"), ("instruction", "output"), (None, "text")):
            if answer := _last(fields, answered, "assistant"):
                return cls(_last(fields, asked, "user") if asked else None, answer)
        for column in ("messages", "conversations"):
            if answer := _last(fields, column, "assistant"):
                return cls(_last(fields, column, "user", before=int(answer[1])), answer)
        return cls(None, None)

    def read(self, fields: Mapping[str, Any], path: _Path | None) -> str:
        value: Any = fields
        for step in path or ():
            value = value[step]
        return value if isinstance(value, str) else ""


def _last(fields: Mapping[str, Any], column: str, role: str, *, before: int | None = None) -> _Path | None:
    """Where the text of a column stands, or that of its last message of a role where it holds messages."""
    value = fields.get(column)
    if isinstance(value, str):
        return (column,)
    turns = value[:before] if isinstance(value, list) else []
    for number in range(len(turns) - 1, -1, -1):
        if isinstance(turns[number], dict) and _role(turns[number]) == role:
            key = "value" if "value" in turns[number] else "content"
            text = turns[number].get(key)
            if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict) and isinstance(text[0].get("text"), str):
                return (column, number, key, 0, "text")
            return (column, number, key) if isinstance(text, str) else None
    return None


def _role(turn: Mapping[str, Any]) -> str:
    if "from" in turn:
        return SPEAKERS.get(str(turn["from"]), str(turn["from"]))
    return str(turn.get("role", ""))


def _messages(fields: Mapping[str, Any]) -> list[dict[str, str]]:
    """The record as a dialogue to read: every column that is not a list of turns is a turn of that name."""
    dialogue = []
    for column, value in fields.items():
        turns = value if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value) else None
        if turns is None or not any("role" in turn or "from" in turn for turn in turns):
            dialogue.append({"role": column, "content": _readable(value)})
            continue
        for turn in turns:
            rest = {key: below for key, below in turn.items() if key not in ("role", "from", "content", "value")}
            parts = [turn.get("content", turn.get("value")), *([rest] if rest else [])]
            content = "\n".join(_readable(part) for part in parts if part is not None)
            dialogue.append({"role": _role(turn), "content": content})
    return dialogue


def _readable(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# ---- back -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What people decided about one record."""

    path: str
    line: int
    digest: str
    choice: Choice
    prompt: str | None
    """The corrected prompt; None where it stays."""
    answer: str | None
    """The corrected answer; None where it stays."""
    task: int | str
    """Label Studio's number of the task, for messages."""


def from_tasks(exported: Path) -> Iterator[Decision]:
    """The decisions in an export of Label Studio, JSON or JSON-MIN; the latest of each record, tasks nobody finished left out.

    The export is read at once.

    Raises:
        DataError: the file is no such export, or holds tasks or answers that do not come from these: up to `MOST_PROBLEMS` of
            them, each with its task.
    """
    try:
        tasks = json.loads(exported.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{exported}: cannot be read as JSON: {error}", hint=_EXPORT_HINT) from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise DataError(f"{exported}: expected an array of tasks", hint=_EXPORT_HINT)
    latest: dict[tuple[str, int, str], tuple[tuple[str, str, int], Decision]] = {}
    problems: list[str] = []
    for number, task in enumerate(tasks, start=1):
        try:
            made = list(_decisions(task, task.get("id", f"number {number}")))
        except DataError as error:
            problems.append(f"{exported}: {error.message}")
            if len(problems) == MOST_PROBLEMS:
                break
            continue
        for time, decision in made:
            record = decision.path, decision.line, decision.digest
            if record not in latest or time >= latest[record][0]:
                latest[record] = time, decision
    if problems:
        raise DataError("\n".join(problems), hint=_EXPORT_HINT)
    for _, decision in sorted(latest.values(), key=lambda item: (item[1].path, item[1].line)):
        yield decision


_EXPORT_HINT = (
    "export the project that was made from these tasks as JSON or JSON-MIN; "
    "its labelling interface must be the one that came with them"
)


def _decisions(task: dict[str, Any], name: int | str) -> Iterator[tuple[tuple[str, str, int], Decision]]:
    """The decisions of a task with when each was made: (last changed, created, number), which sorts by time."""
    annotations = task.get("annotations")
    data = task.get("data") if isinstance(annotations, list) else task
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), kind) for key, kind in (("path", str), ("line", int), ("digest", str))
    ):
        if annotations is None and isinstance(task.get("data"), dict):
            raise DataError(f"task {name}: it has no annotations: this is a task as it was written, not as it was exported")
        raise DataError(f"task {name}: it does not say which record it is about (path, line and digest in its data)")
    if not isinstance(annotations, list):  # JSON-MIN: an annotation, or a task without one
        if task.get("annotation_id") is not None:
            answers = {key: _as_texts(task.get(key)) for key in (_DECISION, _PROMPT, _ANSWER)}
            yield _time(task, task.get("annotation_id")), _decision(data, answers, name)
        return
    for annotation in annotations:
        if annotation.get("was_cancelled") or annotation.get("skipped"):
            continue
        answers = {_DECISION: [], _PROMPT: [], _ANSWER: []}
        for result in annotation.get("result") or []:
            if result.get("from_name") in answers:
                value = result.get("value") or {}
                answers[result["from_name"]] += _as_texts(value.get("choices", value.get("text")))
        yield _time(annotation, annotation.get("id")), _decision(data, answers, name)


def _time(annotation: Mapping[str, Any], number: Any) -> tuple[str, str, int]:
    # Times are ISO 8601 in UTC, which sort as text.
    created = str(annotation.get("created_at") or "")
    return str(annotation.get("updated_at") or created), created, number if isinstance(number, int) else 0


def _as_texts(value: Any) -> list[str]:
    """The texts of an answer, which is one text, several, or (in JSON-MIN) objects that hold several."""
    if value is None:
        return []
    if isinstance(value, dict):
        return _as_texts(value.get("choices", value.get("text")))
    if isinstance(value, list):
        return [text for item in value for text in _as_texts(item)]
    return [str(value)]


def _decision(data: Mapping[str, Any], answers: Mapping[str, list[str]], name: int | str) -> Decision:
    for key, texts in answers.items():
        if len(texts) > 1:
            raise DataError(f"task {name}: {len(texts)} answers to `{key}` in one annotation, expected one")
    chosen = answers[_DECISION][0] if answers[_DECISION] else None
    choice = next((choice for choice in CHOICES if choice == chosen), None)
    if choice is None:
        found = "no choice was made" if chosen is None else f"unknown choice {chosen!r}"
        raise DataError(f"task {name}: {found}; allowed: {', '.join(CHOICES)}")
    prompt, answer = (
        _changed(answers[key], data.get(shown)) if choice == "fix" else None
        for key, shown in ((_PROMPT, "prompt"), (_ANSWER, "answer"))
    )
    if choice == "fix" and prompt is None and answer is None:
        raise DataError(f"task {name}: `fix` was chosen, but neither prompt nor answer was changed")
    return Decision(data["path"], data["line"], data["digest"], choice, prompt, answer, name)


def _changed(texts: Sequence[str], shown: Any) -> str | None:
    """The text given, or None where it is what the box opened with."""
    # A browser's text box turns every line break into \n (HTML, 4.10.11: "API value"), which is no correction.
    same = bool(texts) and isinstance(shown, str) and _line_breaks(texts[0]) == _line_breaks(shown)
    return texts[0] if texts and not same else None


def _line_breaks(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---- carrying out ---------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of a source, or one record of a source without lines, as a line of JSON Lines."""

    path: str
    line: int
    """As in `records.Place`: counted from 1."""
    raw: bytes
    """With its line ending, where it has one."""


def rows_of(source: Source) -> Iterator[Row]:
    """Everything in a source's files, its `limit` left aside: JSON Lines line by line as they are, other records as JSON.

    Raises:
        DataError: a file cannot be read to its end, or has a record that cannot be read or written as JSON.
        UsageError: a hub dataset without the `hub` extra.
    """
    whole = source.model_copy(update={"limit": None})
    for name in sources.files(source) if source.path is not None else [None]:
        if name is not None and _has_lines(Path(name)):
            yield from _lines(Path(name))
        else:
            yield from _as_lines(sources.read(whole if name is None else whole.model_copy(update={"path": name})))


def _has_lines(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "") in (".jsonl", ".ndjson")


#: Bytes of a file of lines that are read at a time.
_PIECE_BYTES = 1 << 20


def _lines(path: Path) -> Iterator[Row]:
    line, held = 1, b""
    with Stream(path) as stream:
        while not stream.at_end:
            *whole, held = (held + stream.read(_PIECE_BYTES)).split(b"\n")
            for raw in whole:
                yield Row(str(path), line, raw + b"\n")
                line += 1
        if stream.broken:
            raise DataError(f"{path}:{line}: {stream.broken}", hint="a copy would lose what stands behind; mend the file first")
    if held:
        yield Row(str(path), line, held)


def _as_lines(records: Iterable[RawRecord | Reject]) -> Iterator[Row]:
    for record in records:
        if isinstance(record, Reject):
            raise DataError(f"{record.origin}: {record.reason}", hint="a copy would lose this record; mend the file first")
        try:
            raw = json.dumps(record.fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"{record.origin}: cannot be written as JSON: {error}", hint="write its columns as text") from error
        yield Row(record.origin.path, record.origin.line, raw)


@dataclass(frozen=True)
class Applied:
    """What became of the rows of a source."""

    untouched: int
    """Rows nobody decided about; blank lines and lines that could not be read count as well."""
    kept: int
    dropped: int
    fixed: int


def apply(rows: Iterable[Row], decisions: Iterable[Decision], out: Path) -> Applied:
    """Writes a new JSON Lines file with the decisions carried out, in the order of the rows; it appears whole or not at all.

    A corrected record is written anew as JSON, its other columns unchanged.

    Raises:
        UsageError: `out` exists already; no file is overwritten.
        DataError: a decision about a record that is not there or has changed since, or a correction that the record has no place
            for: up to `MOST_PROBLEMS` of them, each with its record and task.
        FitError: the disk is full.
    """
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UsageError(f"{out}: what is written is JSON Lines", hint="give a name that ends in .jsonl")
    if out.exists():
        raise UsageError(f"{out}: exists already", hint="give another name, or remove it first")
    waiting: dict[tuple[str, int], dict[str, Decision]] = {}
    for decision in decisions:
        waiting.setdefault((_same(decision.path), decision.line), {})[decision.digest] = decision
    problems: list[str] = []
    counts = dict.fromkeys(("untouched", "kept", "dropped", "fixed"), 0)
    partial = out.with_name(f".{out.name}.partial")
    with naming_disk_trouble(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                ended = True
                for row in rows:
                    try:
                        what, raw = _carried_out(row, waiting.get((_same(row.path), row.line)))
                    except DataError as error:
                        problems.append(error.message)
                        if len(problems) == MOST_PROBLEMS:
                            break
                        continue
                    counts[what] += 1
                    if raw:  # the last line of a file may have no end, and another file follow
                        file.write(raw if ended else b"\n" + raw)
                        ended = raw.endswith(b"\n")
                file.flush()
                os.fsync(file.fileno())
            if len(problems) < MOST_PROBLEMS:
                problems += [
                    f"{left.path}:{left.line}: the record of task {left.task} is not there, or has changed since"
                    for about_one in waiting.values()
                    for left in about_one.values()
                ]
            if problems:
                raise DataError(
                    "\n".join(problems[:MOST_PROBLEMS]),
                    hint="decisions hold for the records they were made about: make the tasks anew from these",
                )
            partial.rename(out)
        finally:
            partial.unlink(missing_ok=True)
    return Applied(**counts)


def _same(path: str) -> str:
    """One name for a file however it is called: recipes name files by whole paths, people by short ones."""
    return _real(os.path.abspath(path))  # noqa: PTH100 - a short name means another file in another folder


@lru_cache(maxsize=64)
def _real(path: str) -> str:
    return os.path.realpath(path)


def _fields(raw: bytes) -> dict[str, Any] | None:
    """The columns of a line; None where it is no record."""
    try:
        fields = json.loads(raw.removeprefix(BOM))
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _carried_out(row: Row, decisions: dict[str, Decision] | None) -> tuple[str, bytes]:
    """What became of a row, and what is written in its place; the decision about it, if there is one, is taken out.

    Args:
        decisions: those about records on this line, by digest: an array of a .json file may have several on one.
    """
    fields = _fields(row.raw) if decisions else None
    decision = decisions.pop(record_digest(fields), None) if decisions and fields is not None else None
    if fields is None or decision is None:
        return "untouched", row.raw
    if decision.choice == "keep":
        return "kept", row.raw
    if decision.choice == "drop":
        return "dropped", b""
    fixed = deepcopy(fields)
    texts = _Texts.of(fields)
    for name, path, text in (("prompt", texts.prompt, decision.prompt), ("answer", texts.answer, decision.answer)):
        if text is None:
            continue
        if path is None:
            raise DataError(
                f"{row.path}:{row.line}: task {decision.task} corrects the {name}, but the record has none that is one text"
            )
        holder: Any = fixed
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = text
    mark = BOM if row.raw.startswith(BOM) else b""
    ending = row.raw[len(row.raw.rstrip(b"\r\n")) :]
    return "fixed", mark + json.dumps(fixed, ensure_ascii=False).encode() + ending
