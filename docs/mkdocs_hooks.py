"""Hooks of MkDocs: README and CHANGELOG become pages of the site, and links to what is no page of it become plain text.

On disk every link goes to a file of the repository, which is right where the repository is read.
"""

import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_ROOT = pathlib.Path(__file__).parent.parent
_PAGES = {"index.md": "README.md", "changes.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for page, source in _PAGES.items():
        text = (_ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page, config: MkDocsConfig, files: Files) -> str:
    del config
    folder = posixpath.dirname(page.file.src_uri)
    names = {posixpath.join("..", source): name for name, source in _PAGES.items()}

    def link(found: re.Match) -> str:
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return found[0]
        uri = posixpath.normpath(posixpath.join(folder, path))
        if uri in names:
            return f"[{text}]({posixpath.relpath(names[uri], folder or '.')}{'#' + anchor if anchor else ''})"
        return found[0] if files.get_file_from_path(uri) else text

    return _LINK.sub(link, markdown)
