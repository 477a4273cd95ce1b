"""Numbers, several labels and labels of an order: Capotune beside named peers on the same rows.

    pip download --no-deps --no-binary :all: vaderSentiment    # tweets and reviews rated by twenty people each, MIT
    python benchmarks/targets.py --vader vaderSentiment-3.3.2.tar.gz --anem ../shared/data/anem

Three sets of real rows:

    regression    4,200 tweets, from -4 (very negative) to 4, the mean of twenty people (Hutto and Gilbert 2014)
    ordinal       3,708 sentences of reviews, the same scale in five steps
    multi-label   sentences of biomedical abstracts, the kinds of anatomical entities that each one names (AnEM)

Peers, each with what scikit-learn recommends for choosing its regularization by cross-validation:

    TF-IDF        words and pairs of words; RidgeCV, or one LogisticRegression a label (C by its F1, threshold a half)
    frozen        the same on the mean of MiniLM's last states, which is what sentence-transformers gives
    the mean, the most frequent labels

Every technique of ours runs with its defaults on the same MiniLM. Seconds are CPU seconds of the whole process,
features included, on an empty cache; results are appended to ``benchmarks/results/targets.json``.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "targets.json"
METHODS = ("feature-extraction", "lora", "qlora", "prompt-tuning")
EDGES = (-2.0, -0.5, 0.5, 2.0)
"""Between the five steps of a review's rating."""
Rows = list[dict[str, Any]]


# The rows


def rated(sdist: Path, name: str) -> Rows:
    """Texts with the mean of their ratings, from the source distribution of vaderSentiment."""
    inner = "hutto_ICWSM_2014"
    with tarfile.open(sdist) as outer:
        member = next(one for one in outer.getmembers() if one.name.endswith(f"{inner}.tar.gz"))
        packed = outer.extractfile(member)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as archive:
            file = archive.extractfile(f"{inner}/{name}_GroundTruth.txt")
            assert file is not None
            lines = [line.split("\t") for line in file.read().decode("utf-8", "replace").splitlines()]
    rows = [{"text": html.unescape(one[2]).strip(), "score": float(one[1])} for one in lines if len(one) > 2]
    return [row for row in rows if row["text"]]


def entity_kinds(path: Path) -> Rows:
    """Sentences of a CoNLL file with the kinds of entities that they name."""
    rows = []
    for block in path.read_text("utf-8").split("\n\n"):
        fields = [line.split("\t") for line in block.splitlines() if line.strip()]
        if fields:
            kinds = sorted({one[-1][2:] for one in fields if one[-1] != "O"})
            rows.append({"text": " ".join(one[0] for one in fields), "labels": kinds})
    return rows


def tasks(vader: Path, anem: Path) -> dict[str, tuple[Rows, Rows, dict[str, Any]]]:
    """For each task rows to train on, rows to test on, and settings."""
    tweets, reviews = rated(vader, "tweets"), rated(vader, "amazonReviewSnippets")
    steps = [{"text": row["text"], "stars": int(np.digitize(row["score"], EDGES)) + 1} for row in reviews]
    return {
        "regression": (*_split(tweets), {}),
        "ordinal": (*_split(steps), {"task": "ordinal", "label_column": "stars"}),
        "multi-label": (entity_kinds(anem / "train.conll"), entity_kinds(anem / "test.conll"), {}),
    }


