"""analyse.py and the notebook, on small dictionaries of every method over the activations of real prompts."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import started
import torch
from made_up_activations import planted_activations
from made_up_documents import write_documents

from crosscoder.activations.collection import Document
from crosscoder.activations.store import ActivationStore
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.findings import find
from crosscoder.analysis.latent_scaling import latent_scaling
from crosscoder.analysis.tables import ADDED, read_added, write_csv
from crosscoder.dashboard.records import DashboardConfig
from crosscoder.dashboard.summary import FEW, listed
from crosscoder.dictionaries.checkpoint import load_dictionary, save_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import StagewiseSAE, new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.extra_analyses import load_pair, open_second
from crosscoder.names import ActivationChoice, crosscoder_folder, name_of_method
from crosscoder.opening import AnalysisConfig, open_crosscoder
from crosscoder.results import write_page
from finqa.models import students
from finqa.runtime.errors import UserError
from finqa.runtime.journal import KeyedJournal
from finqa.runtime.paths import REPOSITORY, Folders
from finqa.task.records import TeacherRow

FOLDER = REPOSITORY / "crosscoder-model-diff"
NOTEBOOK = "analysis_and_dashboard.ipynb"
D_MODEL, N_LATENTS, DEAD = 64, 24, 5
METHODS = ("batchtopk", "l1", "partition", "dedicated", "difference-sae", "stagewise-sae")
OF_ALL = {"explained_variance", "explained_variance_by_kind", "firing_frequency"}
OF_ONE_KIND = ("difference-sae", "stagewise-sae")
OF_TWO_MODELS = {"relative_decoder_norms", "decoder_cosines", "latent_scaling"}


def dictionary(method: str) -> BatchTopKCrosscoder:
    """An untrained one with a dead latent, and where there are two models with one latent of each exclusive class."""
    groups = {"partition": {"n_delta": 8, "k_delta": 2}, "dedicated": {"reserved_share": 0.25}}
    config = CrosscoderConfig(D_MODEL, N_LATENTS, 4, method=method, **groups.get(method, {}))  # type: ignore[arg-type]
    model = new_dictionary(config, generator=torch.Generator().manual_seed(3))
    model.threshold = 0.05 if method == "difference-sae" else 0.4  # the difference is small
    model.delta_threshold = 0.2 if method == "partition" else None
    model.further_thresholds = {"dedicated": (0.1, 0.2), "stagewise-sae": (0.3,)}.get(method, ())
    model.b_enc.data[DEAD] = -1e6
    if config.compares_models:
        model.W_dec.data[2, 0] *= 0.05
        model.W_dec.data[3, 1] *= 0.05
    if method == "stagewise-sae":
        model.W_dec.data[6, 1] = -model.W_dec.data[6, 0]  # it turned about
        model.W_enc.data[1, :, 7] += model.W_enc.data[0, :, 8]
    return model


class Made:
    """A data folder with an activation set of the tiny student, and a checkpoint of every method."""

    def __init__(self, folder: Path, student: Path, rows: list[TeacherRow]):
        self.folders = Folders(data=folder / "data")
        self.results = folder / "results"
        self.student = student
        run = students.StudentRun("FinQA-mini", str(student), students.settings_for(str(student)))
        self.choice = ActivationChoice(run)
        tokenizer = students.load_tokenizer(str(student))
        documents = []
        for row in rows:
            ids, n_prompt = students.training_ids(tokenizer, row.prompt, row.generated_code)
            documents.append(Document(row.id, tuple(ids), n_prompt))

        def activations(table: dict[str, torch.Tensor]) -> torch.Tensor:
            return planted_activations(len(table["token_id"]), D_MODEL, 16)

        self.set_folder = self.folders.activations(self.choice.name)
        self.store = write_documents(self.set_folder, documents, tokenizer.bos_token_id, activations)
        for method in METHODS:
            about = {"activations": self.store.config.recorded}
            save_dictionary(dictionary(method), self.checkpoint(method), **about)

    def name(self, method: str) -> str:
        return name_of_method(self.choice.crosscoder_name, method)

    def checkpoint(self, method: str) -> Path:
        return crosscoder_folder(self.folders, self.name(method))

    def words(self, method: str = "batchtopk") -> list[str]:
        words = ["FinQA-mini", self.student, "--data-dir", self.folders.data, "--results-dir", self.results]
        return [*map(str, words), "--method", method]


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python command in the folder of the model diff, offline."""
    if words[0] == "analyse.py":
        return started.run(words, FOLDER, os.environ | environment)
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=FOLDER,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_here(*words: object) -> int:
    """analyse.py as a command, in this process: what it imports is there already. Its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["analyse.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FOLDER / "analyse.py"), run_name="__main__")
    return ended.value.code  # type: ignore[return-value]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path, teacher_rows: list[TeacherRow]) -> Made:
    return Made(tmp_path_factory.mktemp("analysed"), tiny_student, teacher_rows)


@pytest.fixture(scope="module")
def analysed(made: Made) -> Callable[[str], Path]:
    """The folder that analyse.py writes for a method; run once for each."""
    done: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in done:
            assert run_here(*made.words(method), "--most-changed", "6", "--examples-for", "4") == 0
            done[method] = made.results / made.name(method)
        return done[method]

    return of


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "analysis.json").read_text())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_figures_and_tables_that_apply_to_it(analysed, method):
    folder = analysed(method)
    figures = OF_ALL if method in OF_ONE_KIND else OF_ALL | OF_TWO_MODELS
    assert {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.svg")} == figures
    tables = {"latents", "most_changed", "explained_variance"}
    tables |= set() if method in OF_ONE_KIND else {"classes", "confirmed"}
    assert {path.stem for path in folder.glob("*.csv")} == tables
    assert {"analysis.json", "analysis.run.json", "dashboard.html"} <= {path.name for path in folder.iterdir()}
    assert len(table(folder / "latents.csv")) == N_LATENTS
    assert len(table(folder / "most_changed.csv")) == 6
    assert json.loads((folder / "analysis.run.json").read_text())["config"]["method"] == method


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_those_of_the_library_over_the_held_out_documents(made, analysed, method):
    found = numbers(analysed(method))
    store = ActivationStore(made.set_folder)
    held_out = store.split(0.1, 0).held_out
    model = load_dictionary(made.checkpoint(method))
    raw = store.read(held_out)
    expected = analysis.explained_variance(model, [raw])._asdict()
    assert found["explained_variance"] == pytest.approx({k: v for k, v in expected.items() if v is not None})
    assert (found["n_tokens"], found["n_held_out_tokens"]) == (len(store), len(held_out))
    with torch.no_grad():
        f = model.encode(model.scale(store.read(torch.arange(len(store)))))
    alive = int((f > 0).any(dim=0).sum())
    assert alive < N_LATENTS
    assert found["latents"] == {"n": N_LATENTS, "alive": alive, "dead": N_LATENTS - alive}
    assert sum(map(sum, found["frequency"]["histogram"]["counts"].values())) == alive


def page_of(folder: Path) -> dict[str, Any]:
    packed = re.findall(r'id="data">(.*?)</script>', (folder / "dashboard.html").read_text(), re.DOTALL)[0]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def columns_of_page(folder: Path) -> set[str]:
    return {column["key"] for column in page_of(folder)["columns"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["batchtopk", "difference-sae", "stagewise-sae"])
def test_the_first_screen_of_the_dashboard_says_what_the_tables_say(analysed, chromium, method):
    folder = analysed(method)
    found, rows = numbers(folder), table(folder / "latents.csv")
    page = chromium.new_page()
    page.goto((folder / "dashboard.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    said = page.inner_text("#sentences")
    shown = [int(text) for text in page.locator("#changed th").all_inner_texts()]
    page.close()
    alive = [row for row in rows if float(row["frequency"]) > 0]
    dead = len(rows) - len(alive)
    expected = {f"{len(alive)} of its {len(rows)} latents are active; {dead} are dead"}
    names = {"instruct": "the instruct model", "fine_tuned": "the fine-tuned model", "difference": "their difference"}
    explained = found["explained_variance"]
    expected |= {f"{explained[key]:.1%} of the variance of {name}" for key, name in names.items() if key in explained}
    shares = sorted((float(row["difference_share"]) for row in rows), reverse=True)
    half = next(n for n in range(1, len(shares)) if sum(shares[:n]) >= sum(shares) / 2)
    expected |= {f"{half} of the active ones make up half of the difference of the models"}
    if method == "batchtopk":
        expected |= {
            f"{row['latents']} {row['class'].replace('between', 'in between')}" for row in table(folder / "classes.csv")
        }
        for kind in ("fine-tuned-only", "instruct-only"):
            confirmed = [row["latent"] for row in alive if row["confirmed"] == kind]
            which = f" ({listed(confirmed)})" if 0 < len(confirmed) <= FEW else ""
            expected |= {f"{len(confirmed)} as {kind}{which}"}
    if method == "stagewise-sae":
        expected |= {f"{sum(float(row['change']) > 0.1 for row in alive)} turned by more than 0.1"}
    changed = table(folder / "most_changed.csv")
    assert {phrase for phrase in expected if phrase not in said} == set()
    assert shown[: len(changed)] == [int(row["latent"]) for row in changed]
    assert re.search(r"^(\d+) of the 10 latents", said)


@pytest.mark.slow
def test_the_dashboard_has_the_labels_of_latents_csv_unless_it_is_of_another_dictionary(made, analysed, tmp_path):
    words = [*made.words()[:-3], str(tmp_path), "--method", "batchtopk"]
    folder = shutil.copytree(analysed("batchtopk"), tmp_path / made.name("batchtopk"))
    found = find(open_crosscoder(words))
    labelled = [
        row | {"label": f"label {row['latent']}", "label_score": "0.75"} for row in table(folder / "latents.csv")
    ]
    labelled[1] |= {"label": "", "label_score": ""}
    labelled[2] |= {"label": "a\u2028b\nc"}
    write_csv(folder / "latents.csv", labelled)
    write_page(found, DashboardConfig())
    assert {"label", "label_score"} == columns_of_page(folder) & set(ADDED)
    said = f"a mean score of 0.75 (95% interval 0.75 to 0.75, {len(labelled) - 1} labels); 0.5 is chance"
    assert said in " ".join(page_of(folder)["summary"]["sentences"])
    assert read_added(folder / "latents.csv", found.rows)["label"][:3] == ["label 0", None, "a\u2028b\nc"]
    write_csv(folder / "latents.csv", labelled[::-1])  # as one who sorts the table leaves it
    assert read_added(folder / "latents.csv", found.rows)["label"][:3] == ["label 0", None, "a\u2028b\nc"]
    write_csv(folder / "latents.csv", [row | {"label_score": "x"} for row in labelled])
    with pytest.raises(UserError, match=r"latents\.csv: could not convert string to float"):
        write_page(found, DashboardConfig())
    write_csv(folder / "latents.csv", labelled)
    numbers = json.loads((folder / "analysis.json").read_text())
    for other in ({"dictionary": "of another seed"}, {"activations": "another set"}):
        (folder / "analysis.json").write_text(json.dumps(numbers | {"made_of": numbers["made_of"] | other}))
        write_page(found, DashboardConfig())
        assert columns_of_page(folder).isdisjoint(ADDED)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["batchtopk", "l1", "partition", "dedicated"])
def test_classes_norms_and_scaling_are_counted_over_the_latents_that_are_alive(made, analysed, method):
    folder = analysed(method)
    found = numbers(folder)
    alive = found["latents"]["alive"]
    classes = found["classes"]
    assert classes.pop("n") == sum(classes.values()) == alive
    assert classes["fine-tuned-only"] > 0 and classes["instruct-only"] > 0
    norms = found["relative_decoder_norm"]
    assert sum(norms["histogram"]["counts"]) == norms["n"] == alive
    assert sum(region["n"] for region in norms["regions"]) == alive
    assert found["decoder_cosine"]["n"] + found["decoder_cosine"]["without_length"] == alive
    shown = found["latent_scaling"]["shown"].values()
    assert sum(of["n"] + of["too_few"] + of["outside"] for of in shown) == alive
    rows = {row["class"]: row for row in table(folder / "classes.csv")}
    assert {kind: int(row["latents"]) for kind, row in rows.items()} == classes
    for kind in ("instruct-only", "fine-tuned-only"):
        assert int(rows[kind]["confirmed"]) == found["latent_scaling"][kind]["confirmed"]
        column = f"meets_{kind}".replace("-", "_")
        meet = found["latent_scaling"][kind]["meet"]
        assert {its: int(row[column]) for its, row in rows.items()} == {its: len(of) for its, of in meet.items()}
        own = [row for row in table(folder / "latents.csv") if row["confirmed"] in (kind, "both")]
        assert sorted(int(row["latent"]) for row in own) == sorted(j for of in meet.values() for j in of)
    confirmed = [row for row in table(folder / "latents.csv") if row["confirmed"]]
    assert table(folder / "confirmed.csv") == confirmed


@pytest.mark.slow
def test_the_table_of_latents_has_the_values_of_latent_scaling(made, analysed):
    rows = table(analysed("batchtopk") / "latents.csv")
    store = ActivationStore(made.set_folder)
    model = load_dictionary(made.checkpoint("batchtopk"))
    scaling = latent_scaling(model, [store.read(store.split(0.1, 0).held_out)])
    assert [row["kind"] for row in rows[2:4]] == ["fine-tuned-only", "instruct-only"]
    for latent, probe in ((2, 1), (3, 0)):
        assert float(rows[latent]["nu_err"]) == pytest.approx(scaling.nu_err[latent, probe].item(), rel=1e-4)
        assert int(rows[latent]["scaling_firings"]) == scaling.n[latent]
    changed = [int(row["latent"]) for row in table(analysed("batchtopk") / "most_changed.csv")]
    assert set(changed[:2]) == {2, 3}
    assert changed == numbers(analysed("batchtopk"))["most_changed"]["latents"]


@pytest.mark.slow
def test_explained_variance_is_given_by_kind_of_token(made, analysed):
    rows = {row["kind"]: row for row in table(analysed("batchtopk") / "explained_variance.csv")}
    assert {"all", "template", "chat", "frame", "passage", "question", "program", "end"} <= set(rows)
    parts = [int(row["n_tokens"]) for kind, row in rows.items() if kind not in ("all", "template")]
    assert sum(parts) == int(rows["all"]["n_tokens"]) == numbers(analysed("batchtopk"))["n_held_out_tokens"]


@pytest.mark.slow
def test_what_compares_two_models_is_left_out_for_a_difference_sae(made, analysed):
    folder = analysed("difference-sae")
    found = numbers(folder)
    assert not {"classes", "relative_decoder_norm", "decoder_cosine", "latent_scaling"} & set(found)
    assert set(found["explained_variance"]) == {"difference", "l0", "n_tokens"}
    rows = table(folder / "latents.csv")
    for column in ("delta", "relative_decoder_norm", "cosine", "nu_err", "nu_rec", "promoted_instruct"):
        assert {row[column] for row in rows} == {""}
    shares = [float(row["difference_share"]) for row in table(folder / "most_changed.csv")]
    assert shares == sorted(shares, reverse=True) and shares[-1] > 0
    assert found["most_changed"]["ordered_by"] == "difference_share"


@pytest.mark.slow
def test_the_classes_of_a_dedicated_crosscoder_are_its_groups(made, analysed):
    rows = table(analysed("dedicated") / "latents.csv")
    # The third and the fourth have lengths that Delta calls exclusive; they are of the shared group.
    assert [row["kind"] for row in rows] == ["shared"] * 12 + ["instruct-only"] * 6 + ["fine-tuned-only"] * 6
    assert float(rows[2]["delta"]) > 0.9 and float(rows[3]["delta"]) < 0.1
    assert {float(row["delta"]) for row in rows[12:18]} == {0} and {float(row["delta"]) for row in rows[18:]} == {1}


@pytest.mark.slow
def test_the_latents_of_a_stagewise_sae_are_in_the_order_of_their_change(made, analysed):
    folder = analysed("stagewise-sae")
    found, rows = numbers(folder), table(folder / "latents.csv")
    model = load_dictionary(made.checkpoint("stagewise-sae"))
    assert isinstance(model, StagewiseSAE)
    assert [float(row["change"]) for row in rows] == pytest.approx(model.change().tolist(), abs=1e-6)
    changes = [float(row["change"]) for row in table(folder / "most_changed.csv")]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0.5
    assert found["most_changed"]["ordered_by"] == "change"
    assert not {"classes", "relative_decoder_norm", "latent_scaling"} & set(found)
    assert {"instruct", "fine_tuned", "difference"} <= set(found["explained_variance"])


@pytest.mark.slow
def test_figures_of_an_earlier_dictionary_of_this_name_that_do_not_apply_are_not_left_there(made, tmp_path: Path):
    folder = tmp_path / made.name("difference-sae")
    folder.mkdir()
    stale = [folder / name for name in ("latent_scaling.png", "latent_scaling.svg", "classes.csv")]
    for path in stale:
        path.write_text("earlier")
    words = [*made.words("difference-sae"), "--results-dir", tmp_path, "--no-dashboard"]
    assert run_here(*words) == 0
    assert not any(path.exists() for path in stale)
    assert (folder / "analysis.json").exists() and not (folder / "dashboard.html").exists()


def same_results(written: Path, expected: Path) -> None:
    """Two folders of results with the same content, but for the manifest."""
    names = {path.name for path in expected.iterdir()} - {"analysis.run.json"}
    assert {path.name for path in written.iterdir()} == names
    for name in names:
        if not name.endswith(".png"):
            assert (written / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom_and_writes_what_the_command_writes(made, analysed, tmp_path: Path):
    words = [*made.words(), "--results-dir", str(tmp_path)]
    notebook = ("--to", "html", "--execute", NOTEBOOK, "--output-dir", tmp_path)
    environment = {"CROSSCODER_ARGUMENTS": shlex.join(words), "LATENTS_IN_TABLE": "6", "EXAMPLES_FOR": "4"}
    output = run("-m", "jupyter", "nbconvert", *notebook, **environment)
    assert output.returncode == 0, output.stderr
    same_results(tmp_path / made.name("batchtopk"), analysed("batchtopk"))
    page = (tmp_path / "analysis_and_dashboard.html").read_text()
    texts = re.findall(r'<img alt="([^"]*)"', page)
    assert {text.partition(": ")[0].replace(" ", "_") for text in texts} == OF_ALL | OF_TWO_MODELS
    assert len(texts) == page.count('src="data:image/png;base64,iVBOR') == len(OF_ALL | OF_TWO_MODELS), texts
    assert "<em>Left out" not in page


@pytest.mark.slow
def test_the_notebooks_cells_leave_out_what_a_difference_sae_has_not(made, analysed, tmp_path: Path, monkeypatch):
    words = [*made.words("difference-sae"), "--results-dir", str(tmp_path)]
    monkeypatch.setenv("CROSSCODER_ARGUMENTS", shlex.join(words))
    monkeypatch.setenv("LATENTS_IN_TABLE", "6")
    monkeypatch.setenv("EXAMPLES_FOR", "4")
    from IPython.display import Markdown

    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    names: dict[str, Any] = {}
    for cell in json.loads((FOLDER / NOTEBOOK).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK, "exec"), names)
    same_results(tmp_path / made.name("difference-sae"), analysed("difference-sae"))
    left_out = [what for what in shown if isinstance(what, Markdown) and "Left out" in str(what.data)]
    assert len(left_out) == len(OF_TWO_MODELS)


# Another seed, and the models themselves


@pytest.fixture
def with_adapter(made: Made, data_folder: Path) -> Made:
    """With the tiny student's fine-tune beside the activation set."""
    student = made.choice.student
    own, source = (f.model(student.dataset, student.model_id) for f in (made.folders, Folders(data=data_folder)))
    shutil.copytree(source, own, dirs_exist_ok=True)
    return made


