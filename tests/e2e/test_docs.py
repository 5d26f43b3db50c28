"""Every command in README and docs is typed as it stands there, in order, by a newcomer with a small data file.

`make` targets are read, not run (the checks run each of them once); `pip install` is what set up the environment of this test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command of the pages, once, in the order of the pages."""
    lines = [line.split("  #")[0].strip() for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, smollm2: None) -> Path:
    """A folder with a small data file, as somebody who follows the README has one."""
    folder = tmp_path_factory.mktemp("newcomer")
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(12)]
    for name in ("train.jsonl", "data.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "export.json").write_text("[]", encoding="utf-8")  # Label Studio's export of a project nobody worked on
    return folder


@pytest.mark.timeout(2400)  # dozens of commands, several of which train and evaluate a real model
def test_every_command_works(newcomer: Path) -> None:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env.pop("OMP_NUM_THREADS", None)  # a newcomer's machine computes with all its cores
    failed = []
    for command in commands():
        words = shlex.split(command)
        cwd = newcomer
        if words[:2] == ["pip", "install"]:
            continue
        if words[0] == "make":
            words, cwd = ["make", "--dry-run", *words[1:]], ROOT
        elif words[0] == "python":
            words[0] = sys.executable
        done = subprocess.run(words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            failed.append(f"$ {command}\n{done.stderr[-2000:]}")
    assert not failed, "\n\n".join(failed)
    for page in PAGES:  # what is shown in Python works on the run made above
        for block in blocks(page, "python"):
            done = subprocess.run(
                [sys.executable, "-c", block], cwd=newcomer, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{page.name}:\n{block}\n{done.stderr[-2000:]}"


def test_the_readme_tree_is_there() -> None:
    """Each path that the README's tree names exists."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1]
    package = ROOT / "src" / "fullrank"
    inside = "\n".join(re.findall(r"^ {6}(\S.*)$", tree, re.MULTILINE))
    names = re.findall(r"(?:^|  )([a-z_]+(?:/|\.py))", inside, re.MULTILINE)
    assert len(names) > 15
    assert not [name for name in names if not (package / name).exists()]
    assert not [name for name in re.findall(r"^ {4}([a-z]+/)", tree, re.MULTILINE) if not (ROOT / name).exists()]


def row(recipe: str, n: int) -> dict[str, object]:
    """A record of the form that a recipe is written for, no two alike."""
    if recipe == "gsm8k":
        said = [f"What is {n} plus {n * n}?", f"It is {n + n * n}.\n#### {n + n * n}"]
        return {"messages": [{"role": who, "content": words} for who, words in zip(("user", "assistant"), said, strict=True)]}
    if recipe == "domain-text":
        return {"text": f"A sentence of the domain, number {n}. " * 60}
    return {"prompt": f"Card {n * 37 % 1000} of mine is gone since {n} o'clock", "completion": "lost_card"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_planned(path: Path, tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    """Each recipe is planned, over a small data file of its form and with a tiny model in the place of its own."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    train, test = tmp_path / "data.jsonl", tmp_path / "test.jsonl"
    for file, numbers in ((train, range(40)), (test, range(40, 60))):
        file.write_text("".join(json.dumps(row(path.stem, n)) + "\n" for n in numbers), encoding="utf-8")
    items = written["data"]["train"] if isinstance(written["data"]["train"], list) else [{}]
    sources = [{**item, "path": str(train)} for item in items]
    overrides = [
        f"model.source={tiny_model_folder('llama')}",
        f"data.train={json.dumps(sources)}",
        *([f"data.test={test}"] if "test" in written["data"] else []),
    ]
    command = [sys.executable, "-m", "fullrank", "plan", str(path), *overrides, "--json", "--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    assert plan["fits"] and plan["steps"] >= 1


def test_the_pages_quote_the_results() -> None:
    """The figures in README and docs are those of benchmarks/results, not retyped."""
    spec = importlib.util.spec_from_file_location("quote", ROOT / "benchmarks" / "quote.py")
    assert spec and spec.loader
    quote = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quote)
    for path in quote.PAGES:
        page = path.read_text(encoding="utf-8")
        assert "<!-- figures: " in page and quote.with_figures(page) == page, f"{path.name}: run python benchmarks/quote.py"
