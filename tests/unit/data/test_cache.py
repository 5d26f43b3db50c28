"""Shards are made once: again only where a byte or a setting that they depend on has changed, and never taken when broken."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from staging import Staged, leftovers, staged, write_case
from tiny import CHATML, chat_rows, write_jsonl

from fullrank.data import digests, prepare, sources
from fullrank.data.cache import ShardCache
from fullrank.data.digests import DigestMemory
from fullrank.data.sources import Block
from fullrank.data.splits import Splits
from fullrank.errors import DataRefused
from fullrank.models.load import load_tokenizer
from fullrank.sequences.store import TokenStore

WEEK = 7 * 24 * 3600.0


class Watch:
    """What is done to shards and files while it watches."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.hashed: list[str] = []
        self.opened: list[str] = []
        self.folder = "nowhere"
        """Files below it are watched for being opened."""

    def forget(self) -> None:
        for found in (self.written, self.hashed, self.opened):
            found.clear()


_watching: list[Watch] = []


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching and isinstance(arguments[0], str) and arguments[0].startswith(_watching[-1].folder):
        _watching[-1].opened.append(arguments[0])


sys.addaudithook(_heard)  # for good: Python has no way to take one away


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    seen = Watch()
    run, digest = prepare.Prepare.run, digests.file_digest

    def writing(self: prepare.Prepare, block: Block, path: Path) -> None:
        seen.written.append(path.name)
        run(self, block, path)

    def hashing(path: Path) -> str:
        seen.hashed.append(path.name)
        return digest(path)

    monkeypatch.setattr(prepare.Prepare, "run", writing)
    monkeypatch.setattr(digests, "file_digest", hashing)
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", 0)  # files were written just now, and will not be in the same tick
    _watching.append(seen)
    yield seen
    _watching.pop()


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    model = shutil.copytree(tiny_model_folder("llama"), tmp_path / "model")
    made = write_case(tmp_path, model)
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "data" / f"{name}.jsonl")
    return made


ASKED = ["data.train=data/train.jsonl", "data.validation=data/validation.jsonl", "data.chat_template=chat.jinja"]


def prepared(case: Path, *overrides: str, runs: Path | None = None) -> Staged:
    run = staged(case, [*ASKED, *overrides], runs=runs)
    run.data()
    return run


def texts(run: Staged, split: str = "train") -> list[str]:
    store, tokenizer = TokenStore(run.run.data / split), load_tokenizer(run.base.folder)
    return [tokenizer.decode(store[n].ids, skip_special_tokens=False) for n in range(len(store))]


def learned(run: Staged) -> list[list[int]]:
    store = TokenStore(run.run.data / "train")
    return [store[n].ids[store[n].supervised].tolist() for n in range(len(store))]


# ---- nothing changed ------------------------------------------------------------------------------------------------


def test_the_same_run_again_opens_no_data_file(case: Path, watch: Watch) -> None:
    prepared(case)
    assert len(watch.written) == 2 and set(watch.hashed) == {"train.jsonl", "validation.jsonl"}
    watch.forget()
    watch.folder = str(case.parent / "data")
    again = prepared(case, "train.epochs=7", "data.quarantine_budget=3", "machine.workers=1")
    assert again.reused("data")
    assert (watch.written, watch.hashed, watch.opened) == ([], [], [])


@pytest.mark.parametrize("change", ["another run", "moved", "renamed", "copied into another folder", "a deleted run"])
def test_the_same_content_makes_no_shard_anew(case: Path, watch: Watch, change: str) -> None:
    first = prepared(case)
    before = texts(first)
    watch.forget()
    overrides = []
    if change == "another run":
        overrides = ["name=other", "train.seed=4"]
    elif change == "moved":
        (case.parent / "data").rename(case.parent / "elsewhere")
        overrides = ["data.train=elsewhere/train.jsonl", "data.validation=elsewhere/validation.jsonl"]
    elif change == "renamed":
        (case.parent / "data" / "train.jsonl").rename(case.parent / "data" / "t.ndjson")
        overrides = ["data.train=data/t.ndjson"]
    elif change == "copied into another folder":
        shutil.copytree(case.parent / "data", case.parent / "copy")
        overrides = ["name=other", "data.train=copy/train.jsonl"]
    else:
        shutil.rmtree(first.run.root)
    again = prepared(case, *overrides)
    assert watch.written == []
    assert texts(again) == before
    if change in ("another run", "a deleted run"):
        assert watch.hashed == []  # remembered across runs
    origin = TokenStore(again.run.data / "train").origin(0).rpartition(":")[0]
    assert origin == again.recipe.data.train[0].path and Path(origin).is_file()  # where the record stands now