@pytest.mark.slow
def test_a_second_seed_and_the_models_give_a_table_each(with_adapter, tmp_path: Path):
    made = with_adapter
    words = [*made.words(), "--results-dir", tmp_path, "--no-dashboard"]
    assert run_here(*words, "--second-seed", made.checkpoint("batchtopk"), "--splice") == 0
    folder = tmp_path / made.name("batchtopk")
    found = numbers(folder)
    stability = table(folder / "stability.csv")
    assert len(stability) == len(found["stability"])
    everything = stability[0]
    assert everything["set"] == "all"
    assert int(everything["n_first"]) == int(everything["n_second"]) > 0
    # Against itself every latent is found again.
    assert float(everything["matched_0.95"]) == 1
    assert "fine-tuned-only, confirmed" in {row["set"] for row in stability}
    splicing = table(folder / "splicing.csv")
    assert len(splicing) == len(found["splicing"])
    assert {row["model"] for row in splicing} == {"instruct", "fine-tuned"}
    assert {int(row["n_documents"]) for row in splicing} == {found["n_held_out_documents"]}
    assert all(float(row["spliced"]) != float(row["clean"]) for row in splicing)


@pytest.mark.slow
def test_splicing_a_difference_sae_is_in_the_fine_tuned_model_alone(with_adapter, tmp_path: Path):
    made = with_adapter
    words = [*made.words("difference-sae"), "--results-dir", tmp_path, "--no-dashboard", "--splice"]
    assert run_here(*words, "--second-seed", made.checkpoint("difference-sae")) == 0
    folder = tmp_path / made.name("difference-sae")
    assert {row["model"] for row in table(folder / "splicing.csv")} == {"fine-tuned"}
    assert [row["set"] for row in table(folder / "stability.csv")] == ["all"]


