"""For mkdocs: what the pages link to outside of this folder (cards, recipes, sources) becomes part of the site."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parent.parent
# Where the repository's own files lie in the site, under the paths that they have there.
MIRROR = "repository"
_PATTERNS = ("*.md", "LICENSE", "model_cards/**/*", "examples/**/*", "benchmarks/**/*", "src/**/*.py")
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files, config):
    for pattern in _PATTERNS:
        for path in sorted(REPOSITORY.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                name = f"{MIRROR}/{path.relative_to(REPOSITORY).as_posix()}"
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links are written for who reads the repository, and put right for the site here."""
    mirrored = page.file.src_uri.startswith(f"{MIRROR}/")
    source = page.file.src_uri.removeprefix(f"{MIRROR}/") if mirrored else f"docs/{page.file.src_uri}"

    def on_site(link: re.Match) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(source), link[2]))
        if (REPOSITORY / target).is_dir():
            # What a folder tells of itself: its first page.
            pages = sorted((REPOSITORY / target).glob("*.md"))
            target = pages[0].relative_to(REPOSITORY).as_posix() if pages else target
        uri = target.removeprefix("docs/") if target.startswith("docs/") else f"{MIRROR}/{target}"
        return link[1] + os.path.relpath(uri, os.path.dirname(page.file.src_uri) or ".")

    return _LINK.sub(on_site, markdown)
