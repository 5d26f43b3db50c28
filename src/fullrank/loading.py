"""YAML -> Recipe: all problems at once, each with file:line and, where one is near, a "did you mean".

YAML here is the core schema of YAML 1.2, so `2e-5` is a number and `no` is a word. Overrides are `key.path=value`, with the
value written as YAML; they are applied to the document before it is validated, once.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fullrank.errors import DataError, RecipeError
from fullrank.recipe import ALIASES, REFUSED, Recipe, Section, Source, ValidationSplit

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe and where it came from."""

    recipe: Recipe
    path: Path
    overrides: tuple[str, ...] = ()
    run_root: Path | None = None
    """Folder of the run whose saved recipe this is; None for a recipe file."""


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader whose plain scalars follow the YAML 1.2 core schema."""


class _CoreDumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which `_CoreLoader` (or a YAML 1.1 reader) would take for something else."""


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    for _either in (_CoreLoader, _CoreDumper):
        _either.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def load(path: str | Path, overrides: Sequence[str] = (), *, need_files: bool = True) -> LoadedRecipe:
    """Reads, overrides and validates a recipe; relative data paths become absolute.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings.
        need_files: False leaves paths as they are, for reading about a run whose data may have moved.

    Raises:
        RecipeError: with every problem of the file and the overrides.
        DataError: when the recipe is right but files it names do not exist.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise RecipeError(
            f"{path}: no such recipe" + (f"; did you mean {path.parent / near[0]}?" if near else ""),
            hint="`fullrank init` writes one to start from",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    document, lines = _parse(text, str(path))
    problems = _apply_overrides(document, lines, overrides)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems += [_describe(detail, lines, str(path)) for detail in error.errors()]
    if problems or recipe is None:
        raise RecipeError("\n".join(_in_reading_order(problems)), hint="`fullrank schema` prints every key with its meaning")
    if need_files:
        recipe = _with_absolute_paths(recipe, lines, path)
    return LoadedRecipe(recipe, path, tuple(overrides))


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out, so that the saved copy repeats the run by itself."""
    document = recipe.model_dump(mode="json")
    return yaml.dump(document, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=100)


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Lines `key.path: old then, new now` for every value in which two nested mappings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for k in keys for line in differences(before.get(k), now.get(k), f"{path}.{k}" if path else str(k))]
    return [] if before == now else [f"{path}: {before!r} then, {now!r} now"]


# ---- parsing, with positions ----------------------------------------------------------------------------------------


class _Lines(dict[KeyPath, str]):
    """Key path -> `file:line` or `override 'x=y'`; an absent path takes its nearest ancestor's place."""

    def nearest(self, path: KeyPath) -> str:
        for end in range(len(path), -1, -1):
            if path[:end] in self:
                return self[path[:end]]
        return ""