def _split(rows: Rows) -> tuple[Rows, Rows]:
    """Four fifths to train, a fifth to test; equal texts stand on one side."""
    texts = sorted({row["text"] for row in rows})
    random.Random(0).shuffle(texts)
    held = set(texts[: len(texts) // 5])
    return [row for row in rows if row["text"] not in held], [row for row in rows if row["text"] in held]


# Ours


def ours(method: str, train: Rows, test: Rows, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """The scores of one technique with its defaults, and of the base."""
    from capotune.api.training import sources
    from capotune.methods import get
    from capotune.runs.run import run
    from capotune.settings import TrainSettings

    with tempfile.TemporaryDirectory() as folder:
        given = sources(train, {"test": test, "out": Path(folder) / "run", "seed": seed, "cache": False, **settings})
        record = run(TrainSettings(**given), get(method).Settings(), base_score=method == METHODS[0])
    return {"scores": record["result"]["scores"], "base": record.get("base_scores", {})}


# Peers


def features(kind: str, train: Rows, test: Rows) -> tuple[Any, Any]:
    """Of the texts, for scikit-learn."""
    texts = [[row["text"] for row in rows] for rows in (train, test)]
    if kind == "TF-IDF":
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        return words.fit_transform(texts[0]), words.transform(texts[1])
    import torch
    from transformers import AutoModel, AutoTokenizer

    from capotune.models.base import find

    folder = str(find("minilm").folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for part in texts:
        vectors = []
        with torch.no_grad():
            for start in range(0, len(part), 32):
                batch = tokenizer(part[start : start + 32], padding=True, truncation=True, return_tensors="pt")
                mask = batch["attention_mask"][..., None]
                states = model(**batch).last_hidden_state
                vectors.append(((states * mask).sum(1) / mask.sum(1)).numpy())
        found.append(np.concatenate(vectors))
    return found[0], found[1]


def peer_regression(kind: str, train: Rows, test: Rows) -> dict[str, float]:
    """RidgeCV."""
    from sklearn.linear_model import RidgeCV

    one, other = features(kind, train, test)
    fitted = RidgeCV(np.logspace(-3, 4, 15)).fit(one, [row["score"] for row in train])
    return number_scores(np.array([row["score"] for row in test]), fitted.predict(other))


def number_scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """By scikit-learn and SciPy."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, root_mean_squared_error

    return {
        "rmse": float(root_mean_squared_error(true, predicted)),
        "mae": float(mean_absolute_error(true, predicted)),
        "pearson": float(pearsonr(true, predicted)[0]),
        "spearman": float(spearmanr(true, predicted)[0]),
    }


def peer_ordinal(kind: str, train: Rows, test: Rows) -> dict[str, float]:
    """LogisticRegressionCV by the most probable label, and RidgeCV rounded to the nearest step."""
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.metrics import accuracy_score, cohen_kappa_score

    one, other = features(kind, train, test)
    true, stars = np.array([row["stars"] for row in test]), [row["stars"] for row in train]
    scores = {}
    for name, said in (
        (
            "classes",
            LogisticRegressionCV(Cs=8, cv=5, max_iter=2000, use_legacy_attributes=False).fit(one, stars).predict(other),
        ),
        ("rounded ridge", np.clip(np.rint(RidgeCV(np.logspace(-3, 4, 15)).fit(one, stars).predict(other)), 1, 5)),
    ):
        scores[name] = {
            "steps": float(np.abs(said - true).mean()),
            "kappa": float(cohen_kappa_score(true, said.astype(int), weights="quadratic")),
            "accuracy": float(accuracy_score(true, said)),
        }
    return scores


def peer_labels(kind: str, train: Rows, test: Rows) -> dict[str, float]:
    """One LogisticRegression a label, C by cross-validated F1, threshold a half."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.model_selection import GridSearchCV
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer

    one, other = features(kind, train, test)
    marks = MultiLabelBinarizer().fit([row["labels"] for row in train])
    true = marks.transform([row["labels"] for row in test])
    search = GridSearchCV(
        OneVsRestClassifier(LogisticRegression(max_iter=2000)),
        {"estimator__C": [0.1, 1, 10, 100, 1000]}, scoring="f1_micro", cv=3,
    )  # fmt: skip
    said = search.fit(one, marks.transform([row["labels"] for row in train])).predict(other)
    return {
        "micro_f1": float(f1_score(true, said, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(true, said, average="macro", zero_division=0)),
        "subset_accuracy": float((said == true).all(1).mean()),
    }


PEERS: dict[str, Callable[[str, Rows, Rows], dict[str, Any]]] = {
    "regression": peer_regression, "ordinal": peer_ordinal, "multi-label": peer_labels,
}  # fmt: skip


# Runs


def one_run(name: str, who: str, vader: Path, anem: Path, seed: int, most: int) -> dict[str, Any]:
    """What ``who`` reaches on a task, and its CPU seconds."""
    train, test, settings = tasks(vader, anem)[name]
    train, test = (random.Random(1).sample(rows, min(most, len(rows))) for rows in (train, test))
    start = time.process_time()
    found = ours(who, train, test, settings, seed) if who in METHODS else {"scores": PEERS[name](who, train, test)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.process_time() - start
    return {"task": name, "who": who, "train_rows": len(train), "test_rows": len(test), "seed": seed, **found,
            "cpu_seconds": seconds, "peak_bytes": peak}  # fmt: skip


def main() -> None:
    """Run what is asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vader", type=Path, required=True)
    parser.add_argument("--anem", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(PEERS))
    parser.add_argument("--who", nargs="+", default=["TF-IDF", "frozen", *METHODS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1_000_000, help="at most so many to train on, and to test on")
    parser.add_argument("--here", action="store_true", help="in this process, printing the result")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(one_run(given.tasks[0], given.who[0], given.vader, given.anem, given.seed, given.rows)))
        return
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    for name in given.tasks:
        for who in given.who:
            shared = ["--vader", given.vader, "--anem", given.anem, "--seed", given.seed, "--rows", given.rows]
            command = [sys.executable, __file__, *shared, "--tasks", name, "--who", who, "--here"]
            said = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
            found = json.loads(said.splitlines()[-1])
            results.append(found)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            print(name, who, found["scores"], f"{found['cpu_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
