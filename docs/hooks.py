"""What mkdocs needs beside the pages: README and its neighbours as pages of the site, and each
source file that a page links to as a page with its code.

The Markdown stays as it is, readable where it lies; links are rewritten for the site only.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {path.name: path.name.lower() for path in ROOT.glob("*.md")} | {"README.md": "index.md"}
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cuda", ".yaml": "yaml"}
LINK = re.compile(r"(\]\()([^()\s:#]+)((?:#[^()\s]*)?\))")

CELL_CODE = re.compile(r"(?<=<code>)[^<]*(?=</code>)(?=[^\n]*</td>)")


def on_files(files: Files, config) -> Files:
    """Adds the pages that do not lie in docs/."""
    sources = set()
    for path in [*(ROOT / "docs").glob("*.md"), *map(ROOT.joinpath, OUTSIDE)]:
        for _, target, _ in LINK.findall(path.read_text()):
            there = repository_path(path, target)
            if not there.startswith("docs/") and there not in OUTSIDE:
                sources.add(there)
    for source, page in OUTSIDE.items():
        path = ROOT / source
        text = rewritten(path, path.read_text())
        files.append(File.generated(config, page, content=text))
    for source in sorted(sources):
        language = LANGUAGES.get(Path(source).suffix, "text")
        front = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n"
        code = f"{front}# {source}\n\n````{language}\n{(ROOT / source).read_text()}````\n"
        files.append(File.generated(config, f"source/{source}.md", content=code))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """A page of docs/ with its links to files outside turned to their pages on the site."""
    if page.file.generated_by is not None:
        return markdown
    return rewritten(ROOT / "docs" / page.file.src_uri, markdown)


def on_page_content(html: str, **_) -> str:
    """A page where names in tables break at their dots and underscores only, on a narrow screen."""
    return CELL_CODE.sub(lambda match: re.sub(r"(?<=\w)([._])(?=\w)", r"\1<wbr>", match[0]), html)


def rewritten(path: Path, text: str) -> str:
    """The text of `path` with relative links as from docs/."""

    def turned(match: re.Match) -> str:
        there = repository_path(path, match[2])
        if there in OUTSIDE:
            there = OUTSIDE[there]
        elif there.startswith("docs/"):
            there = there.removeprefix("docs/")
        else:
            there = f"source/{there}.md"
        return match[1] + there + match[3]

    return LINK.sub(turned, text)


def repository_path(path: Path, target: str) -> str:
    """A link's target in the page at `path`, from the root of the repository."""
    here = path.relative_to(ROOT).parent.as_posix()
    return posixpath.normpath(posixpath.join(here, target))
