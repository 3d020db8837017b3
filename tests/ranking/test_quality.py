import dataclasses
import itertools
import random

import numpy as np
import pytest
import scipy.stats

from kdnas.ranking.quality import BenchmarkRow, canonical_rows, groups, quality, read_table
from kdnas.tables import load_space

TOY = load_space("toy").fitted(classes=3, image_channels=3)
MACRO = load_space("nas_bench_macro")


def row(code, truth, space=TOY, **changes):
    made = BenchmarkRow(code, space.parse(code), truth, 10, 20, 2, 1)
    return dataclasses.replace(made, **changes)


def non_minimal(architecture):
    return sum(option != "identity" for option in architecture.values())


def rows_of(num, seed=0):
    """Different networks with random truths and sizes."""
    rng = random.Random(seed)
    chosen = rng.sample(list(MACRO.all()), num)
    return [
        BenchmarkRow(
            MACRO.code(a),
            a,
            rng.gauss(0, 1),
            rng.randint(1, 9),
            rng.randint(1, 10**6),
            rng.randint(5, 8),
            non_minimal(a),
        )
        for a in chosen
    ]


def test_every_group_has_scipys_numbers():
    rows = rows_of(150)
    scores = np.array([r.truth for r in rows]) + np.random.default_rng(0).normal(size=150)
    found = quality({"mine": scores.tolist()}, rows, resamples=50)
    for name, held in groups(rows).items():
        truths, mine = np.array([rows[i].truth for i in held]), scores[held]
        shown = found["groups"][name]["scores"]["mine"]
        value, low, high = shown["tau"]
        assert value == pytest.approx(scipy.stats.kendalltau(mine, truths).statistic)
        assert low < value < high
        assert shown["rho"][0] == pytest.approx(scipy.stats.spearmanr(mine, truths).statistic)
        macs = [rows[i].macs for i in held]
        gap = value - scipy.stats.kendalltau(macs, truths).statistic
        assert shown["tau - macs"][0] == pytest.approx(gap)
    layers = {n: len(h) for n, h in groups(rows).items() if n.startswith("layers")}
    taus = [found["groups"][n]["scores"]["mine"]["tau"][0] for n in layers]
    pairs = [n * (n - 1) / 2 for n in layers.values()]
    assert found["within"]["layers"]["mine"][0] == pytest.approx(np.average(taus, weights=pairs))


def test_the_interval_has_the_width_that_theory_gives():
    rng = np.random.default_rng(0)
    rows = rows_of(400)
    found = quality({"noise": rng.normal(size=400).tolist()}, rows, resamples=400)
    value, low, high = found["groups"]["all"]["scores"]["noise"]["tau"]
    # Independent rankings: variance 2 (2 n + 5) / (9 n (n - 1)).
    spread = (2 * (2 * 400 + 5) / (9 * 400 * 399)) ** 0.5
    assert abs(value) < 3.5 * spread
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1.0, abs=0.15)


def test_groups_are_parts_of_the_distinct_networks():
    codes = ["00000012", "00000102", "00000002", "00000020"]  # the last two are one network: identities commute
    rows = [row(c, 1.0, MACRO) for c in codes] + [r for r in rows_of(130) if r.non_minimal > 2][:120]
    found = groups(rows)
    canonical = canonical_rows(rows)
    assert len(canonical) == len({r.architecture for r in rows}) == 123
    assert [i for i in canonical if i < 4] == [0, 1, 2]
    assert len(found["all"]) == 124
    bands = [found[f"macs {i}/5"] for i in range(1, 6)]
    assert sorted(i for band in bands for i in band) == sorted(canonical)
    edges = [(min(rows[i].macs for i in band), max(rows[i].macs for i in band)) for band in bands]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(edges))
    worst = min(rows[i].truth for i in found["top tenth"])
    assert len(found["top tenth"]) == 13
    assert all(rows[i].truth <= worst for i in set(canonical) - set(found["top tenth"]))
    for name in ("layers 5", "layers 6"):
        assert {rows[i].layers for i in found[name]} == {int(name[-1])}


