"""What `mkdocs build` adds to docs/: README, reports, changelog and a list of decisions.

They stay where readers of the repository look for them; links between them and docs/ are turned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, *, config: Any) -> Files:
    """Add pages and pictures that lie outside docs/."""
    readme = (ROOT / "README.md").read_text("utf-8").replace("](docs/", "](")
    readme = readme.replace("](decisions/)", "](decisions/index.md)")
    readme = readme.replace("[examples/](examples)", "`examples/`")  # programs, which the site has not
    pages = {
        "index.md": readme,
        "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text("utf-8").replace("](docs/", "]("),
        "decisions/index.md": _decisions(),
    }
    for report in sorted((ROOT / "reports").glob("*.md")):
        pages[f"reports/{report.name}"] = report.read_text("utf-8").replace("](../docs/", "](../")
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    for picture in sorted((ROOT / "reports").glob("*.png")):
        files.append(File.generated(config, f"reports/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Reports lie beside docs/ in the repository, and inside the site."""
    return markdown.replace("](../reports/", "](reports/")


def _decisions() -> str:
    """A list of docs/decisions by title."""
    lines = ["# Decisions", "", "Why it is built this way.", ""]
    for path in sorted((ROOT / "docs/decisions").glob("0*.md")):
        title = path.read_text("utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"
