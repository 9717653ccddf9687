"""What is generated from the zoo and the benchmarks: complete, usable, reproducible, and stale when it should be."""

import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from mmengine.registry import MODELS
from PIL import Image, ImageChops, ImageDraw
from PIL.PngImagePlugin import PngInfo

from backbones import zoo
from backbones.commands import benchmark
from backbones.models import family_names
from tests.tolerances import LOGITS
from tools import certify, model_cards
from tools.cards import accuracy, benchmarks, card, conditions, facts, markdown, metafiles, pictures

ROOT = Path(__file__).parents[1]
SECTIONS = (
    *("Block", "Scan order", "Use", "Models", "Parity certificate", "Weights", "Training recipe"),
    *("Known traps, and deviations from the original", "Limits", "Licence", "Citation"),
)


@pytest.fixture(scope="module", params=family_names(guests=True))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def text(family: str) -> str:
    return card.card(family)


def test_a_card_has_every_section_and_every_model(family: str, text: str) -> None:
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(SECTIONS)
    for name, entry in facts.models(family):
        row = next(
            line for line in text.splitlines() if line.startswith(f"| `{name}` | {entry['parameters'] / 1e6:.1f}")
        )
        top1 = entry.get("reported", {}).get("imagenet", {}).get("top1")
        assert top1 is None or f"| {top1} |" in row
        certificate = text.partition("## Parity certificate")[2].partition("## Weights")[0]
        assert f"`{name}`" in certificate
    assert all(f"`{alias}` is `{name}`" in text for alias, name in facts.aliases(family).items())


def test_its_configs_build(text: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        scope: dict = {}
        exec(block, scope)
        if "backbone" in scope:
            backbone = MODELS.build(scope["backbone"])
            channels = [backbone.model.feature_info[i]["num_chs"] for i in backbone.out_indices]
            neck = scope.get("neck", {}).get("in_channels")
            head = scope.get("decode_head", {}).get("in_channels")
            assert channels in (neck, [neck], head)
            if "type" in scope.get("neck", {}):
                neck = MODELS.build(scope["neck"])
                assert head in (None, [256] * neck.num_outs)


def test_pictures_are_reproducible_and_compared_by_their_pixels(tmp_path: Path) -> None:
    png = pictures.orders_picture("vim")
    assert png == pictures.orders_picture("vim")
    path = tmp_path / "orders.png"
    assert not pictures.same_picture(path, png)
    path.write_bytes(png)
    assert pictures.same_picture(path, png)
    assert not pictures.same_picture(path, pictures.orders_picture("spatialmamba"))


def test_a_picture_is_stale_when_something_moved_but_not_when_edges_are_smoothed(tmp_path: Path) -> None:
    def page(draw: Callable[[ImageDraw.ImageDraw], object], **fields: str) -> bytes:
        image, buffer, texts = Image.new("RGB", (1600, 1000), "white"), io.BytesIO(), PngInfo()
        draw(ImageDraw.Draw(image))
        for name, text in fields.items():
            texts.add_text(name, text)
        image.save(buffer, "png", pnginfo=texts)
        return buffer.getvalue()

    path = tmp_path / "page.png"
    path.write_bytes(page(lambda on: on.ellipse((300, 400, 312, 412), "#882255"), Data="1"))
    assert pictures.same_picture(path, path.read_bytes())
    assert not pictures.same_picture(path, page(lambda on: on.ellipse((300, 400, 312, 412), "#882255"), Data="2"))
    assert not pictures.same_picture(path, page(lambda on: on.ellipse((300, 425, 312, 437), "#882255"), Data="1"))
    text = pictures.orders_picture("localvim")
    path.write_bytes(text)
    with Image.open(path) as image:
        buffer = io.BytesIO()
        Image.blend(image, ImageChops.offset(image, 1, 0), 0.5).save(buffer, "png")
    assert buffer.getvalue() != text
    assert pictures.same_picture(path, buffer.getvalue())


def test_the_picture_of_accuracy_shows_every_reported_model() -> None:
    drawn = accuracy.curves()
    shown = {name: top1 for curve in drawn for name, _, top1 in curve.points}
    reported = {
        name: entry["reported"]["imagenet"]["top1"]
        for family in facts.families()
        for name, entry in facts.models(family)
        if "imagenet" in entry.get("reported", {})
    }
    assert shown == reported
    figure = accuracy.accuracy_figure(drawn)
    (axes,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert [text.get_text() for text in axes.texts] == [curve.title for curve in drawn]
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    for i, box in enumerate(boxes):
        assert box.x0 > axes.bbox.x0
        assert box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:i])
        for curve in drawn:
            points = axes.transData.transform([point[1:] for point in curve.points])
            assert box.count_contains(points) == 0, f"{drawn[i].title} covers {curve.title}"