def test_a_score_that_is_size_gains_nothing_over_size():
    rows = rows_of(60)
    found = quality({"mine": [float(r.macs) for r in rows]}, rows, resamples=20)
    assert found["groups"]["all"]["scores"]["mine"]["tau - macs"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"macs": [1.0] * 12}, "a control"),
        ({"mine": [1.0]}, "1 numbers for 12 rows"),
        ({"mine": [1.0] * 11 + [float("nan")]}, "not finite for"),
    ],
)
def test_scores_that_cannot_rank_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        quality(scores, rows_of(12), resamples=2)


def write(path, header, lines):
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


CODES = [TOY.code(a) for a in TOY.all()][:12]


def test_a_table_is_read_by_its_arch_column_or_its_first(tmp_path):
    with_arch = write(tmp_path / "a.csv", "place,arch,acc", [f"{i},{c},{50 + i}" for i, c in enumerate(CODES)])
    first = write(tmp_path / "b.csv", "code,acc", [f"{c},{50 + i}" for i, c in enumerate(CODES)])
    rows = read_table(with_arch, TOY, "acc")
    assert rows == read_table(first, TOY, "acc")
    assert [r.code for r in rows] == CODES
    assert rows[3].truth == 53.0
    smallest = rows[CODES.index(TOY.code(TOY.smallest))]
    assert smallest.non_minimal == 0 and smallest.layers == 2
    assert max(r.non_minimal for r in rows) >= 1


def test_size_is_exact_whatever_the_table_says(tmp_path):
    codes = ["00000000", "22222222", "02012100", "22212220"] * 3
    path = write(tmp_path / "t.csv", "arch,mean_acc,params,macs", [f"{c},90,1,1" for c in codes])
    rows = read_table(path, MACRO, "mean_acc")
    assert [(r.params, r.macs) for r in rows[:4]] == [
        (387_882, 7_713_280),
        (2_932_586, 105_660_928),
        (890_666, 47_327_744),
        (1_985_514, 85_164_544),
    ]
    assert [r.non_minimal for r in rows[:4]] == [0, 8, 4, 7]


@pytest.mark.parametrize(
    ("header", "first", "message"),
    [
        ("arch,mean_ac", f"{CODES[0]},1", "Did you mean 'mean_ac'"),
        ("arch,mean_acc", "9999,1", r"line 2: column 'arch' must be a code of toy, got '9999'"),
        ("arch,mean_acc", f"{CODES[0]},many", "finite number, got 'many'"),
        ("arch,mean_acc", f"{CODES[0]},nan", "finite number, got 'nan'"),
        ("arch,mean_acc", f"{CODES[0]}", "finite number, got None"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(tmp_path, header, first, message):
    path = write(tmp_path / "t.csv", header, [first, *(f"{c},1" for c in CODES)])
    with pytest.raises(ValueError, match=message):
        read_table(path, TOY, "mean_acc")


def test_a_missing_file_and_too_few_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_table(tmp_path / "none.csv", TOY, "mean_acc")
    with pytest.raises(ValueError, match="at least 10 rows, got 2"):
        read_table(write(tmp_path / "t.csv", "arch,mean_acc", [f"{c},1" for c in CODES[:2]]), TOY, "mean_acc")


@pytest.mark.parametrize(
    "content",
    [
        b"arch,mean_acc\n\0,1\n",
        b"arch,mean_acc\n\xe9,1\n",
        b"arch,mean_acc\n" + b'"' + b"x" * 200_000 + b'",1\n',
        b"arch,mean_acc\n" + b"x" * 5000 + b",1\n",
        b"arch,mean_acc\n000000," + b"9" * 5000 + b"\n",
        b"arch,acc\x1b[2J\n0,1\n",
        b"arch,mean_acc\n\x1b[2J,1\n",
        b"",
    ],
)
def test_a_damaged_table_is_refused_in_one_short_printable_sentence(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        read_table(tmp_path / "t.csv", TOY, "mean_acc")
    assert len(str(refusal.value)) < 500 and str(refusal.value).isprintable()
