"""The site's hooks: pages made of files in the repository's root, and references in docstrings."""

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# files outside of docs/, and the names of their pages
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files in the root."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source == "LICENSE":
            text = f"# License\n\n```text\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links that work in the repository to those of the site."""
    folder = ROOT if page.file.src_uri in PAGES.values() else ROOT / "docs"

    def changed(match: re.Match[str]) -> str:
        text, target = match.groups()
        if re.match(r"https?:|#", target):
            return match[0]
        path, _, heading = target.partition("#")
        path = (folder / path).resolve().relative_to(ROOT).as_posix()
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            return text  # a file or folder of the repository that has no page
        return f"[{text}]({path}{'#' if heading else ''}{heading})"

    if page.file.src_uri.startswith("api/"):
        return markdown
    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", changed, markdown)


class Docstrings(griffe.Extension):
    """Change ``:func:`name``` in docstrings to links to the API reference, or to code where the name has no page, and
    show the help texts of the options of ``TrainConfig``."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        options = []
        for attribute in cls.attributes.values():
            match attribute.value:
                case griffe.ExprCall(function=griffe.ExprName(name="_option"), arguments=[default, str(text), *_]):
                    attribute.value = default
                    options.append(f"    {attribute.name}: {ast.literal_eval(text)}.")
        if options and cls.docstring:
            cls.docstring.value += "\n\nArgs:\n" + "\n".join(options)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r":(?:attr|class|func|meth|mod):`([^`]+)`",
                lambda match: self.reference(obj, match[1].lstrip(".~")),
                obj.docstring.value,
            )

    @staticmethod
    def reference(obj: griffe.Object, name: str) -> str:
        if not name.startswith("vit_triton."):
            try:
                path = obj.resolve(name)
            except griffe.NameResolutionError:
                return f"`{name}`"
        else:
            path = name
            try:
                obj.modules_collection[name]
            except KeyError as error:
                raise ValueError(f"the docstring of {obj.path} refers to {name}, which does not exist") from error
        return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