EXTRAS = ("--no-dashboard", "--splice", "--causal", "2")


def killed_when(words: Sequence[object], happened: Callable[[], bool]) -> None:
    """Run analyse.py, and kill it once something has happened."""
    assert started.killed_when(happened, ["analyse.py", *words], FOLDER).returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_run_has_all_that_is_cheap_and_goes_on_to_the_report_of_an_uninterrupted_one(
    with_adapter, tmp_path, monkeypatch, capsys
):
    made = with_adapter
    whole, killed = (tmp_path / name / made.name("batchtopk") for name in ("whole", "killed"))
    monkeypatch.setattr("finqa.runtime.progress.PLAIN_EVERY_S", 0)
    assert run_here(*made.words(), "--results-dir", whole.parent, *EXTRAS) == 0
    n_cells = len((whole / "causal" / "cells.jsonl").read_text().splitlines()) - 1  # and one batch
    assert re.search(rf"\n[\d:]{{8}} {n_cells} cells on 1 documents, tokens: .* s left\n", capsys.readouterr().err)
    words = [*made.words(), "--results-dir", killed.parent, *EXTRAS]

    def lines(name: str) -> int:
        path = killed / name
        return path.read_bytes().count(b"\n") if path.exists() else 0

    killed_when(words, (killed / "analysis.run.json").exists)
    cheap = {f"{name}.png" for name in OF_ALL | OF_TWO_MODELS} | {"latents.csv", "classes.csv", "analysis.run.json"}
    assert cheap <= {path.name for path in killed.iterdir()}
    assert "splicing" not in numbers(killed) and numbers(killed)["latents"] == numbers(whole)["latents"]
    killed_when(words, lambda: lines("causal/cells.jsonl") > 0)
    assert numbers(killed)["splicing"] == numbers(whole)["splicing"] and "causal" not in numbers(killed)
    (survey,) = (killed / "causal").glob("survey-*.safetensors")
    surveyed = survey.stat().st_mtime_ns
    assert run_here(*words) == 0
    assert "cells on 1 documents" not in capsys.readouterr().err
    assert survey.stat().st_mtime_ns == surveyed
    assert len(KeyedJournal(killed / "causal" / "cells.jsonl").read().found) == n_cells + 1
    for name in ("analysis.json", "causal/causal.json", "causal.csv", "splicing.csv", "causal.svg"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_what_a_second_seed_gave_is_not_measured_again(made, tmp_path: Path, monkeypatch):
    words = [*made.words(), "--results-dir", tmp_path, "--no-dashboard", "--second-seed", made.checkpoint("batchtopk")]
    assert run_here(*words) == 0
    first = (tmp_path / made.name("batchtopk") / "stability.csv").read_bytes()
    monkeypatch.setattr("crosscoder.analysis.stability.match", None)
    assert run_here(*words) == 0
    assert (tmp_path / made.name("batchtopk") / "stability.csv").read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize("method", ["batchtopk", "difference-sae", "stagewise-sae"])
def test_sets_of_latents_are_patched_into_the_models(with_adapter, method, tmp_path: Path, capsys):
    made = with_adapter
    words = [*made.words(method), "--results-dir", tmp_path]
    assert run_here(*words, "--causal", 1) == 0
    folder = tmp_path / made.name(method)
    assert {"causal_effect"} == columns_of_page(folder) & set(ADDED)
    effects = [float(row["causal_effect"]) for row in table(folder / "latents.csv")]
    assert effects[DEAD] == 0 < max(map(abs, effects))
    rows = table(folder / "causal.csv")
    assert {"none", "ceiling", "ranked", "random sets", "random directions"} <= {row["kind"] for row in rows}
    whole = [row for row in rows if row["kind"] == "ceiling" and row["measure"] == "divergence"]
    assert {(row["direction"], row["carrier"]) for row in whole} == {
        (direction, carrier) for direction in ("sufficiency", "necessity") for carrier in ("own", "other")
    }
    assert all(float(row["recovered"]) == pytest.approx(1) for row in whole if row["recovered"])
    assert (folder / "causal.png").stat().st_size > 10_000
    report = json.loads((folder / "causal" / "causal.json").read_text())
    assert (report["n_questions"], report["n_choosing"]) == (1, 1)
    capsys.readouterr()
    assert run_here(*words) == 0
    assert not (folder / "causal.csv").exists()
    assert not (folder / "causal.png").exists()
    assert columns_of_page(folder).isdisjoint(ADDED)
    assert run_here(*words, "--causal", -3) == 1
    assert "--causal must be at least 0, not -3" in capsys.readouterr().err


def test_a_dictionary_of_another_kind_or_of_other_activations_is_no_second_seed(made, tmp_path: Path):
    reading = open_crosscoder(made.words())
    with pytest.raises(UserError, match="is a partition of width 64, and cannot be matched with a batchtopk"):
        open_second(reading, made.checkpoint("partition"))
    save_dictionary(dictionary("batchtopk"), tmp_path / "other", activations={"fingerprint": "another set"})
    with pytest.raises(UserError, match="was trained on other activations than those in"):
        open_second(reading, tmp_path / "other")
    with pytest.raises(UserError, match="no crosscoder at"):
        open_second(reading, tmp_path / "nothing")


def test_a_fine_tune_that_changed_since_its_activations_were_recorded_is_not_spliced(with_adapter):
    reading = open_crosscoder(with_adapter.words())
    reading.store.config.recorded["fine_tuned_hash"] = "of another one"
    with pytest.raises(UserError, match=r"has changed since the activations were recorded"):
        load_pair(reading.store, with_adapter.choice, with_adapter.folders)


# What a user can get wrong


def test_help_imports_no_torch():
    output = run("-X", "importtime", "analyse.py", "--help")
    imported = {line.rsplit("|", 1)[-1].strip() for line in output.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "transformers", "pandas", "matplotlib", "numpy"})
    assert "DATASET_NAME" in output.stdout and "--most-changed" in output.stdout