def test_a_curve_leads_through_the_best_of_its_models() -> None:
    points = (("a", 1.0, 70.0), ("b", 1.02, 72.0), ("c", 2.0, 71.0), ("d", 3.0, 75.0))
    curve = accuracy.Curve("x", False, points)
    assert curve.front() == [(1.02, 72.0), (3.0, 75.0)]
    assert curve.rest() == [(1.0, 70.0), (2.0, 71.0)]
    with pytest.raises(ValueError, match="widen"):
        accuracy.accuracy_figure([accuracy.Curve("x", False, (("a", 1000.0, 70.0),))])


def test_only_what_is_stale_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old.md", tmp_path / "cards" / "new.md"
    old.write_text("up to date")
    monkeypatch.setattr(model_cards, "ROOT", tmp_path)
    monkeypatch.setattr(model_cards, "texts", lambda: {old: "up to date", new: "fresh"})
    monkeypatch.setattr(model_cards, "pictures", lambda: {tmp_path / "a.png": pictures.orders_picture("vim")})
    assert model_cards.main(["--check"]) == 1
    assert not new.exists()
    before = old.stat().st_mtime_ns
    assert model_cards.main([]) == 0
    assert (new.read_text(), old.stat().st_mtime_ns) == ("fresh", before)
    assert model_cards.main(["--check"]) == 0


def test_blocks_are_replaced_between_their_markers() -> None:
    page = "a\n<!-- generated: x (how) -->\nold\n<!-- end of x -->\nb"
    changed = markdown.replace_block(page, "x", r"\1 new")
    assert changed == "a\n<!-- generated: x (how) -->\n\n\\1 new\n\n<!-- end of x -->\nb"
    assert markdown.replace_block(changed, "x", r"\1 new") == changed
    with pytest.raises(ValueError, match="generated: y"):
        markdown.replace_block(page, "y", "")


@pytest.mark.parametrize("rows", [facts.model_table(), facts.full_model_table("../")], ids=["readme", "models"])
def test_every_architecture_has_a_row(rows: str) -> None:
    names = [name for family in facts.families() for name, _ in facts.models(family)]
    assert re.findall(r"^\|.*?\| `(\w+)` \|", rows, re.MULTILINE) == names


def test_metafiles_hold_the_configs_that_exist_with_their_results() -> None:
    files = metafiles.metafiles(ROOT)
    index = yaml.safe_load(files.pop(ROOT / "model-index.yml"))
    assert index["Import"] == sorted(path.relative_to(ROOT).as_posix() for path in files)
    for path, content in files.items():
        entries = yaml.safe_load(content)["Models"]
        assert {entry["Config"] for entry in entries} == {
            config.relative_to(ROOT).as_posix() for config in path.parent.glob("*.py")
        }
    coco = {entry["Name"]: entry for entry in yaml.safe_load(files[ROOT / "configs/coco/metafile.yml"])["Models"]}
    entry = coco["mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco"]
    assert entry["Results"][0]["Metrics"] == {"box AP": 48.8, "mask AP": 43.7}