def _parse(text: str, file: str) -> tuple[dict[str, Any], _Lines]:
    try:
        loader = _CoreLoader(text)
    except yaml.reader.ReaderError as error:  # a character that YAML does not allow
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{file}:{line}: not valid YAML: the character {text[error.position]!r} is not allowed") from None
    try:
        node = loader.get_single_node()
        lines = _Lines({(): f"{file}:1"})
        duplicates = [] if node is None else list(_index(node, (), file, lines))
        document = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{file}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise RecipeError(f"{file}: an alias (*name) stands inside what it names") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise RecipeError(f"{file}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if duplicates:
        raise RecipeError("\n".join(duplicates), hint="write each key once")
    if not isinstance(document, dict):
        found = "an empty file" if document is None else f"a {type(document).__name__}"
        raise RecipeError(
            f"{file}:1: a recipe is a mapping of keys, found {found}", hint="`fullrank init` writes one to start from"
        )
    return document, lines


def _index(node: yaml.Node, path: KeyPath, file: str, lines: _Lines) -> Iterator[str]:
    """Records the line of every key below `node`; yields a problem for every key written twice."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            here = (*path, str(key_node.value))
            place = f"{file}:{key_node.start_mark.line + 1}"
            if here in lines:
                yield f"{place}: {dotted(here)}: written twice, first at {lines[here]}"
            lines[here] = place
            yield from _index(value_node, here, file, lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[(*path, number)] = f"{file}:{item.start_mark.line + 1}"
            yield from _index(item, (*path, number), file, lines)


def _apply_overrides(document: dict[str, Any], lines: _Lines, overrides: Sequence[str]) -> list[str]:
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            problems.append(
                f"override {override!r}: an override is key.path=value, for example train.optimizer.learning_rate=1e-5"
            )
            continue
        try:
            parsed = yaml.load(value, _CoreLoader)
        except (yaml.YAMLError, ValueError, RecursionError):
            problems.append(f"override {override!r}: the value is not valid YAML")
            continue
        *parents, last = key.split(".")
        target: Any = document
        for part in parents:
            below = target.setdefault(part, {})
            if not isinstance(below, dict):  # a short form, such as `validation: file.jsonl`, gives way
                below = target[part] = {}
            target = below
        target[last] = parsed
        lines[tuple(key.split("."))] = f"override {override!r}"
    return problems


# ---- describing problems --------------------------------------------------------------------------------------------


def dotted(path: KeyPath) -> str:
    """`train.optimizer.betas[1]` from ("train", "optimizer", "betas", 1)."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _describe(detail: ErrorDetails, lines: _Lines, file: str) -> str:
    is_about_a_key = detail["type"] in ("missing", "extra_forbidden") and isinstance(detail["loc"][-1], str)
    path = _real_path(detail["loc"], lines, is_about_a_key)
    place = lines.nearest(path)
    name = dotted(path)
    if detail["type"] == "extra_forbidden":
        return f"{place}: {name}: unknown key{_suggestion(path)}"
    if detail["type"] == "missing":
        if not is_about_a_key:
            return f"{place}: {name}: too few values"
        return f"{lines.nearest(path[:-1]) or file}: {name}: is required"
    message = detail["msg"].removeprefix("Value error, ")
    value = detail["input"]
    found = "" if isinstance(value, dict | list) or not name else f" (found {value!r})"
    return f"{place}: {name or 'recipe'}: {message[:1].lower()}{message[1:]}{found}"


def _real_path(loc: Sequence[str | int], lines: _Lines, ends_with_a_key: bool) -> KeyPath:
    """Drops the names of union members and short forms that pydantic adds and the user never wrote."""
    path: KeyPath = ()
    for position, part in enumerate(loc):
        written = (*path, part) in lines or any(known[: len(path) + 1] == (*path, part) for known in lines)
        if written or (ends_with_a_key and position == len(loc) - 1):
            path = (*path, part)
    return path


def _fields(path: KeyPath) -> dict[str, Any]:
    """The fields of the recipe section at `path`, or none where there is no section."""
    section: type[BaseModel] = Recipe
    for part in path:
        if part not in section.model_fields:  # a list's index, or the name of a test set
            continue
        below = [t for t in _types_within(section.model_fields[part].annotation) if issubclass(t, Section)]
        if not below:
            return {}
        section = below[0]
    return dict(section.model_fields)


def _types_within(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from _types_within(argument)


def _all_keys(section: type[BaseModel] = Recipe, path: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        yield (*path, name)
        for below in _types_within(field.annotation):
            if issubclass(below, Section):
                yield from _all_keys(below, (*path, name))


def _suggestion(path: KeyPath) -> str:
    key = str(path[-1])
    if key in REFUSED:
        return f": {REFUSED[key]}"
    if key in ALIASES:
        return f"; did you mean {ALIASES[key]!r}?"
    near = difflib.get_close_matches(key, _fields(path[:-1]), n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    every_key = list(_all_keys())
    near = difflib.get_close_matches(key, {str(k[-1]) for k in every_key}, n=1, cutoff=0.8)
    if near:
        return f"; did you mean {dotted(next(k for k in every_key if k[-1] == near[0]))!r}?"
    allowed = ", ".join(_fields(path[:-1]))
    return f"; allowed here: {allowed}" if allowed else ""


def _in_reading_order(problems: list[str]) -> list[str]:
    def line(problem: str) -> int:
        match = re.search(r":(\d+): ", problem)
        return int(match[1]) if match else 0

    return sorted(dict.fromkeys(problems), key=line)


# ---- paths ----------------------------------------------------------------------------------------------------------


def matching_files(path: str) -> list[str]:
    """The files that a path names: itself, or all that match a pattern (`*`, `?`, `[...]`, and `**` for folders), in order.

    A file whose own name has such characters is taken by that name.
    """
    if Path(path).is_file():
        return [path]
    if not glob.has_magic(path):
        return []
    found = glob.glob(path, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    return sorted(name for name in found if Path(name).is_file())


def _with_absolute_paths(recipe: Recipe, lines: _Lines, file: Path) -> Recipe:
    """Paths made absolute: looked for beside the recipe first, then in the working directory.

    A pattern stays one, for the files that match it when they are read; some must do so now.
    """
    missing: list[str] = []
    folders = dict.fromkeys([file.resolve().parent, Path.cwd()])

    def find(written: str, path: KeyPath) -> str:
        candidates = [(folder / Path(written).expanduser()).resolve() for folder in folders]
        for candidate in candidates:
            if candidate.exists():
                return str(candidate)
        if glob.has_magic(written):
            patterns = [str(Path(glob.escape(str(folder)), Path(written).expanduser())) for folder in folders]
            found = next((pattern for pattern in patterns if matching_files(pattern)), None)
            if found:
                return found
        looked = " and ".join(dict.fromkeys(str(candidate) for candidate in candidates))
        missing.append(f"{lines.nearest(path)}: {dotted(path)}: file not found: {written} (looked for {looked})")
        return written

    def sources(items: list[Source], path: KeyPath) -> list[Source]:
        return [s.model_copy(update={"path": find(s.path, path)}) if s.path else s for s in items]

    data = recipe.data
    update: dict[str, Any] = {"train": sources(data.train, ("data", "train"))}
    if not isinstance(data.validation, ValidationSplit):
        update["validation"] = sources(data.validation, ("data", "validation"))
    update["test"] = {name: sources(items, ("data", "test")) for name, items in data.test.items()}
    update["general"] = {name: sources(items, ("data", "general")) for name, items in data.general.items()}
    if data.chat_template:
        update["chat_template"] = find(data.chat_template, ("data", "chat_template"))
    if data.glossary:
        update["glossary"] = find(data.glossary, ("data", "glossary"))
    parallel = recipe.parallel
    if parallel.deepspeed_config:
        path = find(parallel.deepspeed_config, ("parallel", "deepspeed_config"))
        parallel = parallel.model_copy(update={"deepspeed_config": path})
    tasks = []
    for number, task in enumerate(recipe.evaluate.tasks):
        files: dict[str, str] = {}
        if task.json_schema:
            files["json_schema"] = find(task.json_schema, ("evaluate", "tasks", number, "json_schema"))
        if task.function:
            file_name, _, name = task.function.rpartition(":")
            files["function"] = f"{find(file_name, ('evaluate', 'tasks', number, 'function'))}:{name}"
        tasks.append(task.model_copy(update=files))
    evaluate = recipe.evaluate.model_copy(update={"tasks": tasks}) if tasks != recipe.evaluate.tasks else recipe.evaluate
    if missing:
        raise DataError("\n".join(missing), hint="paths are relative to the recipe's folder, then to the working directory")
    model_folder = next((folder / recipe.model.source for folder in folders if (folder / recipe.model.source).is_dir()), None)
    model = recipe.model.model_copy(update={"source": str(model_folder.resolve())}) if model_folder else recipe.model
    sections = {"data": data.model_copy(update=update), "model": model, "parallel": parallel, "evaluate": evaluate}
    return recipe.model_copy(update=sections)
