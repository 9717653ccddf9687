"""Lets mkdocs read the repository's own Markdown files where they are.

Pages keep their paths, except that ``docs/`` is the root of the site: links into and out of it change by that much.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from backbones import zoo
from backbones.models import family_names

ROOT = Path(__file__).resolve().parents[2]
_PAGES = (
    "*.md",
    "model_cards/*.md",
    "model_cards/*.png",
    "benchmarks/results/*.csv",
    "backbones/*.py",
    "backbones/models/*.py",
    "LICENSE",
    "CITATION.cff",
)


def on_config(config: MkDocsConfig) -> None:
    """Puts the families' cards, in the order of all tables, under "Models" of the navigation."""
    (models,) = [entry["Models"] for entry in config.nav or [] if "Models" in entry]
    models += [{zoo.load_family(name)["title"]: f"model_cards/{name}.md"} for name in family_names(guests=True)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside of ``docs/``."""
    for pattern in _PAGES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Changes relative links for the place of the page in the site."""
    if page.file.generated_by is None:
        return re.sub(r"\]\(\.\./", "](", markdown)  # of docs/
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