def test_a_config_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "configs" / "coco"
    folder.mkdir(parents=True)
    (folder / "mask-rcnn_resnet-50_fpn_1x_coco.py").touch()
    with pytest.raises(ValueError, match="'resnet_50' is no model of the zoo"):
        metafiles.metafiles(tmp_path)


SCAN = """# device X
# date Y
shape,dtype,out,deterministic,forward_ms,forward_backward_ms,official_forward_ms,official_forward_backward_ms
a,bf16,per_order,False,0.2,1.0,0.5,3.5
a,bf16,per_order,True,9,9,9,9
a,fp32,per_order,False,9,9,9,9
new,bf16,per_order,False,1,1,2,2
"""


def test_tables_of_speed(tmp_path: Path) -> None:
    path = tmp_path / "scan.csv"
    path.write_text(SCAN)
    results = conditions.read(path)
    assert benchmarks.gpu_scan_table([results]).splitlines()[2:] == [
        "| Vim-Ti at 224 x 224, batch 128 | 0.2 | 0.5 | 2.5x | 1.0 | 3.5 | 3.5x |",
        "| new | 1 | 2 | 2.0x | 1 | 2 | 2.0x |",
    ]
    assert conditions.conditions([results], tmp_path) == (
        "[scan.csv](scan.csv): device X. date Y. No command in this repository repeats this measurement."
    )
    with pytest.raises(ValueError, match=r"scan\.csv: no column of, backend, forward ms"):
        benchmarks.cpu_table(results)


