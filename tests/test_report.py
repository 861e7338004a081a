"""The page of a run: complete, self-contained, and safe against the text of a model."""

import html.parser
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.report import CHARTS, HEIGHT, WIDTH, _chart, main, ticks, write_report
from spo_jax.runlog import RunLog

HOSTILE = "</pre></details><script>alert('x')</script><img src=x onerror=y>&amp;\"\ud800"
SUMMARY = {
  "initial": {"greedy_accuracy": 0.371, "sampled_accuracy": 0.25},
  "final": {"greedy_accuracy": 0.912, "sampled_accuracy": 0.5},
  "iterations": 3,
  "seconds": 312.4,
  "tokens": 1_923_456,
}


@pytest.fixture
def run(tmp_path):
  with RunLog(tmp_path / "chain<b>1") as log:
    log.write_config(f"seed: 3 # {HOSTILE}\n")
    log.log(0, {"eval/greedy_accuracy": 0.371, "eval/sampled_accuracy": 0.25})
    for i in range(1, 4):
      log.log(
        i,
        {key: i / 7 for chart in CHARTS for key, _ in chart.series}
        | {"loss/kl": float("nan"), "time/grade_s": "slow"},
      )
    log.log_samples(2, [{"prompt": "older", "response": "", "reward": 0.0, "finished": True}])
    log.log_samples(
      3,
      [
        {"prompt": HOSTILE, "response": HOSTILE, "reward": 1.0, "finished": True},
        {"prompt": "p", "response": "9" * 10**6, "reward": -0.5, "finished": False},
      ],
    )
    log.write_summary(SUMMARY)
  return log.run_dir


class Page(html.parser.HTMLParser):
  """Collects the tags with their attributes and the text a reader sees."""

  def __init__(self, path):
    super().__init__()
    self.tags, self.attributes, self.text = set(), [], ""
    self.feed(path.read_text(encoding="utf-8"))

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes += attrs

  def handle_data(self, data):
    self.text += data


def test_model_text_and_config_are_shown_as_text_and_never_run(run):
  page = Page(write_report(run))
  assert page.text.count(HOSTILE.replace("\ud800", "?")) == 3  # Prompt, response, config.
  assert not page.tags & {"script", "img", "link", "iframe"}
  assert page.tags >= {"svg", "details", "table"}
  assert not [name for name, _ in page.attributes if name.startswith("on")]
  assert page.text.count("chain<b>1") == 2  # Title and heading.


def test_the_page_needs_no_network(run):
  path = write_report(run)
  page = Page(path)
  assert path == (run / "report.html").resolve()
  assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset")]
  assert not re.search(r"https?:|url\(|@import", path.read_text())
  assert path.stat().st_size < 60_000


def test_the_page_shows_summary_charts_and_the_newest_samples(run):
  page = Page(write_report(run))
  for part in (
    "0.371",
    "0.912",
    "+0.541",
    "+0.250",
    "5 min 12 s",
    "1.92 M",
    "3 iterations",
    "Samples of iteration 3",
    "reward -0.500",
    "cut off",
    "iteration",
  ):
    assert part in page.text
  assert "older" not in page.text
  for chart in CHARTS:
    assert (chart.title in page.text) == (chart.title != "KL to the reference policy")
  assert "update" in page.text and "grade" not in page.text


def test_curves_follow_the_numbers(run):
  svg = ElementTree.fromstring(re.search(r"<svg.*?</svg>", write_report(run).read_text())[0])
  greedy, sampled = (
    [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    for line in svg.iter("polyline")
  )
  assert len(greedy) == len(sampled) == 4
  assert [x for x, _ in greedy] == sorted({x for x, _ in greedy})
  # SVG counts y from the top: 0.371 stands above 0.25, and 1/7 below both.
  assert greedy[0][1] < sampled[0][1] < greedy[1][1]
  assert greedy[1] == sampled[1]


@settings(deadline=None)
@given(
  values=st.lists(
    st.none() | st.floats(-1e30, 1e30) | st.sampled_from([1e-14, 5e-324]), max_size=5
  ),
  step=st.integers(1, 10**6),
)
def test_any_series_makes_a_well_formed_chart_inside_its_frame(values, step):
  chart = CHARTS[2]
  records = [{"iteration": i * step, chart.series[0][0]: y} for i, y in enumerate(values)]
  card = _chart(chart, records)
  numbers = [y for y in values if y is not None]
  assert bool(card) == bool(numbers)
  if not numbers:
    return
  svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", card)[0])
  [line] = svg.iter("polyline")
  points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
  assert len(points) == len(numbers)
  assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


@settings(deadline=None)
@given(low=st.floats(-1e6, 0), high=st.floats(0, 1e6))
def test_ticks_cover_the_range_with_few_round_numbers(low, high):
  result = ticks(low, high)
  slack = 1e-6 * (high - low)
  assert result[0] <= low + slack and result[-1] >= high - slack
  assert 3 <= len(result) <= 7
  assert result == sorted(set(result))


def test_ticks_are_the_ones_a_person_would_choose():
  assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
  assert ticks(0, 60) == [0, 20, 40, 60]
  assert ticks(-0.025, 0.02) == [-0.03, -0.02, -0.01, 0, 0.01, 0.02]


def test_an_unfinished_run_is_reported_as_far_as_it_came(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"iteration": 4, "rollout/reward_mean": 0.5}\n{"iter')
  page = Page(write_report(tmp_path))
  assert "the last iteration logged is 4" in page.text
  assert "Mean reward" in page.text and "Samples" not in page.text and "config" not in page.text


def test_a_run_killed_before_its_first_record_still_has_a_report(tmp_path):
  (tmp_path / "metrics.jsonl").write_text("")
  page = Page(write_report(tmp_path))
  assert "the last iteration logged is none" in page.text and "svg" not in page.tags


def test_an_accuracy_that_was_never_measured_is_a_dash(run):
  summary = SUMMARY | {"final": {"greedy_accuracy": None, "sampled_accuracy": 0.5}}
  (run / "summary.json").write_text(json.dumps(summary))
  assert "greedy accuracy0.371––" in Page(write_report(run)).text


def test_the_command_prints_the_path_of_the_page(run):
  done = subprocess.run(
    [sys.executable, "-m", "spo_jax.report", run],
    capture_output=True,
    text=True,
    check=False,
    cwd=Path(__file__).parents[1],
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, f"{run / 'report.html'}\n", "")


def test_help_is_there(capsys):
  with pytest.raises(SystemExit) as stop:
    main(["--help"])
  assert stop.value.code == 0 and "RUN_DIR" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_is_one_line_and_exit_code_one(run, capsys):
  (run / "report.html").mkdir()
  assert main([str(run)]) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ") and "report.html" in error and error.count("\n") == 1


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    (None, "", "there is no run directory"),
    ("other.txt", "", "holds no metrics.jsonl"),
    ("summary.json", "{", "is not the summary of a run"),
    ("summary.json", "[]", "is not the summary of a run"),
    ("summary.json", '{"iterations": 3}', "is not the summary of a run"),
  ],
)
def test_a_directory_without_a_run_is_one_line_and_exit_code_two(
  tmp_path, capsys, name, content, message
):
  run = tmp_path / "run"
  if name:
    run.mkdir()
    (run / name).write_text(content)
  if name == "summary.json":
    (run / "metrics.jsonl").write_text("")
  assert main([str(run)]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and message in error and error.count("\n") == 1
  assert not (run / "report.html").exists()