def error_of(output: subprocess.CompletedProcess[str]) -> str:
    assert output.returncode == 1
    (line,) = output.stderr.strip().splitlines()
    return line


def test_bare_it_means_the_7b_run_and_says_both_places_and_the_command(tmp_path: Path):
    error = error_of(run("analyse.py", "--data-dir", tmp_path, HF_NAME="someone"))
    name = "Mistral-7B-Instruct-v0.3-FinQA-layer17-mlp_1k_samples_batchtopk"
    assert f"no crosscoder in {tmp_path}/models/crosscoders/{name}" in error
    assert f"on the Hub as someone/{name}" in error
    assert error.endswith(
        f"make it with: python train.py FinQA mistralai/Mistral-7B-Instruct-v0.3 --data-dir {tmp_path}"
    )


def test_the_command_that_is_named_makes_the_dictionary_that_was_asked_for(made, tmp_path: Path):
    words = [*made.words("partition"), "--data-dir", tmp_path, "--name", "mine"]
    assert error_of(run("analyse.py", *words)).endswith(f"--method partition --name mine --data-dir {tmp_path}")


def test_a_dictionary_of_other_activations_is_refused(made):
    other = crosscoder_folder(made.folders, "other")
    save_dictionary(dictionary("batchtopk"), other, activations={"fingerprint": "another set"})
    error = error_of(run("analyse.py", *made.words(), "--name", "other"))
    assert "was trained on other activations (not said: data set, layer, site) than those in" in error
    assert error.endswith(f"--name other --data-dir {made.folders.data} --overwrite")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--most-changed", "0"), "--most-changed must be at least 1, not 0"),
        (("--min-frequency", "1"), "--min-frequency must be at least 0 and below 1, not 1.0"),
        (("--examples-for", "-1"), "--examples-for must be at least 0, not -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_read(flags, said, tmp_path: Path):
    assert said in error_of(run("analyse.py", "--data-dir", tmp_path, *flags))


def test_a_reading_config_checks_itself():
    with pytest.raises(UserError, match="--min-frequency must be at least 0 and below 1"):
        AnalysisConfig(min_frequency=-0.1)
