"""Run files and metrics, against an independent float64 computation and against trec_eval on the written file."""

import gzip
import math
import random

import numpy as np
import pytest

from rarezoo.retrieval import evaluate_run, evaluate_run_per_query, rank_documents, read_run, write_run

pytrec_eval = pytest.importorskip("pytrec_eval")


def random_case(seed, distinct_scores):
    """40 judged queries with graded judgements, rankings of 1 to 150 documents, many equal scores when few distinct."""
    generator = random.Random(seed)
    documents = [f"d{number}" for number in range(160)]
    run, qrels = {}, {}
    for number in range(40):
        query = f"q{number}"
        judged = generator.sample(documents, generator.randint(1, 60))
        qrels[query] = {document: generator.choice([0, 0, 1, 1, 2, 3]) for document in judged}
        retrieved = generator.sample(documents, generator.randint(1, 150))
        run[query] = {document: np.float32(generator.randrange(distinct_scores) / 7) for document in retrieved}
    run["unjudged"] = {"d1": 1.0}
    return run, qrels


def reference_ranking(scores):
    ordered = sorted(scores, reverse=True)  # larger ids first …
    return sorted(ordered, key=lambda document: -float(scores[document]))  # … among equal scores (a stable sort)


def reference_ndcg(scores, grades, cutoff):
    gains = [grades.get(document, 0) for document in reference_ranking(scores)[:cutoff]]
    ideal = sorted(grades.values(), reverse=True)[:cutoff]
    discounted = [sum(gain / math.log2(rank + 2) for rank, gain in enumerate(row)) for row in (gains, ideal)]
    return discounted[0] / discounted[1] if discounted[1] else 0.0


def reference_reciprocal_rank(scores, grades, cutoff):
    for rank, document in enumerate(reference_ranking(scores)[:cutoff], start=1):
        if grades.get(document, 0) > 0:
            return 1 / rank
    return 0.0


def reference_recall(scores, grades, cutoff):
    relevant = {document for document, grade in grades.items() if grade > 0}
    return len(relevant & set(reference_ranking(scores)[:cutoff])) / len(relevant) if relevant else 0.0


REFERENCES = {"nDCG": reference_ndcg, "RR": reference_reciprocal_rank, "R": reference_recall}


@pytest.mark.parametrize("distinct_scores", [1, 3, 10_000])
@pytest.mark.parametrize("metric", ["nDCG@10", "nDCG@3", "RR@10", "RR@1000", "R@100", "R@5"])
def test_metrics_equal_an_independent_computation(metric, distinct_scores):
    run, qrels = random_case(seed=distinct_scores, distinct_scores=distinct_scores)
    name, cutoff = metric.split("@")
    expected = {query: REFERENCES[name](run[query], grades, int(cutoff)) for query, grades in qrels.items()}
    assert 0.01 < np.mean(list(expected.values())) < 0.99
    per_query = evaluate_run_per_query(run, qrels, [metric])[metric]
    assert list(per_query) == list(qrels)
    assert per_query == pytest.approx(expected, abs=1e-12)
    assert evaluate_run(run, qrels, [metric])[metric] == pytest.approx(np.mean(list(expected.values())), abs=1e-12)


def test_rule_for_equal_scores_is_that_of_trec_eval(tmp_path):
    run, qrels = random_case(seed=5, distinct_scores=2)
    write_run(run, tmp_path / "run.txt")
    raw = {}
    for line in (tmp_path / "run.txt").read_text().splitlines():
        query, _, document, _, score, _ = line.split()
        raw.setdefault(query, {})[document] = float(score)
    trec_eval = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.100"}).evaluate(raw)
    ours = evaluate_run_per_query(run, qrels, ["nDCG@10", "RR", "R@100"])
    for metric, name in (("nDCG@10", "ndcg_cut_10"), ("RR", "recip_rank"), ("R@100", "recall_100")):
        assert ours[metric] == pytest.approx({query: row[name] for query, row in trec_eval.items()}, abs=1e-12)


def test_known_values():
    qrels = {"q": {"a": 2, "b": 1, "c": 0}}
    run = {"q": [("c", 0.9), ("b", 0.8), ("x", 0.8), ("a", 0.1)]}  # order: c, x, b, a
    values = evaluate_run(run, qrels, ["nDCG@10", "MRR@10", "R@3", "P@3"])
    assert values == {
        "nDCG@10": pytest.approx((1 / 2 + 2 / math.log2(5)) / (2 + 1 / math.log2(3))),
        "RR@10": pytest.approx(1 / 3),
        "R@3": pytest.approx(1 / 2),
        "P@3": pytest.approx(1 / 3),
    }
    assert evaluate_run(run, qrels).keys() == {"nDCG@10", "RR@10", "R@100"}


def test_missing_queries_count_as_zero_and_are_reported():
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 0}, "q4": {"b": 1}}
    run = {"q1": {"a": 1.0}, "q3": {"a": 1.0}, "q4": {}}
    with pytest.warns(UserWarning, match="2 of 4 judged queries have no results and count as 0: 'q2', 'q4'"):
        per_query = evaluate_run_per_query(run, qrels, ["nDCG@10", "RR@10"])
    assert per_query == {metric: {"q1": 1.0, "q2": 0.0, "q3": 0.0, "q4": 0.0} for metric in ("nDCG@10", "RR@10")}


