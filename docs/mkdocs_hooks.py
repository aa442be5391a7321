"""A hook of MkDocs for what lies outside of docs/, and for docstrings.

Pages link to files of the repository as ``../benchmarks/results/NAME.png``, so that they can be read where they lie, too. Here
pictures and figures that a page links to become part of the site; links to other files lead to the repository, if
mkdocs.yml names one in ``repo_url``, and are plain text otherwise.

Docstrings have marks that mkdocstrings leaves as they are: roles such as ``:class:`Name```, links such as ``[`Name`]``, and
backticks in types. They become code.
"""

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PUBLISHED = (".png", ".json")
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\(\.\./(?P<path>[^)#\s]+)\)")
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>(?P<tilde>~?)(?P<name>[^<]*)</code>")
NAME_IN_BRACKETS = re.compile(r"\[(<code>[^<]*</code>)\]")
TYPE = re.compile(r"\(<code>(?P<type>[^<]*`[^<]*)</code>\)")

log = logging.getLogger("mkdocs.hooks")  # whose warnings fail a strict build


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pictures and figures that pages link to."""
    linked = {match["path"] for page in sorted(DOCS.glob("*.md")) for match in LINK.finditer(page.read_text("utf-8"))}
    for path in sorted(linked):
        if not (ROOT / path).is_file():
            log.warning("a page links to %s, which does not exist.", path)
        elif path.endswith(PUBLISHED):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, config: Any, **kwargs: Any) -> str:
    """Have links out of docs/ lead to where their targets are in the site."""

    def replaced(match: re.Match[str]) -> str:
        path, text = match["path"], match["text"]
        if path.endswith(PUBLISHED):
            return f"{match['picture']}[{text}]({path})"
        repository = (config.repo_url or "").rstrip("/")
        return f"[{text}]({repository}/blob/main/{path})" if repository else text

    return LINK.sub(replaced, markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Marks in docstrings become code; of a name that begins with ``~`` its last part remains, as in Sphinx."""

    def replaced(match: re.Match[str]) -> str:
        name = match["name"].rpartition(".")[2] if match["tilde"] else match["name"]
        return f"<code>{name}</code>"

    html = NAME_IN_BRACKETS.sub(r"\1", ROLE.sub(replaced, html))
    return TYPE.sub(
        lambda match: "(" + re.sub(r"`([^`]*)`", r"<code>\1</code>", match["type"].replace("*", "")) + ")", html
    )