@pytest.mark.parametrize(
    "name",
    [
        "selective_scan_cpu",
        "models_cpu",
        "models_cpu_1248",
        "models_cpu_bf16",
        "gpu_models",
        "gpu_dense",
        "gpu_dense_others",
    ],
)
def test_the_command_beside_a_table_has_the_arguments_of_the_measurement(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = conditions.read(model_cards.RESULTS / f"{name}.csv")
    program, tool, *arguments = shlex.split(conditions.command(results))
    assert (program, tool) == ("ssm-backbones", "benchmark")
    given = vars(benchmark.parse_args(arguments))
    assert {name: str(value) for name, value in given.items() if name not in ("run", "csv")} == results.arguments
    text = conditions.conditions([results], ROOT)
    assert f"at commit {results.facts['commit']}." in text
    assert f"`{conditions.command(results)} --csv benchmarks/results/{name}.csv`" in text


def test_the_summary_compares_models_of_one_run_and_says_in_which_mode() -> None:
    files = [conditions.read(model_cards.RESULTS / f"{name}.csv") for name in ("models_cpu", "models_cpu_1248")]
    gpu = conditions.read(model_cards.RESULTS / "gpu_models.csv")
    rows = [line.strip("| ").split(" | ") for line in benchmarks.summary_table(files, gpu).splitlines()[2:]]
    speeds = {(row["model"], row["mode"]): float(row["inference_img_s"] or "nan") for row in gpu.rows}
    ours, other = "vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224"
    graphs = next(row for row in rows if row[0] == f"`{ours}`" and "graphs" in row[2])
    against = "graphs" if (other, "graphs") in speeds else "eager"
    assert graphs[3] == f"{speeds[ours, 'graphs'] / speeds[other, against]:.2f}x"
    assert graphs[2].endswith("against eager mode") == (against == "eager")
    for row in gpu.rows:
        row["training_img_s"] = row["training_img_s"] if row["mode"] == "eager" else ""
    assert "graphs" not in benchmarks.summary_table(files, gpu)  # as where a run was ended before
    long = next(row for row in rows if "1248" in row[2])
    assert long[3] == f"{float(files[1].rows[0]['inference over deit']):.2f}x"


def test_reported_and_measured_share_no_column(text: str) -> None:
    header = next(line for line in text.splitlines() if line.startswith("| model | measured"))
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[1:4] == ["measured M", "measured G", "of which scans"]
    assert all(name.startswith("reported") or name in ("source", "weights") for name in columns[4:])


def test_the_readme_s_words_about_speed_hold() -> None:
    """They must change with the files when these are measured again."""
    for path in model_cards.RESULTS.glob("selective_scan_h200*.csv"):
        for row in conditions.read(path).rows:
            assert float(row["forward_ms"]) < float(row["official_forward_ms"])
    rows = {row["model"]: row for row in conditions.read(model_cards.RESULTS / "models_h200.csv").rows}
    graphs = {name: float(row["graph_inference_img_s"]) for name, row in rows.items()}
    ours = {name: speed for name, speed in graphs.items() if name.startswith(("vim", "vmamba"))}
    assert min(ours.values()) > graphs["convnext_tiny"] > graphs["swin_tiny_patch4_window7_224"]
    assert max(ours.values()) < graphs["deit_small_patch16_224"]
    assert float(rows["vmamba_tiny_s1l8"]["inference_img_s"]) < float(rows["convnext_tiny"]["inference_img_s"])
    slow = [graphs[name] for name in ("msvmamba_tiny", "groupmamba_tiny", "spatialmamba_tiny")]
    assert max(slow) < graphs["swin_tiny_patch4_window7_224"]
    rows = conditions.read(model_cards.RESULTS / "models_compiled_h200.csv").rows
    compiled = {row["model"]: float(row["inference_img_s"]) for row in rows if row["mode"] == "graphs"}
    assert compiled["convnext_tiny"] > compiled["vim_tiny"] > compiled["swin_tiny_patch4_window7_224"]
    assert compiled["swin_tiny_patch4_window7_224"] > compiled["vmamba_tiny_s1l8"]
    long = conditions.read(model_cards.RESULTS / "long_sequence_h200.csv").rows
    times = {row["model"] + row["attention"]: float(row["graph_inference_ms"]) for row in long if row["batch"] == "8"}
    assert times["deit_tiny_patch16_224scaled_dot_product_attention"] < times["vim_tiny"] < times["vim_tiny (original)"]
    assert times["vim_tiny"] < times["deit_tiny_patch16_224explicit"]


def test_a_certificate_is_what_replaying_gives(capsys: pytest.CaptureFixture[str]) -> None:
    row = certify._replay("lbvim_tiny_224", "lbvim_tiny")
    certified = zoo.load_measured()["models"]["lbvim_tiny"]["parity"][0]
    assert row.keys() == certified.keys()
    assert (row["recording"], row["input"]) == (certified["recording"], certified["input"])
    assert 0 < row["logits_max_error"] <= LOGITS
    assert certify.main(["--out", "no/such/folder/measured.yml"]) == 2
    assert capsys.readouterr().err == "certify.py: error: folder no/such/folder does not exist\n"


@pytest.mark.parametrize("family", family_names(guests=True))
def test_certificates_name_their_run(family: str) -> None:
    run = zoo.load_measured()["runs"][family]
    assert all(run.values())
    text = (ROOT / "model_cards" / f"{family}.md").read_text(encoding="utf-8")
    assert f"on {run['date']} at commit `{run['commit']}`, torch {run['torch']}, {run['device']}." in text


def test_other_families_keep_their_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = zoo.load_measured()
    monkeypatch.setattr(certify, "_replay", lambda name, model: {"recording": name})
    monkeypatch.setattr(certify, "compute", lambda name: {"size": 1})
    assert certify.main(["lbmamba", "--out", str(tmp_path / "measured.yml")]) == 0
    after = yaml.safe_load((tmp_path / "measured.yml").read_text(encoding="utf-8"))
    assert list(after["models"]) == list(before["models"])
    assert after["runs"].pop("lbmamba")["command"] == "python tools/certify.py lbmamba"
    assert after["runs"].items() <= before["runs"].items()
    changed = {name for name, facts in after["models"].items() if facts != before["models"][name]}
    assert changed == set(zoo.load_family("lbmamba")["models"])
    with pytest.raises(SystemExit):
        certify.main(["mamba"])