def test_touched_files_are_hashed_and_taken_for_what_they_are(case: Path, watch: Watch) -> None:
    prepared(case)
    watch.forget()
    path = case.parent / "data" / "train.jsonl"
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))
    again = prepared(case)
    assert again.reused("data") and watch.written == [] and watch.hashed == ["train.jsonl"]


def test_a_change_behind_the_same_size_and_time_is_seen(case: Path, watch: Watch) -> None:
    prepared(case)
    path = case.parent / "data" / "train.jsonl"
    facts = path.stat()
    path.write_bytes(path.read_bytes().replace(b"bank 1 ", b"bank 2 ", 1))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    again = prepared(case)
    assert not again.reused("data") and "bank 2 " in texts(again)[1]


def test_a_longer_file_makes_its_last_block_anew(case: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "blocks", partial(sources.blocks, block_bytes=700))
    prepared(case)
    made = len(watch.written)
    assert made > 5
    watch.forget()
    path = case.parent / "data" / "train.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(chat_rows(17)[16]) + "\n")
    prepared(case)
    assert 1 <= len(watch.written) <= 2


def test_sources_in_another_order_or_mix_make_no_shard(case: Path, watch: Watch) -> None:
    write_jsonl(case.parent / "data" / "more.jsonl", [{"prompt": "the sky", "completion": "blue"}])
    prepared(case, "data.train=[data/train.jsonl, data/more.jsonl]")
    watch.forget()
    run = prepared(
        case, "data.train=[{path: data/more.jsonl, weight: 1, repeat: 2}, {path: data/train.jsonl, weight: 1}]", "train.seed=9"
    )
    assert watch.written == [] and not run.reused("data") and len(texts(run)) == 4


# ---- something changed ----------------------------------------------------------------------------------------------

SETTINGS = {
    "max_length": "data.max_length=127",
    "too_long": "data.too_long=truncate",
    "overlap": "data.chunk_overlap_ratio=0.5",
    "loss_on": "data.loss_on=completion",
    "mask": "data.audit.mask=[personal_data]",
    "skip": "data.audit.skip=[language]",
    "date": "data.template_date=2026-01-02",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_that_could_show_makes_other_shards(case: Path, watch: Watch, setting: str) -> None:
    prepared(case)
    before = set(watch.written)
    watch.forget()
    again = prepared(case, SETTINGS[setting])
    assert not again.reused("data")
    assert len(watch.written) == 2 and not before & set(watch.written)


def test_loss_elsewhere_is_learned(case: Path) -> None:
    assert learned(prepared(case)) != learned(prepared(case, "data.loss_on=all"))


def test_one_character_of_the_template(case: Path, watch: Watch) -> None:
    first = prepared(case)
    before = set(watch.written)
    watch.forget()
    (case.parent / "chat.jinja").write_text(CHATML.replace("'\\n' }}{% endfor", "' ' }}{% endfor"), encoding="utf-8")
    old = texts(first)
    again = prepared(case)
    assert len(watch.written) == 2 and not before & set(watch.written) and not again.reused("data")
    assert [text.replace("<|im_end|>\n", "<|im_end|> ") for text in old] == texts(again) != old


def test_one_merge_of_the_tokenizer(case: Path, watch: Watch) -> None:
    first = prepared(case)
    old, before = texts(first), set(watch.written)
    ids = [TokenStore(first.run.data / "train")[n].ids.tolist() for n in range(16)]
    watch.forget()
    path = case.parent / "model" / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["model"]["merges"][0]
    path.write_text(json.dumps(document), encoding="utf-8")
    again = prepared(case)
    assert len(watch.written) == 2 and not before & set(watch.written) and not again.reused("data")
    assert texts(again) == old and [TokenStore(again.run.data / "train")[n].ids.tolist() for n in range(16)] != ids


def test_one_byte_of_one_file(case: Path, watch: Watch) -> None:
    first = prepared(case)
    old, before = texts(first), set(watch.written)
    watch.forget()
    path = case.parent / "data" / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"bank 5 ", b"bank 4 ", 1))
    again = prepared(case)
    assert len(watch.written) == 1 and not before & set(watch.written)  # validation is what it was
    assert [n for n, (a, b) in enumerate(zip(old, texts(again), strict=True)) if a != b] == [5]


