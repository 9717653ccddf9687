"""Under which conditions the files of ``benchmarks/results`` were measured, in sentences, and by which command."""

from __future__ import annotations

import ast
import csv
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# The keys that ``ssm-backbones benchmark`` writes; comments without one of them are sentences already.
_KEYS = ("gpu", "cpu", "instruction set", "threads", "dtype", "allocator", "torch", "backbones", "commit", "arguments")
_KEY = re.compile(r"([a-z][a-z ]+): (.*)")
_ARGUMENT = re.compile(r"(\w+)=(\[.*?\]|.*?)(?=\s\w+=|$)")
_MADE_BY_HAND = "No command in this repository repeats this measurement."


@dataclass(frozen=True)
class Results:
    """A file's rows, and the lines of comment above them."""

    path: Path
    comments: list[str]
    rows: list[dict[str, str]]

    @cached_property
    def facts(self) -> dict[str, str]:
        """What the benchmark wrote about itself, by key; empty for files that it did not write."""
        pairs = (match.groups() for line in self.comments if (match := _KEY.fullmatch(line)))
        found = {key: value for key, value in pairs}
        return found if "arguments" in found else {}

    @cached_property
    def arguments(self) -> dict[str, str]:
        """The benchmark's arguments by name, as they were printed; empty for files that it did not write."""
        return dict(_ARGUMENT.findall(self.facts.get("arguments", "").partition("; ")[0]))

    def need(self, *columns: str) -> None:
        """Raises ValueError where a column is missing."""
        missing = [name for name in columns if not self.rows or name not in self.rows[0]]
        if missing:
            raise ValueError(f"{self.path}: no column {', '.join(missing)}")


def read(path: Path) -> Results:
    """A CSV file whose first lines begin with ``#``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ").strip() for line in lines if line.startswith("#")]
    return Results(path, comments, list(csv.DictReader(line for line in lines if not line.startswith("#"))))


def conditions(files: Iterable[Results], root: Path, prefix: str = "") -> str:
    """A paragraph for each file: where and how it was measured, and how to measure it again.

    Args:
        files: the results of one table.
        root: of the repository.
        prefix: leads from the page to ``root``.
    """
    paragraphs = []
    for file in files:
        name = file.path.relative_to(root).as_posix()
        if file.facts:
            again = f"To measure again: `{command(file)} --csv {name}`"
        else:
            again = _MADE_BY_HAND
        paragraphs.append(f"[{file.path.name}]({prefix}{name}): {_sentences(file)} {again}")
    return "\n\n".join(paragraphs)


def _sentences(file: Results) -> str:
    facts = file.facts
    if not facts:
        return " ".join(line if line.endswith(".") else f"{line}." for line in file.comments)
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != '1')}"
    if "gpu" in facts:  # for which the `cpu` kernels' instructions do not matter
        machine = f"{facts['gpu']} beside an {facts['cpu']} ({threads})"
    else:
        machine = f"{facts['cpu']} ({facts['instruction set']}, {threads})"
    version = f"ssm-backbones {facts['backbones']} at commit {facts['commit']}"
    said = [f"{machine}, {facts['dtype']}, torch {facts['torch']}, {version}"]
    if "rounds" in file.arguments:
        said.append(f"Medians of {file.arguments['rounds']} rounds")
    if facts["allocator"] != "default":
        said.append(f"The allocator {facts['allocator']}")
    said += [f"{key[0].upper()}{key[1:]}: {value}" for key, value in facts.items() if key not in _KEYS]
    if rest := facts["arguments"].partition("; ")[2]:
        said.append(rest[0].upper() + rest[1:])
    return " ".join(f"{sentence}." for sentence in said)


def command(file: Results) -> str:
    """The command line that measured a file's rows, without ``--csv``."""
    given = dict(file.arguments)
    if "shapes" in given:
        words = ["op", "--shapes", *ast.literal_eval(given.pop("shapes")), "--dtype", given.pop("dtype")]
    elif "against" in given:
        words = ["model", *ast.literal_eval(given.pop("names")), "--against", *ast.literal_eval(given.pop("against"))]
    else:
        kind = (
            "dense" if "configs" in given else "scaling" if "gpus" in given else "gpu" if "batch" in given else "host"
        )
        words = [kind, *ast.literal_eval(given.pop("configs" if kind == "dense" else "names"))]
        del given["device"], given["dtype"]  # it has one of each
    for name, value in given.items():
        words += {"True": [f"--{name}"], "False": [], "None": []}.get(value, [f"--{name}", value])
    return shlex.join(["ssm-backbones", "benchmark", *words])
