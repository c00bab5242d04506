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


def test_pre_commit_runs_the_versions_of_the_extra():
    pinned = dict(
        requirement.split("==")
        for requirement in PROJECT["project"]["optional-dependencies"]["test"]
        if "==" in requirement
    )
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = dict(re.findall(r"repo: https://\S+/([a-z]+)-\S+\n +rev: v(\S+)", config))
    assert hooks == {name: pinned[name] for name in ("pyright", "ruff")}
    assert config.count("rev:") == len(hooks)


def test_the_citation_is_of_the_latest_release():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.search(r"^## \[(\d.*)\] - (\S+)$", changelog, re.MULTILINE).groups()
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == version
    assert re.search(r'^date-released: "(.*)"$', citation, re.MULTILINE)[1] == date