def test_another_model_with_the_same_tokenizer_is_judged_by_its_own_size(case: Path, watch: Watch) -> None:
    """What the audit says of the amount of data depends on the model's parameters."""

    def said(run: Staged) -> list[str]:
        audit = json.loads((run.run.data / "audit.json").read_text(encoding="utf-8"))
        return [finding["what"] for finding in audit["findings"] if finding["kind"] == "too_little_data"]

    small = said(prepared(case))
    large = staged(case, ASKED)
    large.base = replace(large.base, facts=large.base.facts.model_copy(update={"parameters": 8_000_000_000}))
    watch.forget()
    large.data()
    assert watch.written == []  # no token depends on it
    assert said(large) != small and any("8.0B" in what and "7B" in what for what in said(large))


def test_a_file_that_changes_while_it_is_prepared_is_not_taken_for_the_old_one(
    case: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card must not say of new content that it is the old, or the next run would use it unseen."""
    path = case.parent / "data" / "train.jsonl"
    whole, old = Splits.prepare, path.read_bytes()

    def with_a_writer(self: Splits) -> None:
        path.write_bytes(old.replace(b"bank 1 ", b"bank 2 ", 1))
        whole(self)

    monkeypatch.setattr(Splits, "prepare", with_a_writer)
    run = staged(case, ASKED)
    try:
        run.data()
    except Exception as error:  # a refusal is right, as long as it says why
        assert "chang" in str(error)
    monkeypatch.setattr(Splits, "prepare", whole)
    path.write_bytes(old)
    again = prepared(case)
    assert "bank 2 " not in texts(again)[1]


# ---- shards that are not what they should be ------------------------------------------------------------------------


def damaged(raw: bytes, how: str) -> bytes:
    return {
        "empty": b"",
        "cut in its header": raw[:100],
        "cut in its arrays": raw[:-7],
        "cut to its header": raw[: 8 + int.from_bytes(raw[:8], "little")],
        "zeros": bytes(len(raw)),
        "longer": raw + b"more",
    }[how]


@pytest.mark.parametrize("how", ["empty", "cut in its header", "cut in its arrays", "cut to its header", "zeros", "longer"])
def test_a_damaged_shard_is_made_anew(case: Path, watch: Watch, how: str) -> None:
    """A machine that loses power may leave a file under its final name that is not whole."""
    first = prepared(case)
    old = texts(first)
    shutil.rmtree(first.run.root)
    shards = {path: path.read_bytes() for path in (case.parent / "runs" / ".shards").glob("*.safetensors")}
    hurt = next(path for path, raw in shards.items() if b"messages" not in raw)
    hurt.unlink()
    hurt.write_bytes(damaged(shards[hurt], how))
    watch.forget()
    again = prepared(case)
    assert watch.written == [hurt.name] and texts(again) == old
    assert {path: path.read_bytes() for path in shards} == shards


# ---- the cache by itself --------------------------------------------------------------------------------------------


def block(payload: bytes = b"{}\n", **changes: Any) -> Block:
    facts: dict[str, Any] = {
        "path": "a.jsonl",
        "first": 1,
        "offset": 0,
        "payload": payload,
        "kind": "lines",
        "seekable": True,
        "source_bytes": 3,
    }
    return Block(**{**facts, **changes})


def test_a_name_is_the_content_and_the_settings(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    one = cache.path(block(), "settings")
    assert one == cache.path(block(path="b.jsonl", first=9, offset=77, seekable=False, source_bytes=1), "settings")
    others = [
        cache.path(block(b"{} \n"), "settings"),
        cache.path(block(kind="rows"), "settings"),
        cache.path(block(), "others"),
        ShardCache(tmp_path / "other").path(block(), "settings"),
    ]
    assert len({one, *others}) == 5


def test_a_run_holds_its_shards_by_links(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    shard = cache.path(block(), "settings")
    shard.write_bytes(b"shard")
    os.utime(shard, (0, 0))
    cache.give(shard, tmp_path / "mine")
    assert (tmp_path / "mine").samefile(shard) and time.time() - shard.stat().st_mtime < 60
    shard.unlink()
    assert (tmp_path / "mine").read_bytes() == b"shard"


def test_shards_are_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*names: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    cache = ShardCache(tmp_path / "cache")
    shard = cache.path(block(), "settings")
    shard.write_bytes(b"shard")
    cache.give(shard, tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == b"shard" and not (tmp_path / "mine").samefile(shard)


def test_only_what_is_old_and_held_by_no_run_is_removed(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    now = time.time()
    names = {"old": 1.1 * WEEK, "used lately": 0.9 * WEEK, "old and held": 3 * WEEK, "fresh": 0.0}
    for name, age in names.items():
        path = cache.folder / f"{name}.safetensors"
        path.write_bytes(b"")
        if "held" in name:
            os.link(path, tmp_path / "of a run")
        os.utime(path, (now - age, now - age))
    for name, age in (("killed", 2 * WEEK), ("under way", 60.0)):
        path = cache.folder / f".{name}.safetensors.7.partial"
        path.write_bytes(b"")
        os.utime(path, (now - age, now - age))
    cache.digests.write_text("{}", encoding="utf-8")
    os.utime(cache.digests, (0, 0))
    cache.prune()
    assert {path.name for path in cache.folder.iterdir()} == {
        "used lately.safetensors",
        "old and held.safetensors",
        "fresh.safetensors",
        ".under way.safetensors.7.partial",
        "digests.json",
    }
    cache.prune()


def test_preparing_removes_what_no_run_has_held_for_a_week(case: Path, watch: Watch) -> None:
    first = prepared(case)
    old = time.time() - 2 * WEEK
    left = first.run.root.parent / ".shards" / f"{'0' * 64}.safetensors"
    left.write_bytes(b"")
    for path in left.parent.glob("*.safetensors"):
        os.utime(path, (old, old))
    prepared(case, "name=second", "data.max_length=100")
    names = {path.name for path in left.parent.glob("*.safetensors")}
    assert names == set(watch.written)  # those of the first run are old, and held


def test_runs_side_by_side_share_a_memory_of_digests(tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that save at the same moment: either memory is right, and neither fails."""
    file = tmp_path / "data.jsonl"
    file.write_text("{}\n", encoding="utf-8")
    saved = tmp_path / "cache" / "digests.json"
    one, other = DigestMemory.load(saved), DigestMemory.load(saved)
    for memory in (one, other):
        memory.digest(file)
    fsync = os.fsync
    met: list[int] = []

    def meanwhile(descriptor: int) -> None:
        if not met:
            met.append(descriptor)
            monkeypatch.setattr(os, "getpid", lambda: 4_000_000)  # the other one is another process
            other.save()
            monkeypatch.undo()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    one.save()
    assert met and DigestMemory.load(saved).digest(file) == digests.file_digest(file)
    assert leftovers(tmp_path) == []


# ---- refusals are remembered as well --------------------------------------------------------------------------------


def test_refused_data_are_refused_again_without_work(case: Path, watch: Watch) -> None:
    write_jsonl(case.parent / "data" / "train.jsonl", [*chat_rows(5), {"prompt": "who"}])
    words = []
    for _ in range(2):
        run = staged(case, ASKED)
        with pytest.raises(DataRefused) as caught:
            run.data()
        words.append(str(caught.value))
    assert words[0] == words[1] and len(watch.written) == 2 and run.reused("data")
    allowed = prepared(case, "data.quarantine_budget=1")
    assert allowed.reused("data") and len(watch.written) == 2
