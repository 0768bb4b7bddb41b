"""The page as a browser lays it out, where one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_runs import evolve

from evollm.report import read_run, write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")

# Where each of these ends on the right, in pixels of the frame.
MEASURE = """
<body style="margin:0"><iframe id="page" src="page.html" style="border:0;width:{width}px;height:900px"></iframe>
<script>
document.getElementById("page").onload = () => {{
  const inner = document.getElementById("page").contentDocument;
  const right = (all) => Math.max(...[...all].map((one) => one.getBoundingClientRect().right));
  const texts = [...inner.querySelectorAll("#family text")];
  const found = {{
    winner: right(texts.filter((one) => one.textContent.trim() === "{winner}")),
    cells: right(inner.querySelectorAll(".differences td")),
    page: inner.documentElement.scrollWidth,
    answers: right(inner.querySelectorAll(".sample div")),
  }};
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
}};
</script>"""


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory) -> Path:
    """The folder of a run of many generations, with its report."""
    folder = evolve(tokenizer, tmp_path_factory.mktemp("long") / "run", agents=3, generations=40)
    write_report(folder, folder.parent / "page.html", pictures=False)
    return folder


@pytest.mark.parametrize("width", [480, 1280])
def test_winner_interval_and_verdict_are_in_sight(run, tmp_path, width) -> None:
    frame = run.parent / f"frame-{width}.html"
    frame.write_text(MEASURE.format(width=width, winner=read_run(run).winner))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = [str(BROWSER), *options, "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}"]
    said = subprocess.run(
        [*command, frame.as_uri()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=True,
        text=True,
    )
    measured = re.search(r"<pre>(.*)</pre>", said.stdout)
    assert measured is not None
    found = json.loads(measured[1])
    assert 0.5 * width < found["winner"] <= width
    assert 0 < found["cells"] <= width
    assert found["answers"] <= width
    # Nothing but the tree and the settings scrolls sideways.
    assert found["page"] <= width
