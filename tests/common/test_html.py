"""The pages in a real browser: they render, their controls work, and nothing is complained of."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax import evaluate, preview
from spatial_ssrl_jax.config.load import to_dict
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.eval.benchmarks.registry import open_benchmark
from spatial_ssrl_jax.eval.predictions import as_line
from spatial_ssrl_jax.eval.questions import unscored_prediction
from spatial_ssrl_jax.monitoring.metrics import MetricsWriter
from spatial_ssrl_jax.monitoring.rollout_samples import write_rollouts
from spatial_ssrl_jax.trainer.report import write_report
from tests.helpers import benchmark_files as files


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are missing: install them to try the pages.")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(driver)
    found = selenium.Chrome(options=options, service=service)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a synthetic run of both stages."""
    folder = tmp_path_factory.mktemp("run")
    writer = MetricsWriter(folder)
    for step in range(1, 11):
        writer.write("sft", step, {"loss/sft": 3.0 / step})
    for step in range(11, 31):
        figures = {"reward/overall_mean": step / 30, "task/flip/accuracy": step / 40}
        figures |= {"perf/rollout_seconds": 3.0, "perf/step_seconds": 5.0}
        writer.write("grpo", step, figures | {"task/crop/accuracy": step / 50})
    writer.close()
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for step, task, right in ((15, "flip", 1.0), (20, "crop", 0.0), (25, "crop", 1.0)):
        responses = [
            {"text": "a", "reward": a, "advantage": 0.0, "accuracy": a, "length": 3}
            for a in (right, 0.0)
        ]
        row = {"task": task, "kind": "k", "question": "?", "answer": "A", "responses": responses}
        write_rollouts(folder, step, [row | {"images": [image]}])
    write_report(folder, to_dict(Config("demo")), "demo")
    return folder / "report.html"


def shown(browser) -> list[str]:
    return [
        article.get_attribute("data-step")
        for article in browser.find_elements("css selector", "article")
        if article.is_displayed()
    ]


def choose(browser, name: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("css selector", f"select[name={name}]")).select_by_visible_text(
        value
    )


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_renders_without_complaint(browser, report: Path, width: int):
    browser.set_window_size(width, 900)
    browser.get(report.as_uri())
    assert browser.get_log("browser") == []
    images = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert images == [60, 60, 60]
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('polyline')].map(p => p.getBBox().width)"
    )
    assert len(drawn) == 4 and min(drawn) > 300
    wide = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert wide == 0  # nothing has to be scrolled to sideways


def test_the_reports_rollouts_are_chosen_by_step_task_and_answers(browser, report: Path):
    browser.get(report.as_uri())
    assert shown(browser) == ["15", "20", "25"]
    choose(browser, "task", "crop")
    assert shown(browser) == ["20", "25"]
    choose(browser, "answers", "mixed")
    assert shown(browser) == ["25"]
    assert browser.find_element("css selector", ".filters output").text == "1 of 3"
    choose(browser, "task", "all")
    choose(browser, "step", "15")
    assert shown(browser) == ["15"]
    assert browser.get_log("browser") == []


def test_a_curve_tells_its_value_under_the_pointer(browser, report: Path):
    from selenium.webdriver import ActionChains

    browser.set_window_size(1280, 900)
    browser.get(report.as_uri())
    svg = browser.find_element("css selector", "figure svg")
    ActionChains(browser).move_to_element_with_offset(svg, svg.size["width"] // 2 - 10, 0).perform()
    output = browser.find_element("css selector", "figure output")
    assert output.text == "step 30: 1"
    assert browser.get_log("browser") == []


def test_the_previews_examples_are_chosen_by_task_and_kind(browser, tmp_path: Path):
    out = tmp_path / "preview"
    preview.main(["--source=scenes:3:160x120", f"--out={out}", "--count=10"])
    browser.set_window_size(390, 900)
    browser.get((out / "index.html").as_uri())
    assert browser.get_log("browser") == []
    fields = [
        (a.get_attribute("data-task"), a.get_attribute("data-kind"))
        for a in browser.find_elements("css selector", "article")
    ]
    assert len(fields) == 10 and len({task for task, _ in fields}) == 5
    choose(browser, "task", "flip")
    choose(browser, "kind", fields[1][1])
    text = browser.find_element("css selector", ".filters output").text
    assert text == f"{fields.count(fields[1])} of 10"
    wide = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert wide == 0


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of two benchmarks, and of one of them a comparison with other answers."""
    folder = tmp_path_factory.mktemp("answers")
    paths = {}
    for name, model, responses in (
        ("blink", "a", "ABA"),
        ("blink", "b", "BAA"),
        ("spatial457", "a", ("yes", "no", r"I think that it is \boxed{yes}.", "<think>Perhaps")),
    ):
        benchmark = open_benchmark(name, files.WRITERS[name](folder))
        path = paths[name, model] = folder / f"{name}_{model}.jsonl"
        records = [
            unscored_prediction(question, benchmark.prompt(question), responses[i % len(responses)])
            for i, question in enumerate(benchmark.questions)
        ]
        path.write_text("".join(map(as_line, records)), "utf-8")
    given = [str(paths["blink", "a"]), str(paths["spatial457", "a"])]
    out = f"--out={folder / 'out'}"
    evaluate.main(["--score", *given, out, f"--data={folder}"])
    both = [str(paths["blink", model]) for model in "ab"]
    evaluate.main(["--compare", *both, out, f"--data={folder}"])
    return folder / "out"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("name", "count"), [("results", 13), ("comparison", 4)])
def test_pages_of_answers_render_without_complaint(browser, answers: Path, name, count, width):
    browser.set_window_size(width, 900)
    browser.get((answers / f"{name}.html").as_uri())
    assert browser.get_log("browser") == []
    images = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert images == [40] * count
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.ours .scale i')].map(e => e.clientWidth)"
    )
    assert drawn and min(drawn) > 10
    wide = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert wide == 0


def test_answers_are_chosen_by_benchmark_category_and_verdict(browser, answers: Path):
    browser.get((answers / "results.html").as_uri())
    output = browser.find_element("css selector", ".filters output")
    assert output.text == "10 of 10"
    choose(browser, "benchmark", "blink")
    choose(browser, "answer", "right")
    assert output.text == "2 of 10"
    choose(browser, "benchmark", "all")
    choose(browser, "answer", "unparsed")
    choose(browser, "category", "L4_occ")
    assert output.text == "1 of 10"
    assert browser.get_log("browser") == []


def test_changed_answers_are_chosen_by_how_they_changed(browser, answers: Path):
    browser.get((answers / "comparison.html").as_uri())
    choose(browser, "change", "lost")
    assert browser.find_element("css selector", ".filters output").text == "1 of 2"
    (shown,) = (a for a in browser.find_elements("css selector", "article") if a.is_displayed())
    assert "A: right" in shown.text and "B: wrong" in shown.text