def test_missing_queries_stay_in_the_denominator(tmp_path):
    """Means over all judged queries: of four, one has its answer first, one second, one no results, one is absent."""
    qrels = {"q1": {"a": 1}, "q2": {"a": 1, "b": 1}, "q3": {"a": 1}, "q4": {"a": 1}}
    run = {"q1": [("a", 2.0), ("b", 1.0)], "q2": [("c", 2.0), ("a", 1.0)], "q3": []}
    expected = {
        "RR@10": (1 + 1 / 2) / 4,
        "R@1": 1 / 4,
        "R@100": (1 + 1 / 2) / 4,
        "nDCG@10": (1 + (1 / math.log2(3)) / (1 + 1 / math.log2(3))) / 4,
    }
    with pytest.warns(UserWarning, match="2 of 4 judged queries have no results and count as 0: 'q3', 'q4'"):
        assert evaluate_run(run, qrels, list(expected)) == pytest.approx(expected, abs=1e-12)
    write_run(run, tmp_path / "run.txt")
    with pytest.warns(UserWarning, match="2 of 4 judged queries"):
        found = evaluate_run(read_run(tmp_path / "run.txt"), qrels, list(expected))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", ["foo@10", "nDCG@x", "nDCG@0", "nDCG@-1", "nDCG@1.5", "R", "nDCG@", "nDCG@10@2", ""])
def test_unknown_metric(metric):
    with pytest.raises(ValueError, match=r"unknown metric .*such as nDCG@10"):
        evaluate_run({"q": {"a": 1.0}}, {"q": {"a": 1}}, [metric])


@pytest.mark.parametrize(
    ("run", "qrels", "message"),
    [
        ({"1": {"a": 1.0}}, {"q1": {"a": 1}}, "no query in common: the run has '1', the judgements have 'q1'"),
        ({}, {"q1": {"a": 1}}, "no query in common: the run has none"),
        ({"q": {"a": math.nan}}, {"q": {"a": 1}}, "query 'q', document 'a': the score is nan"),
        ({"q": {"a": math.inf}}, {"q": {"a": 1}}, "query 'q', document 'a': the score is inf"),
        ({"q": [("a", 2.0), ("b", 1.0), ("a", 1.0)]}, {"q": {"a": 1}}, "query 'q': the document 'a' occurs twice"),
        ({"q": {"a": 1.0}}, {}, "nothing to evaluate: 3 metrics, 0 judged queries"),
    ],
)
def test_bad_runs(run, qrels, message):
    with pytest.raises(ValueError, match=message):
        evaluate_run(run, qrels)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_run_file_round_trip(tmp_path, suffix):
    run, _ = random_case(seed=3, distinct_scores=50)
    path = tmp_path / "runs" / f"run.txt{suffix}"
    write_run(run, path, name="first")
    write_run(run, path, name="second")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    again = read_run(path)
    assert again == {query: {key: float(value) for key, value in row.items()} for query, row in run.items()}
    assert [list(row) for row in again.values()] == [reference_ranking(row) for row in run.values()]
    text = gzip.decompress(path.read_bytes()).decode() if suffix else path.read_text()
    first = text.splitlines()[0].split()
    assert (first[0], first[1], first[3], first[5]) == ("q0", "Q0", "1", "second")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q Q0 d 1 0.5\n", r"run\.txt, line 1: expected 6 columns .* found 5"),
        ("q Q0 d 1 0.5 r\n\nq Q0 my file.txt 2 0.4 r\n", "line 3: expected 6 columns .* found 7"),
        ("q Q0 d 1 high r\n", "line 1: the score 'high' is not a finite number"),
        ("q Q0 d 1 nan r\n", "line 1: the score 'nan' is not a finite number"),
        ("q Q0 d 1 0.5 r\nq Q0 d 2 0.4 r\n", "line 2: the document 'd' occurs twice for query 'q'"),
        ("\n", r"run\.txt: holds no results"),
    ],
)
def test_bad_run_files(tmp_path, content, message):
    path = tmp_path / "run.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(path)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ({"q": {"my file.txt": 1.0}}, "r"),
        ({"q 1": {"d": 1.0}}, "r"),
        ({"q": {"d": 1.0}}, "a b"),
        ({"": {"d": 1.0}}, "r"),
    ],
)
def test_ids_with_white_space_are_not_written(tmp_path, run, name):
    path = tmp_path / "run.txt"
    path.write_text("an earlier run")
    with pytest.raises(ValueError, match="separated by white space"):
        write_run({"good": {"d": 1.0}, **run}, path, name)
    assert path.read_text() == "an earlier run"
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="the score is nan"):
        write_run({"q": {"d": math.nan}}, tmp_path / "run.txt")
    assert not list(tmp_path.iterdir())


def test_rank_documents_order():
    assert rank_documents("q", {"a": 1.0, "b": 1.0, "c": 2.0, "é": 1.0}) == [
        ("c", 2.0),
        ("é", 1.0),
        ("b", 1.0),
        ("a", 1.0),
    ]
