"""What MkDocs does beside its settings: pages from all over the repository, each at its own path.

So links between documents are the same on the site and in a checkout. A link to any other file of
the repository leads to a copy of it, and one to a folder to its README, or is text. The
reports of findings are pages that only the findings link to.
"""

import posixpath
import re
from pathlib import Path

import click
from mkdocs.structure.files import File

from helix_conformance.cli import main
from helix_conformance.report.html import explore_page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#:\s]+)\)")
INVARIANT = re.compile(r"^\*\*([A-Z]+-\d+)\*\*", re.M)
SECTION = re.compile(r"^(##+ (\d+(?:\.\d+)?) .*)$", re.M)
COMMANDS = "<!-- the help of every command -->"


def pages(nav):
    """The paths of all pages of the navigation."""
    if isinstance(nav, str):
        yield nav
    for below in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []:
        yield from pages(below)


def target(page, link):
    """The path in the repository to which a link of a page leads; `vectors` is a symbolic link."""
    path = (ROOT / posixpath.dirname(page) / link).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else link


def taken_in(path):
    """Whether a file that a page links to is on the site: pages of the navigation are already."""
    return not path.endswith(".md") or "/reports/" in path


def on_files(files, config):
    """Take in the pages of the navigation, and the files that they link to."""
    paths = set(pages(config.nav))
    for page in list(paths):
        linked = (target(page, link) for _, link in LINK.findall((ROOT / page).read_text()))
        paths |= {path for path in linked if (ROOT / path).is_file() and taken_in(path)}
    for path in sorted(paths):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(
        File.generated(config, "docs/explanation/explorer_page.html", content=explore_page())
    )
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links to folders, give SPEC.md an anchor for every number, write out the commands."""
    uri = page.file.src_uri

    def kept(found):
        path = target(uri, found[2])
        if (ROOT / path).is_dir():
            path += "/README.md"
            if files.get_file_from_path(path) is None:
                return found[1]
        return f"[{found[1]}]({posixpath.relpath(path, posixpath.dirname(uri))})"

    markdown = LINK.sub(kept, markdown)
    if uri.endswith("SPEC.md"):
        markdown = INVARIANT.sub(r'<span id="\1"></span>**\1**', markdown)
        markdown = SECTION.sub(r"\1 { #\2 }", markdown)
    return markdown.replace(COMMANDS, "\n".join(help_texts(main, ["helix-conformance"])))


def help_texts(command, words):
    """The help of a command and of all below it, as Markdown."""
    context = click.Context(command, info_name=" ".join(words), max_content_width=100)
    yield f"## `{' '.join(words)}`\n\n```text\n{command.get_help(context)}\n```\n"
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from help_texts(below, [*words, name])
