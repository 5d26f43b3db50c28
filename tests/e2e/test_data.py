"""`fullrank data` as a user types it: what is printed where, with which exit code, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from staging import leftovers, write_case
from tiny import chat_rows, write_jsonl

from fullrank.cli.app import main
from fullrank.plan import speed

KEY = "AKIAIOSFODNN7EXAMPLX"


class Done(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The object on the last line, the only one there is."""
        (line,) = self.out.splitlines()
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture
def fullrank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command, typed in a folder; in this process, since another one takes seconds to import torch."""

    def typed(*arguments: str, cwd: Path, columns: int = 200) -> Done:
        code = 0
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", ["fullrank", *arguments])
            patch.setenv("COLUMNS", str(columns))
            patch.setattr(speed, "measure", lambda *arguments, **options: None)
            before = signal.getsignal(signal.SIGTERM)
            capsys.readouterr()
            try:
                main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
            finally:
                signal.signal(signal.SIGTERM, before)
        found = Done(code, *capsys.readouterr())
        assert "Traceback" not in found.err + found.out
        assert leftovers(cwd) == []
        return found

    return typed


def in_a_process(*arguments: str, cwd: Path) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "fullrank", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    return write_case(tmp_path, tiny_model_folder("llama"))


@pytest.fixture
def flawed(case: Path) -> Path:
    """A secret on line 3 of the training data, and a record that cannot be used at the end of the validation data."""
    rows = chat_rows(12)
    rows[2]["messages"][-1]["content"] += f" and the key is {KEY}"
    write_jsonl(case.parent / "train.jsonl", rows)
    with (case.parent / "validation.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "who"}\n')
    return case


# ---- prepare and audit ----------------------------------------------------------------------------------------------


def test_json_is_one_object_on_standard_output(case: Path) -> None:
    done = in_a_process("data", "recipe.yaml", "--json", cwd=case.parent)
    assert done.code == 0, done.err
    found = done.json()
    assert (found["read"], found["used"], found["quarantined"]) == (20, 20, 0)
    for finding in found["findings"]:
        assert isinstance(finding["kind"], str) and finding["severity"] in ("error", "warning", "note") and finding["advice"]
        assert all(isinstance(place["path"], str) and place["line"] >= 1 for place in finding["records"])
    assert "error" not in done.err


def test_refused_data_are_printed_all_the_same(flawed: Path) -> None:
    done = in_a_process("data", "recipe.yaml", "data.quarantine_budget=1", "--json", cwd=flawed.parent)
    assert done.code == 3, done.err
    found = done.json()
    assert (found["read"], found["used"], found["quarantined"]) == (17, 16, 1)
    (secret,) = [finding for finding in found["findings"] if finding["severity"] == "error"]
    assert secret["kind"] == "secret"
    assert [(Path(place["path"]).name, place["line"]) for place in secret["records"]] == [("train.jsonl", 3)]
    assert done.err.count("error: ") == 1 and "data.audit.accept=[" in done.err and "secret" in done.err


def test_the_terminal_says_it_and_a_page_shows_it(flawed: Path, fullrank: Callable[..., Done]) -> None:
    done = fullrank("data", "recipe.yaml", "data.quarantine_budget=1", cwd=flawed.parent)
    assert done.code == 3
    page = flawed.parent / "runs" / "tiny" / "report" / "data.html"
    assert "secret" in done.out and "train.jsonl:3" in done.out and "data.html" in done.out
    assert "error: the audit of the data found errors" in done.err
    text = page.read_text(encoding="utf-8")
    assert "secret" in text and "train.jsonl" in text and "validation.jsonl" in text and "without an answer" in text
    assert 'class="t s"' in text and 'data-id="' in text  # tokens, some of them supervised
    assert "<script" not in text and 'src="http' not in text and 'href="http' not in text


def test_the_page_is_there_for_good_data_too(case: Path, fullrank: Callable[..., Done]) -> None:
    done = fullrank("data", "recipe.yaml", cwd=case.parent)
    assert done.code == 0 and (case.parent / "runs" / "tiny" / "report" / "data.html").is_file()
    assert done.out.count("data.html") == 1 and done.err.count("error") == 0


def test_the_word_prepare_may_be_left_out(case: Path, fullrank: Callable[..., Done]) -> None:
    with_it = fullrank("data", "prepare", "recipe.yaml", "--json", cwd=case.parent)
    without = fullrank("data", "--json", "recipe.yaml", cwd=case.parent)
    by_name = fullrank("data", "tiny", "--json", cwd=case.parent)
    assert (with_it.code, without.code, by_name.code) == (0, 0, 0)
    assert with_it.json() == without.json() and with_it.json()["findings"] == by_name.json()["findings"]


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_errors_stop_a_run_unless_they_are_accepted(flawed: Path, fullrank: Callable[..., Done], verb: str) -> None:
    done = fullrank(verb, "recipe.yaml", "data.quarantine_budget=1", cwd=flawed.parent)
    assert done.code == 3 and done.err.count("error: ") == 1 and "secret" in done.err
    run = flawed.parent / "runs" / "tiny"
    assert (run / "data" / "audit.json").is_file() and not (run / "plan.json").exists() and not (run / "train").exists()
    if verb == "plan":
        done = fullrank("plan", "recipe.yaml", "data.quarantine_budget=1", "data.audit.accept=[secret]", cwd=flawed.parent)
        assert done.code == 0, done.err
        assert (run / "plan.json").is_file()


def test_rejected_records_stop_it_before_the_audit_does(flawed: Path, fullrank: Callable[..., Done]) -> None:
    done = fullrank("data", "recipe.yaml", "--json", cwd=flawed.parent)
    assert done.code == 3 and done.json()["quarantined"] == 1
    assert f"error: {flawed.parent / 'validation.jsonl'}:5: record without an answer" in done.err
    assert "data.quarantine_budget" in done.err


# ---- show -----------------------------------------------------------------------------------------------------------


def test_examples_are_shown(case: Path, fullrank: Callable[..., Done]) -> None:
    done = fullrank("data", "show", "recipe.yaml", "--record", "7", "--whole", cwd=case.parent)
    assert done.code == 0
    assert "train.jsonl:7" in done.out and "<|im_start|>" in done.out and "assistant" in done.out
    flat = "".join(done.out.replace("·", " ").split())
    assert "whatisthelimitofbank6" not in flat and "borrowerofbank6" in flat  # the very record
    other = fullrank("data", "show", "recipe.yaml", "--example", "3", "--example", "4", cwd=case.parent)
    assert other.out.index("train.jsonl:4") < other.out.index("train.jsonl:5")


def test_ids_are_shown_when_asked_for(case: Path, fullrank: Callable[..., Done]) -> None:
    shown = fullrank("data", "show", "recipe.yaml", "--example", "0", "--json", cwd=case.parent).json()["examples"]
    ids = [token["id"] for turn in shown[0]["turns"] for token in turn["tokens"]]
    plain = fullrank("data", "show", "recipe.yaml", "--example", "0", "--whole", cwd=case.parent).out
    with_ids = fullrank("data", "show", "recipe.yaml", "--example", "0", "--whole", "--ids", cwd=case.parent).out
    assert len(with_ids) > len(plain) and all(str(number) in with_ids for number in ids)


def test_shown_examples_as_json(case: Path, fullrank: Callable[..., Done]) -> None:
    done = fullrank("data", "show", "recipe.yaml", "--split", "validation", "--count", "2", "--json", cwd=case.parent)
    examples = done.json()["examples"]
    assert done.code == 0 and len(examples) == 2
    for example in examples:
        tokens = [token for turn in example["turns"] for token in turn["tokens"]]
        assert example["split"] == "validation" and example["tokens"] == len(tokens)
        assert example["supervised_tokens"] == sum(token["supervised"] for token in tokens) > 0
        assert {turn["role"] for turn in example["turns"]} >= {"user", "assistant"}


def test_hostile_text_cannot_drive_the_terminal(case: Path, fullrank: Callable[..., Done]) -> None:
    row = {"prompt": "\x1b[2J\x1b]0;owned\x07 [bold]see[/bold] \u202eevil", "completion": "no\r\x1b[1A"}
    write_jsonl(case.parent / "train.jsonl", [*chat_rows(3), row])
    for arguments in (("data", "recipe.yaml"), ("data", "show", "recipe.yaml", "--example", "3", "--whole")):
        done = fullrank(*arguments, cwd=case.parent)
        assert not set("\x1b\x07\r\u202e") & set(done.out + done.err), arguments
    assert "[U+001B]" in done.out and "[U+202E]" in done.out


# ---- labelling ------------------------------------------------------------------------------------------------------


def test_records_go_to_label_studio_and_come_back(flawed: Path, fullrank: Callable[..., Done]) -> None:
    folder = flawed.parent
    accept = "data.quarantine_budget=1"
    done = fullrank("data", "flagged", "recipe.yaml", accept, "--kind", "secret", "--out", "out/tasks.json", cwd=folder)
    assert done.code == 0 and "wrote 1 task" in done.out and "out/tasks.json" in done.out and "out/tasks.xml" in done.out
    (task,) = json.loads((folder / "out" / "tasks.json").read_text(encoding="utf-8"))
    result = [{"from_name": "decision", "to_name": "messages", "type": "choices", "value": {"choices": ["drop"]}}]
    annotation = {"id": 1, "created_at": "2026-01-02T03:04:05Z", "was_cancelled": False, "result": result}
    (folder / "export.json").write_text(json.dumps([{"id": 9, "annotations": [annotation], **task}]), encoding="utf-8")
    done = fullrank("data", "labelled", "train.jsonl", "export.json", "--out", "mended.jsonl", cwd=folder)
    assert done.code == 0 and "1 dropped" in done.out
    old, new = (folder / "train.jsonl").read_bytes().splitlines(), (folder / "mended.jsonl").read_bytes().splitlines()
    assert new == [*old[:2], *old[3:]]
    again = fullrank("data", "labelled", "train.jsonl", "export.json", "--out", "mended.jsonl", cwd=folder)
    assert again.code == 2 and "mended.jsonl: exists already" in again.err
    assert fullrank("data", "recipe.yaml", accept, "data.train=mended.jsonl", cwd=folder).code == 0


# ---- wrong input ----------------------------------------------------------------------------------------------------


def test_help_needs_nothing(case: Path, fullrank: Callable[..., Done]) -> None:
    for arguments in (("data",), ("data", "--help"), ("data", "show", "--help"), ("data", "labelled", "--help")):
        done = fullrank(*arguments, cwd=case.parent)
        assert "Usage: " in done.out + done.err
    assert not (case.parent / "runs").exists()


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no such recipe": (["data", "recipes.yaml"], 2, "recipes.yaml: no such recipe; did you mean recipe.yaml?"),
    "no such run": (["data", "tinny"], 2, "no run 'tinny' in runs"),
    "no such key": (["data", "recipe.yaml", "data.quarantine_buget=1"], 2, "did you mean 'quarantine_budget'?"),
    "a budget below zero": (["data", "recipe.yaml", "data.quarantine_budget=-1"], 2, "data.quarantine_budget"),
    "a kind that is not masked": (["data", "recipe.yaml", "data.audit.mask=[mojibake]"], 2, "'secret' or 'personal_data'"),
    "a kind that is none": (["data", "recipe.yaml", "data.audit.accept=[secrets]"], 2, "data.audit.accept"),
    "one weight of two": (
        ["data", "recipe.yaml", "data.train=[{path: train.jsonl, weight: 1}, validation.jsonl]"],
        2,
        "1 of 2 sources have no `weight`",
    ),
    "a weight of nothing": (["data", "recipe.yaml", "data.train={path: train.jsonl, weight: 0}"], 2, "greater than 0"),
    "a repeat without a weight": (["data", "recipe.yaml", "data.train={path: train.jsonl, repeat: 2}"], 2, "`repeat`"),
    "no worker": (["data", "recipe.yaml", "machine.workers=0"], 2, "machine.workers"),
    "no such file": (["data", "recipe.yaml", "data.train=tarin.jsonl"], 3, "data.train: file not found: tarin.jsonl"),
    "no such pattern": (["data", "recipe.yaml", "data.train=folder/*.jsonl"], 3, "data.train: file not found: folder/*.jsonl"),
    "a folder": (["data", "recipe.yaml", "data.train=folder"], 3, "is not a file"),
    "an unknown kind of file": (["data", "recipe.yaml", "data.train=words.docx"], 3, "'.docx' files are not known"),
    "no records": (["data", "recipe.yaml", "data.train=empty.jsonl"], 3, "empty.jsonl: holds no records"),
    "another encoding": (["data", "recipe.yaml", "data.train=wide.jsonl"], 3, "is UTF-16 text"),
    "no glossary": (["data", "recipe.yaml", "data.glossary=terms.txt"], 3, "data.glossary: file not found"),
    "no template": (["data", "recipe.yaml", "data.chat_template=chat.jinja"], 3, "data.chat_template: file not found"),
    "a broken template": (["data", "recipe.yaml", "data.chat_template=broken.jinja"], 3, "broken.jinja:1: not a Jinja template"),
    "no such split": (["data", "show", "recipe.yaml", "--split", "test"], 2, "there is no split 'test' to show"),
    "no such example": (["data", "show", "recipe.yaml", "--example", "99"], 2, "train has no example 99: there are 16"),
    "an example below zero": (["data", "show", "recipe.yaml", "--example", "-1"], 2, "train has no example -1"),
    "no such record": (["data", "show", "recipe.yaml", "--record", "nothing.jsonl:3"], 2, "no example of train was made from it"),
    "no record at all": (["data", "show", "recipe.yaml", "--record", "three"], 2, "a record is named by its line"),
    "no such finding": (["data", "flagged", "recipe.yaml", "--kind", "mojibake"], 2, "no finding is of kind 'mojibake'"),
    "no export": (["data", "labelled", "train.jsonl", "exprot.json", "--out", "new.jsonl"], 3, "exprot.json: cannot be read"),
    "no export of Label Studio": (
        ["data", "labelled", "train.jsonl", "recipe.yaml", "--out", "new.jsonl"],
        3,
        "expected an array of tasks",
    ),
    "nothing to label": (["data", "labelled", "tarin.jsonl", "empty.json", "--out", "new.jsonl"], 3, "tarin.jsonl: no such file"),
    "a file where runs should be": (["data", "recipe.yaml", "--runs-dir", "train.jsonl"], 2, "--runs-dir"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_told_in_one_message(case: Path, fullrank: Callable[..., Done], what: str) -> None:
    folder = case.parent
    (folder / "folder").mkdir()
    (folder / "words.docx").write_bytes(b"PK")
    (folder / "empty.jsonl").write_text("\n \n", encoding="utf-8")
    (folder / "empty.json").write_text("[]", encoding="utf-8")
    (folder / "wide.jsonl").write_text(json.dumps(chat_rows(1)[0]), encoding="utf-16")
    (folder / "broken.jinja").write_text("{% for message in messages %}", encoding="utf-8")
    arguments, code, words = WRONG[what]
    done = fullrank(*arguments, cwd=folder)
    assert (done.code, done.out) == (code, ""), done.err
    assert done.err.count("error: ") == 1 and words in done.err[done.err.index("error: ") :], done.err
    assert not (folder / "new.jsonl").exists()
    if code == 2 and arguments[1] == "recipe.yaml":
        assert not (folder / "runs" / "tiny" / "data").exists()
