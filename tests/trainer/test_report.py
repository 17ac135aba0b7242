"""The report: one file that is alone, with curves, words of warning, and escaped responses."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax.config.load import to_dict
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.monitoring.metrics import MetricsWriter
from spatial_ssrl_jax.monitoring.rollout_samples import write_rollouts
from spatial_ssrl_jax.trainer.report import warnings, write_report

EVIL = '<script>alert("x")</script><img src=http://evil/x.png>'
CONFIG = to_dict(Config("demo"))


def grpo_steps(count: int, **last: float) -> list[dict]:
    """Rows of a healthy run; keywords (with __ for /) replace metrics of the last five."""
    healthy = {
        "reward/overall_mean": 0.5,
        "advantage/zero_variance_share": 0.2,
        "policy/entropy": 1.0,
        "response/length_mean": 30.0,
        "mismatch/logprob_mean": 0.001,
        "response/clipped_share": 0.0,
    }
    rows = [{"step": i, "stage": "grpo"} | healthy for i in range(1, count + 1)]
    for row in rows[-5:]:
        row |= {key.replace("__", "/"): value for key, value in last.items()}
    return rows


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"advantage__zero_variance_share": 0.9}, "90% of the groups have no variance"),
        ({"policy__entropy": 0.05}, "entropy is below a tenth"),
        ({"response__length_mean": 5.0}, "shorter than a third"),
        (
            {"mismatch__logprob_mean": 0.08},
            "Sampler and trainer differ by 0.080 nats a token, 80 times",
        ),
        ({"response__clipped_share": 0.25}, "25% of the responses are truncated"),
        ({"mismatch__logprob_mean": 0.01}, "0.010 nats a token, 10 times the first value"),
        ({"prompt__dropped": 5.0, "task__flip__count": 3.0}, "Of 8 prompts a step 5 are dropped"),
        ({"optim__skipped": 1.0}, "5 updates were skipped"),
    ],
)
def test_problems_are_named(last: dict, words: str):
    found = warnings(grpo_steps(20, **last))
    assert len(found) == 1 and words in found[0]


def test_a_healthy_or_young_run_has_no_warning():
    assert warnings(grpo_steps(20)) == []
    assert warnings(grpo_steps(9, policy__entropy=0.0)) == []
    assert warnings(grpo_steps(20, mismatch__logprob_mean=None)) == []


class Links(HTMLParser):
    """Every tag, and every address that a page refers to."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.addresses, self.polylines = [], [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.polylines += [value for name, value in attrs if tag == "polyline" and name == "points"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    writer = MetricsWriter(folder)
    for step in range(1, 4):
        writer.write("sft", step, {"loss/sft": 3.0 / step})
    for step in range(4, 16):
        figures = {"reward/overall_mean": step / 20, "response/clipped_share": 0.5}
        figures |= {"task/flip/accuracy": 0.1 * (step % 3), "task/crop/accuracy": 0.5}
        figures |= {"perf/rollout_seconds": 3.0, "perf/update_seconds": 1.0}
        if step == 15:
            figures |= {"heldout/flip/accuracy_greedy": 0.625, "heldout/flip/format": float("nan")}
        writer.write("grpo", step, figures)
    writer.close()
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    response = {"text": EVIL, "reward": 0.1, "advantage": -0.5, "accuracy": 0.0, "length": 7}
    row = {
        "task": "flip",
        "kind": "2x2",
        "question": EVIL,
        "answer": "A<B",
        "responses": [response] * 2,
    }
    write_rollouts(folder, 10, [row | {"images": [image, image]}])
    write_rollouts(folder, 14, [row | {"images": [image], "task": "crop"}])
    write_report(folder, CONFIG, "demo <1>")
    assert not list(folder.glob("*.partial"))
    return (folder / "report.html").read_text()


def test_what_a_model_says_is_text_and_no_markup(page: str):
    assert EVIL not in page and "&lt;script&gt;alert(&quot;x&quot;)" in page
    assert Links(page).tags.count("script") == 2  # the page's own
    assert "demo &lt;1&gt;" in page and "answer A&lt;B" in page


def test_the_page_refers_to_no_other_file(page: str):
    found = Links(page)
    assert found.addresses[0] == "data:,"  # no request for an icon
    assert len(found.addresses) == 4  # the rollouts' images
    assert all(address.startswith("data:image/jpeg;base64,") for address in found.addresses[1:])
    assert "url(" not in page


def test_each_figure_has_its_curve_through_every_step(page: str):
    figures = dict(
        re.findall(r"<figcaption>(.*?)<output></output></figcaption>(.*?)</figure>", page)
    )
    assert set(figures) == {"Reward", "Accuracy per task", "Supervised loss"}
    (reward,) = Links(figures["Reward"]).polylines
    points = [tuple(map(float, point.split(","))) for point in reward.split()]
    assert len(points) == 12 and points[0][0] < points[-1][0]
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)  # it rises
    assert len(Links(figures["Accuracy per task"]).polylines) == 2
    assert "</i>flip</span>" in figures["Accuracy per task"]
    assert "</i>crop</span>" in figures["Accuracy per task"]


def test_figures_in_words(page: str):
    assert '<p class="warning">50% of the responses are truncated' in page
    assert "rollout 3.00 s" in page and "update 1.00 s" in page and "width:75.0%" in page
    assert "GRPO, step 15 of 360" in page
    assert "<td>flip</td><td>0.625</td><td>–</td><td>–</td>" in page


def test_rollouts_can_be_chosen(page: str):
    assert re.findall(
        r'<article data-task="(\w+)" data-step="(\d+)" data-answers="(.*?)"', page
    ) == [
        ("flip", "10", "all wrong"),
        ("crop", "14", "all wrong"),
    ]
    assert "<option>flip</option>" in page and "<option>14</option>" in page


def test_the_best_score_of_a_benchmark_is_named(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    for step, score in enumerate((90.0, 40.0, 62.5, 62.5, 50.0)):
        writer.write("grpo", step, {"benchmark/3dsrbench/score": score})
    writer.close()
    write_report(tmp_path, CONFIG, "demo")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>3DSRBench</h2>" in page and "<figcaption>Benchmark score" in page
    assert "<td>untrained, step 0</td><td>90.00</td>" in page
    assert "<td>GRPO, step 4</td><td>50.00</td>" in page
    assert "<td>best, step 2</td><td>62.50</td>" in page


def test_a_run_that_has_not_begun_has_a_report(tmp_path: Path):
    write_report(tmp_path, CONFIG, "demo")
    page = (tmp_path / "report.html").read_text()
    assert "Not started" in page and "<article" not in page


@pytest.mark.parametrize("field", ["task", "question", "images", "responses"])
def test_damaged_rollouts_and_images_are_left_out(tmp_path: Path, field: str):
    response = {"text": "t", "reward": 0.1, "advantage": -0.5, "accuracy": 0.0, "length": 7}
    row = {"task": "flip", "kind": "flip", "question": "shown", "answer": "A"}
    row |= {"responses": [response], "images": [np.zeros((8, 8, 3), np.uint8)]}
    path = write_rollouts(tmp_path, 1, [row] * 3)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {field: [{"a": 1}], "answer": "damaged"})
    path.write_text("\n".join(lines))
    images = sorted(path.parent.glob("images/*.png"))
    images[0].write_bytes(images[0].read_bytes()[:40])
    images[2].unlink()
    write_report(tmp_path, CONFIG, "demo")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<article") == 2 and "answer damaged" not in page
    assert "data:image" not in page.partition("<article")[2]
