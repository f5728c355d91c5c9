"""The pages that are generated are in sync, and links between pages lead somewhere."""

import re
from pathlib import Path

import pytest

from gateway.config import leaves
from gateway.metrics import LABELS, Metrics, reference

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = {"routing.choose"}
"""What pages name that looks like a setting."""
PAGES = [ROOT / "README.md", ROOT / "k8s" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_metrics_is_in_sync() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert reference() in page, "paste what `python -m gateway.metrics` prints"


def test_every_label_is_explained() -> None:
    used: set[str] = set()
    for metric in Metrics().__dict__.values():
        used.update(getattr(getattr(metric, "metric", metric), "_labelnames", ()))
    assert used == set(LABELS)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_and_metrics_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    settings = {".".join(path) for path, _ in leaves()}
    sections = {key.partition(".")[0] for key in settings if "." in key}
    for section, key in re.findall(r"`(\w+)\.(\w+)(?::[^`]*)?`", text):
        name = f"{section}.{key}"
        assert section not in sections or name in settings | FUNCTIONS, name
    metrics = re.findall(r"`(cachewise_\w+)", reference())
    for name in re.findall(r"`(cachewise_\w+)", text):
        assert any(m == name or (name[-1] == "_" and m.startswith(name)) for m in metrics), name
