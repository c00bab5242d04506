"""The list of packages, and the README as a package index shows it."""

import fnmatch
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
URLS = PROJECT["project"]["urls"]
HOSTED = URLS["Source"]
RAW = HOSTED.replace("//github.com", "//raw.githubusercontent.com")


def test_packaging_finds_every_folder_of_the_package():
    """.ci/packages reads the wheel itself."""
    folders = {path.parent for path in (ROOT / "mora_jax").rglob("*.py")}
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    for folder in folders:
        assert (folder / "__init__.py").exists(), folder
        name = ".".join(folder.relative_to(ROOT).parts)
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns), name


def links_of_the_readme():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    found = re.findall(r"(!?)\[[^\]]*\]\(\s*<?([^)\s>]+)", text)
    found += [("", target) for target in re.findall(r"^\[[^\]]+\]:\s*<?(\S+?)>?$", text, re.M)]
    found += re.findall(r"""<(?:img|a)\b[^>]*?\b(?:src|href)()=["']([^"']+)""", text)
    return found


def test_the_readme_works_where_a_package_index_shows_it():
    links = links_of_the_readme()
    assert any(picture for picture, _ in links)
    for picture, target in links:
        assert target.startswith("https://") or (target[0] == "#" and not picture), target
        if picture and target.startswith(HOSTED):
            pytest.fail(f"{target} is a page about a picture; the picture is below {RAW}")


def test_the_readme_links_to_files_of_this_repository():
    ours = [target for _, target in links_of_the_readme() if target.startswith((HOSTED, RAW))]
    for target in ours:
        path, _, anchor = target.partition("#")
        path = ROOT / path.removeprefix(f"{HOSTED}/blob/main/").removeprefix(f"{RAW}/main/")
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    assert ours
